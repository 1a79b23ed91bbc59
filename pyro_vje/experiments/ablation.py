"""The ablation: a grid of pretraining runs in a folder of cells, with one table and one picture of them."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_vje.anomaly.judge import HOW
from pyro_vje.anomaly.table import score
from pyro_vje.config import ABLATION_AXES, TrainConfig, fields_of
from pyro_vje.data.splits import load_train_set
from pyro_vje.experiments.cells import NOT_USED, Cell, Cells, Comparison, Table, protocols_of, spread, text
from pyro_vje.model.build import build_model, unused
from pyro_vje.pages import pictures
from pyro_vje.representation.evaluation import probe
from pyro_vje.runs.folder import METRICS, default_device, load_run, load_split
from pyro_vje.training.monitor import HEALTH_IMAGES

NOT_AXES = ("dataset", "data_dir", "download", "devices")  # numbers on different data do not compare
MEASURES = {"knn": ("k-NN", ".3f"), "linear": ("linear", ".3f"), "auroc": ("AUROC", ".3f")}  # heading, format
MEASURES |= {"effective_rank": ("eff. rank", ".1f"), "posterior_snr": ("post. SNR", ".2f")}
MEASURES |= {"loss": ("loss", ".2f"), "seconds": ("seconds", ".0f")}


def grid(base: TrainConfig, axes: Mapping[str, Sequence[Any]]) -> list[TrainConfig]:
    """Every combination of the axes' values, the first seed's first; what does nothing in a cell keeps its default."""
    allowed = [name for name in fields_of(TrainConfig) if name not in NOT_AXES]
    for name, values in axes.items():
        if name not in allowed:
            raise ValueError(f"{name} cannot be varied: choose axes among {', '.join(allowed)}")
        if isinstance(values, str) or not len(values):
            raise ValueError(f"axis {name} must be a sequence of values, not {values!r}")
    names = sorted(axes, key=lambda name: name != "seed")
    found, default = [], TrainConfig()
    for values in itertools.product(*(axes[name] for name in names)):
        config = TrainConfig.from_dict({**base.to_dict(), **dict(zip(names, values, strict=True))})
        found.append(dataclasses.replace(config, **{name: getattr(default, name) for name in unused(config)}))
    for name, values in axes.items():
        if len(set(values)) > 1 and all(name in unused(config) for config in found):
            raise ValueError(f"{name} does nothing in any of these cells, so {values} cannot be compared")
    return list(dict.fromkeys(found))


def ablate(base: TrainConfig, axes: Mapping[str, Sequence[Any]], out: str | Path) -> Comparison:
    """Run every cell of a grid that has not been run yet, and write the tables that compare all of them.

    ``axes`` are values of the settings that vary, by name. A cell is what `train` gives; an interrupted one goes on, a
    diverged one is a row that says so, and values may be added later, or side by side. ``FileExistsError`` if ``out``
    holds anything else; ``ValueError``, ``FileNotFoundError`` if an axis, a setting in common or the data are unusable.
    """
    if base.devices != 1:
        raise ValueError(f"a cell trains on one device, not {base.devices}: run parts of it side by side")
    names = (*ABLATION_AXES[:-1], *sorted(set(axes) - set(ABLATION_AXES)), ABLATION_AXES[-1])
    late = {name: getattr(base, name) for name in ("warmup_epochs", "knn_every")}  # by epochs, which may vary
    cells = Cells(Path(out), "ablation", {**base.resolved().to_dict(), **late}, names)
    named = {_name(config, names): config for config in grid(base, axes)}
    if named.keys() - {cell.name for cell in cells.read() if cell.status != "failed"}:
        # What is wrong with all cells is an error now, not a row for each.
        single = {name: values[0] for name, values in axes.items() if len(values) == 1}
        common = dataclasses.replace(base, **single).resolved()
        build_model(common, load_train_set(common)[0].image_size)

    def tabulate(found: list[Cell]) -> Table:
        rows = rows_of(found, names)
        table, constant = compare(rows, names)
        plot(rows, [name for name in names if name in table], cells.folder / "ablation.png")
        common = {name: value for name, value in cells.settings.items() if value is not None} | constant
        notes = [_said(common), "seeds: cells with a result; numbers: mean ± standard deviation over them"]
        notes += [f"{name}: {_said(protocol)}" for name, protocol in protocols_of(found).items()]
        return rows, table, notes

    return cells.run(named, _measure, tabulate)


def _name(config: TrainConfig, names: Iterable[str]) -> str:
    parts = [f"{name}-{text(getattr(config, name))}".removeprefix("likelihood-") for name in names]
    return re.sub(r"[^\w.+-]", "-", "_".join(part.replace("_", "-") for part in parts))


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in settings.items())


def _measure(config: TrainConfig, folder: Path) -> dict[str, Any]:
    run = load_run(folder, trust_plugins=True, device=default_device())  # the caller has just named them
    measures = read_measures(folder / METRICS)
    health = {"images": min(HEALTH_IMAGES, run.info.train_images), "split": "train", "epoch": "last"}
    protocols: dict[str, Any] = {"loss": {"unit": "nats an image", "epoch": "last"}, "health": health}
    train_set = load_split(run, "train", download=config.download)
    if train_set.labels is not None and len(train_set.labels[train_set.labels >= 0].unique()) > 1:
        test_set = load_split(run, "test", download=config.download)
        accuracy, found = probe(run.vje, run.info.view, train_set, test_set)
        measures |= {name: accuracy[name] for name in found}
        protocols |= found
    if config.normal_class is not None:
        scored = score(folder, download=config.download, trust_plugins=True)
        if scored.auroc is not None:
            measures["auroc"] = scored.auroc
            protocols["auroc"] = {name: getattr(scored.settings, name) for name in HOW}
    return {"measures": measures, "protocols": protocols}


def read_measures(path: Path) -> dict[str, float]:
    """What a run's ``metrics.csv`` says of its last epoch, and its seconds of training."""
    try:
        history = pd.read_csv(path)[["loss", "effective_rank", "posterior_snr", "seconds"]].astype(float)
        return {**history.iloc[-1].to_dict(), "seconds": round(float(history["seconds"].sum()), 3)}
    except (ValueError, TypeError, LookupError) as error:
        how = f"remove {path.parent} to train the cell anew"
        raise ValueError(f"{path} is damaged ({error}): {how}") from None


