"""Timing one thing against another in turns, and the table that comes of it; knows nothing of what is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Any

import torch

Work = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """Sizes for a trial (``quick``) or in full, CPU threads, and Lightning's name of the precision."""

    quick: bool
    threads: int
    precision: str

    @property
    def device(self) -> torch.device:
        """The GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def repetitions(self) -> int:
        """Timings of each side that a ratio is the median of."""
        return 2 if self.quick else 5

    def command(self, name: str) -> str:
        """What runs one benchmark as it is run here."""
        return f"python -m benchmarks --only {name} --threads {self.threads}{' --quick' * self.quick}"

    def autocast(self) -> torch.autocast:
        """The precision that training chooses, for rivals too."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")


@dataclass
class Row:
    """Seconds a call and the ratio of our time to the rival's: below 1 we are faster; ``wanted`` is an upper bound.

    A row without numbers says why in ``note``. ``images`` is how many a call works on. What is said in no row of its
    own, the registry fills in: the benchmark's name, the command that runs it alone, threads and precision.
    """

    what: str
    rival: str
    ours_seconds: float = math.nan
    rival_seconds: float = math.nan
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    repetitions: int = 0
    wanted: float | None = None
    images: int | None = None
    note: str = ""
    precision: str = ""
    benchmark: str = ""
    command: str = ""
    threads: int = 0

    def cells(self) -> list[str]:
        """The row as text, for the columns of ``HEADER``."""
        ratio = f"{self.ratio:.3f} [{self.ratio_min:.3f}, {self.ratio_max:.3f}]"
        wanted = "" if self.wanted is None else f"≤ {self.wanted:.3g}"
        rate = f"{self.images / self.ours_seconds:,.0f}" if self.images else ""
        times = (_seconds(self.ours_seconds), _seconds(self.rival_seconds))
        return [self.benchmark, self.what, self.rival, *times, ratio, wanted, rate, self.precision]

    def __str__(self) -> str:
        return f"{self.benchmark}: {self.what} against {self.rival}: {self.note}"


HEADER = ["benchmark", "what", "rival", "ours", "rival's", "ratio [min, max]", "wanted", "images/s", "precision"]


@dataclass
class Growth:
    """How a cost grows: points (x, value), and the slope of log value on log x (1: in proportion)."""

    what: str
    variable: str
    unit: str
    points: list[tuple[int, float]]
    slope: float = math.nan
    precision: str = ""
    benchmark: str = ""
    command: str = ""
    threads: int = 0

    def __post_init__(self) -> None:
        logs = [(math.log(x), math.log(y)) for x, y in self.points]
        self.slope = linear_regression(*zip(*logs, strict=True)).slope

    def __str__(self) -> str:
        shown = _seconds if self.unit == "s" else lambda value: f"{value:.0f} {self.unit}"
        points = ", ".join(f"{x}: {shown(value)}" for x, value in self.points)
        return f"{self.benchmark}: {self.what} against {self.variable}: {points}; slope {self.slope:.2f}"


Result = Row | Growth
BENCHMARKS: dict[str, Callable[[Settings], list[Result]]] = {}


def benchmark(
    name: str, cases: Callable[[Settings], Sequence[tuple[Any, ...]]] = lambda settings: [()]
) -> Callable[[Callable[..., Iterable[Result]]], Callable[..., Iterable[Result]]]:
    """Enter a function ``(settings, *case) -> results`` in the registry, to be called for each case."""

    def enter(function: Callable[..., Iterable[Result]]) -> Callable[..., Iterable[Result]]:
        def run(settings: Settings) -> list[Result]:
            results = [result for case in cases(settings) for result in function(settings, *case)]
            for result in results:
                result.benchmark, result.command = name, settings.command(name)
                result.threads = settings.threads
                result.precision = result.precision or settings.precision
            return results

        BENCHMARKS[name] = run
        return function

    return enter


def versus(
    settings: Settings,
    what: str,
    rival: str,
    ours: Work,
    theirs: Work,
    wanted: float | None = None,
    images: int | None = None,
    precision: str = "",
) -> Row:
    """Compare two tasks as the settings say; the ratio is that of neighbours in time, which share disturbances.

    ``precision`` is to be said where it is not that of the settings.
    """
    times = compare(ours, theirs, settings.repetitions, min_seconds=0.0 if settings.quick else 0.2)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    spread = (median(ratios), min(ratios), max(ratios))
    numbers = (median(times[0]), median(times[1]), *spread, len(ratios), wanted, images)
    return Row(what, rival, *numbers, precision=precision)


def compare(
    ours: Work,
    rival: Work,
    repetitions: int,
    *,
    warmup: int = 1,
    min_seconds: float = 0.0,
    clock: Clock = time.perf_counter,
) -> tuple[list[float], list[float]]:
    """Time two tasks in turns, ours first; seconds a call of each, one entry a repetition.

    Parameters
    ----------
    ours, rival : callable
        A task that returns a float has timed itself, in seconds: an epoch without the start of its trainer.
    repetitions : int
        Timings of each.
    warmup : int
        Calls of each beforehand (at least 1), in turns, that count for nothing.
    min_seconds : float
        A timing spans as many calls as fill this time at the warm-up's speed.
    clock : callable
        Gives the time in seconds.

    Raises
    ------
    ValueError
        If there is to be no repetition or no warm-up.
    """
    if repetitions < 1 or warmup < 1:
        raise ValueError(f"repetitions and warmup must be at least 1, not {repetitions} and {warmup}")
    for _ in range(warmup):
        fastest = min(measure(ours, 1, clock), measure(rival, 1, clock))
    calls = min(10_000, max(1, math.ceil(min_seconds / max(fastest, 1e-9))))
    pairs = [(measure(ours, calls, clock), measure(rival, calls, clock)) for _ in range(repetitions)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def measure(work: Work, calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Seconds a call, the device's queue empty before and after."""
    synchronise()
    start = clock()
    own = [seconds for seconds in (work() for _ in range(calls)) if isinstance(seconds, float)]
    synchronise()
    return (sum(own) if own else clock() - start) / calls


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(results: Sequence[Result]) -> str:
    """All measured rows in columns, then a line for each of the rest."""
    measured = [result for result in results if isinstance(result, Row) and result.ratio is not None]
    rows = [HEADER, *(row.cells() for row in measured)] if measured else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines + [str(result) for result in results if result not in measured])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
