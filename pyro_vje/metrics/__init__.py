"""Numbers from arrays: functions that know no model, data or run; NumPy or torch in, floats and NumPy out."""

from pyro_vje.metrics.detection import (
    RejectionCurve,
    aupr,
    auroc,
    auroc_interval,
    benjamini_hochberg,
    conformal_p_values,
    detection_metrics,
    fpr_at_tpr,
    r_auroc,
    rejection_curve,
)
from pyro_vje.metrics.representation import (
    alignment,
    effective_rank,
    embedding_spread,
    knn_predict,
    knn_sweep,
    linear_probe,
    posterior_snr,
    unhealthy,
    uniformity,
)
