"""``python -m tests.soak [SUITE ...]``: run the suites, print their figures, write them as JSON."""

import argparse
import importlib
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pyro_vje.runs.files import write_json

SUITES = ("kills", "fuzz")
"""Modules here with ``run(quick, seed) -> dict``, which raises AssertionError where a promise is broken."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--quick", action="store_true", help="the short form, of which `make test` runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no suite {', '.join(sorted(unknown))}: choose among {', '.join(SUITES)}")
    about = {
        "command": " ".join(["python", "-m", "tests.soak", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "lightning")},
        "cores": os.cpu_count(),
        "seed": options.seed,
    }
    broken, figures = [], {}
    for name in options.suites or SUITES:
        began = time.monotonic()
        try:
            figures[name] = importlib.import_module(f"{__package__}.{name}").run(options.quick, options.seed)
        except AssertionError as error:
            broken.append(name)
            figures[name] = {"broken": str(error)}
            print(f"{name}: {error}", file=sys.stderr)
        figures[name]["seconds"] = round(time.monotonic() - began, 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {**about, **figures})
    print(f"{options.out}" + (f"; BROKEN: {', '.join(broken)}" if broken else ""))
    return 1 if broken else 0


sys.exit(main())
