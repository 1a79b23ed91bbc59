"""The ablation: a grid of pretraining runs, resumable, and one table that compares them.

::

    DIR/cells/NAME/        the run folder of a cell, as `train` leaves it
    DIR/cells/NAME.json    what the cell reached; written last, so a cell that has it is done
    DIR/ablation.csv       a row for each cell
    DIR/ablation.txt       mean and spread over seeds for each setting
    DIR/ablation.json      all of it, with the settings in common, protocols and versions
    DIR/ablation.png       k-NN accuracy of each setting, a dot for each seed
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyro_vje.anomaly.table import score
from pyro_vje.config import ABLATION_AXES, TrainConfig
from pyro_vje.data.splits import load_train_set
from pyro_vje.experiments.comparison import Cell, format_csv, format_table, plot_cells, text
from pyro_vje.model.likelihoods import SETTINGS, get_family
from pyro_vje.representation.evaluation import features_of, load_split, probe
from pyro_vje.runs.files import check_form, is_begun, read_json, write_atomic, write_json
from pyro_vje.runs.folder import (
    CONFIG,
    METRICS,
    WEIGHTS,
    build_model,
    default_device,
    load_run,
    read_info,
    versions,
)
from pyro_vje.training.monitor import HEALTH_IMAGES
from pyro_vje.training.run import train

log = logging.getLogger("pyro_vje")

CELLS, SUMMARY = "cells", "ablation.json"
NOT_AXES = ("dataset", "data_dir", "download", "devices")
"""Settings that cells have in common: numbers on different data do not compare."""


@dataclass(frozen=True)
class AblationResult:
    """Where an ablation lies, all cells run in it so far (sorted by setting), and its table as text."""

    folder: Path
    cells: list[Cell]
    table: str


def grid(base: TrainConfig, axes: Mapping[str, Sequence[Any]]) -> list[TrainConfig]:
    """Every combination of the axes' values, resolved, each once, the first seed's before the second's.

    A setting that a likelihood does not use keeps its default, so that no cell is trained twice.

    Raises
    ------
    ValueError
        If an axis is no setting that may vary, has no values, or values of another type.
    """
    allowed = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in NOT_AXES]
    for name, values in axes.items():
        if name not in allowed:
            raise ValueError(f"{name} cannot be varied: choose axes among {', '.join(allowed)}")
        if isinstance(values, str) or not len(values):
            raise ValueError(f"axis {name} must be a sequence of values, not {values!r}")
        numbers = [
            value for value in values if isinstance(value, float) and (name, value) != ("df", math.inf)
        ]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"axis {name} holds a value that is not finite: {values}")
    # With the seed outermost, an ablation stopped early has compared all settings, if only on the first seed.
    names = sorted(axes, key=lambda name: name != "seed")
    combinations = itertools.product(*(axes[name] for name in names))
    settings = (dict(zip(names, values, strict=True)) for values in combinations)
    configs = (TrainConfig.from_dict({**base.to_dict(), **values}) for values in settings)
    return list(dict.fromkeys(map(_resolved, configs)))


def _resolved(config: TrainConfig) -> TrainConfig:
    try:
        config = config.resolved()
        default = TrainConfig(embedding_dim=config.embedding_dim).resolved()
        ignored = set(SETTINGS).difference(get_family(config.likelihood).uses)
        return dataclasses.replace(config, **{name: getattr(default, name) for name in ignored})
    except ValueError:  # the cell will be a row that says what is wrong
        return config


def ablate(base: TrainConfig, axes: Mapping[str, Sequence[Any]], out: str | Path) -> AblationResult:
    """Run every cell of a grid that has not been run yet, and write the tables that compare all of them.

    A cell gives what `train` gives with the same settings and seed. One that was interrupted goes on from its last
    checkpoint; one that diverges, or whose settings do not go together, becomes a row that says so. Values may be
    added from call to call, also by several processes at once as long as their grids do not overlap.

    Parameters
    ----------
    base : TrainConfig
        The settings that do not vary.
    axes : mapping of str to sequence
        Values of the settings that vary, by the names of `TrainConfig`.
    out : path
        The folder, new or of an ablation with the same ``base``.

    Raises
    ------
    FileExistsError
        If ``out`` holds something else, or an ablation with another ``base``.
    ValueError, FileNotFoundError
        If an axis, a setting in common or the data are unusable.
    """
    folder = Path(out)
    if base.devices != 1:
        raise ValueError(
            f"a cell trains on one device, not {base.devices}: run parts of the grid side by side"
        )
    configs = grid(base, axes)
    names = (*ABLATION_AXES[:-1], *sorted(set(axes) - set(ABLATION_AXES)), ABLATION_AXES[-1])
    fixed = base.resolved().to_dict()
    # Where they are not set they follow from the epochs, which may vary.
    fixed |= {"warmup_epochs": base.warmup_epochs, "knn_every": base.knn_every}
    # How images are fetched and decoded changes no number.
    fixed = {name: value for name, value in fixed.items() if name not in (*names, "download", "workers")}
    _check_folder(folder, fixed, names)

    cells = {_name(config, names): config for config in configs}
    done = {cell.name for cell in _read_cells(folder) if cell.status != "failed"}
    todo = [name for name in cells if name not in done]
    if todo:  # what is wrong with all cells is an error now, not a row for each
        single = {name: values[0] for name, values in axes.items() if len(values) == 1}
        common = dataclasses.replace(base, **single).resolved()
        build_model(common, load_train_set(common)[0].image_size)
    folder.mkdir(parents=True, exist_ok=True)
    result = _summarise(folder, fixed, names)
    (folder / CELLS).mkdir(exist_ok=True)
    for number, name in enumerate(todo, 1):
        log.info("cell %d of %d (%d were done): %s", number, len(todo), len(cells) - len(todo), name)
        cell = _run(name, cells[name], folder / CELLS / name)
        values = {**dataclasses.asdict(cell), "config": cell.config.to_dict(), "versions": versions()}
        write_json(folder / CELLS / f"{name}.json", values)
        result = _summarise(folder, fixed, names)
    return result


def _check_folder(folder: Path, fixed: dict[str, Any], names: Sequence[str]) -> None:
    if not (folder / SUMMARY).is_file():
        if is_begun(folder):
            raise FileExistsError(f"{folder} exists and holds no ablation: name another folder with --out")
        return
    form = {"axes": list, "fixed": dict}
    stored = read_json(folder / SUMMARY, lambda values: check_form(values, form))
    old, new = (
        {**dict.fromkeys(map(str, n), "varied"), **f}
        for n, f in ((stored["axes"], stored["fixed"]), (names, fixed))
    )
    for name in sorted(old.keys() | new.keys()):
        default = TrainConfig().to_dict().get(name)  # a setting that the version before did not have
        if old.get(name, default) != new.get(name, default):
            raise FileExistsError(
                f"{folder} holds an ablation with {name} {old.get(name)}, not {new.get(name)}: "
                "keep that setting, or name another folder with --out"
            )


# Cells ----------------------------------------------------------------------------------------------------------------


def _name(config: TrainConfig, names: Iterable[str]) -> str:
    parts = [f"{name}-{text(getattr(config, name))}".removeprefix("likelihood-") for name in names]
    return re.sub(r"[^\w.+-]", "-", "_".join(part.replace("_", "-") for part in parts))


def _run(name: str, config: TrainConfig, folder: Path) -> Cell:
    try:
        config = config.resolved()
        train_cell(config, folder)
        return Cell(name, config, "finished", None, *_measure(config, folder))
    except (FloatingPointError, ValueError) as error:
        status = "diverged" if isinstance(error, FloatingPointError) else "failed"
        log.warning("%s: %s", status, error)
        return Cell(name, config, status, str(error), {}, {})


def train_cell(config: TrainConfig, folder: Path) -> None:
    """Train a cell, whatever an interruption has left of it; ``FileExistsError`` if that is another cell's."""
    begun = (folder / CONFIG).is_file()
    if begun:
        stored = read_info(folder).config
        if config.batch_size is None:  # fitted to the data when the cell was begun
            config = dataclasses.replace(config, batch_size=stored.batch_size)
        if dataclasses.replace(stored, download=config.download, workers=config.workers) != config:
            raise FileExistsError(f"{folder} holds a run with other settings: move it out of the ablation")
        if (folder / WEIGHTS).is_file():
            return
    train(config, folder, resume=begun)


