import dataclasses
import logging
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pyro_vje.cli import options
from pyro_vje.launch import is_first_process

log = logging.getLogger("pyro_vje")


@options.command("train")
@options.recipe
@options.training()
@click.option("--out", type=options.ANY, metavar="RUN", help="Run folder. [default: runs/DATASET-N]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, to more --epochs if so said.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.pass_context
def train(ctx: click.Context, out: Path | None, resume: bool, overwrite: bool, **settings: Any) -> None:
    """Pretrain a model on images, without their labels.

    Leaves a run folder with the weights, metrics.csv, pictures and what resuming needs. Stopped or killed at any
    moment, it goes on with --resume and ends as if it had not been: a checkpoint is written after every epoch, every
    ten minutes, and on Ctrl-C or SIGTERM.
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite replaces it: leave one out")
    if resume and out is None:
        raise click.UsageError("--resume needs the run to go on with: name it (--out RUN)")
    config = options.train_config(settings) if not resume else None

    from pyro_vje import train
    from pyro_vje.runs.folder import read_info
    from pyro_vje.training.run import refuse_changes

    if config is None:
        given = {name for name in settings if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
        stored = read_info(out or Path())
        config = dataclasses.replace(stored.config, **{name: settings[name] for name in given})
        # Also what is a default: `train` cannot tell whether that was said.
        refuse_changes(out or Path(), stored, {name: config.to_dict()[name] for name in given})
    folder = train(config, out, resume=resume, overwrite=overwrite)
    if is_first_process():
        log.info("which images are strange: pyro-vje score --ckpt %s --data FOLDER", folder)
        log.info("how good the features are: pyro-vje eval --ckpt %s", folder)
        click.echo(folder)
