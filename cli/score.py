"""``pyro-vje score`` and ``pyro-vje embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.anomaly.scores import SCORES
from pyro_vje.cli import options

LEVEL = click.FloatRange(0, 1, min_open=True, max_open=True)


@click.command("score")
@options.ckpt
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="A folder of images, all of which are scored.",
)
@click.option(
    "--dataset", type=options.DATASETS, help="Score a data set's test split instead. [default: the run's own]"
)
@options.data_dir
@options.download
@click.option("--normal-class", metavar="K", help="The class that counts as normal, for the metrics.")
@click.option(
    "--score",
    type=click.Choice(list(SCORES)),
    default="conditional",
    show_default=True,
    help="; ".join(f"{score.name}: {score.description}" for score in SCORES.values()) + ".",
)
@options.score_likelihood
@click.option(
    "--num-pairs",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="0: the image's own embedding, one pass of the encoder. K: mean over K augmented pairs, 2 K passes.",
)
@options.num_particles
@options.score_seed
@click.option("--alpha", type=LEVEL, help="Call an image an anomaly if its p-value is at most this.")
@click.option(
    "--fdr",
    type=LEVEL,
    help="Call images anomalies of which at most this share is normal (Benjamini-Hochberg).",
)
@options.batch_size
@click.option(
    "--out", type=click.Path(path_type=Path), help="The CSV. [default: scores.csv in the run folder]"
)
@click.option("--draw/--no-draw", default=True, show_default=True, help="Draw pictures beside the CSV.")
@click.option("--report", is_flag=True, help="Write one self-contained HTML page beside the CSV.")
@click.option("--parquet", is_flag=True, help="Write the table as Parquet too (needs pyarrow).")
@click.option(
    "--resume", is_flag=True, help="Go on from an interrupted call with the same options, if there was one."
)
@options.deterministic
@options.trust_plugins
@click.pass_context
def score_command(ctx: click.Context, ckpt: Path, deterministic: bool, **settings: Any) -> None:
    """Anomaly score of each image, higher for stranger ones, with p-value and the likelihood's parts, as a CSV."""
    from pyro_vje.anomaly.table import score
    from pyro_vje.data.imageset import counted
    from pyro_vje.runs.folder import deterministic_kernels

    with deterministic_kernels(deterministic):
        result = score(ckpt, **settings)
    how = result.settings
    passes = f"{how.passes} forward pass{'es' if how.passes > 1 else ''} an image"
    click.echo(
        f"{counted(result.scored)} scored by {how.score} "
        f"({passes}, {how.num_particles} particles, seed {how.seed}): {result.csv}"
    )
    if result.auroc is not None:
        click.echo(
            f"AUROC {result.auroc:.4f} (anomalies positive: {result.scored - (result.normal or 0)}, "
            f"normal: {result.normal})"
        )
    if result.flagged is not None:
        alpha, fdr = settings["alpha"], settings["fdr"]
        rule = (
            f"p-value ≤ {alpha}" if fdr is None else f"Benjamini-Hochberg at a false-discovery rate of {fdr}"
        )
        click.echo(f"{result.flagged} of {result.scored} called anomalies ({rule})")
    if result.report:
        click.echo(f"report: {result.report}")
    if result.failed:
        click.echo(f"{counted(result.failed)} could not be read: see the column error", err=True)
        ctx.exit(1)


@click.command("embed")
@options.ckpt
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="A folder of images.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="FILE.npz", help="The file to write."
)
@options.batch_size
@options.trust_plugins
@click.pass_context
def embed_command(ctx: click.Context, ckpt: Path, data: Path, out: Path, **settings: Any) -> None:
    """Features, embeddings and posterior loc and scale of each image, as a NumPy .npz."""
    from pyro_vje.anomaly.table import embed
    from pyro_vje.data.imageset import counted

    path, written, failed = embed(ckpt, data, out, **settings)
    click.echo(f"{counted(written)} embedded: {path}")
    if failed:
        click.echo(f"{counted(failed)} could not be read and left out", err=True)
        ctx.exit(1)
