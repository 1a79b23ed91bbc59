"""``pyro-vje train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pyro_vje.cli import options


@click.command("train")
@options.train_settings()
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="RUN", help="Run folder. [default: runs/DATASET-N]"
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with the settings stored there.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.pass_context
def train_command(
    ctx: click.Context, out: Path | None, resume: bool, overwrite: bool, **settings: Any
) -> None:
    """Pretrain a model on images, without their labels.

    Leaves a run folder with the weights, metrics.csv, pictures and what resuming needs. Stopped or killed at any
    moment, it goes on with --resume and ends as if it had not been: a checkpoint is written after every epoch, every
    ten minutes, and on Ctrl-C or SIGTERM.
    """
    if resume:
        unsaid = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
        given = [name for name in ("recipe", *settings) if ctx.get_parameter_source(name) not in unsaid]
        if overwrite or given:
            flags = ", ".join("--" + name.replace("_", "-") for name in [*given, *["overwrite"] * overwrite])
            raise click.UsageError(f"--resume goes on with the run's own settings: leave out {flags}")
        if out is None:
            raise click.UsageError("--resume needs the run to go on with: name it (--out RUN)")
    config = options.train_config(settings)

    from pyro_vje.training.run import train

    click.echo(train(config, out, resume=resume, overwrite=overwrite))
