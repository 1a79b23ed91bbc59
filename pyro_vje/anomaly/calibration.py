"""What a score is compared with to become a p-value: held-out images, or folds that were each held out once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_vje.anomaly.parts import Scorer
from pyro_vje.model import Encoded, encode_features
from pyro_vje.model.vje import VJE


class Split:
    """Scores ``(n,)`` of images that the model has not seen, made like those of any image."""

    def __init__(self, scores: NDArray[np.float64]) -> None:
        self.scores, self.folds = scores, 1
        self._sorted = np.sort(scores)

    def at_least(self, scores: NDArray[np.float64], encoded: Encoded | None = None) -> NDArray[np.float64]:
        """How many calibration images look at least as strange as each image, ``(N,)``."""
        return len(self._sorted) - np.searchsorted(self._sorted, scores, side="left").astype(np.float64)


class Cross:
    """All training images: each is scored by a head that has not seen its fold, and so is every new image, K times.

    The p-value (1 + Σ_k #{i in fold k: s_k(i) ≥ s_k(x)}) / (n + 1) is cross-conformal (Vovk 2015, "Cross-conformal
    predictors"). For a normal image P(p ≤ α) ≤ 2 α + 2 (1 - 1/K) / (n/K + 1) always (Barber et al. 2021, theorem 4 on
    CV+; in practice it is near α), where held-out images alone would give α, but smallest p-values twenty times larger.
    """

    def __init__(
        self, score: str, scorers: Sequence[Scorer], heads: Sequence[VJE], held_out: Sequence[Encoded]
    ):
        self.score, self.scorers, self.heads, self.folds = score, scorers, heads, len(heads)
        self._of_fold = [
            np.sort(scorer.scores(score, encoded.posteriors).cpu().numpy())
            for scorer, encoded in zip(scorers, held_out, strict=True)
        ]
        self.scores = np.concatenate(self._of_fold)

    def at_least(self, scores: NDArray[np.float64], encoded: Encoded | None = None) -> NDArray[np.float64]:
        """How many training images look at least as strange as each of ``encoded``, to heads that knew neither."""
        assert encoded is not None
        total = np.zeros(len(encoded.features))
        for head, scorer, known in zip(self.heads, self.scorers, self._of_fold, strict=True):
            found = (
                scorer.scores(self.score, encode_features(head, encoded.features).posteriors).cpu().numpy()
            )
            total += len(known) - np.searchsorted(known, found, side="left")
        return total


Calibration = Split | Cross


def cross_calibration(
    score: str, fold: torch.Tensor, features: torch.Tensor, heads: Sequence[VJE], scorer: Scorer
) -> Cross:
    """`Cross` from what a run with a frozen encoder keeps, with the settings of ``scorer``."""
    scorers, held_out = [], []
    for k, head in enumerate(heads):
        encoded = encode_features(head, features.to(scorer.device))
        inside, outside = (
            Encoded(*(x[rows.to(x.device)] for x in encoded)) for rows in (fold == k, fold != k)
        )
        scorers.append(scorer.of(head, outside.posteriors))
        held_out.append(inside)
    return Cross(score, scorers, heads, held_out)
