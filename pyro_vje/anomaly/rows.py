"""From images to rows: read, encoded and scored batch by batch, each row on disk as it comes.

Memory does not grow with the number of images, and an interrupted call can go on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vje.anomaly.calibration import Calibration, cross_calibration
from pyro_vje.anomaly.maps import Maps, load_maps, map_file, peaks_and_tails, picture_size
from pyro_vje.anomaly.parts import LikelihoodParts, Scorer, augmented_pairs
from pyro_vje.anomaly.scores import PLACES, Score, get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageSet
from pyro_vje.data.splits import reference_images
from pyro_vje.metrics.detection import conformal_p_values
from pyro_vje.model.encoding import Encoded, encode, encode_batches, images_at_once
from pyro_vje.progress import Progress, clear_line
from pyro_vje.runs import folder
from pyro_vje.runs.files import locked, parse_json, write_atomic
from pyro_vje.runs.folder import LoadedRun

log = logging.getLogger("pyro_vje")

PARTS = ("log_likelihood", "log_direction", "log_radius", "kl", "posterior_variance", "log_aggregate")
"""Columns of what the likelihood says of an image, beside the score."""
MAP_COLUMNS = ("map_peak", "map_p_value")
"""Columns of scoring with maps: the largest value of an image's, and the share of normal images with such a one."""
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


@dataclass(frozen=True)
class Judge:
    """A run, a score, and what its values are compared with: it makes rows of numbers of images."""

    run: LoadedRun
    settings: ScoreConfig  # which name the score
    score: Score
    scorer: Scorer
    maps: Maps | None = None
    calibration: Calibration | None = None  # without it there are no p-values

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers in a row."""
        return ("anomaly_score", "p_value", *PARTS, *(MAP_COLUMNS if self.maps else ()))

    @property
    def passes(self) -> int:
        """How many passes of the encoder an image costs."""
        if self.settings.num_pairs:
            return 2 * self.settings.num_pairs
        return 4 if self.score.of == "rotations" else 1

    def rows(self, images: ImageSet, maps_folder: Path | None = None) -> Iterator[pd.DataFrame]:
        """Rows of each batch, by the images' positions, of those that can be decoded; their maps go to a folder."""
        vje, info, size, pairs = (
            self.run.vje,
            self.run.info,
            self.settings.batch_size,
            self.settings.num_pairs,
        )
        if self.maps is not None:
            for encoded, maps in self.maps.encode_batches(images, size):
                peaks, tails = peaks_and_tails(maps).unbind(1)
                table = self._table(encoded.indices, [encoded], tails)
                table["map_peak"] = peaks.cpu().numpy()
                table["map_p_value"] = conformal_p_values(peaks, self.maps.peaks)
                for i, image in zip(table.index, maps, strict=True):
                    if maps_folder is not None:
                        self.maps.write(
                            map_file(maps_folder, images.names[i]), image, picture_size(images, i)
                        )
                yield table
        elif pairs:
            for indices, batch in images.batches(images_at_once(images, size, vje.device)):
                how = {"num_pairs": pairs, "seed": self.settings.seed}
                yield self._table(indices, augmented_pairs(vje, info.views, batch.to(vje.device), **how))
        else:
            turns = self.score.of == "rotations"
            for encoded in encode_batches(vje, images, info.view, batch_size=size, turns=turns):
                yield self._table(encoded.indices, [encoded])

    def _table(self, indices: Tensor, each: list[Encoded], places: Tensor | None = None) -> pd.DataFrame:
        """Rows of N images by what the model says of them, once or of each pair, and by the scores of their maps."""
        found = [_numbers(self.score, self.scorer.parts(encoded), places) for encoded in each]
        means = {name: torch.stack([numbers[name] for numbers in found]).mean(0) for name in found[0]}
        table = pd.DataFrame({name: x.cpu().numpy() for name, x in means.items()}, indices.tolist())
        table.insert(1, "p_value", np.nan)
        if self.calibration is not None:
            table["p_value"] = self.calibration.p_values(table["anomaly_score"].to_numpy(), each[0].features)
        return table


