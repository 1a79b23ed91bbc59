"""Options that several commands share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import click

from pyro_vje.config import DATASET_DEFAULTS, RECIPES, TrainConfig, load_recipe

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = TrainConfig()
DATASETS = click.Choice(list(DATASET_DEFAULTS))

ckpt = click.option(
    "--ckpt",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="RUN",
    help="A run folder, or a weights file (.safetensors).",
)
data_dir = click.option("--data-dir", metavar="DIR", help="Where the data set lies or is downloaded to.")
download = click.option(
    "--download/--no-download", default=True, show_default=True, help="Fetch a missing data set."
)
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Images read and encoded at once; on a CPU raised until passes of the encoder are full.",
)
score_likelihood = click.option(
    "--score-likelihood",
    metavar="FAMILY",
    help="Score with this likelihood family, for instance polar-student-t-exact. [default: the one trained with]",
)
num_particles = click.option(
    "--num-particles",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    help="Samples of the latent an image; they cost no pass of the encoder.",
)
score_seed = click.option("--seed", default=0, show_default=True, help="Seed of every draw.")
trust_plugins = click.option(
    "--trust-plugins", is_flag=True, help="Import code that the run's configuration names (module:attribute)."
)

deterministic = click.option(
    "--deterministic", is_flag=True, help="Kernels that give the same bits every time, on a GPU too."
)

NO_RADIUS = "none"
"""What the command line calls the absent radial factor, ``None`` in `TrainConfig`."""

SETTINGS: tuple[tuple[str, str, Any], ...] = (
    ("--normal-class", "Pretrain on this class alone (name or index). [default: all classes]", str),
    ("--image-size", "Side of the square images in pixels.", int),
    ("--holdout", "Share of the images kept out of training to calibrate scores into p-values.", float),
    ("--encoder", "resnet-small, resnet18, resnet34, resnet50, or your own as module:factory.", str),
    (
        "--projector",
        "Between encoder and embedding: none, a linear map, or an MLP.",
        click.Choice(["none", "linear", "mlp"]),
    ),
    (
        "--embedding-dim",
        "Dimension D of embedding and latent. [default: the encoder's width; behind a projector 128]",
        int,
    ),
    ("--hidden-dim", "Hidden width of projector and posterior network.", int),
    ("--likelihood", "A likelihood family, or your own as module:function.", str),
    ("--df", "Degrees of freedom of the Student-t; inf is the Gaussian limit. [default: D - 2]", float),
    ("--unit-radius", "Radius of the sphere of directions: 1 or √D.", click.Choice(["1", "sqrt-d"])),
    (
        "--radius",
        "Radial factor of the polar families.",
        click.Choice(["student-t", "log-student-t", NO_RADIUS]),
    ),
    (
        "--radius-scale",
        "Scale of the radial factor: one learned number, or shared with the posterior.",
        click.Choice(["learned", "shared"]),
    ),
    ("--analytic-kl/--sampled-kl", "KL divergence in closed form, or by the samples of the latent.", None),
    ("--kl-weight", "Weight of the KL divergence; 1 is the ELBO proper.", float),
    ("--shared-variance/--separate-variance", "Likelihood scale: the posterior's, or learned apart.", None),
    ("--objective", "elbo, or your own as module:function, on the same networks and schedule.", str),
    ("--epochs", "Passes over the data.", int),
    (
        "--batch-size",
        "Images in an optimiser step, over all devices. [default: the data set's; of fewer images a quarter]",
        int,
    ),
    ("--lr", "Learning rate for 256 images; scaled by batch size / 256.", float),
    ("--weight-decay", "Weight decay of kernels and matrices.", float),
    ("--warmup-epochs", "Epochs of linear warm-up. [default: a tenth, at most 10]", float),
    ("--num-particles", "Samples of the latent an image and direction.", int),
    ("--devices", "GPUs, or processes on the CPU.", int),
    ("--precision", "auto is bf16 where the hardware has it.", click.Choice(["auto", "32", "bf16"])),
    ("--compile/--no-compile", "Compile the encoder.", None),
    ("--deterministic/--fastest", "Kernels that give the same bits every time, on a GPU too.", None),
    (
        "--residency",
        "Images in memory or decoded as they come.",
        click.Choice(["auto", "memory", "stream"]),
    ),
    ("--workers", "Decoding processes of a streamed data set.", int),
    ("--knn-every", "Epochs between k-NN evaluations. [default: ten in a run]", int),
    ("--seed", "Seed of every random draw.", int),
)
"""Options for the `TrainConfig` fields of the same names: flag, help, type."""


def _take_recipe(ctx: click.Context, parameter: click.Parameter, name: str | None) -> None:
    if name is None:
        return
    options = {option.name: option for option in ctx.command.params if isinstance(option, click.Option)}
    values = {**load_recipe(name)}
    if "radius" in values:
        values["radius"] = values["radius"] or NO_RADIUS
    absent = ", ".join(key for key in values if key not in options)
    if absent:
        raise click.UsageError(f"the recipe {name} sets {absent}, for which {ctx.info_name} has no option")
    ctx.default_map = {key: (value,) if options[key].multiple else value for key, value in values.items()}


recipe = click.option(
    "--recipe",
    metavar="NAME",
    is_eager=True,  # before the options whose defaults it sets
    expose_value=False,
    callback=_take_recipe,
    help=f"Settings of a published result, over which options go: {', '.join(RECIPES)}, or a TOML file's path.",
)


def field_of(flag: str) -> str:
    """The `TrainConfig` field behind an option: ``--df`` is ``df``, ``--compile/--no-compile`` is ``compile``."""
    return flag.partition("/")[0].removeprefix("--").replace("-", "_")


def train_settings(
    repeated: Collection[str] = (), without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Every setting of a pretraining run as an option; the fields in ``repeated`` may be given several times."""
    flags = [setting for setting in SETTINGS if field_of(setting[0]) not in without]
    settings = [("--dataset", "What to pretrain on.", DATASETS), *flags]

    def decorate(command: Command) -> Command:
        decorators = [_setting(*setting, field_of(setting[0]) in repeated) for setting in settings]
        for option in reversed([recipe, decorators[0], data_dir, download, *decorators[1:]]):
            command = option(command)
        return command

    return decorate


def train_config(settings: dict[str, Any]) -> TrainConfig:
    """The settings of a command as a `TrainConfig`, checked as far as can be done without torch, which loads slowly.

    Raises
    ------
    ValueError, FileNotFoundError
        If a value is out of its range, or the folder of images is not there.
    """
    if settings.get("radius") == NO_RADIUS:
        settings = {**settings, "radius": None}
    config = dataclasses.replace(DEFAULTS, **settings)
    config.resolved()
    if config.dataset == "folder" and not Path(config.data_dir or "").exists():
        raise FileNotFoundError(f"no such folder: {Path(config.data_dir or '').absolute()} (--data-dir)")
    return config


def _setting(flag: str, help: str, kind: Any, repeated: bool) -> Callable[[Command], Command]:
    default = getattr(DEFAULTS, field_of(flag))
    if field_of(flag) == "radius" and default is None:
        default = NO_RADIUS
    if default is None and "[default" not in help:
        help += " [default: the data set's]"
    if repeated:
        help += " Repeatable."
        if isinstance(default, bool):  # Click names the flag itself only where it is not repeatable
            help += f" [default: {flag.split('/')[not default].removeprefix('--')}]"
    return click.option(
        flag,
        type=kind,
        multiple=repeated,
        default=(default,) if repeated and default is not None else default,
        show_default=default is not None and "[default" not in help,
        help=help,
    )
