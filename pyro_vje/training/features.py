"""What a frozen encoder makes of the images, once: the head then trains on these numbers in seconds."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, derive_seed
from pyro_vje.model import VJE, Whitening
from pyro_vje.model.build import build_head
from pyro_vje.model.encoding import cpu_rows
from pyro_vje.progress import Progress
from pyro_vje.runs.files import read_json, write_json
from pyro_vje.runs.folder import RunInfo
from pyro_vje.training.module import QUIET, Pretraining, quiet_lightning

ROWS = 32
"""Images at once; their views are drawn from a seed of these rows, so that a resumed cache is the same."""
SAVE_EVERY = 8  # of these steps, between notes of how far the cache is


def cache_features(
    vje: VJE, images: ImageSet, info: RunInfo, folder: Path, device: str = "cpu", *, bf16: bool = False
) -> tuple[Tensor, ImageSet]:
    """Features ``(N, 1 + feature_views, feature_dim)`` of the clean image and augmented views, and whose they are.

    They are written to ``folder/features.npy`` as they are made, `ROWS` images at a time, and mapped into memory; an
    interrupted cache goes on where it was. Images that cannot be decoded are left out of both. With ``bf16`` the
    augmented views are encoded in bfloat16 autocast; clean images never are, as they are compared with scored ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, state, seed = folder / "features.npy", folder / "features.json", info.config.seed
    augmented, view, views = info.config.feature_views, info.view, info.views
    digest = hashlib.sha256()
    for name, tensor in vje.encoder.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    made = [images.fingerprint(), digest.hexdigest(), augmented, seed, info.view_size, info.fit, bf16]
    before: dict[str, Any] = read_json(state, dict) if state.is_file() and path.is_file() else {}
    done, good = 0, torch.zeros(len(images), dtype=torch.bool)
    if before.get("made") == made:
        array = np.lib.format.open_memmap(path, mode="r+")
        done, good[before["good"]] = before["done"], True
    else:
        shape = (len(images), 1 + augmented, vje.feature_dim)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    vje.eval()
    at_once = cpu_rows(info.view_size) if device == "cpu" else ROWS

    @torch.no_grad()
    def look(part: Tensor, generator: torch.Generator) -> Tensor:
        found = [vje.features(view(part))]
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found += [vje.features(views.one(part, generator)) for _ in range(augmented)]
        return torch.stack(found, 1).cpu()

    count = int(good.sum())
    progress = Progress("looking at the images to learn from", len(images) - done)
    for start in range(done, len(images), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(images)))
        generator = torch.Generator(device).manual_seed(derive_seed("features", seed, start))
        for index, batch in images.select(rows).batches(ROWS):
            found = [look(part, generator) for part in batch.to(device).split(at_once)]
            array[count : count + len(index)] = torch.cat(found).numpy()
            good[rows[index]], count = True, count + len(index)
        end = int(rows[-1]) + 1
        if (start // ROWS + 1) % SAVE_EVERY == 0 or end == len(images):
            array.flush()
            write_json(state, {"made": made, "done": end, "good": good.nonzero().flatten().tolist()})
        progress.add(len(rows))
    return torch.from_numpy(array[:count]), images if count == len(images) else images.select(good)


def fit_whitening(vje: VJE, features: Tensor) -> None:
    """Take the projector's whitening from the clean images' features ``(N, feature_dim)``, if it is one."""
    if isinstance(vje.projector, Whitening):
        vje.projector.fit(features)


def fit_head(config: TrainConfig, features: Tensor) -> VJE:
    """A head of features, trained on ``(N, V, F)`` of V views of each of N: its whitening takes the first view's."""
    head = build_head(config, features.shape[-1])
    fit_whitening(head, features[:, 0])
    with quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=config.epochs, devices=1, logger=False, enable_checkpointing=False, **QUIET
        )
        trainer.fit(Pretraining(head, config, features))
    del trainer
    head.zero_grad()
    gc.collect()  # the trainer is a ring of references, and holds the optimiser's state until then
    return head.cpu().eval()


def fit_folds(config: TrainConfig, features: Tensor) -> tuple[Tensor, list[VJE]]:
    """The fold ``(N,)`` of each image, and for each fold a head, of features, that has not seen it.

    Whitening and posterior network of a head are fitted to the other folds of `cache_features`' ``(N, V, F)``.
    """
    generator = torch.Generator().manual_seed(derive_seed("folds", config.seed))
    fold = torch.randperm(len(features), generator=generator) % config.folds
    heads, progress = [], Progress("learning without a part of the images", config.folds, "parts")
    for k in range(config.folds):
        rest = features[fold != k]
        # Half the epochs cost an AUROC of 0.002 on tiles and screws, and the heads of folds are most of the waiting.
        epochs, batch_size = -(-(config.epochs or 1) // 2), min(config.batch_size or 0, len(rest))
        settings = dataclasses.replace(config, batch_size=batch_size, epochs=epochs)
        heads.append(fit_head(settings, rest))
        progress.add(1)
    return fold, heads
