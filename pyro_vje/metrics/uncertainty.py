"""Whether an uncertainty ``(N,)`` says which images are dealt with wrongly, ``correct`` ``(N,)`` which are not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyro_vje.metrics.arrays import Array, as_booleans, as_vector
from pyro_vje.metrics.detection import auroc


class RejectionCurve(NamedTuple):
    """Accuracy ``(N,)`` of the images kept after rejecting the share ``rejected`` ``(N,)``, and its mean ``area``."""

    rejected: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    area: float


def rejection_curve(correct: Array, uncertainty: Array) -> RejectionCurve:
    """Accuracy of the images that remain as the most uncertain ones are rejected, from none to all but one.

    The area is the mean over the curve, one minus the AURC of Geifman & El-Yaniv 2017. Images of equal uncertainty are
    rejected in random order, in expectation: constant uncertainty gives a flat curve. Raises ``ValueError`` if lengths
    differ or an uncertainty is not finite.
    """
    vector = as_vector(uncertainty, "uncertainty")
    right = as_booleans(correct, "correct", vector.size)
    _, level = np.unique(vector, return_inverse=True)
    expected = (np.bincount(level, weights=right) / np.bincount(level))[level]
    kept = np.arange(1, vector.size + 1)
    accuracy = (expected[np.argsort(level, kind="stable")].cumsum() / kept)[::-1]
    return RejectionCurve(1 - kept[::-1] / vector.size, accuracy, float(accuracy.mean()))


def r_auroc(correct: Array, uncertainty: Array) -> float:
    """AUROC of an uncertainty for retrieval failing; 0.5 says that it knows nothing of where.

    R-AUROC of Kirchhof et al. 2023 ("URL: a representation learning benchmark for transferable uncertainty
    estimates"), where an image is retrieved correctly if its nearest neighbour is of its class (Recall@1; `knn_predict`
    with k = 1). Raises as `rejection_curve`; also if retrieval never fails or always does.
    """
    vector = as_vector(uncertainty, "uncertainty")
    right = as_booleans(correct, "correct", vector.size)
    if right.all() or not right.any():
        raise ValueError(f"retrieval {'never' if right.all() else 'always'} fails: R-AUROC does not exist")
    return auroc(vector, ~right)
