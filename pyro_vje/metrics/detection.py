"""Whether scores ``(N,)`` tell anomalies from normal images, and uncertainties mistakes; scores into decisions.

Higher is stranger, or less certain. ``ValueError``: lengths differ, a vector is empty or not finite, one of the two
classes is missing, or a setting is out of range.
"""

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, rankdata
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from pyro_vje.metrics.arrays import Array, as_booleans, as_vector

Positive: TypeAlias = Literal["anomaly", "normal"]


def _two_classes(
    scores: Array, is_anomaly: Array, positive: Positive = "anomaly"
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores and truth, both turned round where normal images are the positive class."""
    if positive not in ("anomaly", "normal"):
        raise ValueError(f"positive must be 'anomaly' or 'normal', got {positive!r}")
    vector = as_vector(scores, "scores")
    labels = as_booleans(is_anomaly, "is_anomaly", vector.size)
    if labels.all() or not labels.any():
        kind = f"all {labels.size} images are {'anomalies' if labels[0] else 'normal'}"
        raise ValueError(f"both classes are needed, but {kind}")
    return (vector, labels) if positive == "anomaly" else (-vector, ~labels)


def auroc(scores: Array, is_anomaly: Array) -> float:
    """Area under the ROC curve: the probability that an anomaly scores above a normal image, ties counting half."""
    vector, labels = _two_classes(scores, is_anomaly)
    return float(roc_auc_score(labels, vector))


def auroc_interval(scores: Array, is_anomaly: Array) -> tuple[float, float]:
    """95 % interval of `auroc` by the variance of DeLong et al. 1988, computed by ranks (Sun & Xu 2014), within [0, 1].

    It says how much depends on which test images were drawn, not on the seed; with a class of one image it is (0, 1).
    """
    vector, labels = _two_classes(scores, is_anomaly)
    ranks, classes = rankdata(vector), (labels, ~labels)
    if min(members.sum() for members in classes) < 2:
        return 0.0, 1.0
    # For each image, the share of the other class below it: its rank among all less its rank among its own.
    below = [(ranks[own] - rankdata(vector[own])) / (~own).sum() for own in classes]
    error = sum(part.var(ddof=1) / len(part) for part in below) ** 0.5
    centre, width = below[0].mean(), 1.959964 * error
    return max(0.0, float(centre - width)), min(1.0, float(centre + width))


def aupr(scores: Array, is_anomaly: Array, *, positive: Positive) -> float:
    """Area under the precision-recall curve (average precision); chance is the positive class's share of images."""
    vector, labels = _two_classes(scores, is_anomaly, positive)
    return float(average_precision_score(labels, vector))


def fpr_at_tpr(scores: Array, is_anomaly: Array, *, positive: Positive, tpr: float = 0.95) -> float:
    """Smallest false-positive rate of a threshold that finds at least the share ``tpr`` of the positive class.

    The literature has both conventions under the name FPR@95: with ``positive="normal"`` (Liang et al. 2018, ODIN) it
    is the share of anomalies accepted when 95% of the normal images are; with ``positive="anomaly"`` (Hendrycks et
    al. 2019) the share of normal images flagged when 95% of the anomalies are. Name it beside the number.
    """
    vector, labels = _two_classes(scores, is_anomaly, positive)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    false_positive, true_positive, _ = roc_curve(labels, vector, drop_intermediate=False)
    return float(false_positive[true_positive >= tpr].min())


def detection_metrics(scores: Array, is_anomaly: Array) -> dict[str, Any]:
    """All that is usually quoted of an anomaly score: `auroc` and its interval, `aupr` and `fpr_at_tpr` both ways."""
    return {
        "auroc": auroc(scores, is_anomaly),
        "auroc_95": list(auroc_interval(scores, is_anomaly)),
        "aupr_anomalies_positive": aupr(scores, is_anomaly, positive="anomaly"),
        "fpr_at_95_tpr_anomalies_positive": fpr_at_tpr(scores, is_anomaly, positive="anomaly"),
        "aupr_normal_positive": aupr(scores, is_anomaly, positive="normal"),
        "fpr_at_95_tpr_normal_positive": fpr_at_tpr(scores, is_anomaly, positive="normal"),
    }


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
    Benjamini & Hochberg 1995, which holds for `conformal_p_values` (Bates et al. 2023, theorem 2). With n calibration
    images nothing is selected unless about N / (fdr · (n + 1)) images are as strange as p-values can say.
    """
    values = as_vector(p_values, "p_values")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"p_values must lie in [0, 1], got {values.min():g} to {values.max():g}")
    if not 0 < fdr < 1:
        raise ValueError(f"fdr must lie between 0 and 1, got {fdr}")
    # Conformal p-values are fractions and meet their limits exactly: rounding must not decide.
    return false_discovery_control(values) <= fdr * (1 + 1e-12)


class RejectionCurve(NamedTuple):
    """Accuracy ``(N,)`` of the images kept after rejecting the share ``rejected`` ``(N,)``, and its mean ``area``."""

    rejected: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    area: float


def rejection_curve(correct: Array, uncertainty: Array) -> RejectionCurve:
    """Accuracy of the images that remain as the most uncertain ones are rejected, from none to all but one.

    The area is the mean over the curve, one minus the AURC of Geifman & El-Yaniv 2017. Images of equal uncertainty are
    rejected in random order, in expectation: constant uncertainty gives a flat curve.
    """
    vector = as_vector(uncertainty, "uncertainty")
    right = as_booleans(correct, "correct", vector.size)
    _, level = np.unique(vector, return_inverse=True)
    expected = (np.bincount(level, weights=right) / np.bincount(level))[level]
    kept = np.arange(1, vector.size + 1)
    accuracy = (expected[np.argsort(level, kind="stable")].cumsum() / kept)[::-1]
    return RejectionCurve(1 - kept[::-1] / vector.size, accuracy, float(accuracy.mean()))


def r_auroc(correct: Array, uncertainty: Array) -> float:
    """R-AUROC of Kirchhof et al. 2023 ("URL: a representation learning benchmark for transferable uncertainty ...").

    AUROC of an uncertainty for retrieval failing (Recall@1; `knn_predict` with k = 1); 0.5 knows nothing of where.
    """
    vector = as_vector(uncertainty, "uncertainty")
    right = as_booleans(correct, "correct", vector.size)
    if right.all() or not right.any():
        raise ValueError(f"retrieval {'never' if right.all() else 'always'} fails: R-AUROC does not exist")
    return auroc(vector, ~right)
