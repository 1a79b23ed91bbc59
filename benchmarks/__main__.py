"""``python -m benchmarks``: run what is asked for, print a table, write JSON."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks.harness import BENCHMARKS, Growth, Result, Settings, table
from benchmarks.rivals import installed
from benchmarks.speed import ROOT  # and its functions enter the registry
from pyro_vje.runs.files import write_json
from pyro_vje.training.run import choose_precision


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that the command line names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the benchmarks themselves")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--threads", type=int, help="CPU threads and workers (default: every core)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    settings = Settings(options.quick, torch.get_num_threads(), choose_precision("auto"))
    about = describe(shlex.join(["python", "-m", "benchmarks", *arguments]), settings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    torch.manual_seed(0)
    for name in options.only or BENCHMARKS:
        print(f"{name} ...", file=sys.stderr)
        with pyro.validation_enabled(False):
            results += BENCHMARKS[name](settings)
        # After each: a run that is broken off leaves what it has.
        write_json(options.out, {**about, **as_json(results)})
    print(table(results))
    print(f"{about['hardware']['cpu']}, {settings.threads} threads, {settings.device}, {settings.precision}")
    print(f"{about['command']}; written to {options.out}")


def as_json(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """The results as JSON-ready values, rows against rivals and growth apart."""
    kinds: dict[str, list[dict[str, Any]]] = {"rows": [], "growth": []}
    for result in results:
        values = dataclasses.asdict(result).items()  # JSON has no NaN, the time of what was not there to be measured
        plain = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}
        kinds["growth" if isinstance(result, Growth) else "rows"].append(plain)
    return kinds


def describe(command: str, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on: hardware, versions, command, date, commit, threads, precision."""
    packages = {"pyro_vje": "pyro-vje", "pyro": "pyro-ppl", "torch": "torch", "torchvision": "torchvision"}
    packages |= {name: name for name in ("lightning", "kornia", "lightly")}
    versions = {package: version(package) for module, package in packages.items() if installed(module)}
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **versions},
        **dataclasses.asdict(settings),
    }


def cpu_name() -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that was measured, ``+`` appended where the package differs from it."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
