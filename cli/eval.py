"""``pyro-vje eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ScoreConfig


@options.command("eval")
@options.ckpt
@options.of(ScoreConfig, "dataset", help="Another data set than the run's own.")
@options.of(ScoreConfig, "data_dir", "download")
@click.option(
    "--k",
    default=(200,),
    multiple=True,
    show_default=True,
    type=click.IntRange(min=1),
    help="Neighbours of the k-NN. Repeatable: all combinations with --temperature, the first in the table.",
)
@click.option(
    "--temperature",
    default=(0.1,),
    multiple=True,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Temperature of the k-NN weights. Repeatable, as --k.",
)
@click.option(
    "--linear",
    default=("logistic",),
    multiple=True,
    show_default=True,
    type=click.Choice(["logistic", "sgd"]),
    help="Linear probe: logistic regression on clean features, or SGD on augmented images with steps of --batch-size, "
    "for which both encoders pass over all training images in each of --probe-epochs epochs. Repeatable.",
)
@click.option(
    "--probe-epochs",
    default=90,
    show_default=True,
    type=click.IntRange(min=1),
    help="Epochs of --linear sgd; its cost is proportional to them.",
)
@options.of(ScoreConfig, "batch_size")
@options.of(ScoreConfig, "out", help="The JSON. [default: eval.json in the run folder]")
@options.of(ScoreConfig, "trust_plugins")
def command(ckpt: Path, **settings: Any) -> None:
    """Probes of the representation: the trained encoder, the same untrained, and raw pixels.

    Weighted k-NN and linear probe; of the encoders also effective rank, alignment, uniformity, and whether the
    posterior's variance says where retrieval fails (R-AUROC, accuracy against rejected share, a picture of it).
    """
    from pyro_vje import evaluate
    from pyro_vje.representation import format_table

    click.echo(format_table(evaluate(ckpt, **settings)))
