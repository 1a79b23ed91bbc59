"""Published protocols of anomaly detection: one class against the others, and one data set against others.

All scores of the package stand beside all cheap detectors (`pyro_vje.experiments.baselines`) on the same normal images,
the ones that the run trained on and keeps as its reference. ::

    DIR/cells/CLASS_seed-S/        a run folder (one-class only)
    DIR/cells/NAME.json            what it reached; written last, so a cell that has it is done
    DIR/table.csv, .json, .md      all of it: every cell, and the table over classes and seeds
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vje import metrics
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.data.splits import load_train_set, reference_images
from pyro_vje.experiments.ablation import train_cell
from pyro_vje.experiments.baselines import DETECTORS
from pyro_vje.model.encoding import encode
from pyro_vje.representation.evaluation import load_split, pixels
from pyro_vje.runs.files import check_form, is_begun, read_json, write_atomic, write_json
from pyro_vje.runs.folder import (
    REFERENCE,
    LoadedRun,
    build_model,
    default_device,
    load_posteriors,
    load_run,
    versions,
)
from pyro_vje.runs.stopping import unless_stopped, work_for_parent

log = logging.getLogger("pyro_vje")

CELLS, TABLE = "cells", "table"
BY_TRAINED, BY_UNTRAINED, BY_PIXELS = "trained features", "untrained features", "raw pixels"
KNN = ("k-NN 1", "k-NN 50")
"""What the controls (untrained encoder, raw pixels) are judged by."""

Scores = dict[tuple[str, str], NDArray[Any]]
"""Anomaly scores ``(N,)`` by (score, what it looks at)."""


@dataclass(frozen=True)
class ProtocolResult:
    """Where the tables lie, a row for each score and cell, and the table as Markdown."""

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
            run.vje, reference=reference, num_particles=num_particles, seed=seed, likelihood=family
        )
        for scores, images in zip(found, encoded[1:], strict=True):
            batches = [
                scorer.parts(part, with_reference=True) for part in images.posteriors.split(batch_size)
            ]
            for score in SCORES.values():
                values = torch.cat([score(parts) for parts in batches]).cpu().numpy()
                if np.isfinite(values).all() and not (family and score.name == "variance"):
                    scores[score.name, name] = values
    untrained = build_model(run.info.config, run.info.image_size).to(device).eval()
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
    jobs: int = 1,
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
        Normal classes; by default all there are.
    seeds : sequence of int
        Training seeds.
    likelihoods : sequence of str
        Families to score with, beside the one that was trained.
    jobs : int
        Cells at once, each in a process with its share of the cores, or its GPU where there are several.

    Raises
    ------
    ValueError
        If the data have no labels, there is no such class, or ``jobs`` or ``seeds`` are unusable.
    FileExistsError
        If ``out`` holds something else, or cells of other settings.
    """
    if jobs < 1 or not seeds:
        raise ValueError(f"jobs and the number of seeds must be at least 1, not {jobs} and {len(seeds)}")
    images = load_dataset(
        base.dataset, base.data_dir, "test", image_size=base.image_size, download=base.download
    )
    images.labelled()
    for name in classes:
        images.class_index(name)
    folder = _open(Path(out), {"protocol": "one-class", **_settings(base)})
    # A default batch stays open: it is fitted to each class's number of images.
    resolved = dataclasses.replace(base.resolved(), batch_size=base.batch_size)
    configs = {
        f"{name.replace(os.sep, '-')}_seed-{seed}": dataclasses.replace(
            resolved, normal_class=name, seed=seed
        )
        for seed in seeds
        for name in classes or images.classes or ()
    }
    todo = [name for name in configs if not _done(folder / CELLS / f"{name}.json")]
    log.info("%d of %d cells were done", len(configs) - len(todo), len(configs))
    arguments = {name: (configs[name], folder / CELLS / name, tuple(likelihoods)) for name in todo}
    if jobs == 1:
        for name in todo:
            log.info("cell %s", name)
            _one_class_cell(*arguments[name])
            _summarise(folder)
    elif todo:
        context = multiprocessing.get_context("spawn")
        places = context.Queue()
        for place in range(jobs):
            places.put(place)
        with ProcessPoolExecutor(jobs, context, _take_share, (places, jobs)) as pool:
            futures: dict[Future[None], str] = {
                pool.submit(unless_stopped, partial(_one_class_cell, *arguments[name])): name for name in todo
            }
            try:
                for future in as_completed(futures):
                    future.result()
                    log.info("cell %s is done", futures[future])
                    _summarise(folder)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()  # it finishes its step and writes a checkpoint, for which the pool waits
                raise
    return _summarise(folder)


