"""What images are judged by: a run, a score and a calibration, which make rows of numbers of images."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.maps import Maps, load_maps, map_file, peaks_and_tails, picture_size
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import PLACES, Score, get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageSet
from pyro_vje.metrics.detection import conformal_p_values
from pyro_vje.model.encoding import Encoded, encode_batches, encode_features
from pyro_vje.model.vje import VJE
from pyro_vje.runs import folder
from pyro_vje.runs.folder import LoadedRun

log = logging.getLogger("pyro_vje")

Floats = NDArray[np.float64]
THRESHOLDS = (0.05, 0.01)
PARTS = ("log_likelihood", "log_direction", "log_radius", "kl", "posterior_variance", "log_aggregate")
"""Columns of what the likelihood says of an image, beside the score."""
MAP_COLUMNS = ("map_peak", "map_p_value")
"""Columns of scoring with maps: the largest value of an image's, and the share of normal images with such a one."""
HOW = ("score", "score_likelihood", "calibration", "num_particles", "seed", "maps")
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
        return 4 if self.score.of == "rotations" else 1

    def rows(self, images: ImageSet, maps_folder: Path | None = None) -> Iterator[pd.DataFrame]:
        """Rows of each batch, by the images' positions, of those that can be decoded; their maps go to a folder."""
        vje, info, settings = self.run.vje, self.run.info, self.settings
        if self.maps is not None:
            for encoded, maps in self.maps.encode_batches(images, settings.batch_size):
                peaks, tails = peaks_and_tails(maps).unbind(1)
                table = self._table(encoded, tails)
                table["map_peak"] = peaks.cpu().numpy()
                table["map_p_value"] = conformal_p_values(peaks, self.maps.peaks)
                for i, image in zip(table.index if maps_folder else (), maps, strict=False):
                    place = map_file(cast(Path, maps_folder), images.names[i])
                    self.maps.write(place, image, picture_size(images, i))
                yield table
        else:
            size, turns = settings.batch_size, self.score.of == "rotations"
            for encoded in encode_batches(vje, images, info.view, batch_size=size, turns=turns):
                yield self._table(encoded)

    def _table(self, encoded: Encoded, places: Tensor | None = None) -> pd.DataFrame:
        """Rows of N images by what the model says of them, and by the scores of their maps."""
        parts = self.scorer.parts(encoded)
        if places is not None:
            parts.places = places
        scores = self.score(parts).double()
        p_values = np.full(len(scores), np.nan)
        if self.calibration is not None:
            p_values = self.calibration.p_values(scores.cpu().numpy(), encoded.features)
        columns = {
            "anomaly_score": scores,
            "p_value": torch.from_numpy(p_values),
            "log_likelihood": parts.log_likelihood,
            "log_direction": parts.log_direction,
            "log_radius": parts.log_radius,
            "kl": parts.kl,
            "posterior_variance": parts.variance,
        }
        # A density over thousands of kernels is there if the score is made of it.
        is_known = "log_aggregate" in vars(parts)
        columns["log_aggregate"] = parts.log_aggregate if is_known else torch.full_like(parts.kl, torch.nan)
        return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}, encoded.indices.numpy())


# What images are judged by --------------------------------------------------------------------------------------------


def prepare(run: LoadedRun, settings: ScoreConfig) -> Judge:
    """What a run's images are scored by under these settings.

    Where they name no score, it is the best one by what was measured: `rotation-joint` of a run with rotations, but for
    maps, which show no turns; else `aggregate`; `conditional` where neither can be. The log says which. ``ValueError``:
    there is no such score, it is none of maps, or no such calibration.
    """
    scorer, why = make_scorer(run, settings), "the default"
    best = name = "rotation-joint" if run.vje.rotations and not settings.maps else "aggregate"
    if scorer.reference is None:
        why = f"as there are no reference images ({folder.REFERENCE}) for {best}, the default"
        name = "conditional"
    score = get_score(settings.score or name)
    if settings.score is None:
        log.info("score %s, %s", score.name, why)
    if score is PLACES and not settings.maps:
        raise ValueError(f"the score {score.name!r} is of an image's map: add maps (--maps)")
    if score.of == "rotations" and settings.maps:
        raise ValueError(f"maps are made without the turns that {score.name!r} is of: leave one of them out")
    maps = load_maps(run) if settings.maps else None
    judge = Judge(run, dataclasses.replace(settings, score=score.name), score, scorer, maps)
    return dataclasses.replace(judge, calibration=_calibration(judge))


def make_scorer(run: LoadedRun, settings: ScoreConfig) -> Scorer:
    """The scorer of a run, with the reference images if the run has them."""
    return Scorer(
        run.vje,
        reference=folder.load_posteriors(run, folder.REFERENCE),
        num_particles=settings.num_particles,
        seed=settings.seed,
        likelihood=settings.score_likelihood,
        kl_weight=run.info.config.kl_weight,
    )


