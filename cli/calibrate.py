from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options


@options.command("calibrate")
@options.ckpt
@options.scoring("data", required=True, help="A folder of normal images that the run has not seen.")
@click.option("--name", default="new", show_default=True, help="What score --calibration calls it.")
@options.scoring("batch_size", "trust_plugins")
def command(ckpt: Path, data: Path, name: str, **settings: Any) -> None:
    """Calibrate a finished run anew with other normal images: another camera, another season."""
    from pyro_vje import calibrate
    from pyro_vje.data import counted

    path, images = calibrate(ckpt, data, name, **settings)
    click.echo(f"calibrated with {counted(images)}: {path}")
