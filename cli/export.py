from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options

FORMATS = (
    "onnx, for ONNX Runtime (writing it needs pip install 'pyro-vje[export]'); torch, for torch.export.load."
)
choice = click.Choice(["onnx", "torch"])


@options.command("export")
@options.ckpt
@click.option("--format", type=choice, default="onnx", show_default=True, help=FORMATS)
@options.scoring("out", help="The file. [default: model.onnx or model.pt2 in the run folder]")
@options.scoring("score", "score_likelihood", "num_particles", "seed", "trust_plugins")
def command(ckpt: Path, **settings: Any) -> None:
    """Write a model as one file that runs without this package, with a model card beside it.

    It maps uint8 RGB images (N, 3, S, S) to embedding, posterior loc and scale, the score that `score` writes, and
    its p-value.
    """
    from pyro_vje import export

    result = export(ckpt, **settings)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in result.differences.items())
    click.echo(f"{result.path}\nlargest differences from the model, on random images: {differences}")
    click.echo(f"model card: {result.card}")