def _measure(config: TrainConfig, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    # The plug-ins in the run folder are those that the caller has just named.
    device = default_device()
    run = load_run(folder, trust_plugins=True, device=device)
    measures = _read_measures(folder / METRICS)
    protocols: dict[str, Any] = {
        "loss": {"unit": "nats an image", "epoch": "last"},
        "health": {"images": min(HEALTH_IMAGES, run.info.train_images), "split": "train", "epoch": "last"},
    }
    train_set = load_split(run, "train", None, None, download=config.download)
    if train_set.labels is not None and len(train_set.labels[train_set.labels >= 0].unique()) > 1:
        sets = train_set.labelled(), load_split(run, "test", None, None, download=config.download).labelled()
        accuracy, found = probe(features_of(run.vje, run.info.view), *sets)
        found["linear"].pop("seed")  # the cell's
        measures |= {name: accuracy[name] for name in found}
        protocols |= found
    if config.normal_class is not None:
        scored = score(folder, download=config.download, draw=False, trust_plugins=True)
        if scored.auroc is not None:
            measures["auroc"] = scored.auroc
            protocols["auroc"] = {**dataclasses.asdict(scored.settings), "positive": "anomalies"}
    return measures, protocols


def _read_measures(path: Path) -> dict[str, float]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
        measures = {name: float(history[-1][name]) for name in ("loss", "effective_rank", "posterior_snr")}
        return {**measures, "seconds": round(sum(float(row["seconds"]) for row in history), 3)}
    except (ValueError, TypeError, LookupError, csv.Error) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove {path.parent}, and the cell is trained anew"
        ) from None


# Summary --------------------------------------------------------------------------------------------------------------


def _read_cells(folder: Path) -> list[Cell]:
    return [read_json(path, Cell.from_dict) for path in sorted((folder / CELLS).glob("*.json"))]


def _summarise(folder: Path, fixed: dict[str, Any], names: Sequence[str]) -> AblationResult:
    def by_setting(cell: Cell) -> list[tuple[bool, Any]]:
        values = (getattr(cell.config, name) for name in names)
        return [(value is None, "" if value is None else value) for value in values]

    cells = sorted(_read_cells(folder), key=by_setting)
    protocols = next((cell.protocols for cell in cells if cell.status == "finished"), {})
    rows = [{**dataclasses.asdict(cell), "config": cell.config.to_dict()} for cell in cells]
    for row in rows:
        del row["protocols"]  # the same for every cell
    date = datetime.now(UTC).isoformat(timespec="seconds")
    summary = {"fixed": fixed, "axes": names, "cells": rows, "protocols": protocols}
    write_json(folder / SUMMARY, {**summary, "versions": versions(), "date": date})

    write_atomic(folder / "ablation.csv", format_csv(cells, names))
    set_values = {name: value for name, value in fixed.items() if value is not None}
    table = format_table(cells, names, set_values, protocols)
    write_atomic(folder / "ablation.txt", table + "\n")
    plot_cells(cells, names, folder / "ablation.png")
    return AblationResult(folder, cells, table)
