"""The ``pyro-vje`` command: parse, call, print. Commands import what they call when they run."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import click
from pyro_vje.cli.ablate import ablate_command
from pyro_vje.cli.benchmark import benchmark_command
from pyro_vje.cli.evaluate import eval_command
from pyro_vje.cli.score import embed_command, score_command
from pyro_vje.cli.train import train_command

from pyro_vje import __version__
from pyro_vje.interruption import EXIT_SIGNAL, handle, raise_interrupted, restored_handlers

EXIT_UNREADABLE, EXIT_USAGE, EXIT_DIVERGED = 1, 2, 3


class Failure(click.ClickException):
    """An error that the user can mend: one line, no traceback."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]


class Commands(click.Group):
    """Turns the package's errors into one line on stderr; ``--debug`` lets the traceback through."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            with restored_handlers():
                handle(signal.SIGTERM, raise_interrupted)
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            click.echo(str(stop) or "stopped", err=True)
            ctx.exit(EXIT_SIGNAL + getattr(stop, "signum", signal.SIGINT))
        except FloatingPointError as error:
            self._fail(ctx, error, EXIT_DIVERGED)
        except (ValueError, OSError) as error:
            self._fail(ctx, error, EXIT_USAGE)

    @staticmethod
    def _fail(ctx: click.Context, error: Exception, exit_code: int) -> None:
        if ctx.params.get("debug"):
            raise error
        raise Failure(str(error), exit_code) from error


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

    Exit codes: 0 success, 1 some images could not be read, 2 usage or bad input, 3 training diverged,
    130 stopped by Ctrl-C, 143 stopped by SIGTERM; after both, what stderr says goes on.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("pyro_vje")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(log_level.upper())


main.add_command(train_command)
main.add_command(eval_command)
main.add_command(ablate_command)
main.add_command(benchmark_command)
main.add_command(score_command)
main.add_command(embed_command)
