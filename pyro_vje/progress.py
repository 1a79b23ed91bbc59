"""How far long work is: a line that is rewritten in a terminal, a line of the log a minute elsewhere."""

import logging
import shutil
import sys
import time

log = logging.getLogger("pyro_vje")

MINUTE, REDRAWN = 60.0, 0.2  # seconds between lines of the log, and between drawings in a terminal
_shown = False  # whether the terminal's last line is ours


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``3 min``, ``2 h 5 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def clear_line() -> None:
    """Remove the line from the terminal, where there is one, before something else is written there."""
    global _shown
    if _shown:
        _shown = False
        print("\r" + " " * _width(), end="\r", file=sys.stderr, flush=True)


def _width() -> int:
    return shutil.get_terminal_size().columns - 1


class Progress:
    """Of work on ``total`` things: ``scoring: 300 of 1000 images, 2 min left``."""

    def __init__(self, what: str = "", total: int = 0, things: str = "images") -> None:
        self.what, self.total, self.things, self.done = what, total, things, 0
        self.began = self.said = time.monotonic()

    def add(self, done: int) -> None:
        """So many more are done; the line goes away with the last."""
        self.done += done
        left = (time.monotonic() - self.began) / max(1, self.done) * (self.total - self.done)
        if self.done >= self.total:
            clear_line()
        elif self.due():
            self.show(f"{self.what}: {self.done} of {self.total} {self.things}, {duration(left)} left")

    def due(self) -> bool:
        """Whether it is time for another line."""
        wait = REDRAWN if sys.stderr.isatty() else MINUTE
        return log.isEnabledFor(logging.INFO) and time.monotonic() - self.said >= wait

    def show(self, line: str) -> None:
        """Write a line, cut to the width of the terminal."""
        global _shown
        self.said = time.monotonic()
        if not sys.stderr.isatty():
            log.info(line)
            return
        _shown = True
        print(f"\r{line[: _width()]:<{_width()}}", end="", file=sys.stderr, flush=True)
