"""What a score is compared with to become a p-value: held-out images, or folds that were each held out once."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.parts import Scorer
from pyro_vje.model import encode_features
from pyro_vje.model.vje import VJE

log = logging.getLogger("pyro_vje")

Floats = NDArray[np.float64]
THRESHOLDS = (0.05, 0.01)


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
        """P-values of images of ``scores`` (N,), or where there are several models of ``features`` (N, F)."""
        found = [scores]
        if features is not None and self.scorers:
            found = [_scores(own, self._score, features) for own in self.scorers]
        pairs = zip(self.folds, found, strict=True)
        at_least = np.sum([len(fold) - np.searchsorted(fold, x, side="left") for fold, x in pairs], axis=0)
        return (1 + at_least) / (len(self.scores) + 1)

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


def cross_calibration(
    score: str, fold: Tensor, features: Tensor, heads: Sequence[VJE], scorer: Scorer
) -> Calibration:
    """From each training image's fold ``(n,)`` and features ``(n, F)``, and the head that has not seen each fold."""
    features, fold = features.to(scorer.device), fold.to(scorer.device)
    scorers = [scorer.of(head, encode_features(head, features[fold != k])) for k, head in enumerate(heads)]
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
