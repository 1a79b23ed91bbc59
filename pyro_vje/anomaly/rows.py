"""From images to rows: read, encoded and scored batch by batch, each row on disk as it comes.

Memory does not grow with the number of images, and an interrupted call can go on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vje.anomaly.calibration import Calibration, Floats, cross_calibration, training_images
from pyro_vje.anomaly.maps import Maps, load_maps, map_file, peaks_and_tails, picture_size
from pyro_vje.anomaly.parts import LikelihoodParts, Scorer, augmented_pairs
from pyro_vje.anomaly.scores import PLACES, Score, get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageSet
from pyro_vje.data.splits import reference_images
from pyro_vje.model.encoding import Encoded, encode, encode_batches, images_at_once
from pyro_vje.progress import Progress, clear_line
from pyro_vje.runs import folder
from pyro_vje.runs.files import locked, parse_json, write_atomic
from pyro_vje.runs.folder import LoadedRun

log = logging.getLogger("pyro_vje")

PARTS = {name: name for name in ("log_likelihood", "log_direction", "log_radius", "kl")}
PARTS |= {"posterior_variance": "variance", "log_aggregate": "log_aggregate"}
"""Columns of numbers beside the score, and what they are called in `LikelihoodParts`."""
HOW = (
    "score",
    "score_likelihood",
    "calibration",
    "reference_views",
    "num_pairs",
    "num_particles",
    "seed",
    "maps",
)
"""Settings on which scores depend."""


class Rows:
    """Numbers of images on disk while they are scored: a line of JSON each, after one that says how they were ``made``.

    ``shape`` is the number of images and of numbers in a row. Without ``resume`` the file is begun anew.
    """

    def __init__(self, path: Path, made: dict[str, Any], shape: tuple[int, int], *, resume: bool) -> None:
        self.path, self._lock = path, ExitStack()
        self._lock.enter_context(locked(path))
        content = path.read_bytes() if resume and path.is_file() else b""
        if resume and not content:
            log.info("there is no %s to resume: from the beginning", path)
        *whole, _ = (content or f"{json.dumps(made)}\n".encode()).split(b"\n")  # a kill may cut off the last
        try:
            before, *rows = [parse_json(line) for line in whole]
            changed = [name for name, value in made.items() if before[name] != value]
            self.numbers: dict[int, list[float]] = {} if changed else dict(rows)
            good = changed or len(self.numbers) == len(rows)
            good = good and all(type(i) is int and 0 <= i < shape[0] for i in self.numbers)
            good = good and all([*map(type, row)] == [float] * shape[1] for row in self.numbers.values())
        except (ValueError, TypeError, KeyError):
            changed, good = [], False
        if changed or not good:
            wrong = f"was made with other settings ({', '.join(changed)})" if changed else "is damaged"
            raise ValueError(f"{path} {wrong}: score again without --resume")
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
    reference, config = folder.load_posteriors(run, folder.REFERENCE), run.info.config
    if settings.reference_views:
        train_set, _ = training_images(run, "kernels at augmented views of the training images need these")
        views, images = run.info.views, reference_images(train_set, config.seed)
        generator = torch.Generator(run.vje.device).manual_seed(settings.seed)
        drawn = [
            encode(run.vje, images, lambda batch: views(batch, generator)[0])
            for _ in range(settings.reference_views)
        ]
        reference = Encoded.cat([*drawn, *([] if reference is None else [reference])])
    how = {"num_particles": settings.num_particles, "seed": settings.seed}
    likelihood = settings.score_likelihood
    return Scorer(run.vje, reference=reference, likelihood=likelihood, kl_weight=config.kl_weight, **how)


class Judge(NamedTuple):
    """What a run's images are scored by; ``known`` is what p-values compare with."""

    run: LoadedRun
    settings: ScoreConfig
    score: Score
    scorer: Scorer
    known: Calibration | None
    maps: Maps | None = None
    folder: Path | None = None  # of the maps' files


def prepare(run: LoadedRun, settings: ScoreConfig) -> Judge:
    """What a run's images are scored by under these settings.

    Where they name no score, it is the best one by what was measured: `rotation-joint` of a run with rotations, else
    `aggregate`; `conditional` where neither can be. The log says which. ``ValueError``: there is no such score, it is
    none of pairs, or no such calibration.
    """
    scorer, why = make_scorer(run, settings), "the default"
    best = "rotation-joint" if run.vje.rotations else "aggregate"
    if settings.num_pairs:
        why = f"as {best}, the default, is none of pairs"
    elif not scorer.has_reference:
        why = f"as there are no reference images ({folder.REFERENCE}) for {best}, the default"
    score = get_score(settings.score or (best if why == "the default" else "conditional"))
    if settings.score is None:
        log.info("score %s, %s", score.name, why)
    if settings.num_pairs and score.needs_reference:
        raise ValueError(f"{score.name!r} compares clean images with clean reference images: leave pairs out")
    if score is PLACES and not settings.maps:
        raise ValueError(f"the score {score.name!r} is of an image's map: add maps (--maps)")
    if settings.num_pairs and settings.maps:
        raise ValueError("maps are of clean images: leave pairs out (num_pairs)")
    maps = load_maps(run) if settings.maps else None
    judge = Judge(run, dataclasses.replace(settings, score=score.name), score, scorer, None, maps)
    return judge._replace(known=calibrate(judge))