def _done(path: Path) -> bool:
    return path.is_file() and not read_json(path, _cell)["status"].startswith("failed")


def _take_share(places: Any, jobs: int) -> None:
    """Give a worker its part of the machine, before it computes anything; it stops with its parent."""
    work_for_parent()
    place = places.get()
    torch.set_num_threads(max(1, (os.cpu_count() or jobs) // jobs))
    count = torch.cuda.device_count()
    if count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place % count)


def _one_class_cell(config: TrainConfig, folder: Path, likelihoods: tuple[str, ...]) -> None:
    began = time.monotonic()
    row: dict[str, Any] = {"normal": config.normal_class, "seed": config.seed, "config": config.to_dict()}
    try:
        train_cell(config, folder)
        run = load_run(folder, trust_plugins=True, device=default_device())
        train_set, _ = load_train_set(dataclasses.replace(config, image_size=run.info.image_size))
        test = load_split(run, "test", None, None, download=config.download).labelled()
        is_anomaly = (
            test.labels_at(torch.arange(len(test))) != test.class_index(config.normal_class or "")
        ).numpy()
        (found,) = all_scores(run, reference_images(train_set, config.seed), [test], likelihoods=likelihoods)
        row |= {"status": "finished", "scores": _judge(found, is_anomaly)}
    except (FloatingPointError, ValueError) as error:
        log.warning("%s: %s", folder.name, error)
        kind = "diverged" if isinstance(error, FloatingPointError) else "failed"
        row |= {"status": f"{kind}: {error}", "scores": []}
    row |= {"seconds": round(time.monotonic() - began, 1), "versions": versions()}
    write_json(folder.parent / f"{folder.name}.json", row)


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
    folder = _open(Path(out), {"protocol": "ood", "run": str(ckpt), "config": config.to_dict()})
    todo = {name: place for name, place in outside.items() if not (folder / CELLS / f"{name}.json").is_file()}
    if todo:
        began = time.monotonic()
        train_set, _ = load_train_set(config)
        inside = load_split(run, "test", None, None, download=config.download)
        if config.normal_class is not None:
            inside = inside.of_class(config.normal_class)
        others = [
            load_dataset(kind, where, "all" if kind == "folder" else "test", image_size=run.info.image_size)
            for kind, where in todo.values()
        ]
        normal = reference_images(train_set, config.seed)
        own, *theirs = all_scores(run, normal, [inside, *others], likelihoods=likelihoods)
        for name, scores in zip(todo, theirs, strict=True):
            joined = {key: np.concatenate([own[key], scores[key]]) for key in own.keys() & scores.keys()}
            count = len(next(iter(own.values())))
            total = len(next(iter(joined.values())))
            row: dict[str, Any] = {"normal": f"against {name}", "seed": config.seed, "status": "finished"}
            row |= {"scores": _judge(joined, np.arange(total) >= count)}
            row |= {"seconds": round(time.monotonic() - began, 1), "versions": versions()}
            write_json(folder / CELLS / f"{name}.json", row)
    return _summarise(folder)


def _judge(scores: Scores, is_anomaly: NDArray[np.bool_]) -> list[dict[str, Any]]:
    counts = {"normal_images": int((~is_anomaly).sum()), "anomalies": int(is_anomaly.sum())}
    return [
        {"score": name, "on": on, "forward_passes": 0 if on == BY_PIXELS else 1, **counts}
        | metrics.detection_metrics(values, is_anomaly)
        for (name, on), values in sorted(scores.items(), key=lambda item: _order(*item[0]))
    ]


def _order(name: str, on: str) -> tuple[int, str, int]:
    kinds = (BY_TRAINED, BY_UNTRAINED, BY_PIXELS)
    return (1 + kinds.index(on) if on in kinds else 0, on, [*SCORES, *DETECTORS].index(name))


# Folder and table -----------------------------------------------------------------------------------------------------


def _settings(base: TrainConfig) -> dict[str, Any]:
    resolved = base.resolved().to_dict()
    return {k: v for k, v in resolved.items() if k not in ("normal_class", "seed", "download", "workers")}


def _table(values: Any) -> dict[str, Any]:
    return check_form(values, {"settings": dict})


def _cell(values: Any) -> dict[str, Any]:
    check_form(values, {"normal": str, "seed": int, "status": str, "scores": list})
    for score in values["scores"]:
        check_form(score, {"score": str, "on": str, "auroc": float, "auroc_95": list})
        if list(map(type, score["auroc_95"])) != [float, float]:
            raise ValueError(f"auroc_95 is {score['auroc_95']}, not two numbers")
    return values


def _open(folder: Path, settings: dict[str, Any]) -> Path:
    """Create the folder, or check that it holds the same protocol with the same settings."""
    path = folder / f"{TABLE}.json"
    if path.is_file():
        stored = read_json(path, _table)["settings"]
        default = TrainConfig().to_dict()  # of a setting that the version before did not have
        changed = sorted(
            k
            for k in stored.keys() | settings.keys()
            if stored.get(k, default.get(k)) != settings.get(k, default.get(k))
        )
        if changed:
            raise FileExistsError(
                f"{folder} holds results of other settings ({', '.join(changed)}): name another folder (--out)"
            )
    elif is_begun(folder):
        raise FileExistsError(f"{folder} exists and holds no such results: name another folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_json(path, {"settings": settings})
    (folder / CELLS).mkdir(exist_ok=True)
    return folder


def _summarise(folder: Path) -> ProtocolResult:
    cells = [read_json(path, _cell) for path in sorted((folder / CELLS).glob("*.json"))]
    rows = rows_of(cells)
    stored = read_json(folder / f"{TABLE}.json", _table)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"settings": stored["settings"], "versions": versions(), "date": date}
    write_json(folder / f"{TABLE}.json", {**about, "cells": cells})
    table = markdown(rows)
    unfinished = [
        f"{cell['normal']}, seed {cell['seed']}: {cell['status']}" for cell in cells if not cell["scores"]
    ]
    table += "".join(f"\n{line}" for line in unfinished)
    write_atomic(folder / f"{TABLE}.md", table + "\n")
    if rows:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [name for name in rows[0] if name != "auroc_95"]
        writer.writerow([*names, "auroc_low", "auroc_high"])
        for row in rows:
            writer.writerow([*(row.get(name, "") for name in names), *row["auroc_95"]])
        write_atomic(folder / f"{TABLE}.csv", text.getvalue())
    return ProtocolResult(folder, rows, table)


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each score of each cell, with the cell's normal class and seed."""
    return [
        {"normal": cell["normal"], "seed": cell["seed"], **score}
        for cell in cells
        for score in cell["scores"]
    ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """AUROC (anomalies positive) of each score: a column for each normal class, and their mean, best in bold.

    A column is the mean over seeds. The interval of the mean is 95 %, by DeLong from the test images, as if each
    cell had test images of its own.
    """
    columns = list(dict.fromkeys(str(row["normal"]) for row in rows))
    groups: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        groups.setdefault((row["score"], row["on"]), {}).setdefault(str(row["normal"]), []).append(row)
    means = {
        key: {name: float(np.mean([row["auroc"] for row in cells])) for name, cells in group.items()}
        for key, group in groups.items()
    }
    best = {name: max(group[name] for group in means.values() if name in group) for name in columns}
    overall = {key: float(np.mean(list(group.values()))) for key, group in means.items()}
    lines = [
        f"| score | on | {' | '.join(columns)} | mean | 95 % |",
        f"|---|---|{'---|' * (len(columns) + 2)}",
    ]
    for key, group in groups.items():
        cells = [
            "" if name not in group else _bold(means[key][name], means[key][name] == best[name])
            for name in columns
        ]
        errors = [(row["auroc_95"][1] - row["auroc_95"][0]) / 2 for part in group.values() for row in part]
        half = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        mean = _bold(overall[key], overall[key] == max(overall.values()))
        lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} | {mean} | ± {half:.3f} |")
    return "\n".join(lines)


def _bold(value: float, best: bool) -> str:
    return f"**{value:.3f}**" if best else f"{value:.3f}"
