"""The ablation: a grid of pretraining runs, resumable, and one table that compares them.

Its folder is one of cells (`pyro_vje.experiments.cells`), with a picture ``ablation.png``.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_vje.anomaly.rows import HOW
from pyro_vje.anomaly.table import score
from pyro_vje.config import ABLATION_AXES, TrainConfig
from pyro_vje.data.splits import load_train_set
from pyro_vje.experiments import tables
from pyro_vje.experiments.cells import NO_NUMBER, Cell, Cells
from pyro_vje.representation.evaluation import probe
from pyro_vje.runs.folder import METRICS, build_model, default_device, load_run, load_split
from pyro_vje.training.monitor import HEALTH_IMAGES

NOT_AXES = ("dataset", "data_dir", "download", "devices")
"""Settings that cells have in common: numbers on different data do not compare."""


@dataclass(frozen=True)
class AblationResult:
    """Where an ablation lies, all cells run in it so far (sorted by setting), and its table as text."""

    folder: Path
    cells: list[Cell]
    table: str


def grid(base: TrainConfig, axes: Mapping[str, Sequence[Any]]) -> list[TrainConfig]:
    """Every combination of the axes' values, each once, the first seed's before the second's.

    A setting that does nothing in a cell keeps its default, so that no cell is trained twice. Raises ``ValueError`` if
    an axis is no setting that may vary, has no values, or values of another type.
    """
    allowed = [field.name for field in dataclasses.fields(TrainConfig) if field.name not in NOT_AXES]
    for name, values in axes.items():
        if name not in allowed:
            raise ValueError(f"{name} cannot be varied: choose axes among {', '.join(allowed)}")
        if isinstance(values, str) or not len(values):
            raise ValueError(f"axis {name} must be a sequence of values, not {values!r}")
        numbers = [x for x in values if isinstance(x, float) and (name, x) != ("df", math.inf)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"axis {name} holds a value that is not finite: {values}")
    # With the seed outermost, an ablation stopped early has compared all settings, if only on the first seed.
    names = sorted(axes, key=lambda name: name != "seed")
    combinations = itertools.product(*(axes[name] for name in names))
    settings = (dict(zip(names, values, strict=True)) for values in combinations)
    configs = (TrainConfig.from_dict({**base.to_dict(), **values}) for values in settings)
    default = TrainConfig()
    return list(
        dict.fromkeys(
            dataclasses.replace(config, **{name: getattr(default, name) for name in tables.unused(config)})
            for config in configs
        )
    )


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
    if base.devices != 1:
        raise ValueError(
            f"a cell trains on one device, not {base.devices}: run parts of the grid side by side"
        )
    configs = grid(base, axes)
    names = (*ABLATION_AXES[:-1], *sorted(set(axes) - set(ABLATION_AXES)), ABLATION_AXES[-1])
    fixed = base.resolved().to_dict()
    # Where they are not set they follow from the epochs, which may vary.
    fixed |= {"warmup_epochs": base.warmup_epochs, "knn_every": base.knn_every}
    fixed = {name: value for name, value in fixed.items() if name not in (*names, *NO_NUMBER)}
    cells = Cells(Path(out), "ablation", fixed, names)
    todo = {_name(config, names): config for config in configs}
    if todo.keys() - {cell.name for cell in cells.read() if cell.status != "failed"}:
        # What is wrong with all cells is an error now, not a row for each.
        single = {name: values[0] for name, values in axes.items() if len(values) == 1}
        common = dataclasses.replace(base, **single)
        images, _ = load_train_set(dataclasses.replace(common.resolved(), batch_size=common.batch_size))
        build_model(common.resolved(), images.image_size)
    return cells.run(todo, _measure, lambda: _summarise(cells))


def _name(config: TrainConfig, names: Iterable[str]) -> str:
    parts = [f"{name}-{tables.text(getattr(config, name))}".removeprefix("likelihood-") for name in names]
    return re.sub(r"[^\w.+-]", "-", "_".join(part.replace("_", "-") for part in parts))


def _summarise(cells: Cells) -> AblationResult:
    def by_setting(cell: Cell) -> list[tuple[bool, Any]]:
        values = (getattr(cell.config, name) for name in cells.axes)
        return [(value is None, "" if value is None else value) for value in values]

    found = sorted(cells.read(), key=by_setting)
    cells.summary_of(found)
    rows = tables.rows_of_settings(found, cells.axes)
    table, constant = tables.compare_settings(rows, cells.axes)
    protocols = next((cell.protocols for cell in found if cell.status == "finished"), {})
    common = {name: value for name, value in cells.settings.items() if value is not None}
    notes = tables.describe({**common, **constant}, protocols)
    text = tables.write(cells.folder, cells.summary, rows, table, notes)
    tables.plot_settings(rows, cells.axes, cells.folder / "ablation.png")
    return AblationResult(cells.folder, found, text)


# Measures -------------------------------------------------------------------------------------------------------------


def _measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
    # The plug-ins in the run folder are those that the caller has just named.
    run = load_run(folder, trust_plugins=True, device=default_device())
    measures = _read_measures(folder / METRICS)
    protocols: dict[str, Any] = {
        "loss": {"unit": "nats an image", "epoch": "last"},
        "health": {"images": min(HEALTH_IMAGES, run.info.train_images), "split": "train", "epoch": "last"},
    }
    train_set = load_split(run, "train", None, None, download=config.download)
    if train_set.labels is not None and len(train_set.labels[train_set.labels >= 0].unique()) > 1:
        sets = train_set.labelled(), load_split(run, "test", None, None, download=config.download).labelled()
        accuracy, found = probe(run.vje, run.info.view, *sets)
        found["linear"].pop("seed", None)  # the cell's
        measures |= {name: accuracy[name] for name in found}
        protocols |= found
    if config.normal_class is not None:
        scored = score(folder, download=config.download, draw=False, trust_plugins=True)
        if scored.auroc is not None:
            measures["auroc"] = scored.auroc
            protocols["auroc"] = {
                **{name: getattr(scored.settings, name) for name in HOW},
                "positive": "anomalies",
            }
    return {"measures": measures, "protocols": protocols}


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