def _numbers(score: Score, parts: LikelihoodParts, places: Tensor | None) -> dict[str, Tensor]:
    """The score and `PARTS` of N images, of which ``places`` is the score of their maps."""
    if places is not None:
        parts.places = places
    scores = score(parts).double()
    # A density over thousands of kernels is there if the score is made of it.
    is_known = "log_aggregate" in vars(parts)
    return {
        "anomaly_score": scores,
        "log_likelihood": parts.log_likelihood,
        "log_direction": parts.log_direction,
        "log_radius": parts.log_radius,
        "kl": parts.kl,
        "posterior_variance": parts.variance,
        "log_aggregate": parts.log_aggregate if is_known else torch.full_like(scores, torch.nan),
    }


# What images are judged by --------------------------------------------------------------------------------------------


def prepare(run: LoadedRun, settings: ScoreConfig) -> Judge:
    """What a run's images are scored by under these settings.

    Where they name no score, it is the best one by what was measured: `rotation-joint` of a run with rotations, but for
    maps, which show no turns; else `aggregate`; `conditional` where neither can be. The log says which. ``ValueError``:
    there is no such score, it is none of pairs or of maps, or no such calibration.
    """
    scorer, why = make_scorer(run, settings), "the default"
    best = name = "rotation-joint" if run.vje.rotations and not settings.maps else "aggregate"
    if settings.num_pairs:
        name, why = "conditional", f"as {best}, the default, is none of pairs"
    elif not scorer.has_reference:
        why = f"as there are no reference images ({folder.REFERENCE}) for {best}, the default"
        name = "conditional"
    score = get_score(settings.score or name)
    if settings.score is None:
        log.info("score %s, %s", score.name, why)
    if settings.num_pairs and score.needs_reference:
        raise ValueError(f"{score.name!r} compares clean images with clean reference images: leave pairs out")
    if score is PLACES and not settings.maps:
        raise ValueError(f"the score {score.name!r} is of an image's map: add maps (--maps)")
    if score.of == "rotations" and settings.maps:
        raise ValueError(f"maps are made without the turns that {score.name!r} is of: leave one of them out")
    if settings.num_pairs and settings.maps:
        raise ValueError("maps are of clean images: leave pairs out (num_pairs)")
    maps = load_maps(run) if settings.maps else None
    judge = Judge(run, dataclasses.replace(settings, score=score.name), score, scorer, maps)
    return dataclasses.replace(judge, calibration=_calibration(judge))


def make_scorer(run: LoadedRun, settings: ScoreConfig) -> Scorer:
    """The scorer of a run, with the reference images if the run has them, and their augmented views if asked for."""
    reference, config = folder.load_posteriors(run, folder.REFERENCE), run.info.config
    if settings.reference_views:
        why = "kernels at augmented views of the training images need these"
        views, images = run.info.views, reference_images(folder.training_images(run, why)[0], config.seed)
        generator = torch.Generator(run.vje.device).manual_seed(settings.seed)
        drawn = [
            encode(run.vje, images, lambda batch: views(batch, generator)[0])
            for _ in range(settings.reference_views)
        ]
        reference = Encoded.cat([*drawn, *([] if reference is None else [reference])])
    return Scorer(
        run.vje,
        reference=reference,
        num_particles=settings.num_particles,
        seed=settings.seed,
        likelihood=settings.score_likelihood,
        kl_weight=config.kl_weight,
    )


