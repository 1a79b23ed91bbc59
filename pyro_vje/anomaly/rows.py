"""From images to rows: read, encoded and scored batch by batch, each row on disk as it comes.

Memory does not grow with the number of images, and an interrupted call can go on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.calibration import Calibration, Split, cross_calibration
from pyro_vje.anomaly.parts import Scorer, augmented_pairs
from pyro_vje.anomaly.scores import get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageSet
from pyro_vje.data.splits import reference_images
from pyro_vje.model.encoding import Encoded, Posteriors, encode, encode_batches, images_at_once
from pyro_vje.runs.files import locked, parse_json, write_atomic
from pyro_vje.runs.folder import (
    CALIBRATION,
    REFERENCE,
    LoadedRun,
    calibration_file,
    calibrations,
    load_folds,
    load_posteriors,
    training_images,
)

log = logging.getLogger("pyro_vje")

PARTS = {name: name for name in ("log_likelihood", "log_direction", "log_radius", "kl")}
PARTS |= {"posterior_variance": "variance", "log_aggregate": "log_aggregate"}
"""Columns of numbers beside the score, and what they are called in `LikelihoodParts`."""
HOW = ("score", "score_likelihood", "calibration", "reference_views", "num_pairs", "num_particles", "seed")
"""Settings on which scores depend."""
PROGRESS_EVERY = 30.0  # seconds


class Rows:
    """Numbers of images on disk while they are scored: a line of JSON each, after one that says how they were ``made``.

    ``shape`` is the number of images and of numbers in a row. Without ``resume`` the file is begun anew.
    """

    def __init__(self, path: Path, made: dict[str, Any], shape: tuple[int, int], *, resume: bool) -> None:
        self.path = path
        self.numbers: dict[int, list[float]] = {}
        self._lock = ExitStack()
        self._lock.enter_context(locked(path))
        content = path.read_bytes() if resume and path.is_file() else b""
        if resume and not content:
            log.info("there is no %s to resume: from the beginning", path)
        content = content or f"{json.dumps(made)}\n".encode()
        *whole, _ = content.split(b"\n")  # what a kill cut off is scored again
        try:
            before, *rows = [parse_json(line) for line in whole]
            changed = [name for name, value in made.items() if before[name] != value]
            self.numbers = {} if changed else dict(rows)
            good = all(type(i) is int and 0 <= i < shape[0] for i in self.numbers)
            good &= all(list(map(type, row)) == [float] * shape[1] for row in self.numbers.values())
        except (ValueError, TypeError, KeyError):
            changed, good = [], False
        if changed:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(changed)}): score again without --resume"
            )
        if not good or len(self.numbers) != len(rows):
            raise ValueError(f"{path} is damaged: score again without --resume")
        write_atomic(path, b"\n".join([*whole, b""]))

    def add(self, rows: Mapping[int, list[float]]) -> None:
        """Append the numbers of images by their positions."""
        self.numbers |= rows
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows.items())

    def remove(self) -> None:
        """Remove the file, when all that was made of it is written, and let other processes write it."""
        self.path.unlink()
        self._lock.close()


def make_scorer(run: LoadedRun, settings: ScoreConfig) -> Scorer:
    """The scorer of a run, with the reference images if the run has them, and their augmented views if asked for."""
    reference = load_posteriors(run, REFERENCE)
    if settings.reference_views:
        train_set, _ = _training_images(run, "kernels at augmented views of the training images need these")
        views = run.info.views
        device = next(run.vje.parameters()).device
        generator = torch.Generator(device).manual_seed(settings.seed)
        images = reference_images(train_set, run.info.config.seed)
        drawn = [
            encode(run.vje, images, lambda batch: views(batch, generator)[0], device=device).posteriors
            for _ in range(settings.reference_views)
        ]
        known = [*drawn, *([] if reference is None else [reference])]
        reference = Posteriors(*(torch.cat(tensors) for tensors in zip(*known, strict=True)))
    return Scorer(
        run.vje,
        reference=reference,
        num_particles=settings.num_particles,
        seed=settings.seed,
        likelihood=settings.score_likelihood,
        kl_weight=run.info.config.kl_weight,
    )


def _training_images(run: LoadedRun, why: str) -> tuple[ImageSet, ImageSet | None]:
    """The images that a run was trained on and those it held out; ``ValueError`` with ``why`` if not as they were."""
    try:
        train_set, held_out = training_images(run)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{why}: {error}") from None
    if run.info.fingerprint not in (None, train_set.fingerprint()) or len(train_set) != run.info.train_images:
        raise ValueError(f"{why}: the training images have changed since, and with them what was held out")
    return train_set, held_out


def _encoded(
    run: LoadedRun, images: ImageSet, settings: ScoreConfig
) -> Iterator[tuple[Tensor, list[Posteriors], Encoded | None]]:
    """Indices of the images of each batch, contexts and targets (2 K pairs), and what the model says of them."""
    device, size = next(run.vje.parameters()).device, settings.batch_size
    if not settings.num_pairs:
        for encoded in encode_batches(run.vje, images, run.info.view, batch_size=size, device=device):
            yield encoded.indices, [encoded.posteriors], encoded
        return
    draw = {"num_pairs": settings.num_pairs, "seed": settings.seed}
    for index, batch in images.batches(images_at_once(images, size, device)):
        yield index, augmented_pairs(run.vje, run.info.views, batch.to(device), **draw), None


def calibrate(run: LoadedRun, scorer: Scorer, settings: ScoreConfig) -> Calibration | None:
    """What scores become p-values by: a named calibration, the run's folds, or its held-out images; or nothing."""
    name = CALIBRATION if settings.calibration is None else calibration_file(settings.calibration)
    if settings.calibration is not None and load_posteriors(run, name) is None:
        raise ValueError(
            f"the run has no calibration {settings.calibration!r}: make it (pyro-vje calibrate --name), or choose one "
            f"of {', '.join(calibrations(run)) or 'none'}"
        )
    if settings.num_pairs:
        try:
            _, held_out = _training_images(run, "no p-values, as pairs are calibrated on the held-out images")
        except ValueError as error:
            log.warning("%s", error)
            return None
        found = (
            [] if held_out is None else [rows[:, 0] for _, rows in _score(run, scorer, settings, held_out)]
        )
        return Split(np.concatenate(found)) if found else None
    folds = load_folds(run) if settings.calibration is None else None
    if folds is not None:
        return cross_calibration(settings.score, *folds, scorer)
    stored = load_posteriors(run, name)
    return None if stored is None else Split(scorer.scores(settings.score, stored).cpu().numpy())


