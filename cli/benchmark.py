"""``pyro-vje benchmark``: published protocols of anomaly detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import DATASET_DEFAULTS, ScoreConfig, TrainConfig

likelihoods = click.option(
    "--score-likelihood",
    "likelihoods",
    multiple=True,
    metavar="FAMILY",
    help="Score with this family too, beside the one trained with. Repeatable.",
)
outside_sets = click.option(
    "--outside",
    multiple=True,
    required=True,
    metavar="SET",
    help="A data set by name, or a folder of images. Repeatable.",
)


@click.group("benchmark")
def command() -> None:
    """Anomaly detection by the published protocols: all scores and cheap detectors in one table."""


@command.command("one-class", cls=options.OneValue)
@options.recipe
@options.of(TrainConfig, without=("devices",), repeated=("normal_class", "seed"))
@likelihoods
@options.folder
def one_class_command(
    normal_class: tuple[str, ...],
    seed: tuple[int, ...],
    likelihoods: tuple[str, ...],
    out: Path,
    **settings: Any,
) -> None:
    """Train on one class, score all test images; every class (or those of --normal-class) and every seed.

    Finished cells are not run again. Leaves table.csv, .json, .md and .tex, and a run folder for each cell.
    """
    base = options.train_config(settings)

    from pyro_vje.experiments import one_class
    from pyro_vje.runs.stopping import GOES_ON, Interrupted

    try:
        result = one_class(base, out, classes=normal_class, seeds=seed, likelihoods=likelihoods)
    except KeyboardInterrupt as stop:
        raise Interrupted.after(stop, GOES_ON) from None
    click.echo(result.table)
    click.echo(f"\n{result.folder}")


@command.command("ood", cls=options.OneValue)
@options.ckpt
@outside_sets
@options.of(ScoreConfig, "data_dir", help="Where data sets named by --outside lie.")
@likelihoods
@options.folder
@options.of(ScoreConfig, "trust_plugins")
def ood_command(
    ckpt: Path, outside: tuple[str, ...], data_dir: str | None, out: Path, **settings: Any
) -> None:
    """Tell a run's own test images from those of other data sets.

    Leaves table.csv, .json, .md and .tex.
    """
    known = DATASET_DEFAULTS.keys() - {"folder"}
    places: dict[str, tuple[str, str | None]] = {
        name if name in known else Path(name).name: (name, data_dir) if name in known else ("folder", name)
        for name in outside
    }
    if len(places) < len(outside):
        raise click.UsageError(f"--outside: two sets have one name in the table, {', '.join(outside)}")

    from pyro_vje.experiments import ood

    result = ood(ckpt, places, out, **settings)
    click.echo(result.table)
    click.echo(f"\n{result.folder}")
