"""SIGINT and SIGTERM as one exception, raised at once, or noted until a step of training is done."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_SIGNAL = 128
"""What shells add the number of a signal to, for the exit code of a process that it ended."""
GOES_ON = "stopped: what is finished is kept, and the same command goes on from it"


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop; the message says how to go on.

    Attributes
    ----------
    signum : int
        What asked: SIGINT (Ctrl-C) or SIGTERM.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum

    @classmethod
    def after(cls, stop: KeyboardInterrupt, message: str) -> Interrupted:
        """The same request to stop, with another message."""
        return cls(message, getattr(stop, "signum", signal.SIGINT))


class StopRequest:
    """What was asked by SIGINT or SIGTERM since `install`; asked again, it is done at once.

    Attributes
    ----------
    signum : int
        The signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0

    def install(self) -> None:
        """Note the signals from now on, until the surrounding `restored_handlers` ends."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            handle(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise_interrupted(signum, frame)
        self.signum = signum


def raise_interrupted(signum: int, frame: FrameType | None) -> None:
    """Handle a signal by raising `Interrupted`."""
    raise Interrupted("stopped", signum)


def handle(signum: int, handler: Any) -> None:
    """Set a signal's handler, where that can be done: on the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signum, handler)


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back at the end."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            handle(signum, handler)


class _Worker:
    """Whether this process, started by another one for a part of its work, is at work, and was told to stop."""

    busy = stopped = False


def follow_parent() -> None:
    """Let this process end with the one that started it, also if that one is killed and cannot say so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_SIGNAL + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def work_for_parent() -> None:
    """Let this process of a pool stop when its parent says so, by SIGTERM; its work goes through `unless_stopped`."""
    follow_parent()
    if sys.platform != "win32":
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent alone: asked twice, this would stop at once
    handle(signal.SIGTERM, _stop_worker)


def _stop_worker(signum: int, frame: FrameType | None) -> None:
    _Worker.stopped = True
    if _Worker.busy:  # else it waits for work, and would break the pool it belongs to
        raise_interrupted(signum, frame)


def unless_stopped(work: Callable[[], T]) -> T:
    """Do a piece of work, unless this process was told to stop: a pool hands out some that it cannot cancel.

    Raises
    ------
    Interrupted
        If it was told to stop, before or meanwhile.
    """
    if _Worker.stopped:
        raise Interrupted("stopped", signal.SIGTERM)
    _Worker.busy = True
    try:
        return work()
    except Interrupted:
        _Worker.stopped = True
        raise
    finally:
        _Worker.busy = False