def _calibration(judge: Judge) -> Calibration | None:
    """What scores become p-values by: a named calibration, the run's folds, or its held-out images; or nothing."""
    run, score, scorer, name = judge.run, judge.score, judge.scorer, judge.settings.calibration
    if judge.maps is not None and score is PLACES:
        return Calibration([judge.maps.tails])
    stored = folder.load_posteriors(
        run, folder.CALIBRATION if name is None else folder.calibration_file(name)
    )
    if name is not None and stored is None:
        raise ValueError(
            f"the run has no calibration {name!r}: make it (pyro-vje calibrate --name), or choose one of "
            f"{', '.join(folder.calibrations(run)) or 'none'}"
        )
    if judge.settings.num_pairs:
        try:
            why = "no p-values, as pairs are calibrated on the held-out images"
            _, held_out = folder.training_images(run, why)
        except ValueError as error:
            log.warning("%s", error)
            return None
        scores = [table["anomaly_score"].to_numpy() for table in judge.rows(held_out)] if held_out else []
        return Calibration([np.concatenate(scores)]) if scores else None
    if name is None and (folds := folder.load_folds(run)) is not None:
        return cross_calibration(score.name, *folds, scorer)
    return None if stored is None else Calibration([scorer.scores(score.name, stored).cpu().numpy()])


# Rows on disk ---------------------------------------------------------------------------------------------------------


class Rows:
    """Numbers of images on disk while they are scored: a line of JSON each, after one that says how they were ``made``.

    ``shape`` is the number of images and of numbers in a row. Without ``resume`` the file is begun anew.
    """

    def __init__(self, path: Path, made: dict[str, Any], shape: tuple[int, int], *, resume: bool) -> None:
        self.path, self._lock = path, ExitStack()
        self._lock.enter_context(locked(path))
        self.numbers: dict[int, list[float]] = {}
        *lines, _ = (
            path.read_bytes().split(b"\n") if resume and path.is_file() else [b""]
        )  # a kill cuts off the last
        if lines:
            self._read(lines, made, shape)
        else:
            lines = [json.dumps(made).encode()]
            if resume:
                log.info("there is no %s to resume: from the beginning", path)
        write_atomic(path, b"\n".join([*lines, b""]))

    def _read(self, lines: Sequence[bytes], made: dict[str, Any], shape: tuple[int, int]) -> None:
        damaged = f"{self.path} is damaged: score again without --resume"
        try:
            before, *rows = map(parse_json, lines)
            changed = ", ".join(name for name, value in made.items() if before[name] != value)
            self.numbers = {} if changed else dict(rows)
        except (ValueError, TypeError, KeyError):
            raise ValueError(damaged) from None
        if changed:
            how = f"was made with other settings ({changed})"
            raise ValueError(f"{self.path} {how}: score again without --resume")
        kinds = [float] * shape[1]
        good = all(type(i) is int and 0 <= i < shape[0] for i in self.numbers)
        good = good and all([type(x) for x in numbers] == kinds for numbers in self.numbers.values())
        if not good or len(self.numbers) < len(rows):
            raise ValueError(damaged)

    def add(self, rows: Mapping[int, list[float]]) -> None:
        """Append the numbers of images by their positions."""
        self.numbers |= rows
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows.items())

    def remove(self) -> None:
        """Remove the file, when all that was made of it is written, and let other processes write it."""
        self.path.unlink()
        self._lock.close()


def score_images(
    judge: Judge, images: ImageSet, rows: Rows, maps_folder: Path | None
) -> list[tuple[str, str]]:
    """Score the images that have no row yet; returns path and reason of each that cannot be decoded."""
    remaining = [i for i in range(len(images)) if i not in rows.numbers]
    if len(remaining) < len(images):
        log.info("%d of %d images were scored before", len(images) - len(remaining), len(images))
    todo = images.select(remaining)
    progress = Progress("scoring", len(todo))
    try:
        for table in judge.rows(todo, maps_folder) if remaining else ():
            numbers = zip(table.index, table.to_numpy().tolist(), strict=True)
            rows.add({remaining[i]: row for i, row in numbers})
            progress.add(len(table))
    except KeyboardInterrupt:
        clear_line()
        log.warning("%d of %d images are in %s; --resume goes on", progress.done, len(todo), rows.path)
        raise
    clear_line()  # images that cannot be read leave it short of its end
    return sorted(todo.failed)