def shown(config: TrainConfig, name: str) -> str:
    """A cell's setting as tables have it, also where none is set and something else follows."""
    unset = {"df": "D - 2", "embedding_dim": "by default"}.get(name, text(None))
    value = getattr(config, name)
    return NOT_USED if name in unused(config) else unset if value is None else text(value)


def rows_of(cells: Sequence[Cell], names: Sequence[str]) -> pd.DataFrame:
    """A row for each cell: its settings called ``names`` as text, its measures, its status."""
    said = [{name: shown(cell.config, name) for name in names} for cell in cells]
    rows = [{"cell": x.name, **vars(x), **x.measures, **by} for x, by in zip(cells, said, strict=True)]
    frame = pd.DataFrame(rows, columns=["cell", *names, *MEASURES, "status", "error"])
    return frame.astype(dict.fromkeys(MEASURES, float))


def compare(rows: pd.DataFrame, names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """A line for each setting, mean ± standard deviation over its seeds, and the settings that do not vary."""
    settings = [name for name in names if name != "seed"]
    values = {name: rows[name][rows[name] != NOT_USED].unique() for name in settings}
    measured = [name for name in MEASURES if rows[name].notna().any()]
    columns: dict[str, Any] = {"seeds": ("status", lambda status: str((status == "finished").sum()))}
    columns |= {MEASURES[name][0]: (name, partial(spread, style=MEASURES[name][1])) for name in measured}
    columns[""] = "status", _trouble
    table = rows.groupby(settings, sort=False).agg(**columns).reset_index()
    varied = [name for name in settings if len(values[name]) > 1]
    return table[[*varied, *columns]], {name: found[0] for name, found in values.items() if len(found) == 1}


def _trouble(status: pd.Series) -> str:
    counts = status[status != "finished"].value_counts()
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def plot(rows: pd.DataFrame, varied: Sequence[str], path: Path) -> None:
    """The settings by their mean k-NN accuracy (AUROC where there is none), best on top, a dot for each seed."""
    measure = next((name for name in ("knn", "auroc", "posterior_snr") if rows[name].notna().any()), None)
    if measure is None:
        return
    labels = rows[[*varied] or ["likelihood"]].agg(", ".join, axis=1)
    labels = labels.where(rows["status"] == "finished", labels + " (" + rows["status"] + ")")
    means = rows[measure].groupby(labels).mean().sort_values(na_position="first")
    with pictures.picture(path, 8, 1.2 + 0.26 * len(means)) as figure:
        axes, blue = figure.subplots(), pictures.BLUE
        axes.plot(rows[measure], means.index.get_indexer(labels), "o", color=blue, markersize=4, alpha=0.6)
        axes.plot(means, range(len(means)), "|", color=blue, markersize=11, markeredgewidth=2)
        pictures.style(axes, ", ".join(varied), f"{MEASURES[measure][0]}: mean (bar) and each seed (dot)", "")
        axes.set_yticks(range(len(means)), means.index, fontsize=8, parse_math=False)
