"""Cells side by side: a table of settings, a table of anomaly scores, in CSV, Markdown, LaTeX and text; a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_vje.config import TrainConfig
from pyro_vje.experiments.cells import Cell
from pyro_vje.model.likelihoods import FAMILIES, SETTINGS
from pyro_vje.pages import pictures
from pyro_vje.runs.files import write_atomic

MEASURES = {
    "knn": ("k-NN", ".3f"),
    "linear": ("linear", ".3f"),
    "auroc": ("AUROC", ".3f"),
    "effective_rank": ("eff. rank", ".1f"),
    "posterior_snr": ("post. SNR", ".2f"),
    "loss": ("loss", ".2f"),
    "seconds": ("seconds", ".0f"),
}
"""What is measured of a cell of an ablation: heading and format in the table."""
NOT_USED = "-"
"""What a table says of a setting that does nothing in a cell."""
UNSET = {"df": "D - 2", "embedding_dim": "by default"}
"""What ``None`` means where it is not ``none``."""


def text(value: Any) -> str:
    """A setting's value as written in names and tables: ``5``, ``true``, ``none``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def unused(config: TrainConfig) -> set[str]:
    """The settings that a cell's likelihood does not look at; of a user's own family nothing is known."""
    family = FAMILIES.get(config.likelihood)
    names = set(SETTINGS).difference(family.uses) if family else set()
    return names | ({"radius_scale"} if config.radius is None else set())


def shown(config: TrainConfig, name: str) -> str:
    """A cell's setting as tables have it."""
    value = getattr(config, name)
    if name in unused(config):
        return NOT_USED
    return UNSET[name] if value is None and name in UNSET else text(value)


def spread(values: pd.Series, style: str) -> str:
    """Mean, ± standard deviation where there are several values."""
    values = values.dropna()
    if values.empty:
        return NOT_USED
    deviation = f" ± {values.std():{style}}" if len(values) > 1 else ""
    return f"{values.mean():{style}}{deviation}"


def write(folder: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, notes: Sequence[str]) -> str:
    """Write rows as CSV, a table of strings as Markdown and LaTeX; return what a terminal is to show.

    Entries of the table that begin with ``*`` are the best of their kind.
    """
    plain = table.map(lambda entry: entry.removeprefix("*"))
    write_atomic(folder / f"{name}.csv", rows.to_csv(index=False, lineterminator="\n"))
    write_atomic(folder / f"{name}.md", "\n\n".join([markdown(table), *notes]) + "\n")
    best = np.where(table.map(lambda entry: entry.startswith("*")), "font-weight: bold", "")
    style = plain.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    latex = style.apply(lambda _: best, axis=None).to_latex(hrules=True, convert_css=True)
    comments = "".join(f"% {line}\n" for note in notes for line in textwrap.wrap(note, 110))
    write_atomic(folder / f"{name}.tex", comments + latex.replace("±", r"$\pm$"))
    lines = (textwrap.fill(note, 110, subsequent_indent="    ") for note in notes)
    simple = plain.to_markdown(index=False, tablefmt="simple", disable_numparse=True)
    return "\n".join([*(line.rstrip() for line in simple.splitlines()), "", *lines])


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown, the best in bold."""

    def mark(entry: str) -> str:
        entry = entry.replace("|", "\\|")
        return f"**{entry[1:]}**" if entry.startswith("*") else entry

    return str(table.map(mark).to_markdown(index=False, disable_numparse=True))


# Settings -------------------------------------------------------------------------------------------------------------


def rows_of_settings(cells: Sequence[Cell], names: Sequence[str]) -> pd.DataFrame:
    """A row for each cell: its settings called ``names`` as text, its measures, its status."""
    rows = [
        {"cell": cell.name}
        | {name: shown(cell.config, name) for name in names}
        | {name: cell.measures.get(name) for name in MEASURES}
        | {"status": cell.status, "error": cell.error}
        for cell in cells
    ]
    return pd.DataFrame(rows, columns=["cell", *names, *MEASURES, "status", "error"])


def compare_settings(rows: pd.DataFrame, names: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """A line for each setting, mean ± standard deviation over its seeds, and the settings that do not vary.

    Parameters
    ----------
    rows : DataFrame
        Of `rows_of_settings`.
    names : sequence of str
        The settings in which cells may differ.
    """
    settings = [name for name in names if name != "seed"]
    values = {name: list(dict.fromkeys(v for v in rows[name] if v != NOT_USED)) for name in settings}
    varied = [name for name in settings if len(values[name]) > 1]
    measured = [name for name in MEASURES if rows[name].notna().any()]
    lines = []
    for key, members in rows.groupby(settings, sort=False):
        line = {name: value for name, value in zip(settings, key, strict=True) if name in varied}
        states = members["status"].value_counts()
        line["seeds"] = str(states.get("finished", 0))
        line |= {
            MEASURES[name][0]: spread(members[name].astype(float), MEASURES[name][1]) for name in measured
        }
        line[""] = ", ".join(f"{count} {state}" for state, count in states.items() if state != "finished")
        lines.append(line)
    columns = [*varied, "seeds", *(MEASURES[name][0] for name in measured), ""]
    constant = {name: found[0] for name, found in values.items() if len(found) == 1}
    return pd.DataFrame(lines, columns=columns), constant


def describe(common: Mapping[str, Any], protocols: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line of the settings in common, what ± is, and a line for each protocol."""
    notes = [", ".join(f"{name} {text(value)}" for name, value in common.items())]
    notes.append("seeds: cells with a result; numbers: their mean ± standard deviation over them")
    for name, protocol in protocols.items():
        notes.append(f"{name}: " + ", ".join(f"{key} {text(value)}" for key, value in protocol.items()))
    return notes


