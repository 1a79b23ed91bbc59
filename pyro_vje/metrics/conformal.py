"""Scores into decisions: conformal p-values and selection at a false-discovery rate.

A score in a learned space has no scale of its own. Compared with the scores of held-out normal images it gets one: a
p-value, the share of normal images that would look at least as strange. NumPy in, NumPy out; tensors are accepted.
Vectors that are empty or not finite are a ``ValueError``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from pyro_vje.metrics.arrays import Array, as_vector


def conformal_p_values(scores: Array, calibration_scores: Array) -> NDArray[np.float64]:
    """P-value of each score ``(N,)``, higher for stranger images: (1 + #{calibration scores ≥ score}) / (n + 1).

    ``calibration_scores`` ``(n,)`` are those of held-out normal images by the same model and score. For a new normal
    image, P(p ≤ α) ≤ α for every α, at any n and whatever the score (Vovk et al. 2005; Bates et al. 2023, "Testing
    for outliers with conformal p-values"). This holds on average over calibration sets, and as long as the normal
    images that are scored are exchangeable with the calibration images. It is **void** when the calibration images
    were trained on, were chosen by their scores, come from another camera, time or preprocessing than the scored ones,
    or hold anomalies (then p-values are too large, and anomalies are missed); and when the model or the score was
    picked on them. No p-value is below 1 / (n + 1): decisions at α need n ≥ 1/α - 1.
    """
    values = as_vector(scores, "scores")
    reference = np.sort(as_vector(calibration_scores, "calibration_scores"))
    at_least = len(reference) - np.searchsorted(reference, values, side="left")
    return (1 + at_least) / (len(reference) + 1)


def benjamini_hochberg(p_values: Array, fdr: float) -> NDArray[np.bool_]:
    """True for each image that is selected, ``(N,)``, by the p-values ``(N,)`` of all that are tested together.

    The expected share of normal images among the selected ones is at most ``fdr``, in (0, 1): the step-up procedure of
    Benjamini & Hochberg 1995. It holds for `conformal_p_values`, although these share a calibration set (Bates et al.
    2023, theorem 2), under the conditions named there. With n calibration images nothing is selected unless about
    N / (fdr · (n + 1)) images are as strange as p-values can say. Equal p-values are selected or left together.
    """
    values = as_vector(p_values, "p_values")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"p_values must lie in [0, 1], got {values.min():g} to {values.max():g}")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must lie between 0 and 1, got {fdr}")
    # Conformal p-values are fractions and meet their limits exactly: rounding must not decide.
    return false_discovery_control(values) <= fdr * (1 + 1e-12)
