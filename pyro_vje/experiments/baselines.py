"""What a likelihood has to beat: cheap detectors on features, as in `pyro_vje.anomaly.detectors`; a registry."""

from collections.abc import Callable
from functools import partial

import torch
from sklearn.svm import OneClassSVM
from torch import Tensor
from torch.nn.functional import normalize

from pyro_vje.anomaly.detectors import Fitted, kernel_density, mahalanobis, nearest_neighbour


def one_class_svm(normal: Tensor) -> Fitted:
    """Negative decision function of a one-class SVM, RBF kernel, ν 0.1, on normalised vectors."""
    fitted = OneClassSVM(nu=0.1, gamma="scale").fit(normalize(normal).cpu().numpy())
    return lambda vectors: torch.from_numpy(-fitted.decision_function(normalize(vectors).cpu().numpy()))


def feature_norm(normal: Tensor) -> Fitted:
    """Negative norm of the vectors: what an encoder has not seen excites it less."""
    return lambda vectors: -torch.linalg.vector_norm(vectors.double(), dim=-1)


DETECTORS: dict[str, Callable[[Tensor], Fitted]] = {
    "k-NN 1": partial(nearest_neighbour, k=1),
    "k-NN 50": partial(nearest_neighbour, k=50),
    "Mahalanobis": mahalanobis,
    "KDE": kernel_density,
    "one-class SVM": one_class_svm,
    "feature norm": feature_norm,
}
