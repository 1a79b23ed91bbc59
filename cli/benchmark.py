"""``pyro-vje benchmark``: published protocols of anomaly detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_vje.cli import options
from pyro_vje.config import DATASET_DEFAULTS
from pyro_vje.runs.stopping import GOES_ON, Interrupted

score_likelihood = click.option(
    "--score-likelihood",
    "likelihoods",
    multiple=True,
    metavar="FAMILY",
    help="Score with this family too, beside the one trained with. Repeatable.",
)
folder = click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the results."
)


@click.group("benchmark")
def benchmark_command() -> None:
    """Anomaly detection by the published protocols: all scores and cheap detectors in one table."""


@benchmark_command.command("one-class")
@options.train_settings(repeated=("normal_class", "seed"), without=("devices",))
@score_likelihood
@folder
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

    from pyro_vje.experiments.protocols import one_class

    try:
        result = one_class(base, out, classes=normal_class, seeds=seed, likelihoods=likelihoods)
    except KeyboardInterrupt as stop:
        raise Interrupted.after(stop, GOES_ON) from None
    click.echo(result.table)
    click.echo(f"\n{result.folder}")


@benchmark_command.command("ood")
@options.ckpt
@click.option(
    "--outside",
    multiple=True,
    required=True,
    metavar="SET",
    help="A data set by name, or a folder of images. Repeatable.",
)
@click.option("--data-dir", metavar="DIR", help="Where data sets named by --outside lie.")
@score_likelihood
@folder
@options.trust_plugins
def ood_command(
    ckpt: Path,
    outside: tuple[str, ...],
    data_dir: str | None,
    likelihoods: tuple[str, ...],
    out: Path,
    trust_plugins: bool,
) -> None:
    """Tell a run's own test images from those of other data sets.

    Leaves table.csv, .json, .md and .tex.
    """
    from pyro_vje.experiments.protocols import ood

    known = DATASET_DEFAULTS.keys() - {"folder"}
    places: dict[str, tuple[str, str | None]] = {
        name if name in known else Path(name).name: (name, data_dir) if name in known else ("folder", name)
        for name in outside
    }
    if len(places) < len(outside):
        raise click.UsageError(f"--outside: two sets have one name in the table, {', '.join(outside)}")
    result = ood(ckpt, places, out, likelihoods=likelihoods, trust_plugins=trust_plugins)
    click.echo(result.table)
    click.echo(f"\n{result.folder}")
