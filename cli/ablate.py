from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ABLATION_AXES, TrainConfig, fields_of

COMMON = ("dataset", "data_dir", "download")


@options.command("ablate")
@options.recipe
@options.training(without=("devices",), repeated=fields_of(TrainConfig).keys() - COMMON)
@options.folder
def command(out: Path, **settings: Any) -> None:
    """Train and evaluate every combination of the repeatable settings, and compare them in one table.

    Finished cells are not run again, and more values may be given later. Leaves ablation.csv, .json, .md, .tex
    and .png, and a run folder for each cell.
    """
    given = {name: value for name, value in settings.items() if name not in COMMON and value}
    axes = {name: value for name, value in given.items() if name in ABLATION_AXES or len(value) > 1}
    single = {name: value[0] for name, value in given.items() if name not in axes}
    base = options.train_config({name: settings[name] for name in COMMON} | single)

    from pyro_vje import ablate

    result = ablate(base, axes, out)
    click.echo(f"{result.table}\n\n{len(result.cells)} cells: {result.folder}")