def _calibration(judge: Judge) -> Calibration | None:
    """What scores become p-values by: a named calibration, the run's folds, or its held-out images; or nothing."""
    run, score, scorer, name = judge.run, judge.score, judge.scorer, judge.settings.calibration
    if judge.maps is not None and score is PLACES:
        return Calibration([judge.maps.tails])
    stored = folder.load_posteriors(run, folder.CALIBRATION if name is None else folder.calibration_file(name))
    if name is not None and stored is None:
        raise ValueError(
            f"the run has no calibration {name!r}: make it (pyro-vje calibrate --name), or choose one of "
            f"{', '.join(folder.calibrations(run)) or 'none'}"
        )
    if name is None and (folds := folder.load_folds(run)) is not None:
        return cross_calibration(score.name, *folds, scorer)
    return None if stored is None else Calibration([scorer.scores(score.name, stored).cpu().numpy()])


# P-values -------------------------------------------------------------------------------------------------------------


class Calibration:
    """Scores of images that the model has not seen, in folds; each of several has a model of its own, in ``scorers``.

    Of K folds, a new image is scored by each model, and its p-value (1 + Σ_k #{i in fold k: s_k(i) ≥ s_k(x)}) / (n + 1)
    is cross-conformal (Vovk 2015, "Cross-conformal predictors"). For a normal image P(p ≤ α) ≤ 2 α + 2 (1 - 1/K) /
    (n/K + 1) always (Barber et al. 2021, theorem 4 on CV+), and near α in practice; with one fold, P(p ≤ α) ≤ α.
    """

    def __init__(self, folds: Sequence[Floats], scorers: Sequence[Scorer] = (), score: str = "") -> None:
        self.scores, self.scorers = np.concatenate(folds), scorers
        self.folds, self._score = [np.sort(fold) for fold in folds], score

    def p_values(self, scores: Floats, features: Tensor | None = None) -> Floats:
        """P-values of images of ``scores`` (N,), or where there are several models of ``features`` (N, F).

        A score that is not a number has none.
        """
        found = [scores]
        if features is not None and self.scorers:
            found = [_scores(own, self._score, features) for own in self.scorers]
        pairs = zip(self.folds, found, strict=True)
        at_least = np.sum([len(fold) - np.searchsorted(fold, x, side="left") for fold, x in pairs], axis=0)
        return np.where(np.isnan(found).any(0), np.nan, (1 + at_least) / (len(self.scores) + 1))

    def describe(self) -> dict[str, Any]:
        """Number of its images, and above which score an image's p-value is at most some levels."""
        count, ordered = len(self.scores), np.sort(self.scores)[::-1]
        about = {"images": count, "smallest_p_value": 1 / (count + 1), "folds": len(self.folds)}
        if self.scorers:  # each has a score of its own
            return about
        ranks = {level: int(level * (count + 1) * (1 + 1e-12)) for level in THRESHOLDS}
        return {
            **about,
            "thresholds": {f"{level:g}": float(ordered[n - 1]) if n else None for level, n in ranks.items()},
            "threshold": "an image whose score is above it has a p-value of at most the level",
        }


def _scores(scorer: Scorer, score: str, features: Tensor) -> Floats:
    return scorer.scores(score, encode_features(scorer.vje, features)).cpu().numpy()


def cross_calibration(score: str, fold: Tensor, features: Tensor, heads: Sequence[VJE], scorer: Scorer) -> Calibration:
    """From each training image's fold ``(n,)`` and features ``(n, F)``, and the head that has not seen each fold."""
    features, fold = features.to(scorer.device), fold.to(scorer.device)
    scorers = [
        dataclasses.replace(scorer, vje=head, reference=encode_features(head, features[fold != k]))
        for k, head in enumerate(heads)
    ]
    known = [_scores(own, score, features[fold == k]) for k, own in enumerate(scorers)]
    return Calibration(known, scorers, score)


def say_level(count: int, images: int, alpha: float | None, fdr: float | None) -> None:
    """Say beforehand which decisions so many calibration images carry; ``ValueError`` if no image could meet one."""
    level, name = (fdr, "fdr") if alpha is None else (alpha, "alpha")
    if not count:
        no = "this run has no held-out images to calibrate scores (train --holdout, or pyro-vje calibrate)"
        if level is not None:
            raise ValueError(f"no p-values, so no decisions: {no}")
        log.info("no p-values: %s", no)
        return
    least = 1 / (count + 1)
    log.info("compared with %d normal images, so that no p-value is below %.3g", count, least)
    if level is not None and level < least:
        raise ValueError(
            f"with {count} calibration images no p-value is below {least:.3g}, so nothing could be called an anomaly "
            f"at {name} {level:g}: calibrate with {math.ceil(1 / level) - 1} or more "
            "(train --holdout, or pyro-vje calibrate), or raise the level"
        )
    if fdr is not None and (least_called := math.ceil(images * least / fdr)) > 1:
        log.warning(
            f"at fdr {fdr:g}, among {images} images and with {count} to compare with, fewer than {least_called} "
            "strange ones cannot be called: raise it, or compare with more (pyro-vje calibrate)"
        )