def _score(
    run: LoadedRun,
    scorer: Scorer,
    settings: ScoreConfig,
    images: ImageSet,
    calibration: Calibration | None = None,
) -> Iterator[tuple[Tensor, NDArray[np.float64]]]:
    """Indices of the images of each batch, and a row for each: score, `PARTS`, calibration images as strange."""
    for index, pairs, encoded in _encoded(run, images, settings):
        found = []
        for pair in pairs:
            parts = scorer.parts(pair)
            score = get_score(settings.score)(parts).double()
            # A density over thousands of kernels is there if the score is made of it.
            absent = (
                {} if "log_aggregate" in vars(parts) else {"log_aggregate": torch.full_like(score, torch.nan)}
            )
            columns = [absent[name] if name in absent else getattr(parts, name) for name in PARTS.values()]
            found.append(torch.stack([score, *columns], -1))
        numbers = torch.stack(found).mean(0).cpu().numpy()
        count = np.full(len(numbers), np.nan)
        if calibration is not None:
            count = calibration.at_least(numbers[:, 0], encoded)
        yield index, np.column_stack([numbers, count])


def score_images(
    run: LoadedRun,
    scorer: Scorer,
    settings: ScoreConfig,
    images: ImageSet,
    rows: Rows,
    calibration: Calibration | None,
) -> list[tuple[str, str]]:
    """Score the images that have no row yet; returns path and reason of each that cannot be decoded."""
    remaining = [i for i in range(len(images)) if i not in rows.numbers]
    if len(remaining) < len(images):
        log.info("%d of %d images were scored before", len(images) - len(remaining), len(images))
    todo = images.select(remaining)
    said, done = time.monotonic(), 0
    try:
        for index, numbers in _score(run, scorer, settings, todo, calibration) if remaining else ():
            rows.add({remaining[i]: row for i, row in zip(index.tolist(), numbers.tolist(), strict=True)})
            done += len(index)
            if time.monotonic() - said > PROGRESS_EVERY:
                said = time.monotonic()
                log.info("%d of %d images scored", done, len(todo))
    except KeyboardInterrupt:
        log.warning("%d of %d images are in %s; --resume goes on", done, len(todo), rows.path)
        raise
    return sorted(todo.failed)
