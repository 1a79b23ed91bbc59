"""Numbers from arrays: functions that know no model, data or run; NumPy or torch in, floats and NumPy out."""

from pyro_vje.metrics.conformal import benjamini_hochberg, conformal_p_values
from pyro_vje.metrics.detection import aupr, auroc, auroc_interval, detection_metrics, fpr_at_tpr
from pyro_vje.metrics.representation import (
    alignment,
    collapse_warning,
    effective_rank,
    embedding_spread,
    knn_predict,
    knn_sweep,
    linear_probe,
    posterior_snr,
    uniformity,
)
from pyro_vje.metrics.uncertainty import RejectionCurve, r_auroc, rejection_curve

__all__ = [
    "RejectionCurve", "alignment", "aupr", "auroc", "auroc_interval",
    "benjamini_hochberg", "collapse_warning", "conformal_p_values", "detection_metrics", "effective_rank",
    "embedding_spread", "fpr_at_tpr", "knn_predict", "knn_sweep", "linear_probe", "posterior_snr", "r_auroc",
    "rejection_curve", "uniformity",
]  # fmt: skip
