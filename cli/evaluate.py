"""``pyro-vje eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from pyro_vje.cli import options


@click.command("eval")
@options.ckpt
@click.option("--dataset", help="Another data set than the run's own.")
@options.data_dir
@options.download
@click.option(
    "--k", default=200, show_default=True, type=click.IntRange(min=1), help="Neighbours of the k-NN."
)
@click.option(
    "--temperature",
    default=0.1,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Temperature of the k-NN weights.",
)
@options.batch_size
@click.option(
    "--out", type=click.Path(path_type=Path), help="The JSON. [default: eval.json in the run folder]"
)
@options.trust_plugins
def eval_command(ckpt: Path, out: Path | None, **settings: Any) -> None:
    """Weighted k-NN and linear probe: the trained encoder, the same untrained, and raw pixels."""
    from pyro_vje.evaluation import evaluate, format_table

    click.echo(format_table(evaluate(ckpt, out=out, **settings)))
