"""The ``pyro-vje`` command: parse, call, print. Commands import what they call when they run."""

from __future__ import annotations

import logging
import sys
from typing import Any

import click
from pyro_vje.cli.ablate import ablate_command
from pyro_vje.cli.benchmark import benchmark_command
from pyro_vje.cli.evaluate import eval_command
from pyro_vje.cli.export import export_command
from pyro_vje.cli.score import embed_command, score_command
from pyro_vje.cli.train import train_command

from pyro_vje import __version__

EXIT_UNREADABLE, EXIT_USAGE, EXIT_DIVERGED, EXIT_STOPPED = 1, 2, 3, 130


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
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(EXIT_STOPPED)
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
    130 stopped by Ctrl-C.
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
main.add_command(export_command)
