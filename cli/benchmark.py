from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import DATASET_DEFAULTS

OUTSIDE = "A data set by name, or a folder of images. Repeatable."
TOO = "Score with this family too. Repeatable."
likelihoods = options.scoring("score_likelihood", multiple=True, help=TOO)


@click.group("benchmark")
def command() -> None:
    """Anomaly detection by the published protocols: all scores and cheap detectors in one table."""


@command.command("one-class", cls=options.OneValue)
@options.recipe
@options.training(without=("devices",), repeated=("normal_class", "seed"))
@likelihoods
@options.folder
def one_class(normal_class: Any, seed: Any, score_likelihood: Any, out: Path, **settings: Any) -> None:
    """Train on one class, score all test images; every class (or those of --normal-class) and every seed.

    Finished cells are not run again. Leaves table.csv, .json, .md and .tex, and a run folder for each cell.
    """
    base = options.train_config(settings)

    from pyro_vje import experiments

    result = experiments.one_class(base, out, classes=normal_class, seeds=seed, likelihoods=score_likelihood)
    click.echo(f"{result.table}\n\n{result.folder}")


@command.command("ood", cls=options.OneValue)
@options.ckpt
@click.option("--outside", multiple=True, required=True, metavar="SET", help=OUTSIDE)
@options.scoring("data_dir", help="Where data sets named by --outside lie.")
@likelihoods
@options.folder
@options.scoring("trust_plugins")
def ood(ckpt: Path, outside: Any, data_dir: Any, score_likelihood: Any, out: Path, **settings: Any) -> None:
    """Tell a run's own test images from those of other data sets; leaves table.csv, .json, .md and .tex."""
    known = DATASET_DEFAULTS.keys() - {"folder"}
    places: dict[str, tuple[str, str | None]] = {
        name if name in known else Path(name).name: (name, data_dir) if name in known else ("folder", name)
        for name in outside
    }
    if len(places) < len(outside):
        raise click.UsageError(f"--outside: two sets have one name in the table, {', '.join(outside)}")

    from pyro_vje import experiments

    result = experiments.ood(ckpt, places, out, likelihoods=score_likelihood, **settings)
    click.echo(f"{result.table}\n\n{result.folder}")
