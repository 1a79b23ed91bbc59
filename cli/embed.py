from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options


@options.command("embed")
@options.ckpt
@options.scoring("data", required=True, help="A folder of images.")
@options.scoring("out", required=True, metavar="FILE.npz", help="The file to write.")
@options.scoring("batch_size", "trust_plugins")
@click.pass_context
def command(ctx: click.Context, ckpt: Path, data: Path, out: Path, **settings: Any) -> None:
    """Features, embeddings and posterior loc and scale of each image, as a NumPy .npz."""
    from pyro_vje import embed
    from pyro_vje.data import counted

    path, written, failed = embed(ckpt, data, out, **settings)
    click.echo(f"{counted(written)} embedded: {path}")
    if failed:
        click.echo(f"{counted(failed)} could not be read and left out", err=True)
        ctx.exit(1)
