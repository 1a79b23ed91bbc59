"""Runs that a comparison trains, measures and writes down, each once, side by side in a folder.

``cells/NAME`` is a run folder, ``cells/NAME.json``, written last, what came of it; beside them lie summary and table.
"""

import logging
import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd

from pyro_vje.config import TrainConfig
from pyro_vje.runs.files import check_form, is_begun, read_json, write_atomic, write_json
from pyro_vje.runs.folder import CONFIG, WEIGHTS, read_info, versions
from pyro_vje.runs.stopping import GOES_ON, Interrupted
from pyro_vje.training.run import train

log = logging.getLogger("pyro_vje")

CELLS = "cells"
NOT_USED = "-"  # in tables: a setting that does nothing in a cell, a number that is not there
NO_NUMBER = ("download", "workers")  # how images are fetched and decoded may change in a folder
FORM: dict[str, Any] = {"name": str, "config": dict, "status": str, "error": str | None}
FORM |= {"measures": dict, "protocols": dict, "scores": list}
SCORE_FORM = {"normal": str, "seed": int, "score": str, "on": str, "auroc": float, "auroc_95": list}


@dataclass(frozen=True)
class Cell:
    """A cell that has been run: its settings, measures (numbers by name), and how well each anomaly score does."""

    name: str
    config: TrainConfig
    status: str  # finished, diverged, or failed: settings and data do not go together, as the error says
    error: str | None
    measures: dict[str, float] = field(default_factory=dict)
    protocols: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON-ready values."""
        return {**vars(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read `to_dict`'s form; ``ValueError`` if something is missing or of another type."""
        check_form(values, FORM)
        check_form(values["measures"], dict.fromkeys(values["measures"], int | float))
        check_form(values["protocols"], dict.fromkeys(values["protocols"], dict))
        for row in values["scores"]:
            if [type(end) for end in check_form(row, SCORE_FORM)["auroc_95"]] != [float, float]:
                raise ValueError(f"auroc_95 is {row['auroc_95']}, not two numbers")
        return cls(**{**{x: values[x] for x in FORM}, "config": TrainConfig.from_dict(values["config"])})


