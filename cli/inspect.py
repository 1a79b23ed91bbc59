from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.cli.score import say
from pyro_vje.config import ScoreConfig


@options.command("inspect")
@click.argument("good", type=options.EXISTING)
@click.argument("new", type=options.EXISTING)
@options.scoring("out", default=Path("inspection"), show_default=True, help="Folder of the results.")
@options.training("encoder", "weights", "image_size")
@options.scoring("score", default="aggregate")
@options.scoring("alpha", "fdr", "batch_size", "trust_plugins")
@click.option("--report/--no-report", default=True, show_default=True, help="Write a page beside the CSV.")
@click.pass_context
def command(
    ctx: click.Context,
    good: Path,
    new: Path,
    out: Path,
    weights: str,
    encoder: Any,
    image_size: Any,
    **settings: Any,
) -> None:
    """Say which images in NEW look strange to one who has seen those in GOOD.

    Learns from GOOD what is normal, with a pretrained network if its weights are installed, and leaves scores.csv and
    a page to look at. Without --alpha or --fdr an image is called strange at a p-value of 0.05.
    """
    from pyro_vje import inspect

    how = {"encoder": encoder, "weights": weights, "image_size": image_size}
    say(ctx, inspect(good, new, out, settings=ScoreConfig(**settings), **how))