def calibrate(judge: Judge) -> Calibration | None:
    """What scores become p-values by: a named calibration, the run's folds, or its held-out images; or nothing."""
    run, settings, score, scorer, _, maps, _ = judge
    if maps is not None and score is PLACES:
        return Calibration([maps.tails])
    name = settings.calibration
    file = folder.CALIBRATION if name is None else folder.calibration_file(name)
    stored = folder.load_posteriors(run, file)
    if name is not None and stored is None:
        raise ValueError(
            f"the run has no calibration {name!r}: make it (pyro-vje calibrate --name), or choose one of "
            f"{', '.join(folder.calibrations(run)) or 'none'}"
        )
    if settings.num_pairs:
        try:
            _, held_out = training_images(run, "no p-values, as pairs are calibrated on the held-out images")
        except ValueError as error:
            log.warning("%s", error)
            return None
        batches = score_batches(judge, held_out) if held_out else ()
        rows = [row for _, row in batches]
        return Calibration([np.concatenate(rows)[:, 0]]) if rows else None
    if name is None and (folds := folder.load_folds(run)) is not None:
        return cross_calibration(score.name, *folds, scorer)
    return None if stored is None else Calibration([scorer.scores(score.name, stored).cpu().numpy()])


def _row(score: Score, parts: LikelihoodParts) -> Tensor:
    """Score and `PARTS` of N images; a density over thousands of kernels is there if the score is made of it."""
    found = score(parts).double()
    nothing = {} if "log_aggregate" in vars(parts) else {"log_aggregate": torch.full_like(found, torch.nan)}
    columns = [nothing[name] if name in nothing else getattr(parts, name) for name in PARTS.values()]
    return torch.stack([found, *columns], -1)


def score_batches(judge: Judge, images: ImageSet) -> Iterator[tuple[Tensor, Floats]]:
    """Indices of the images of each batch, and a row for each: score, `PARTS`, calibration images as strange.

    With maps a row ends with the largest value of the image's, which is then on disk.
    """
    run, settings, score, scorer, known, maps, place = judge
    device, size, pairs = scorer.device, settings.batch_size, settings.num_pairs
    found: Iterator[tuple[Tensor, list[Encoded], Tensor | None]]
    if maps is not None:
        for encoded, drawn in maps.encode_batches(images, size):
            parts, largest = scorer.parts(encoded), peaks_and_tails(drawn)
            parts.places = largest[:, 1]
            numbers, count = _row(score, parts).cpu().numpy(), np.full(len(drawn), np.nan)
            if known is not None:
                count = known.at_least(numbers[:, 0], encoded.features)
            for i, image in zip(encoded.indices.tolist(), drawn, strict=True):
                if place is None:
                    break
                maps.write(map_file(place, images.names[i]), image, picture_size(images, i))
            yield encoded.indices, np.column_stack([numbers, count, largest[:, 0].cpu()])
        return
    if pairs:
        draw = partial(augmented_pairs, run.vje, run.info.views, num_pairs=pairs, seed=settings.seed)
        batches = images.batches(images_at_once(images, size, device))
        found = ((index, draw(batch.to(device)), None) for index, batch in batches)
    else:
        turned = run.vje.rotations > 0
        clean = encode_batches(run.vje, images, run.info.view, batch_size=size, rotations=turned)
        found = ((batch.indices, [batch], batch.features) for batch in clean)
    for index, posteriors, features in found:
        rows = torch.stack([_row(score, scorer.parts(each)) for each in posteriors])
        numbers, count = rows.mean(0).cpu().numpy(), np.full(len(index), np.nan)
        if known is not None:
            count = known.at_least(numbers[:, 0], features)
        yield index, np.column_stack([numbers, count])


def score_images(
    images: ImageSet, rows: Rows, score: Callable[[ImageSet], Iterator[tuple[Tensor, Floats]]]
) -> list[tuple[str, str]]:
    """Score the images that have no row yet; returns path and reason of each that cannot be decoded."""
    remaining = [i for i in range(len(images)) if i not in rows.numbers]
    if len(remaining) < len(images):
        log.info("%d of %d images were scored before", len(images) - len(remaining), len(images))
    todo = images.select(remaining)
    progress = Progress("scoring", len(todo))
    try:
        for index, numbers in score(todo) if remaining else ():
            rows.add({remaining[i]: row for i, row in zip(index.tolist(), numbers.tolist(), strict=True)})
            progress.add(len(index))
    except KeyboardInterrupt:
        clear_line()
        log.warning("%d of %d images are in %s; --resume goes on", progress.done, len(todo), rows.path)
        raise
    clear_line()  # images that cannot be read leave it short of its end
    return sorted(todo.failed)
