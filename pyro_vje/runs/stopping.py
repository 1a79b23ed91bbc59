"""SIGINT and SIGTERM as one exception, raised at once, or noted until a step of training is done."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

GOES_ON = "stopped: what is finished is kept, and the same command goes on from it"


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, by the signal ``signum``; the message says how to go on."""

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum

    @classmethod
    def after(cls, stop: KeyboardInterrupt, message: str) -> Self:
        """The same request to stop, with another message."""
        return cls(message, getattr(stop, "signum", signal.SIGINT))


class StopRequest:
    """The signal (``signum``, or 0) that asked to stop since `install`; asked again, it is done at once."""

    signum = 0

    def install(self) -> None:
        """Note the signals from now on, until the surrounding `restored_handlers` ends."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            _handle(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise Interrupted("stopped", signum)
        self.signum = signum


def _handle(signum: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere it cannot be done
        signal.signal(signum, handler)


@contextmanager
def restored_handlers() -> Iterator[None]:
    """Put the handlers of SIGINT and SIGTERM back at the end."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            _handle(signum, handler)


def follow_parent() -> None:
    """Let this process end with the one that started it, also if that one is killed and cannot say so."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
