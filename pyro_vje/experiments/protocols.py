"""Published protocols of anomaly detection: one class against the others, and one data set against others.

All scores of the package stand beside cheap detectors on features and pixels (`pyro_vje.experiments.baselines`), with
the same normal images, the run's reference. Inspection images are one more case of the first: normal ones in
``train/good`` and ``test/good``, defective ones in other folders of ``test/``. Results are in a folder of cells.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from pyro_vje.experiments.cells import Cell, Cells, Comparison, Table
from pyro_vje.model.encoding import encode
from pyro_vje.representation.evaluation import pixels
from pyro_vje.runs import folder as runs

BATCH = 256
KNN = ("k-NN 1", "k-NN 50")
"""What the controls (untrained encoder, raw pixels) are judged by."""
Names = Sequence[str]
Seeds = Sequence[int]
Scores = dict[tuple[str, str], Tensor]
"""Anomaly scores ``(N,)`` by (score, what it looks at)."""


def all_scores(run: runs.LoadedRun, sets: Sequence[ImageSet], *, likelihoods: Names = ()) -> list[Scores]:
    """Every score (by the trained likelihood and the others named) and every detector on every set of images.

    Detectors are fitted on the run's reference images; each encoder sees an image once.
    """
    view, config, device = run.info.view, run.info.config, next(run.vje.parameters()).device
    sets = [reference_images(runs.training_images(run)[0], config.seed), *sets]
    untrained = runs.build_model(config, run.info.view_size).to(device).eval()
    trained, plain = ([encode(vje, x, view, device=device) for x in sets] for vje in (run.vje, untrained))
    found: list[Scores] = [{} for _ in sets[1:]]
    reference = runs.load_posteriors(run, runs.REFERENCE)
    for family in (config.likelihood, *likelihoods):
        scorer = Scorer(run.vje, reference=reference, likelihood=family, kl_weight=config.kl_weight)
        for scores, images in zip(found, trained[1:], strict=True):
            parts = [scorer.parts(part) for part in images.posteriors.split(BATCH)]
            for name, score in SCORES.items():
                values = torch.cat([score(part) for part in parts]).cpu()
                if values.isfinite().all():  # not every family splits direction and radius
                    on = f"likelihood {family}" if score.of == "likelihood" else score.of
                    scores.setdefault((name, on), values)
    features = {
        "trained features": [images.features for images in trained],
        "untrained features": [images.features for images in plain],
        "raw pixels": [pixels(images, view)[1] for images in sets],
    }
    for on, (normal, *tests) in features.items():
        for name in DETECTORS if on == "trained features" else KNN:
            fitted = DETECTORS[name](normal)
            for scores, test in zip(found, tests, strict=True):
                scores[name, on] = torch.cat([fitted(part) for part in test.split(BATCH)])
    return found


def one_class(
    base: TrainConfig, out: str | Path, *, classes: Names = (), seeds: Seeds = (0,), likelihoods: Names = ()
) -> Comparison:
    """Train on one class's training images, score all test images; every class, by default, and every seed.

    The protocol sets ``normal_class`` and ``seed`` of ``base``. In ``out`` finished cells are not run again, and an
    interrupted one goes on; one that diverges, or has too few images, is a line that says so. ``likelihoods`` are
    families to score with, beside the trained one. ``ValueError`` if the data have no labels, there is no such class,
    or no seed; ``FileExistsError`` if ``out`` holds something else, or cells of other settings.
    """
    if not seeds:
        raise ValueError("seeds must name at least one, not none")
    where: dict[str, Any] = {"image_size": base.image_size, "download": base.download, "residency": "stream"}
    sets = (load_dataset(base.dataset, base.data_dir, split, **where) for split in ("train", "test"))
    train, test = (images.labelled() for images in sets)
    present = train.labels_at(torch.arange(len(train))).unique().tolist()
    names = [train.class_name(name) for name in classes or present]
    for name in names:
        train.of_class(name)
        test.class_index(name)
    configs = {
        f"{name.replace(os.sep, '-')}_seed-{seed}": dataclasses.replace(base, normal_class=name, seed=seed)
        for seed in seeds
        for name in names
    }

    def measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
        run = runs.load_run(folder, trust_plugins=True, device=runs.default_device())
        images = runs.load_split(run, "test", download=config.download).labelled()
        normal = images.class_index(config.normal_class or "")
        is_anomaly = images.labels_at(torch.arange(len(images))) != normal
        (found,) = all_scores(run, [images], likelihoods=likelihoods)
        return {"scores": _judge(found, is_anomaly, normal=config.normal_class, seed=config.seed)}

    settings = {"protocol": "one-class", **base.resolved().to_dict()}
    return Cells(Path(out), "table", settings, ("normal_class", "seed")).run(configs, measure, _tabulate)


def ood(
    ckpt: str | Path,
    outside: Mapping[str, tuple[str, str | None]],
    out: str | Path,
    *,
    likelihoods: Names = (),
    trust_plugins: bool = False,
) -> Comparison:
    """Score a run's own test images against those of other data sets: (data set, data_dir) by name in the table.

    Of each the test split is taken, of a folder of images all. ``likelihoods`` are families to score with, beside the
    trained one. ``ValueError`` or ``FileNotFoundError`` if the run or the data are unusable, ``FileExistsError`` if
    ``out`` holds something else.
    """
    run = runs.load_run(ckpt, trust_plugins=trust_plugins, device=runs.default_device())
    config = dataclasses.replace(run.info.config, image_size=run.info.image_size)
    cells = Cells(Path(out), "table", {"protocol": "ood", "run": str(ckpt), "config": config.to_dict()}, ())
    done = {cell.name for cell in cells.read()}
    todo = {name: place for name, place in outside.items() if name not in done}
    if todo:
        inside = runs.load_split(run, "test", download=config.download)
        sets = [inside if config.normal_class is None else inside.of_class(config.normal_class)]
        for kind, place in todo.values():
            sets.append(runs.load_split(run, "all" if kind == "folder" else "test", kind, place))
        own, *theirs = all_scores(run, sets, likelihoods=likelihoods)
        cells.summarise(_tabulate)  # makes the folder
        for name, scores in zip(todo, theirs, strict=True):
            joined = {key: torch.cat([own[key], scores[key]]) for key in own if key in scores}
            both, normal = (len(found[KNN[0], "raw pixels"]) for found in (joined, own))
            rows = _judge(joined, torch.arange(both) >= normal, normal=f"against {name}", seed=config.seed)
            cells.write(Cell(name, config, "finished", None, scores=rows))
    return cells.summarise(_tabulate)


def _judge(scores: Scores, is_anomaly: Tensor, **cell: Any) -> list[dict[str, Any]]:
    cell |= {"normal_images": int((~is_anomaly).sum()), "anomalies": int(is_anomaly.sum())}
    return [
        {**cell, "score": name, "on": on, "forward_passes": 0 if on == "raw pixels" else 1}
        | metrics.detection_metrics(values, is_anomaly)
        for (name, on), values in scores.items()
    ]


def compare_scores(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """AUROC (anomalies positive) of each score: a column for each normal class, and their mean, the best marked.

    A column is the mean over seeds; behind ± of the mean stands its standard deviation over seeds. The 95 % interval is
    that of the mean, from the intervals of the cells, as if each had test images of its own.
    """
    if not rows:
        return pd.DataFrame(columns=["score", "on", "mean", "95 %"])
    frame, key = pd.DataFrame(rows), ["score", "on"]
    frame["squares"] = frame["auroc_95"].map(lambda ends: (ends[1] - ends[0]) ** 2 / 4)
    by = frame.groupby(key, sort=False)
    numbers = frame.pivot_table("auroc", key, "normal").loc[list(by.groups), frame["normal"].unique()]
    numbers["mean"] = numbers.mean(axis=1)
    deviations = frame.groupby([*key, "seed"])["auroc"].mean().groupby(level=key).std()
    entries = numbers.map(lambda value: f"{value:.3f}" if value == value else "")
    entries["mean"] += deviations.map(lambda value: f" ± {value:.3f}" if value == value else "")
    table = entries.mask(numbers == numbers.max(), "**" + entries + "**")
    table["95 %"] = (by["squares"].sum() ** 0.5 / by.size()).map("± {:.3f}".format)
    return table.reset_index()


def _tabulate(cells: list[Cell]) -> Table:
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
