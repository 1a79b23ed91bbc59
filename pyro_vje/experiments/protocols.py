"""Published protocols of anomaly detection: one class against the others, and one data set against others.

All scores of the package stand beside the cheap detectors (`pyro_vje.experiments.baselines`) on the same normal images,
the ones that the run trained on and keeps as its reference. A folder of inspection images is one more case of the
first: normal images in ``train/good`` and ``test/good``, defective ones in other folders of ``test/``. The folder of
results is one of cells (`pyro_vje.experiments.cells`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_vje import metrics
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.data.splits import reference_images
from pyro_vje.experiments import tables
from pyro_vje.experiments.baselines import DETECTORS
from pyro_vje.experiments.cells import CELLS, NO_NUMBER, Cell, Cells
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

BY_TRAINED, BY_UNTRAINED, BY_PIXELS = "trained features", "untrained features", "raw pixels"
KNN = ("k-NN 1", "k-NN 50")
"""What the controls (untrained encoder, raw pixels) are judged by."""

Scores = dict[tuple[str, str], NDArray[Any]]
"""Anomaly scores ``(N,)`` by (score, what it looks at)."""


@dataclass(frozen=True)
class ProtocolResult:
    """Where the tables lie, a row for each score and cell, and the table as text."""

    folder: Path
    rows: list[dict[str, Any]]
    table: str


def all_scores(
    run: LoadedRun,
    normal: ImageSet,
    sets: Sequence[ImageSet],
    *,
    likelihoods: Sequence[str] = (),
    num_particles: int = 16,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Scores]:
    """Every score and every detector on every set of images, one pass of each encoder an image.

    Parameters
    ----------
    run : LoadedRun
        The trained model.
    normal : ImageSet
        The images that detectors are fitted on: those of the run's reference.
    sets : sequence of ImageSet
        What to score.
    likelihoods : sequence of str
        Families to score with, beside the one that was trained.
    """
    device, view = next(run.vje.parameters()).device, run.info.view
    encoded = [
        encode(run.vje, images, view, batch_size=batch_size, device=device) for images in (normal, *sets)
    ]
    found: list[Scores] = [{} for _ in sets]
    reference = load_posteriors(run, REFERENCE)
    for family in (None, *likelihoods):
        name = f"likelihood {family or run.info.config.likelihood}"
        scorer = Scorer(
            run.vje,
            reference=reference,
            num_particles=num_particles,
            seed=seed,
            likelihood=family,
            kl_weight=run.info.config.kl_weight,
        )
        for scores, images in zip(found, encoded[1:], strict=True):
            batches = [scorer.parts(part) for part in images.posteriors.split(batch_size)]
            for score in SCORES.values():
                values = torch.cat([score(parts) for parts in batches]).cpu().numpy()
                if np.isfinite(values).all() and not (family and score.name == "variance"):
                    scores[score.name, name] = values
    untrained = build_model(run.info.config, run.info.view_size).to(device).eval()
    features = {BY_TRAINED: [images.features.numpy() for images in encoded]}
    features[BY_UNTRAINED] = [
        encode(untrained, images, view, batch_size=batch_size, device=device).features.numpy()
        for images in (normal, *sets)
    ]
    features[BY_PIXELS] = [pixels(images, view)[1].numpy() for images in (normal, *sets)]
    for kind, (train, *tests) in features.items():
        for name, detector in DETECTORS.items():
            if kind == BY_TRAINED or name in KNN:
                values = detector(train, np.concatenate(tests))
                parts = np.split(values, np.cumsum([len(test) for test in tests])[:-1])
                for scores, part in zip(found, parts, strict=True):
                    scores[name, kind] = part
    return found


def one_class(
    base: TrainConfig,
    out: str | Path,
    *,
    classes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    likelihoods: Sequence[str] = (),
) -> ProtocolResult:
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
        Normal classes; by default all that are trained on.
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
    train, test = (load_dataset(base.dataset, base.data_dir, split, **where) for split in ("train", "test"))
    train, test = train.labelled(), test.labelled()
    present = train.labels_at(torch.arange(len(train))).unique().tolist()
    labels = [train.class_index(name) for name in classes] or present
    names = [(train.classes or ())[label] for label in labels]
    for name in names:
        train.of_class(name)
        test.class_index(name)
    fixed = base.resolved().to_dict()
    axes = ("normal_class", "seed")
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
        is_anomaly = (images.labels_at(torch.arange(len(images))) != normal).numpy()
        (found,) = all_scores(
            run, reference_images(train_set, config.seed), [images], likelihoods=likelihoods
        )
        rows = _judge(found, is_anomaly, normal=config.normal_class, seed=config.seed)
        return {"scores": rows}

    return cells.run(configs, measure, lambda: _summarise(cells))


def ood(
    ckpt: str | Path,
    outside: Mapping[str, tuple[str, str | None]],
    out: str | Path,
    *,
    likelihoods: Sequence[str] = (),
    trust_plugins: bool = False,
) -> ProtocolResult:
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
        others = [
            load_split(run, "all" if kind == "folder" else "test", kind, where)
            for kind, where in todo.values()
        ]
        normal = reference_images(train_set, config.seed)
        own, *theirs = all_scores(run, normal, [inside, *others], likelihoods=likelihoods)
        (cells.folder / CELLS).mkdir(parents=True, exist_ok=True)
        for name, scores in zip(todo, theirs, strict=True):
            joined = {key: np.concatenate([own[key], scores[key]]) for key in own if key in scores}
            count, total = len(next(iter(own.values()))), len(next(iter(joined.values())))
            rows = _judge(joined, np.arange(total) >= count, normal=f"against {name}", seed=config.seed)
            cells.write(Cell(name, config, "finished", None, scores=rows))
    return _summarise(cells)


def _judge(scores: Scores, is_anomaly: NDArray[np.bool_], **cell: Any) -> list[dict[str, Any]]:
    cell |= {"normal_images": int((~is_anomaly).sum()), "anomalies": int(is_anomaly.sum())}
    return [
        {**cell, "score": name, "on": on, "forward_passes": 0 if on == BY_PIXELS else 1}
        | metrics.detection_metrics(values, is_anomaly)
        for (name, on), values in scores.items()
    ]


def _summarise(cells: Cells) -> ProtocolResult:
    found = cells.read()
    cells.summary_of(found)
    rows = tables.rows_of_scores([cell.to_dict() for cell in found])
    frame = pd.DataFrame(rows)
    if rows:
        frame[["auroc_low", "auroc_high"]] = frame.pop("auroc_95").tolist()
    notes = [
        "AUROC, anomalies positive, the best in bold: means over seeds; ± behind the mean is the standard deviation "
        "over seeds, in the last column the 95 % interval of the mean over images"
    ]
    notes += [f"{cell.name}: {cell.status}: {cell.error}" for cell in found if cell.status != "finished"]
    text = tables.write(cells.folder, cells.summary, frame, tables.compare_scores(rows), notes)
    return ProtocolResult(cells.folder, rows, text)
