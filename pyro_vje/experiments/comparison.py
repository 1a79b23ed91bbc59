"""Cells of an ablation side by side: a CSV, a table of means and spreads over seeds, and a picture."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pyro_vje.config import TrainConfig
from pyro_vje.model.likelihoods import FAMILIES, SETTINGS
from pyro_vje.pages.pictures import BLUE, GREY, VERMILION
from pyro_vje.runs.files import check_form, write_atomic

MEASURES = {
    "knn": ("k-NN", ".3f"),
    "linear": ("linear", ".3f"),
    "auroc": ("AUROC", ".3f"),
    "effective_rank": ("eff. rank", ".1f"),
    "posterior_snr": ("post. SNR", ".2f"),
    "loss": ("loss", ".2f"),
    "seconds": ("seconds", ".0f"),
}
"""What is measured of a cell: heading and format in the table."""


NOT_USED = "-"
"""What the table says of a setting that a likelihood does not look at."""


@dataclass(frozen=True)
class Cell:
    """A cell that has been run: its name and settings, and what came of it.

    Attributes
    ----------
    status : str
        ``finished``; ``diverged``, the loss stopped being finite; or ``failed``, the settings do not go together.
    error : str or None
        What the last two died of.
    measures : dict
        Numbers by the names in `MEASURES`; what does not apply is missing.
    protocols : dict
        How they were measured.
    """

    name: str
    config: TrainConfig
    status: str
    error: str | None
    measures: dict[str, float]
    protocols: dict[str, Any]

    @classmethod
    def from_dict(cls, values: Any) -> Cell:
        """Read what `dataclasses.asdict` gives, with the configuration as its `TrainConfig.to_dict`.

        Raises
        ------
        ValueError
            If something is missing or of another type.
        """
        form = {
            "name": str,
            "config": dict,
            "status": str,
            "error": str | None,
            "measures": dict,
            "protocols": dict,
        }
        kept = {name: check_form(values, form)[name] for name in form}
        check_form(kept["measures"], dict.fromkeys(kept["measures"], int | float))
        check_form(kept["protocols"], dict.fromkeys(kept["protocols"], dict))
        return cls(**{**kept, "config": TrainConfig.from_dict(kept["config"])})


def text(value: Any) -> str:
    """A setting's value as written in tables and names: ``5``, ``true``, ``none``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _setting(config: TrainConfig, name: str) -> str:
    """A setting as text, empty where the likelihood does not use it."""
    family = FAMILIES.get(config.likelihood)
    ignored = family is not None and name in SETTINGS and name not in family.uses
    return "" if ignored else text(getattr(config, name))


def format_csv(cells: Sequence[Cell], names: Sequence[str]) -> str:
    """A row for each cell: its settings called ``names``, its measures, its status."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["cell", *names, *MEASURES, "status", "error"])
    for cell in cells:
        settings = [_setting(cell.config, name) for name in names]
        numbers = [cell.measures.get(name, "") for name in MEASURES]
        writer.writerow([cell.name, *settings, *numbers, cell.status, cell.error or ""])
    return stream.getvalue()


def _by_setting(cells: Sequence[Cell], names: Sequence[str]) -> list[tuple[dict[str, str], list[Cell]]]:
    """Cells that differ in nothing but their seed, together, with the values of their settings."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    names = [name for name in names if name != "seed"]
    for cell in cells:
        groups.setdefault(tuple(_setting(cell.config, name) or NOT_USED for name in names), []).append(cell)
    return [(dict(zip(names, values, strict=True)), members) for values, members in groups.items()]


def _varied(groups: Sequence[tuple[dict[str, str], list[Cell]]]) -> list[str]:
    settings = [values for values, _ in groups]
    return [
        name for name in (settings or [{}])[0] if len({values[name] for values in settings} - {NOT_USED}) > 1
    ]


def _spread(values: Sequence[float], style: str) -> str:
    """Mean ± half the range: at two or three seeds a standard deviation would say no more."""
    mean = format(sum(values) / len(values), style)
    return f"{mean} ± {format((max(values) - min(values)) / 2, style)}" if len(values) > 1 else mean


def format_table(
    cells: Sequence[Cell], names: Sequence[str], common: Mapping[str, Any], protocols: Mapping[str, Any]
) -> str:
    """A line for each setting with the mean and spread of its seeds, under what all of them have in common.

    Parameters
    ----------
    cells : sequence of Cell
        In the order of the lines.
    names : sequence of str
        The settings in which cells may differ.
    common, protocols : mapping
        The other settings, and how the numbers were measured.
    """
    groups = _by_setting(cells, names)
    varied = _varied(groups)
    measured = [name for name in MEASURES if any(name in cell.measures for cell in cells)]
    lines = [[*varied, "seeds", *(MEASURES[name][0] for name in measured), ""]]
    for settings, members in groups:
        numbers = []
        for name in measured:
            values = [cell.measures[name] for cell in members if name in cell.measures]
            numbers.append(_spread(values, MEASURES[name][1]) if values else "-")
        states = Counter(cell.status for cell in members)
        trouble = ", ".join(f"{count} {status}" for status, count in states.items() if status != "finished")
        lines.append([*(settings[name] for name in varied), str(states["finished"]), *numbers, trouble])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    constant = {
        name: value
        for settings, _ in groups
        for name, value in settings.items()
        if name not in varied and value != NOT_USED
    }
    notes = [", ".join(f"{name} {text(value)}" for name, value in {**common, **constant}.items())]
    notes.append("seeds: cells with a result; numbers: mean ± half the range over them")
    for name, protocol in protocols.items():
        notes.append(f"{name}: " + ", ".join(f"{key} {text(value)}" for key, value in protocol.items()))
    return "\n".join([*rows, "", *(textwrap.fill(note, 110, subsequent_indent="    ") for note in notes)])


def plot_cells(cells: Sequence[Cell], names: Sequence[str], path: Path) -> None:
    """The settings by their mean k-NN accuracy (AUROC where there is none), best on top, a dot for each seed."""
    groups = _by_setting(cells, names)
    varied = _varied(groups)
    present = {name for cell in cells for name in cell.measures}
    measure = next((name for name in ("knn", "auroc", "posterior_snr") if name in present), None)
    if measure is None:
        return
    points = [
        (
            ", ".join(f"{name} {settings[name]}" for name in varied if settings[name] != NOT_USED)
            or settings["likelihood"],
            [cell.measures[measure] for cell in members if measure in cell.measures],
            sorted({cell.status for cell in members} - {"finished"}),
        )
        for settings, members in groups
    ]
    points.sort(key=lambda point: sum(point[1]) / len(point[1]) if point[1] else -math.inf)
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(points)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for y, (_, values, trouble) in enumerate(points):
        if values:
            mean = sum(values) / len(values)
            axes.plot([min(values), max(values)], [y, y], color=GREY, linewidth=1)
            axes.plot(values, [y] * len(values), "o", color=BLUE, markersize=4, alpha=0.6, linewidth=0)
            axes.plot([mean], [y], "|", color=BLUE, markersize=11, markeredgewidth=2)
        if trouble:
            axes.annotate(
                " and ".join(trouble), (0.99, y), xycoords=("axes fraction", "data"),
                ha="right", va="center", fontsize=8, color=VERMILION,
            )  # fmt: skip
    axes.set_yticks(range(len(points)), [label for label, *_ in points], fontsize=8, parse_math=False)
    axes.set_ylim(-0.6, len(points) - 0.4)
    axes.set_xlabel(f"{MEASURES[measure][0]}: mean (bar) and each seed (dot)", fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    write_atomic(path, stream.getvalue())
