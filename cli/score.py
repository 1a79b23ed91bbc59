"""Commands that tell strange images from normal ones."""

import logging
from pathlib import Path
from typing import Any

import click

from pyro_vje.anomaly.scores import PLACES, SCORES, get_score
from pyro_vje.cli import options
from pyro_vje.config import INSPECTION, ScoreConfig, fields_of

log = logging.getLogger("pyro_vje")
NAMES = "; ".join(f"{score.name}: {score.description}" for score in (*SCORES.values(), PLACES))
_, _, DEFAULT = (fields_of(ScoreConfig)["score"].description or "").partition(", or ")


@options.command("score")
@options.ckpt
@options.scoring("score", help=f"{NAMES}; or {DEFAULT}")
@options.scoring(without=["score"])
def score(ckpt: Path, **settings: Any) -> None:
    """Anomaly score of each image, higher for stranger ones, with p-value and the likelihood's parts, as a CSV."""
    config = ScoreConfig(**settings)
    if config.score is not None:
        get_score(config.score)  # an unknown one is known before anything heavy is loaded
    from pyro_vje import score

    _say(score(ckpt, config))


@options.command("inspect")
@click.argument("good", type=options.EXISTING)
@click.argument("new", type=options.EXISTING)
@options.scoring("out", default=Path("inspection"), show_default=True, help="Folder of the results.")
@options.training(*INSPECTION)
@options.scoring("score", "alpha", "fdr")
@options.scoring("maps", help="Show where, too: a map of each image, and on the page.")
@options.mapping()
@options.scoring("maps_npz", "masks", "batch_size", "trust_plugins")
@click.option("--report/--no-report", default=True, show_default=True, help="Write a page beside the CSV.")
def inspect(good: Path, new: Path, out: Path, **settings: Any) -> None:
    """Say which images in NEW look strange to one who has seen those in GOOD.

    Learns from GOOD what is normal, with a pretrained network if its weights are installed, and leaves scores.csv and
    a page to look at. Without --alpha or --fdr an image is called strange at a p-value of 0.05.
    """
    from pyro_vje import inspect

    _say(inspect(good, new, out, **settings), plain=True)


@options.command("calibrate")
@options.ckpt
@options.scoring("data", required=True, help="A folder of normal images that the run has not seen.")
@click.option("--name", default="new", show_default=True, help="What score --calibration calls it.")
@options.scoring("batch_size", "trust_plugins")
def calibrate(ckpt: Path, data: Path, name: str, **settings: Any) -> None:
    """Calibrate a finished run anew with other normal images: another camera, another season."""
    from pyro_vje import calibrate
    from pyro_vje.data import counted

    path, images = calibrate(ckpt, data, name, **settings)
    click.echo(f"calibrated with {counted(images)}: {path}")
    log.info("to score with it: pyro-vje score --ckpt %s --calibration %s", ckpt, name)


@options.command("maps")
@options.ckpt
@options.mapping()
@options.scoring("trust_plugins")
def maps(ckpt: Path, **settings: Any) -> None:
    """Learn to show where images are strange, from the training images of a finished run: for score --maps."""
    from pyro_vje import learn_maps

    click.echo(f"maps learned: {learn_maps(ckpt, **settings)}")


def _say(result: Any, *, plain: bool = False) -> None:
    """Print what a `pyro_vje.anomaly.ScoreResult` tells: what, how sure, what to do; exit code 1 if images are unread.

    ``plain`` is for one with a folder of images: how the scores were made is for ``--log-level debug``.
    """
    from pyro_vje.data import counted

    config, scored = result.settings, result.scored
    passes = f"{result.passes} forward pass{'es' if result.passes > 1 else ''} an image"
    how = f"{config.score} ({passes}, {config.num_particles} particles, seed {config.seed})"
    log.debug("scored by %s", how)
    if not plain:
        click.echo(f"{counted(scored)} scored by {how}: {result.csv}")
    elif result.flagged is None:
        click.echo(f"{counted(scored)}, ordered by how strange they look; none is called strange")
    if result.flagged is not None:
        rule = f"Benjamini-Hochberg at a false-discovery rate of {config.fdr}"
        sure = f"at most {100 * (config.fdr or 0):g} % of those are normal, on average"
        if config.alpha is not None:
            rule = f"p-value ≤ {config.alpha}"
            sure = f"about {100 * config.alpha:g} % of normal images are marked by mistake, here "
            sure += f"{config.alpha * scored:.0f} if all {scored} were normal"
        called = "look strange" if plain else "called anomalies"
        click.echo(f"{result.flagged} of {scored} {called} ({rule})\nhow sure: {sure}")
    if result.auroc is not None:
        means = "by the names of the folders, 1 is perfect: " if plain else ""
        counts = f"anomalies positive: {result.anomalies}, normal: {result.normal}"
        counts += f"; left out, without a label: {result.unlabelled}" if result.unlabelled else ""
        click.echo(f"{means}AUROC {result.auroc:.4f} ({counts})")
    if result.maps:
        click.echo(f"maps: {result.maps}")
    for name, value in (result.pixels or {}).items():
        click.echo(f"{name.replace('_', ' ')}: {value:.4g}")
    if result.report:
        click.echo(f"look at them: {result.report}" if plain else f"report: {result.report}")
    if plain:
        click.echo(f"all numbers: {result.csv}")
    if result.failed:
        click.echo(f"{counted(result.failed)} could not be read: see the column error", err=True)
        raise SystemExit(1)
