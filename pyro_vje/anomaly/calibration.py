"""What a score is compared with to become a p-value: held-out images, or folds that were each held out once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.parts import Scorer
from pyro_vje.data import ImageSet
from pyro_vje.model import encode_features
from pyro_vje.model.vje import VJE
from pyro_vje.runs import folder

Floats = NDArray[np.float64]


class Calibration:
    """Scores of images that the model has not seen, in folds; each of several has a model of its own, in ``scorers``.

    Of K folds, a new image is scored by each model, and its p-value (1 + Σ_k #{i in fold k: s_k(i) ≥ s_k(x)}) / (n + 1)
    is cross-conformal (Vovk 2015, "Cross-conformal predictors"). For a normal image P(p ≤ α) ≤ 2 α + 2 (1 - 1/K) /
    (n/K + 1) always (Barber et al. 2021, theorem 4 on CV+), and near α in practice; with one fold, P(p ≤ α) ≤ α.
    """

    def __init__(self, folds: Sequence[Floats], scorers: Sequence[Scorer] = (), score: str = "") -> None:
        self.folds, self.scores, self.scorers = len(folds), np.concatenate(folds), scorers
        self.sorted, self._score = [np.sort(fold) for fold in folds], score

    def at_least(self, scores: Floats, features: Tensor | None = None) -> Floats:
        """How many calibration images look at least as strange as images of ``scores`` (N,) and ``features`` (N, F)."""
        found = [scores]
        if features is not None and self.scorers:
            found = [_judge(own, self._score, features) for own in self.scorers]
        ranks = [len(x) - np.searchsorted(x, s, side="left") for x, s in zip(self.sorted, found, strict=True)]
        return np.sum(ranks, axis=0, dtype=np.float64)


def _judge(scorer: Scorer, score: str, features: Tensor) -> Floats:
    return scorer.scores(score, encode_features(scorer.vje, features)).cpu().numpy()


def cross_calibration(
    score: str, fold: Tensor, features: Tensor, heads: Sequence[VJE], scorer: Scorer
) -> Calibration:
    """From each training image's fold ``(n,)`` and features ``(n, F)``, and the head that has not seen each fold."""
    features, fold = features.to(scorer.device), fold.to(scorer.device)
    scorers = [scorer.of(head, encode_features(head, features[fold != k])) for k, head in enumerate(heads)]
    known = [_judge(own, score, features[fold == k]) for k, own in enumerate(scorers)]
    return Calibration(known, scorers, score)


def training_images(run: folder.LoadedRun, why: str) -> tuple[ImageSet, ImageSet | None]:
    """The images that a run was trained on and those it held out; ``ValueError`` with ``why`` if not as they were."""
    try:
        train_set, held_out = folder.training_images(run)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{why}: {error}") from None
    if run.info.fingerprint not in (None, train_set.fingerprint()) or len(train_set) != run.info.train_images:
        raise ValueError(f"{why}: the training images have changed since, and with them what was held out")
    return train_set, held_out
