"""``python -m benchmarks.frozen FOLDER ...``: what the numbers of a frozen network depend on, and its false alarms.

For each folder of images (``train/`` and ``test/``; normal is the class ``good``, or each class in turn) and each
combination of the settings on the command line: AUROC of `aggregate`, of the same with one variance for all kernels, of
classical scores on the same features; with ``--false-alarms`` how many held-out normal images have a p-value of at
most 0.05 by the folds that `inspect` calibrates with. Features are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from pyro_vje import VJE, TrainConfig
from pyro_vje.anomaly.detectors import kernel_density, mahalanobis, nearest_neighbour
from pyro_vje.anomaly.judge import cross_calibration
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import get_score
from pyro_vje.data import load_dataset
from pyro_vje.model import encode, encode_features, whitened_dim
from pyro_vje.model.build import build_model
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import decoded_as, describe_run
from pyro_vje.training.features import cache_features, fit_folds, fit_head
from pyro_vje.training.run import choose_precision

ENCODER, ALPHA = "timm:tf_efficientnet_lite0", 0.05
AXES = {"fit": str, "image_size": int, "feature_views": int, "precision": str, "embedding_dim": int}
"""Settings of `TrainConfig` that the command line gives one or several values of."""


def features_of(config: TrainConfig, cache: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Features ``(N, 1 + views, F)`` of the training images, clean ones of the test images, labels of both, classes."""
    how = f"{config.fit}-{config.image_size}-{config.feature_views}-{config.precision}"
    path = cache / f"{Path(str(config.data_dir)).name}-{how}.pt"
    if path.is_file():
        return torch.load(path)
    size, interpolation = decoded_as(config)
    train, test = (
        load_dataset(
            "folder", config.data_dir, split, image_size=size, interpolation=interpolation, fit=config.fit or "crop"
        )
        for split in ("train", "test")
    )
    info = describe_run(config, train)
    vje = build_model(config, info.view_size, weights=config.weights).eval()
    bf16 = choose_precision(config.precision) == "bf16-mixed"
    drawn, train = cache_features(vje, train, info, path.with_suffix(""), bf16=bf16)
    clean = encode(vje, test, info.view)
    labels = {"train": train.labels_at(torch.arange(len(train))), "test": test.labels_at(clean.indices)}
    torch.save(({"train": drawn.clone(), "test": clean.features}, {**labels, "classes": train.classes}), path)
    return features_of(config, cache)


def measure(config: TrainConfig, train: Tensor, test: Tensor, strange: Tensor, folds: bool) -> dict[str, Any]:
    """AUROC by score, and false alarms among the normal test images."""
    config = config.fitted(len(train))
    config = dataclasses.replace(config, embedding_dim=config.embedding_dim or whitened_dim(train[:, 0]))
    head = fit_head(config, train)
    reference, scored = encode_features(head, train[:, 0]), encode_features(head, test)
    one = reference._replace(scale=reference.scale.square().mean().sqrt().expand_as(reference.scale))
    found: dict[str, Any] = {"directions": head.embedding_dim}
    for name, kernels in (("aggregate", reference), ("one variance", one)):
        scorer = Scorer(head, reference=kernels)
        score = torch.cat([get_score("aggregate")(scorer.parts(part)) for part in scored.split(256)])
        found[name] = float(roc_auc_score(strange, score))
    for name, detector in (("Mahalanobis", mahalanobis), ("k-NN 1", nearest_neighbour), ("KDE", kernel_density)):
        fitted = detector(train[:, 0], k=1) if name == "k-NN 1" else detector(train[:, 0])
        found[name] = float(roc_auc_score(strange, fitted(test)))
    if folds:
        scorer = Scorer(head, reference=reference)
        normal = encode_features(head, test[~strange])
        known = cross_calibration("aggregate", *_folds(config, train), scorer)
        scores = scorer.scores("aggregate", normal).cpu().numpy()
        p_values = known.p_values(scores, normal.features)
        found |= {"alarms": int((p_values <= ALPHA).sum()), "normal": len(p_values)}
    return found


def _folds(config: TrainConfig, train: Tensor) -> tuple[Tensor, Tensor, list[VJE]]:
    fold, heads = fit_folds(config, train)
    return fold, train[:, 0], heads


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the folders that the command line names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frozen", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    defaults = {"fit": ["crop"], "image_size": [128], "feature_views": [2], "precision": ["auto"]}
    for name, kind in AXES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, nargs="+", type=kind, default=defaults.get(name, [None]))
    parser.add_argument("--classes", nargs="+", help="normal ones [default: good, or all in turn]")
    parser.add_argument("--false-alarms", action="store_true")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    settings = Settings(False, torch.get_num_threads(), choose_precision("auto"))
    about = describe(shlex.join(["python", "-m", "benchmarks.frozen", *arguments]), settings)
    rows: list[dict[str, Any]] = []
    for folder in options.folders:
        for values in itertools.product(*(getattr(options, name) for name in AXES)):
            how = dict(zip(AXES, values, strict=True))
            config = TrainConfig("folder", str(folder), encoder=ENCODER, weights="default", **how).resolved()
            features, data = features_of(config, options.cache)
            names = list(data["classes"])
            known = options.classes or (["good"] if "good" in names else names)
            for name in known:
                normal = names.index(name)
                train = features["train"][data["train"] == normal]
                strange = data["test"] != normal
                found = measure(config, train, features["test"], strange, options.false_alarms)
                rows.append({"data": folder.name, "class": name, "images": len(train), "seed": 0, **how, **found})
                print(json.dumps(rows[-1]), flush=True)
                write_json(options.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
