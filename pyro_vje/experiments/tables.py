"""A table of strings in every form it is wanted in: CSV of the numbers behind it, Markdown, LaTeX, text."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_vje.runs.files import write_atomic

NOT_USED = "-"
"""What a table says of what does not apply: a setting that does nothing in a cell, a number that is not there."""


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


def write(folder: Path, name: str, rows: pd.DataFrame, table: pd.DataFrame, notes: Sequence[str]) -> str:
    """Write rows as CSV, a table of strings (``**best**``) as Markdown and LaTeX, and return it for a terminal."""
    write_atomic(folder / f"{name}.csv", rows.to_csv(index=False, lineterminator="\n"))
    write_atomic(folder / f"{name}.md", "\n\n".join([markdown(table), *notes]) + "\n")
    latex = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", table.to_latex(index=False, escape=True))
    comments = "".join(f"% {note}\n" for note in notes)
    write_atomic(folder / f"{name}.tex", comments + latex.replace("±", r"$\pm$"))
    plain = table.map(lambda entry: entry.strip("*"))
    simple = str(plain.to_markdown(index=False, tablefmt="simple", disable_numparse=True))
    lines = [textwrap.fill(note, 110, subsequent_indent="    ") for note in notes]
    return "\n".join([*map(str.rstrip, simple.splitlines()), "", *lines])


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown."""
    escaped = table.map(lambda entry: entry.replace("|", "\\|"))
    return str(escaped.to_markdown(index=False, disable_numparse=True))
