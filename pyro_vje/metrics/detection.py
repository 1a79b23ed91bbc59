"""How well anomaly scores ``(N,)``, higher for stranger images, tell anomalies from normal images.

Each takes the scores and the truth ``is_anomaly`` ``(N,)``, and raises ``ValueError`` if lengths differ, a score is not
finite, one of the two classes is missing, or a setting is out of range.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
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

    It says how much the number depends on which test images were drawn, not on the training seed; a class of one
    image says nothing of that, and the interval is (0, 1).
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
