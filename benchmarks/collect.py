"""``python -m benchmarks.collect FOLDER --out FILE``: what an ablation or a protocol left, as one JSON of results.

Adds what its folder does not hold: the command as it was typed, commit, hardware, threads, and every epoch of every
run, so that tables and curves can be drawn again without the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import describe
from benchmarks.harness import Settings
from pyro_vje.runs.files import write_json
from pyro_vje.training.run import choose_precision

SUMMARIES = ("ablation.json", "table.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collect", description=__doc__)
    parser.add_argument("folder", type=Path, help="of `pyro-vje ablate` or `pyro-vje benchmark`")
    parser.add_argument("--command", required=True, help="what made it, as it was typed")
    parser.add_argument("--data", required=True, help="what the images are, in words")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of the runs")
    parser.add_argument("--commit", help="of the runs, where it is no longer the one checked out")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    path = next((options.folder / name for name in SUMMARIES if (options.folder / name).is_file()), None)
    if path is None:
        parser.error(f"{options.folder} holds none of {', '.join(SUMMARIES)}: is it the folder of a finished command?")
    about = describe(options.command, Settings(False, options.threads, choose_precision("auto")))
    about["commit"] = options.commit or about["commit"]
    summary = json.loads(path.read_text())
    for cell in summary["cells"]:
        if "name" in cell:
            cell["metrics"] = epochs(options.folder / "cells" / cell["name"] / "metrics.csv")
    # The date is that of the runs.
    write_json(options.out, {**about, **summary, "versions": about["versions"], "data": options.data})


def epochs(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.csv`` as numbers, ``None`` where an epoch measured nothing."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{name: float(value) if value else None for name, value in row.items()} for row in csv.DictReader(file)]


if __name__ == "__main__":
    main()
