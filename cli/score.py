"""``pyro-vje score``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ScoreConfig


@options.command("score")
@options.ckpt
@options.of(ScoreConfig)
@click.pass_context
def command(ctx: click.Context, ckpt: Path, **settings: Any) -> None:
    """Anomaly score of each image, higher for stranger ones, with p-value and the likelihood's parts, as a CSV."""
    config = ScoreConfig(**settings)

    from pyro_vje import score
    from pyro_vje.data.imageset import counted
    from pyro_vje.runs.folder import deterministic_kernels

    values = dataclasses.asdict(config)
    del values["reference_views"]
    with deterministic_kernels(values.pop("deterministic")):
        result = score(ckpt, **values)
    how = result.settings
    passes = f"{how.passes} forward pass{'es' if how.passes > 1 else ''} an image"
    click.echo(
        f"{counted(result.scored)} scored by {how.score} "
        f"({passes}, {how.num_particles} particles, seed {how.seed}): {result.csv}"
    )
    if result.auroc is not None:
        anomalies = result.scored - (result.normal or 0)
        click.echo(f"AUROC {result.auroc:.4f} (anomalies positive: {anomalies}, normal: {result.normal})")
    if result.flagged is not None:
        rule = f"Benjamini-Hochberg at a false-discovery rate of {config.fdr}"
        rule = rule if config.alpha is None else f"p-value ≤ {config.alpha}"
        click.echo(f"{result.flagged} of {result.scored} called anomalies ({rule})")
    if result.report:
        click.echo(f"report: {result.report}")
    if result.failed:
        click.echo(f"{counted(result.failed)} could not be read: see the column error", err=True)
        ctx.exit(1)
