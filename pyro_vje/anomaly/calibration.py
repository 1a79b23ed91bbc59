"""What a score is compared with to become a p-value: held-out images, or folds that were each held out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje.anomaly.parts import Scorer
from pyro_vje.model import encode_features
from pyro_vje.model.vje import VJE

Floats = NDArray[np.float64]


class Calibration:
    """Scores of images that the model has not seen, in folds; each fold of several is ``judged`` by a model of its own.

    Of K folds, a new image is scored by each model, and its p-value (1 + Σ_k #{i in fold k: s_k(i) ≥ s_k(x)}) / (n + 1)
    is cross-conformal (Vovk 2015, "Cross-conformal predictors"). For a normal image P(p ≤ α) ≤ 2 α + 2 (1 - 1/K) /
    (n/K + 1) always (Barber et al. 2021, theorem 4 on CV+), and near α in practice; with one fold, P(p ≤ α) ≤ α.
    """

    def __init__(self, folds: Sequence[Floats], judged: Sequence[Callable[[Tensor], Floats]] = ()) -> None:
        self.folds, self.scores, self._judged = len(folds), np.concatenate(folds), judged
        self._sorted = [np.sort(fold) for fold in folds]

    def at_least(self, scores: Floats, features: Tensor | None = None) -> Floats:
        """How many calibration images look at least as strange as images of ``scores`` (N,) and ``features`` (N, F)."""
        found = [judge(features) for judge in self._judged if features is not None] or [scores]
        ranks = [
            len(x) - np.searchsorted(x, s, side="left") for x, s in zip(self._sorted, found, strict=True)
        ]
        return np.sum(ranks, axis=0, dtype=np.float64)


def cross_calibration(
    score: str, fold: Tensor, features: Tensor, heads: Sequence[VJE], scorer: Scorer
) -> Calibration:
    """From each training image's fold ``(n,)`` and features ``(n, F)``, and the head that has not seen each fold."""
    features, fold = features.to(scorer.device), fold.to(scorer.device)
    known, judged = [], []
    for k, head in enumerate(heads):
        own = scorer.of(head, encode_features(head, features[fold != k]))

        def judge(features: Tensor, own: Scorer = own) -> Floats:
            return own.scores(score, encode_features(own.vje, features)).cpu().numpy()

        known.append(judge(features[fold == k]))
        judged.append(judge)
    return Calibration(known, judged)
