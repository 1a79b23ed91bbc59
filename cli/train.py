"""``pyro-vje train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from pyro_vje.cli import options

from pyro_vje.config import DATASET_DEFAULTS, TrainConfig

DEFAULTS = TrainConfig()


def setting(flag: str, help: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option for the `TrainConfig` field of the same name, with that field's default."""
    default = getattr(DEFAULTS, flag.partition("/")[0].lstrip("-").replace("-", "_"))
    if default is None and "[default" not in help:
        help += " [default: the data set's]"
    return click.option(flag, default=default, show_default=default is not None, help=help, **kwargs)


@click.command("train")
@setting("--dataset", f"One of {', '.join(DATASET_DEFAULTS)}.")
@options.data_dir
@options.download
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="RUN", help="Run folder. [default: runs/DATASET-N]"
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, with the settings stored there.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--normal-class", metavar="K", help="Pretrain on this class alone (name or index).")
@setting("--image-size", "Side of the square images in pixels.", type=int)
@setting("--encoder", "resnet-small, resnet18, resnet34, resnet50, or your own as module:factory.")
@setting("--embedding-dim", "Dimension D of embedding and latent.", type=int)
@setting("--hidden-dim", "Hidden width of projector and posterior network.", type=int)
@setting("--likelihood", "A likelihood family, or your own as module:function.")
@setting("--df", "Degrees of freedom of the Student-t; inf is the Gaussian limit.", type=float)
@setting("--unit-radius", "Radius of the sphere of directions: 1 or √D.", type=click.Choice(["1", "sqrt-d"]))
@click.option(
    "--radius",
    type=click.Choice(["student-t", "log-student-t", "none"]),
    default=DEFAULTS.radius or "none",
    show_default=True,
    help="Radial factor of the polar families.",
)
@setting("--kl-weight", "Weight of the KL divergence; 1 is the ELBO proper.", type=float)
@setting("--shared-variance/--separate-variance", "Likelihood scale: the posterior's, or learned apart.")
@setting("--epochs", "Passes over the data.", type=int)
@setting("--batch-size", "Images in an optimiser step, over all devices.", type=int)
@setting("--lr", "Learning rate for 256 images; scaled by batch size / 256.", type=float)
@setting("--weight-decay", "Weight decay of kernels and matrices.", type=float)
@setting("--warmup-epochs", "Epochs of linear warm-up. [default: a tenth, at most 10]", type=float)
@setting("--num-particles", "Samples of the latent an image and direction.", type=int)
@setting("--devices", "GPUs, or processes on the CPU.", type=int)
@setting("--precision", "auto is bf16 where the hardware has it.", type=click.Choice(["auto", "32", "bf16"]))
@setting("--compile/--no-compile", "Compile the encoder.")
@setting(
    "--residency",
    "Images in memory or decoded as they come.",
    type=click.Choice(["auto", "memory", "stream"]),
)
@setting("--workers", "Decoding processes of a streamed data set.", type=int)
@setting("--knn-every", "Epochs between k-NN evaluations. [default: ten in a run]", type=int)
@setting("--seed", "Seed of every random draw.", type=int)
@click.pass_context
def train_command(
    ctx: click.Context, out: Path | None, resume: bool, overwrite: bool, **settings: Any
) -> None:
    """Pretrain a model on images, without their labels.

    Leaves a run folder with the weights, metrics.csv, pictures and what resuming needs.
    """
    if resume:
        given = [name for name in settings if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if overwrite or given:
            flags = ", ".join("--" + name.replace("_", "-") for name in [*given, *["overwrite"] * overwrite])
            raise click.UsageError(f"--resume goes on with the run's own settings: leave out {flags}")
    if settings["radius"] == "none":
        settings["radius"] = None

    from pyro_vje.training import train

    try:
        folder = train(dataclasses.replace(DEFAULTS, **settings), out, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        click.echo("stopped: the last finished epoch is kept, and --resume goes on from it", err=True)
        ctx.exit(130)
    click.echo(folder)
