"""``pyro-vje export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options


@click.command("export")
@options.ckpt
@click.option(
    "--format",
    type=click.Choice(["onnx", "torch"]),
    default="onnx",
    show_default=True,
    help="onnx, for ONNX Runtime (writing it needs pip install 'pyro-vje[export]'); torch, for torch.export.load.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file. [default: model.onnx or model.pt2 in the run folder]",
)
@options.score_likelihood
@options.num_particles
@options.score_seed
@options.trust_plugins
def export_command(ckpt: Path, **settings: Any) -> None:
    """Write a model as one file that runs without this package, with a model card beside it.

    It maps uint8 RGB images (N, 3, S, S) to embedding, posterior loc and scale, the score that `score` writes, and
    its p-value.
    """
    from pyro_vje.export.deploy import export

    result = export(ckpt, **settings)
    click.echo(result.path)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result.differences.items())
    click.echo(f"largest differences from the model, on random images: {differences}")
    click.echo(f"model card: {result.card}")
