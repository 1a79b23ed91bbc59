"""``pyro-vje ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ABLATION_AXES
from pyro_vje.runs.stopping import GOES_ON, Interrupted


@click.command("ablate")
@options.train_settings(repeated=(*ABLATION_AXES, "objective"), without=("devices",))
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the ablation; one that was begun goes on.",
)
def ablate_command(out: Path, **settings: Any) -> None:
    """Train and evaluate every combination of the repeatable settings, and compare them in one table.

    Finished cells are not run again, and more values may be given later. Leaves ablation.csv, .json, .md, .tex
    and .png, and a run folder for each cell.
    """
    given = {name: settings.pop(name) for name in ABLATION_AXES}
    objectives = settings.pop("objective")
    given["radius"] = tuple(None if value == options.NO_RADIUS else value for value in given["radius"])
    axes = {name: values for name, values in given.items() if values}  # none: the default follows from others
    if len(objectives) > 1:  # an axis where it varies: seldom, and names of cells stay short
        axes["objective"] = objectives
    base = options.train_config({**settings, "objective": objectives[0]})

    from pyro_vje.experiments.ablation import ablate

    try:
        result = ablate(base, axes, out)
    except KeyboardInterrupt as stop:
        raise Interrupted.after(stop, GOES_ON) from None
    click.echo(result.table)
    click.echo(f"\n{len(result.cells)} cells: {result.folder}")
