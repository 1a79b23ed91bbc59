"""The ``pyro-vje`` command: parse, call, print. Commands import what they call when they run."""

import io
import logging
import os
import signal
import sys
import threading
import warnings
from importlib import import_module
from types import FrameType
from typing import Any, TextIO

import click

from pyro_vje import __version__
from pyro_vje.launch import is_first_process
from pyro_vje.progress import clear_line

COMMANDS = {
    "inspect": "score", "train": "train", "eval": "outputs", "ablate": "experiments", "benchmark": "experiments",
    "score": "score", "calibrate": "score", "maps": "score", "embed": "outputs", "export": "outputs",
}  # fmt: skip
"""The file of each, which names the command as it is called."""
EXIT_CODES = {FloatingPointError: 3, ValueError: 2, OSError: 2, MemoryError: 4}
EXIT_MEMORY, EXIT_BUG, EXIT_SIGNAL = 4, 70, 128
LEVELS = click.Choice(["debug", "info", "warning", "error"])
log = logging.getLogger("pyro_vje")


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Outside of training, which finishes its step first."""
    stop = KeyboardInterrupt("stopped")
    stop.signum = signum  # type: ignore[attr-defined]
    raise stop


def _unraisable(lost: Any) -> None:
    """A request to stop that Python drops, as it came in a destructor, is made again when that has ended."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), getattr(lost.exc_value, "signum", signal.SIGINT)))
    again.daemon = True
    again.start()


class Commands(click.Group):
    """Turns errors into one line on stderr: what, where, what to do; ``--debug`` lets the traceback through."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is written as a number
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: D102
        before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
        try:
            if threading.current_thread() is threading.main_thread():
                ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, before))
                signal.signal(signal.SIGTERM, _terminate)
                sys.unraisablehook = _unraisable
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt as stop:
            click.echo(str(stop) or "stopped", err=True)
            ctx.exit(EXIT_SIGNAL + getattr(stop, "signum", signal.SIGINT))
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), EXIT_BUG)
            said = str(error)
            if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for its name
                code, said = EXIT_MEMORY, f"{said}: lower --batch-size"
            elif code == EXIT_MEMORY:
                said = said or "out of memory: lower --batch-size"
            elif isinstance(error, OSError) and error.filename is not None:
                said = f"{os.fsdecode(error.filename)}: {error.strerror}"
            elif code == EXIT_BUG:
                said = f"a bug in pyro-vje, please report it: {type(error).__name__}: {said} "
                said += "(pyro-vje --debug before the command shows the traceback)"
            failure = click.ClickException(" ".join(said.splitlines()))
            failure.exit_code = code  # type: ignore[misc]
            raise failure from error
        finally:
            sys.unraisablehook = hook
            clear_line()


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines of the log where no line of progress is left on the screen."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        clear_line()
        super().emit(record)


def _log_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Libraries' warnings are for those who work on this package: ``--log-level debug`` shows them."""
    log.debug("%s: %s: %s", filename, category.__name__, message)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="pyro-vje")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.option("--log-level", type=LEVELS, default="info", show_default=True, help="How much goes to stderr.")
def main(debug: bool, log_level: str) -> None:
    """Variational Joint Embedding: probabilistic image representations without labels.

    Train on a data set or any folder of images, evaluate the representation, score images by their likelihood.

    Exit codes: 0 success, 1 some images could not be read, 2 usage or bad input, 3 training diverged, 4 not enough
    memory, 70 a bug, 130 stopped by Ctrl-C, 143 stopped by SIGTERM; after both, what stderr says goes on.
    """
    log.handlers, log.propagate = [Lines(sys.stderr)], False
    # The other processes of a training run would repeat what the first says.
    log.setLevel(log_level.upper() if is_first_process() else "WARNING")
    warnings.showwarning = _log_warning


for name, file in COMMANDS.items():
    main.add_command(getattr(import_module(f"pyro_vje.cli.{file}"), name))
