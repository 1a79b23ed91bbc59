"""Commands that train many runs, or compare one with others."""

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import ABLATION_AXES, DATASET_DEFAULTS, TrainConfig, fields_of

OUTSIDE = "A data set by name, or a folder of images. Repeatable."
COMMON = ("dataset", "data_dir", "download")


@options.command("ablate")
@options.recipe
@options.training(without=("devices",), repeated=fields_of(TrainConfig).keys() - COMMON)
@options.folder
def ablate(out: Path, **settings: Any) -> None:
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


likelihoods = options.scoring("score_likelihood", multiple=True, help="Score with this too. Repeatable.")


@click.group("benchmark")
def benchmark() -> None:
    """Anomaly detection by the published protocols: all scores and cheap detectors in one table."""


@benchmark.command("one-class", cls=options.OneValue)
@options.recipe
@options.training(without=("devices",), repeated=("normal_class", "seed"))
@likelihoods
@options.folder
def one_class(normal_class: Any, seed: Any, score_likelihood: Any, out: Path, **settings: Any) -> None:
    """Train on one class, score all test images; every class (or those of --normal-class) and every seed.

    Finished cells are not run again. Leaves table.csv, .json, .md and .tex, and a run folder for each cell.
    """
    base = options.train_config(settings)

    from pyro_vje.experiments import one_class

    result = one_class(base, out, classes=normal_class, seeds=seed, likelihoods=score_likelihood)
    click.echo(f"{result.table}\n\n{result.folder}")


@benchmark.command("ood", cls=options.OneValue)
@options.ckpt
@click.option("--outside", multiple=True, required=True, metavar="SET", help=OUTSIDE)
@options.scoring("data_dir", help="Where data sets named by --outside lie.")
@likelihoods
@options.folder
@options.scoring("trust_plugins")
def ood(ckpt: Path, outside: Any, data_dir: Any, score_likelihood: Any, out: Path, **settings: Any) -> None:
    """Tell a run's own test images from those of other data sets; leaves table.csv, .json, .md and .tex."""
    known = {name: (name, data_dir) for name in DATASET_DEFAULTS if name != "folder"}
    folders = {Path(name).name: ("folder", name) for name in outside if name not in known}
    places = {name: known[name] for name in outside if name in known} | folders
    if len(places) < len(outside):
        raise click.UsageError(f"--outside: two sets have one name in the table, {', '.join(outside)}")

    from pyro_vje.experiments import ood

    result = ood(ckpt, places, out, likelihoods=score_likelihood, **settings)
    click.echo(f"{result.table}\n\n{result.folder}")
