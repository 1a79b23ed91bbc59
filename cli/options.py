"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

ckpt = click.option(
    "--ckpt",
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="A run folder, or a weights file (.safetensors).",
)
data_dir = click.option("--data-dir", metavar="DIR", help="Where the data set lies or is downloaded to.")
download = click.option(
    "--download/--no-download", default=True, show_default=True, help="Fetch a missing data set."
)
batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Images in a forward pass.",
)
trust_plugins = click.option(
    "--trust-plugins", is_flag=True, help="Import code that the run's configuration names (module:attribute)."
)