def plot_settings(rows: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """The settings by their mean k-NN accuracy (AUROC where there is none), best on top, a dot for each seed."""
    measure = next((name for name in ("knn", "auroc", "posterior_snr") if rows[name].notna().any()), None)
    if measure is None:
        return
    varied = [name for name in compare_settings(rows, names)[0] if name in names]
    labels = rows[varied].apply(
        lambda row: ", ".join(f"{name} {value}" for name, value in row.items() if value != NOT_USED), axis=1
    )
    groups = [(str(label), members) for label, members in rows.groupby(labels if varied else "likelihood")]
    groups.sort(key=lambda group: group[1][measure].fillna(-np.inf).mean())
    figure = pictures.new_figure(8, 1.2 + 0.26 * len(groups))
    axes = figure.subplots()
    for y, (_, members) in enumerate(groups):
        values = members[measure].dropna()
        axes.plot(values, [y] * len(values), "o", color=pictures.BLUE, markersize=4, alpha=0.6)
        axes.plot(values.mean(), y, "|", color=pictures.BLUE, markersize=11, markeredgewidth=2)
        trouble = " and ".join(sorted(set(members["status"]) - {"finished"}))
        axes.annotate(
            trouble, (0.99, y), xycoords=("axes fraction", "data"), ha="right", va="center", color="red"
        )
    pictures.style(axes, "", f"{MEASURES[measure][0]}: mean (bar) and each seed (dot)", "")
    axes.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    pictures.save(figure, path)


# Anomaly scores -------------------------------------------------------------------------------------------------------


def rows_of_scores(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each score of each cell in a summary, with the cell's normal class and seed."""
    own = ("normal", "seed")  # which results of the first versions had in the cell
    return [
        {**{name: cell[name] for name in own if name in cell}, **row}
        for cell in cells
        for row in cell["scores"]
    ]


def compare_scores(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """AUROC (anomalies positive) of each score: a column for each normal class, and their mean, the best marked.

    A column is the mean over seeds; behind ± of the mean stands its standard deviation over seeds. The 95 % interval is
    that of the mean, from the intervals of the cells, as if each had test images of its own.
    """
    if not rows:
        return pd.DataFrame(columns=["score", "on", "mean", "95 %"])
    frame = pd.DataFrame(rows)
    frame["half"] = frame["auroc_95"].map(lambda interval: (interval[1] - interval[0]) / 2)
    by = frame.groupby(["score", "on"], sort=False)
    columns = list(dict.fromkeys(frame["normal"]))
    classes = frame.pivot_table("auroc", ["score", "on"], "normal").loc[list(by.groups), columns]
    entries = classes.map("{:.3f}".format).where(classes.notna(), "")
    table = entries.mask(classes == classes.max(), "*" + entries)
    means = classes.mean(axis=1)
    deviations = frame.groupby(["score", "on", "seed"])["auroc"].mean().groupby(level=["score", "on"]).std()
    table["mean"] = [
        ("*" if mean == means.max() else "")
        + f"{mean:.3f}"
        + ("" if np.isnan(deviations[key]) else f" ± {deviations[key]:.3f}")
        for key, mean in means.items()
    ]
    table["95 %"] = [f"± {np.sqrt((part**2).sum()) / len(part):.3f}" for _, part in by["half"]]
    return table.reset_index()
