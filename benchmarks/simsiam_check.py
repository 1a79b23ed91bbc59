"""``python -m benchmarks.simsiam_check``: lightly's SimSiam on the data, views and budget of our control.

The control (`benchmarks.controls.simsiam`) is VJE's networks under SimSiam's loss. This trains lightly's own heads and
loss, with lightly's published settings for CIFAR-10 (learning rate 0.06 for 128 images, weight decay 5e-4, cosine), on
the same encoder, so that a control that is weak by a mistake of ours would show beside it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from benchmarks.rivals import SimSiam
from pyro_vje import VJE, TrainConfig
from pyro_vje.data import load_dataset, make_loader, views_for
from pyro_vje.data.splits import load_train_set
from pyro_vje.model.encoders import build_encoder, feature_dim
from pyro_vje.representation.evaluation import probe
from pyro_vje.runs.files import write_json

LR, DECAY = 0.06 / 128, 5e-4
SIZE, BATCH = 32, 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate the seeds that the command line names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simsiam_check", description=__doc__)
    parser.add_argument("--data-dir", required=True, help="images in train/<class>/ and test/<class>/")
    parser.add_argument("--data", required=True, help="what the images are, in words")
    parser.add_argument("--encoder", default="resnet-small")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.simsiam_check", *arguments])
    about = describe(command, Settings(False, torch.get_num_threads(), "32-true"))
    cells = []
    for seed in options.seed:
        cells.append(cell(options.data_dir, options.encoder, options.epochs, seed))
        print(f"seed {seed}: {cells[-1]['measures']}", file=sys.stderr)
        write_json(options.out, {**about, "cells": cells, "data": options.data})


def cell(data_dir: str, encoder_name: str, epochs: int, seed: int) -> dict[str, Any]:
    """One run, in the form of an ablation's."""
    config = TrainConfig(dataset="folder", data_dir=data_dir, image_size=SIZE, epochs=epochs, seed=seed)
    train_set, _ = load_train_set(config.resolved())  # without the images held out, as in the control's runs
    views, clean = views_for("folder", SIZE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    encoder = build_encoder(encoder_name, SIZE).to(memory_format=torch.channels_last)
    dim = feature_dim(encoder, SIZE)
    method = SimSiam(encoder, dim).to(device)
    loader = make_loader(train_set, BATCH, "memory", seed=seed, device=device)
    optimizer = torch.optim.SGD(method.parameters(), lr=LR * BATCH, momentum=0.9, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    generator = torch.Generator(device).manual_seed(seed)
    start = time.perf_counter()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        for images, _ in loader:
            loss = method(views(images, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - start
    splits = (load_dataset("folder", data_dir, split, image_size=SIZE) for split in ("train", "test"))
    found, _ = probe(VJE(encoder, dim).to(device), clean, *splits)
    measures = {"loss": loss.item(), "knn": found["knn"], "linear": found["linear"], "seconds": seconds}
    settings = {"encoder": encoder_name, "epochs": epochs, "batch_size": BATCH, "lr": LR * BATCH, "seed": seed}
    return {"config": {**settings, "weight_decay": DECAY}, "status": "finished", "measures": measures}


if __name__ == "__main__":
    main()
