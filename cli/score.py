from pathlib import Path
from typing import Any

import click

from pyro_vje.anomaly.scores import SCORES
from pyro_vje.cli import options
from pyro_vje.config import ScoreConfig

NAMES = "; ".join(f"{score.name}: {score.description}" for score in SCORES.values())


@options.command("score")
@options.ckpt
@options.scoring("score", help=f"{NAMES}; or your own as module:function. [default: {ScoreConfig().score}]")
@options.scoring(without=["score"])
@click.pass_context
def command(ctx: click.Context, ckpt: Path, **settings: Any) -> None:
    """Anomaly score of each image, higher for stranger ones, with p-value and the likelihood's parts, as a CSV."""
    config = ScoreConfig(**settings)

    from pyro_vje import score

    say(ctx, score(ckpt, config))


def say(ctx: click.Context, result: Any) -> None:
    """Print what a `pyro_vje.anomaly.ScoreResult` tells; exit code 1 if images could not be read."""
    from pyro_vje.data.imageset import counted

    config = result.settings
    passes = f"{result.passes} forward pass{'es' if result.passes > 1 else ''} an image"
    click.echo(
        f"{counted(result.scored)} scored by {config.score} "
        f"({passes}, {config.num_particles} particles, seed {config.seed}): {result.csv}"
    )
    if result.auroc is not None:
        counts = f"anomalies positive: {result.anomalies}, normal: {result.normal}"
        counts += f"; left out, without a label: {result.unlabelled}" if result.unlabelled else ""
        click.echo(f"AUROC {result.auroc:.4f} ({counts})")
    if result.flagged is not None:
        rule = f"Benjamini-Hochberg at a false-discovery rate of {config.fdr}"
        rule = rule if config.alpha is None else f"p-value ≤ {config.alpha}"
        click.echo(f"{result.flagged} of {result.scored} called anomalies ({rule})")
    if result.report:
        click.echo(f"report: {result.report}")
    if result.failed:
        click.echo(f"{counted(result.failed)} could not be read: see the column error", err=True)
        ctx.exit(1)