Measure = Callable[[TrainConfig, Path], dict[str, Any]]
Table = tuple[pd.DataFrame, pd.DataFrame, list[str]]  # a row for each number, a table of strings, notes
Tabulate = Callable[[list[Cell]], Table]


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to: its folder, all cells run in it so far, and its table as text."""

    folder: Path
    cells: list[Cell]
    table: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        """How well each anomaly score does in each cell."""
        return [row for cell in self.cells for row in cell.scores]


@dataclass
class Cells:
    """The folder of a comparison, new or of the same one (else a ``FileExistsError``); making this writes nothing."""

    folder: Path
    summary: str  # name of its files
    settings: Mapping[str, Any]  # that cells have in common, JSON-ready; those among the axes are left out
    axes: Sequence[str]  # settings in which cells may differ

    def __post_init__(self) -> None:
        free = {*self.axes, *NO_NUMBER}
        self.settings = {name: self.settings[name] for name in self.settings if name not in free}
        path = self.folder / f"{self.summary}.json"
        if not path.is_file() and is_begun(self.folder):
            raise FileExistsError(f"{self.folder} exists and holds no {path.name}: name another (--out)")
        new = self._fixed({"axes": [*self.axes], "settings": self.settings})
        old = read_json(path, self._fixed) if path.is_file() else new
        default = TrainConfig().resolved().to_dict()  # of a setting that the version before did not have
        for name in sorted(old.keys() | new.keys()):
            before, now = (values.get(name, default.get(name)) for values in (old, new))
            if before != now:
                other = f"{self.folder} holds results with {name} {before}, not {now}"
                raise FileExistsError(f"{other}: keep that setting, or name another folder (--out)")

    def _fixed(self, summary: Any) -> dict[str, Any]:
        """The settings in a summary."""
        found = check_form(summary, {"axes": list, "settings": dict})
        return {**dict.fromkeys(map(str, found["axes"]), "varied"), **found["settings"]}

    def read(self) -> list[Cell]:
        """All cells run so far, by their settings."""

        def by_setting(cell: Cell) -> list[tuple[bool, Any]]:
            return [(value is None, value) for value in (getattr(cell.config, name) for name in self.axes)]

        paths = sorted((self.folder / CELLS).glob("*.json"))
        return sorted((read_json(path, Cell.from_dict) for path in paths), key=by_setting)

    def run(self, configs: Mapping[str, TrainConfig], measure: Measure, tabulate: Tabulate) -> Comparison:
        """Train and measure the cells, by name, that are not done or have failed; write the tables after each."""
        done = {cell.name for cell in self.read() if cell.status != "failed"}
        todo = [name for name in configs if name not in done]
        result = self.summarise(tabulate)
        try:
            for number, name in enumerate(todo, 1):
                log.info("cell %d of %d: %s", number, len(todo), name)
                self.write(self._run(name, configs[name].resolved(), measure))
                result = self.summarise(tabulate)
        except KeyboardInterrupt as stop:
            raise Interrupted.after(stop, GOES_ON) from None
        return result

    def _run(self, name: str, config: TrainConfig, measure: Measure) -> Cell:
        folder, began = self.folder / CELLS / name, time.monotonic()
        try:
            if not (folder / WEIGHTS).is_file():
                train(config, folder, resume=(folder / CONFIG).is_file())
            found = measure(config, folder)
            measures = {"seconds": round(time.monotonic() - began, 1), **found.pop("measures", {})}
            return Cell(name, read_info(folder).config, "finished", None, measures, **found)
        except (FloatingPointError, ValueError) as error:
            status = "diverged" if isinstance(error, FloatingPointError) else "failed"
            log.warning("%s %s: %s", name, status, error)
            return Cell(name, config, status, str(error))

    def write(self, cell: Cell) -> None:
        """Write down a cell that is done."""
        write_json(self.folder / CELLS / f"{cell.name}.json", {**cell.to_dict(), "versions": versions()})

    def summarise(self, tabulate: Tabulate) -> Comparison:
        """Write all of it as JSON, protocols, which are the same for every cell, once; and the tables."""
        (self.folder / CELLS).mkdir(parents=True, exist_ok=True)
        cells = self.read()
        rows = [{**cell.to_dict(), "protocols": {}} for cell in cells]
        about = {"versions": versions(), "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())}
        about |= {"protocols": protocols_of(cells), "settings": self.settings, "axes": self.axes}
        write_json(self.folder / f"{self.summary}.json", {**about, "cells": rows})
        return Comparison(self.folder, cells, write_table(self.folder, self.summary, *tabulate(cells)))


def protocols_of(cells: Sequence[Cell]) -> dict[str, Any]:
    """How the numbers were measured, which is the same for every cell."""
    return next((cell.protocols for cell in cells if cell.status == "finished"), {})


def text(value: Any) -> str:
    """A setting's value as written in names and tables: ``5``, ``true``, ``none``."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def spread(values: pd.Series, style: str) -> str:
    """Mean, ± standard deviation where there are several values."""
    values = values.dropna()
    deviation = f" ± {values.std():{style}}" if len(values) > 1 else ""
    return f"{values.mean():{style}}{deviation}" if len(values) else NOT_USED


def write_table(folder: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, notes: Sequence[str]) -> str:
    """Write rows as CSV, a table of strings (``**best**``) as Markdown and LaTeX, and return it for a terminal."""
    write_atomic(folder / f"{name}.csv", rows.to_csv(index=False, lineterminator="\n"))
    write_atomic(folder / f"{name}.md", "\n\n".join([markdown(table), *notes]) + "\n")
    latex = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", table.to_latex(index=False, escape=True))
    write_atomic(folder / f"{name}.tex", "".join(f"% {x}\n" for x in notes) + latex.replace("±", r"$\pm$"))
    plain = table.map(lambda entry: entry.strip("*"))
    simple = str(plain.to_markdown(index=False, tablefmt="simple", disable_numparse=True))
    notes = [note.replace(", best in bold", "") for note in notes]  # of which a terminal has none
    lines = [textwrap.fill(note, 110, subsequent_indent="    ") for note in notes]
    return "\n".join([*map(str.rstrip, simple.splitlines()), "", *lines])


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown."""
    escaped = table.map(lambda entry: entry.replace("|", "\\|"))
    return str(escaped.to_markdown(index=False, disable_numparse=True))
