"""``pyro-vje inspect``."""

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ScoreConfig, TrainConfig


@options.command("inspect")
@click.argument("good", type=options.EXISTING)
@click.argument("new", type=options.EXISTING)
@click.option(
    "--out", type=options.ANY, default="inspection", show_default=True, help="Folder of the results."
)
@options.of(TrainConfig, "encoder", "weights", "image_size")
@options.of(ScoreConfig, "score", default="aggregate")
@options.of(ScoreConfig, "alpha", "fdr", "batch_size", "trust_plugins")
@click.option(
    "--report/--no-report", default=True, show_default=True, help="Write one HTML page beside the CSV."
)
@click.pass_context
def command(
    ctx: click.Context, good: Path, new: Path, weights: str, encoder: str | None, **settings: Any
) -> None:
    """Say which images in NEW look strange to one who has seen those in GOOD.

    Learns from GOOD what is normal, with a pretrained network if its weights are installed, and leaves scores.csv and
    a page to look at. Without --alpha or --fdr an image is called strange at a p-value of 0.05.
    """
    from pyro_vje import inspect
    from pyro_vje.cli.score import say

    out, image_size = settings.pop("out"), settings.pop("image_size")
    config = ScoreConfig(**settings)
    say(
        ctx, inspect(good, new, out, encoder=encoder, weights=weights, image_size=image_size, settings=config)
    )
