"""``pyro-vje score`` and ``pyro-vje embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pyro_vje.cli import options


@click.command("score")
@options.ckpt
@click.option("--data", type=click.Path(path_type=Path), metavar="PATH", help="A folder of images to score.")
@click.option("--dataset", help="Score a data set's test split. [default: the run's own]")
@options.data_dir
@options.download
@click.option("--normal-class", metavar="K", help="The class that counts as normal, for the AUROC.")
@click.option(
    "--score",
    default="conditional",
    show_default=True,
    help="conditional, elbo, direction, radius or variance.",
)
@click.option(
    "--num-particles",
    default=16,
    show_default=True,
    type=click.IntRange(min=1),
    help="Samples of the latent an image; one forward pass whatever their number.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of those samples.")
@options.batch_size
@click.option(
    "--out", type=click.Path(path_type=Path), help="The CSV. [default: scores.csv in the run folder]"
)
@click.option("--draw/--no-draw", default=True, show_default=True, help="Draw pictures beside the CSV.")
@options.trust_plugins
@click.pass_context
def score_command(ctx: click.Context, ckpt: Path, **settings: Any) -> None:
    """Anomaly score of each image, higher for stranger ones, with the likelihood's parts, as a CSV."""
    from pyro_vje.scoring import score

    result = score(ckpt, **settings)
    click.echo(
        f"{result.scored} images scored by {result.score} "
        f"(1 forward pass an image, {result.num_particles} particles, seed {result.seed}): {result.csv}"
    )
    if result.auroc is not None:
        click.echo(
            f"AUROC {result.auroc:.4f} (anomalies positive: {result.scored - (result.normal or 0)}, "
            f"normal: {result.normal})"
        )
    if result.failed:
        click.echo(f"{result.failed} images could not be read: see the column error", err=True)
        ctx.exit(1)


@click.command("embed")
@options.ckpt
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="PATH", help="A folder of images."
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE.npz", help="The file to write."
)
@options.batch_size
@options.trust_plugins
@click.pass_context
def embed_command(ctx: click.Context, ckpt: Path, data: Path, out: Path, **settings: Any) -> None:
    """Features, embeddings and posterior loc and scale of each image, as a NumPy .npz."""
    from pyro_vje.scoring import embed

    path, written, failed = embed(ckpt, data, out, **settings)
    click.echo(f"{written} images embedded: {path}")
    if failed:
        click.echo(f"{failed} images could not be read and are left out", err=True)
        ctx.exit(1)
