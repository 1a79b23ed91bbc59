"""What a likelihood has to beat: cheap detectors on frozen features.

Each takes features of normal images ``(n, F)`` and of images in question ``(N, F)`` and gives anomaly scores ``(N,)``,
higher for stranger ones. A new one is one function and its registry line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import normalize
from sklearn.svm import OneClassSVM

from pyro_vje.anomaly import detectors

Features = NDArray[Any]
Detector = Callable[[Features, Features], Features]


def _fit_and_score(detector: Callable[..., detectors.Fitted], **options: Any) -> Detector:
    """A detector of `pyro_vje.anomaly.detectors` as a function of features of normal images and of others."""

    def score(train: Features, test: Features) -> Features:
        fitted = detector(torch.from_numpy(train), **options)
        return np.concatenate([fitted(part).numpy() for part in torch.from_numpy(test).split(1024)])

    return score


def one_class_svm(train: Features, test: Features) -> Features:
    """Negative decision function of a one-class SVM, RBF kernel, ν 0.1, on normalised features."""
    return -OneClassSVM(nu=0.1, gamma="scale").fit(normalize(train)).decision_function(normalize(test))


def feature_norm(train: Features, test: Features) -> Features:
    """Negative norm of the features: what an encoder has not seen excites it less."""
    return -np.linalg.norm(test, axis=1)


DETECTORS: dict[str, Detector] = {
    "k-NN 1": _fit_and_score(detectors.nearest_neighbour, k=1),
    "k-NN 50": _fit_and_score(detectors.nearest_neighbour, k=50),
    "Mahalanobis": _fit_and_score(detectors.mahalanobis),
    "KDE": _fit_and_score(detectors.kernel_density),
    "one-class SVM": one_class_svm,
    "feature norm": feature_norm,
}
