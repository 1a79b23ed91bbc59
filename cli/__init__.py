"""The ``pyro-vje`` command: parse, call, print. Commands import what they call when they run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

from pyro_vje import __version__
from pyro_vje.cli.ablate import ablate_command
from pyro_vje.cli.benchmark import benchmark_command
from pyro_vje.cli.evaluate import eval_command
from pyro_vje.cli.export import export_command
from pyro_vje.cli.score import embed_command, score_command
from pyro_vje.cli.train import train_command
from pyro_vje.runs.stopping import EXIT_SIGNAL, handle, raise_interrupted, restored_handlers

EXIT_USAGE, EXIT_DIVERGED, EXIT_MEMORY, EXIT_BUG = 2, 3, 4, 70
CLICKS_OWN = (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError)
log = logging.getLogger("pyro_vje")


class Failure(click.ClickException):
    """An error as one line, without a traceback."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class Commands(click.Group):
    """Turns errors into one line on stderr: what, where, what to do; ``--debug`` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            with restored_handlers():
                handle(signal.SIGTERM, raise_interrupted)
                return super().invoke(ctx)
        except CLICKS_OWN:
            raise
        except KeyboardInterrupt as stop:
            click.echo(str(stop) or "stopped", err=True)
            ctx.exit(EXIT_SIGNAL + getattr(stop, "signum", signal.SIGINT))
        except FloatingPointError as error:
            self._fail(ctx, error, EXIT_DIVERGED)
        except (ValueError, OSError) as error:
            self._fail(ctx, error, EXIT_USAGE)
        except MemoryError as error:
            self._fail(ctx, error, EXIT_MEMORY, "" if str(error) else "out of memory: lower --batch-size")
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which is not imported for its name
                self._fail(ctx, error, EXIT_MEMORY, f"{error}: lower --batch-size")
            self._fail(
                ctx,
                error,
                EXIT_BUG,
                f"a bug in pyro-vje, please report it: {type(error).__name__}: {error} "
                "(pyro-vje --debug before the command shows the traceback)",
            )

    @staticmethod
    def _fail(ctx: click.Context, error: Exception, exit_code: int, message: str = "") -> None:
        if ctx.params.get("debug"):
            raise error
        if not message and isinstance(error, OSError) and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"
        raise Failure(" ".join((message or str(error)).splitlines()), exit_code) from error


def _log_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Libraries' warnings are for those who work on this package: ``--log-level debug`` shows them."""
    log.debug("%s: %s: %s", filename, category.__name__, message)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="pyro-vje")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much to say on stderr.",
)
def main(debug: bool, log_level: str) -> None:
    """Variational Joint Embedding: probabilistic image representations without labels.

    Train on a data set or any folder of images, evaluate the representation, score images by their likelihood.

    Exit codes: 0 success, 1 some images could not be read, 2 usage or bad input, 3 training diverged, 4 not enough
    memory, 70 a bug, 130 stopped by Ctrl-C, 143 stopped by SIGTERM; after both, what stderr says goes on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    # The other processes of a training run would repeat what the first says.
    log.setLevel(log_level.upper() if os.environ.get("LOCAL_RANK", "0") == "0" else "WARNING")
    warnings.showwarning = _log_warning


main.add_command(train_command)
main.add_command(eval_command)
main.add_command(ablate_command)
main.add_command(benchmark_command)
main.add_command(score_command)
main.add_command(embed_command)
main.add_command(export_command)
