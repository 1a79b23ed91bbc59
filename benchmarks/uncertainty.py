"""``python -m benchmarks.uncertainty RUN...``: what the posterior's variance knows, beside other measures of doubt.

Of each measure: R-AUROC, whether it finds the test images whose nearest training image is of another class; and
how it answers to what is known to make an image less certain, crops and blur (as in URL, Kirchhof et al. 2023,
arXiv 2307.03810): the mean rank correlation, within an image, with the share of its area cut off or the width of
the blur, and the share of images of which the smallest crop, or the widest blur, is less certain than the whole.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from pyro_vje.data import ImageSet, Recipe, TwoViews, derive_seed
from pyro_vje.data.splits import evenly_spread, reference_images
from pyro_vje.metrics import knn_predict, r_auroc
from pyro_vje.model import Encoded, encode
from pyro_vje.model.build import build_model
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import LoadedRun, load_run, load_split, training_images

AREAS = (1.0, 0.75, 0.5, 0.25, 0.1)
SIGMAS = (0.1, 0.5, 1.0, 2.0)  # pixels
VIEWS = 8
STILL = Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0)
"""Of a view that is the whole image."""

OF_ONE: dict[str, Callable[[Encoded], Tensor]] = {
    "mean variance": lambda x: x.scale.square().mean(-1),
    "mean log variance": lambda x: x.scale.log().mean(-1),
    "noise to signal": lambda x: x.scale.norm(dim=-1) / x.loc.norm(dim=-1),
    "shortness of the embedding": lambda x: -x.embeddings.norm(dim=-1),
}
"""Measures of doubt from one pass over an image, ``(N,)``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the runs that the command line names, and one untrained model."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.uncertainty", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, on labelled images")
    parser.add_argument("--images", type=int, default=2000, help="test images, evenly spread")
    parser.add_argument("--data", required=True, help="what the images are, in words")
    parser.add_argument("--commit", help="of the runs, where it is no longer the one checked out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.uncertainty", *arguments])
    about = describe(command, Settings(False, torch.get_num_threads(), "32-true"))
    runs = [load_run(path, trust_plugins=True) for path in options.runs]
    config = runs[0].info.config
    untrained = LoadedRun(build_model(config, runs[0].info.view_size).eval(), runs[0].info, runs[0].folder)
    rows = [
        {"of": of, "config": run.info.config.to_dict(), "train_images": run.info.train_images, **row}
        for of, run in [*(("trained", run) for run in runs), ("untrained", untrained)]
        for row in measure(run, options.images)
    ]
    about["commit"] = options.commit or about["commit"]
    write_json(options.out, {**about, "rows": rows, "data": options.data})


def measure(run: LoadedRun, count: int) -> list[dict[str, Any]]:
    """A row for each measure."""
    info, vje = run.info, run.vje
    test = load_split(run, "test", None, None).labelled()
    test = test.select(evenly_spread(len(test), count))
    train = reference_images(training_images(run, "neighbours are training images")[0], info.config.seed)
    near, clean = (encode(vje, images, info.view) for images in (train, test))
    predicted = knn_predict(near.features, train.labels_at(near.indices), clean.features, k=1)
    correct = predicted.cpu() == test.labels_at(clean.indices)
    drawn = viewed(run, test, info.views.recipe, VIEWS)
    directions = normalize(torch.stack([x.embeddings for x in drawn]), dim=-1)
    doubts: dict[str, Any] = {name: (of(clean), of) for name, of in OF_ONE.items()}
    doubts["mean variance, mean of 8 views"] = (torch.stack([OF_ONE["mean variance"](x) for x in drawn]).mean(0), None)
    doubts["spread of 8 views' directions"] = (1 - directions.mean(0).norm(dim=-1), None)
    crops = [viewed(run, test, replace(STILL, scale=(area, area)))[0] for area in AREAS]
    blurs = [viewed(run, test, replace(STILL, blur=1.0, sigma=(s, s)))[0] for s in SIGMAS]
    return [
        {"doubt": name, "r_auroc": r_auroc(correct, doubt), "recall_at_1": correct.double().mean().item()}
        | (answer(of, crops, "crop") | answer(of, blurs, "blur") if of else {})
        for name, (doubt, of) in doubts.items()
    ]


def viewed(run: LoadedRun, images: ImageSet, recipe: Recipe, count: int = 1) -> list[Encoded]:
    """So many views of each image by a recipe, encoded."""
    info = run.info
    views = TwoViews(info.view_size, recipe, info.mean, info.std)
    generator = torch.Generator().manual_seed(derive_seed("uncertainty", info.config.seed))
    return [encode(run.vje, images, lambda batch: views.one(batch, generator)) for _ in range(count)]


def answer(of: Callable[[Encoded], Tensor], levels: Sequence[Encoded], name: str) -> dict[str, float]:
    """How a measure follows levels of what was done to the images, from the least."""
    doubts = torch.stack([of(level) for level in levels], 1).double().numpy()
    ranks = doubts.argsort(1).argsort(1)
    correlation = np.mean([spearmanr(np.arange(len(levels)), row).statistic for row in ranks])
    return {f"{name}_correlation": float(correlation), f"{name}_above": float((doubts[:, -1] > doubts[:, 0]).mean())}


if __name__ == "__main__":
    main()
