"""What a likelihood has to beat: cheap detectors on frozen features, from scikit-learn.

Each takes features of normal images ``(n, F)`` and of images in question ``(N, F)`` and gives anomaly scores ``(N,)``,
higher for stranger ones. A new one is one function and its registry line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import KernelDensity, NearestNeighbors
from sklearn.preprocessing import normalize
from sklearn.svm import OneClassSVM

Features = NDArray[Any]
Detector = Callable[[Features, Features], Features]


def nearest_neighbour(train: Features, test: Features, *, k: int) -> Features:
    """Cosine distance to the k-th nearest normal image (the farthest, if there are fewer than k)."""
    found = NearestNeighbors(n_neighbors=min(k, len(train)), metric="cosine").fit(train)
    return found.kneighbors(test)[0][:, -1]


def mahalanobis(train: Features, test: Features) -> Features:
    """Squared Mahalanobis distance with Ledoit & Wolf's shrunk covariance."""
    return LedoitWolf().fit(train).mahalanobis(test)


def kernel_density(train: Features, test: Features) -> Features:
    """Negative log-density of a Gaussian kernel estimate on normalised features.

    Its bandwidth is the median distance of a normal image to its nearest other one, as the rules of thumb for the
    bandwidth mean nothing in hundreds of dimensions.
    """
    train, test = normalize(train), normalize(test)
    nearest = NearestNeighbors(n_neighbors=2).fit(train).kneighbors(train)[0][:, 1]
    bandwidth = max(float(np.median(nearest)), 1e-6)
    return -KernelDensity(bandwidth=bandwidth).fit(train).score_samples(test)


def one_class_svm(train: Features, test: Features) -> Features:
    """Negative decision function of a one-class SVM, RBF kernel, ν 0.1, on normalised features."""
    return -OneClassSVM(nu=0.1, gamma="scale").fit(normalize(train)).decision_function(normalize(test))


def feature_norm(train: Features, test: Features) -> Features:
    """Negative norm of the features: what an encoder has not seen excites it less."""
    return -np.linalg.norm(test, axis=1)


DETECTORS: dict[str, Detector] = {
    "k-NN 1": partial(nearest_neighbour, k=1),
    "k-NN 50": partial(nearest_neighbour, k=50),
    "Mahalanobis": mahalanobis,
    "KDE": kernel_density,
    "one-class SVM": one_class_svm,
    "feature norm": feature_norm,
}
