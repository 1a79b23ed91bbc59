"""Published protocols of anomaly detection: one class against the others, and one data set against others.

All scores of the package stand beside cheap detectors on features and pixels (`pyro_vje.experiments.baselines`), with
the same normal images, those that the run trained on and keeps as its reference. A folder of inspection images is one
more case of the first: normal images in ``train/good`` and ``test/good``, defective ones in other folders of ``test/``.
The folder of results is one of cells (`pyro_vje.experiments.cells`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.data.splits import reference_images
from pyro_vje.experiments.baselines import DETECTORS
from pyro_vje.experiments.cells import NO_NUMBER, Cell, Cells, Comparison
from pyro_vje.model.encoding import encode
from pyro_vje.representation.evaluation import pixels
from pyro_vje.runs.folder import (
    REFERENCE,
    LoadedRun,
    build_model,
    default_device,
    load_posteriors,
    load_run,
    load_split,
    training_images,
)

BATCH = 256
KNN = ("k-NN 1", "k-NN 50")
"""What the controls (untrained encoder, raw pixels) are judged by."""

Scores = dict[tuple[str, str], Tensor]
"""Anomaly scores ``(N,)`` by (score, what it looks at)."""


def all_scores(
    run: LoadedRun, normal: ImageSet, sets: Sequence[ImageSet], *, likelihoods: Sequence[str] = ()
) -> list[Scores]:
    """Every score and every detector on every set of images, one pass of each encoder an image.

    Detectors are fitted on ``normal`` images, those of the run's reference; ``likelihoods`` are families to score with,
    beside the one that was trained.
    """
    view, config, device = run.info.view, run.info.config, next(run.vje.parameters()).device
    untrained = build_model(config, run.info.view_size).to(device).eval()
    trained, plain = (
        [encode(vje, images, view, batch_size=BATCH, device=device) for images in (normal, *sets)]
        for vje in (run.vje, untrained)
    )
    found: list[Scores] = [{} for _ in sets]
    reference = load_posteriors(run, REFERENCE)
    for family in (config.likelihood, *likelihoods):
        scorer = Scorer(run.vje, reference=reference, likelihood=family, kl_weight=config.kl_weight)
        for scores, images in zip(found, trained[1:], strict=True):
            parts = [scorer.parts(part) for part in images.posteriors.split(BATCH)]
            for name, score in SCORES.items():
                values = torch.cat([score(part) for part in parts]).cpu()
                on = f"likelihood {family}" if score.of == "likelihood" else score.of
                if values.isfinite().all():  # not every family splits direction and radius
                    scores.setdefault((name, on), values)
    features = {
        "trained features": [images.features for images in trained],
        "untrained features": [images.features for images in plain],
        "raw pixels": [pixels(images, view)[1] for images in (normal, *sets)],
    }
    for on, (train, *tests) in features.items():
        for name in DETECTORS if on == "trained features" else KNN:
            fitted = DETECTORS[name](train)
            for scores, test in zip(found, tests, strict=True):
                scores[name, on] = torch.cat([fitted(part) for part in test.split(BATCH)])
    return found


def one_class(
    base: TrainConfig,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    likelihoods: Sequence[str] = (),
) -> Comparison:
    """Train on one class's training images, score all test images; every class, every seed.

    Finished cells are not run again, and an interrupted one goes on from its checkpoint. One that diverges, or has too
    few images, becomes a line that says so; a failed one is tried again by the next call.

    Parameters
    ----------
    base : TrainConfig
        Settings; ``normal_class`` and ``seed`` are set by the protocol.
    out : path
        The folder, new or of this protocol with the same settings.
    classes : sequence of str
        Normal classes; by default all that there are training images of.
    seeds : sequence of int
        Training seeds.
    likelihoods : sequence of str
        Families to score with, beside the one that was trained.

    Raises
    ------
    ValueError
        If the data have no labels, there is no such class, or no seed.
    FileExistsError
        If ``out`` holds something else, or cells of other settings.
    """
    if not seeds:
        raise ValueError("seeds must name at least one, not none")
    where: dict[str, Any] = {"image_size": base.image_size, "download": base.download, "residency": "stream"}
    train, test = (
        load_dataset(base.dataset, base.data_dir, split, **where).labelled() for split in ("train", "test")
    )
    present = train.labels_at(torch.arange(len(train))).unique().tolist()
    labels = [train.class_index(name) for name in classes] or present
    names = [(train.classes or ())[label] for label in labels]
    for name in names:
        train.of_class(name)
        test.class_index(name)
    axes = ("normal_class", "seed")
    fixed = base.resolved().to_dict()
    settings = {name: value for name, value in fixed.items() if name not in (*axes, *NO_NUMBER)}
    cells = Cells(Path(out), "table", {"protocol": "one-class", **settings}, axes)
    configs = {
        f"{name.replace(os.sep, '-')}_seed-{seed}": dataclasses.replace(base, normal_class=name, seed=seed)
        for seed in seeds
        for name in names
    }

    def measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
        run = load_run(folder, trust_plugins=True, device=default_device())
        train_set, _ = training_images(run)
        images = load_split(run, "test", None, None, download=config.download).labelled()
        normal = images.class_index(config.normal_class or "")
        is_anomaly = images.labels_at(torch.arange(len(images))) != normal
        reference = reference_images(train_set, config.seed)
        (found,) = all_scores(run, reference, [images], likelihoods=likelihoods)
        return {"scores": _judge(found, is_anomaly, normal=config.normal_class, seed=config.seed)}

    return cells.run(configs, measure, _tabulate)


def ood(
    ckpt: str | Path,
    outside: Mapping[str, tuple[str, str | None]],
    out: str | Path,
    *,
    likelihoods: Sequence[str] = (),
    trust_plugins: bool = False,
) -> Comparison:
    """Score a run's own test images against those of other data sets.

    Parameters
    ----------
    ckpt : path
        A run folder; its data set is the normal one.
    outside : mapping of str to (data set, data_dir)
        The other data sets by the names they have in the table; of each the test split, or a folder of images whole.
    out : path
        The folder for the tables.
    likelihoods : sequence of str
        Families to score with, beside the one that was trained.

    Raises
    ------
    ValueError, FileNotFoundError
        If the run or the data are unusable.
    FileExistsError
        If ``out`` holds something else.
    """
    run = load_run(ckpt, trust_plugins=trust_plugins, device=default_device())
    config = dataclasses.replace(run.info.config, image_size=run.info.image_size)
    cells = Cells(Path(out), "table", {"protocol": "ood", "run": str(ckpt), "config": config.to_dict()}, ())
    done = {cell.name for cell in cells.read()}
    todo = {name: place for name, place in outside.items() if name not in done}
    if todo:
        train_set, _ = training_images(run)
        inside = load_split(run, "test", None, None, download=config.download)
        if config.normal_class is not None:
            inside = inside.of_class(config.normal_class)
        splits = ("all" if kind == "folder" else "test" for kind, _ in todo.values())
        others = [load_split(run, split, *place) for split, place in zip(splits, todo.values(), strict=True)]
        normal = reference_images(train_set, config.seed)
        own, *theirs = all_scores(run, normal, [inside, *others], likelihoods=likelihoods)
        cells.summarise(_tabulate)
        for name, scores in zip(todo, theirs, strict=True):
            joined = {key: torch.cat([own[key], scores[key]]) for key in own if key in scores}
            counts = torch.tensor([len(next(iter(values.values()))) for values in (own, scores)])
            is_anomaly = torch.tensor([False, True]).repeat_interleave(counts)
            rows = _judge(joined, is_anomaly, normal=f"against {name}", seed=config.seed)
            cells.write(Cell(name, config, "finished", None, scores=rows))
    return cells.summarise(_tabulate)


def _judge(scores: Scores, is_anomaly: Tensor, **cell: Any) -> list[dict[str, Any]]:
    cell |= {"normal_images": int((~is_anomaly).sum()), "anomalies": int(is_anomaly.sum())}
    return [
        {**cell, "score": name, "on": on, "forward_passes": 0 if on == "raw pixels" else 1}
        | metrics.detection_metrics(values, is_anomaly)
        for (name, on), values in scores.items()
    ]


# Table ----------------------------------------------------------------------------------------------------------------


def compare_scores(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """AUROC (anomalies positive) of each score: a column for each normal class, and their mean, the best marked.

    A column is the mean over seeds; behind ± of the mean stands its standard deviation over seeds. The 95 % interval is
    that of the mean, from the intervals of the cells, as if each had test images of its own.
    """
    if not rows:
        return pd.DataFrame(columns=["score", "on", "mean", "95 %"])
    frame, key = pd.DataFrame(rows), ["score", "on"]
    low, high = np.array(frame["auroc_95"].tolist()).T
    by = frame.assign(squares=((high - low) / 2) ** 2).groupby(key, sort=False)
    columns = list(dict.fromkeys(frame["normal"]))
    classes = frame.pivot_table("auroc", key, "normal").loc[list(by.groups), columns]
    entries = classes.map("{:.3f}".format).where(classes.notna(), "")
    table = entries.mask(classes == classes.max(), "*" + entries)
    means = classes.mean(axis=1)
    deviations = frame.groupby([*key, "seed"])["auroc"].mean().groupby(level=key).std()
    spreads = deviations.map(lambda value: "" if np.isnan(value) else f" ± {value:.3f}")
    table["mean"] = means.map("{:.3f}".format) + spreads
    table.loc[means == means.max(), "mean"] = "*" + table["mean"]
    table["95 %"] = (by["squares"].sum() ** 0.5 / by.size()).map("± {:.3f}".format)
    return table.reset_index()


def _tabulate(cells: list[Cell]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    rows = [row for cell in cells for row in cell.scores]
    frame = pd.DataFrame(rows)
    if rows:
        frame[["auroc_low", "auroc_high"]] = frame.pop("auroc_95").tolist()
    notes = [
        "AUROC, anomalies positive, the best in bold: means over seeds; ± behind the mean is the standard deviation "
        "over seeds, in the last column the 95 % interval of the mean over images"
    ]
    notes += [f"{cell.name}: {cell.status}: {cell.error}" for cell in cells if cell.status != "finished"]
    return frame, compare_scores(rows), notes
