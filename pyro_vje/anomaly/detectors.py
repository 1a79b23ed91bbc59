"""Classical detectors: each is fitted on vectors of normal images and scores others, higher for stranger ones.

A detector takes vectors ``(n, D)`` of normal images and gives a function of vectors ``(N, D)`` to float64 scores
``(N,)``; on a GPU if the vectors are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn.functional import normalize

Fitted = Callable[[Tensor], Tensor]


def mahalanobis(normal: Tensor) -> Fitted:
    """Squared Mahalanobis distance with Ledoit & Wolf's shrunk covariance."""
    fitted = LedoitWolf().fit(normal.double().cpu().numpy())
    loc, precision = (torch.from_numpy(x).to(normal.device) for x in (fitted.location_, fitted.precision_))

    def score(vectors: Tensor) -> Tensor:
        centred = vectors.double() - loc
        return ((centred @ precision) * centred).sum(-1)

    return score


def nearest_neighbour(normal: Tensor, *, k: int = 5) -> Fitted:
    """Cosine distance to the k-th nearest normal image (the farthest, if there are fewer than k)."""
    directions = normalize(normal.double())
    k = min(k, len(directions))
    return lambda vectors: 1 - (normalize(vectors.double()) @ directions.T).topk(k).values[..., -1]


def kernel_density(normal: Tensor) -> Fitted:
    """Negative log-density of a Gaussian kernel estimate on normalised vectors.

    Its bandwidth is the median distance of a normal image to its nearest other one, as the rules of thumb for the
    bandwidth mean nothing in hundreds of dimensions.
    """
    directions = normalize(normal.double())
    count, dim = directions.shape

    def squared_distances(vectors: Tensor) -> Tensor:
        return (2 - 2 * normalize(vectors.double()) @ directions.T).clamp_min(0)

    # The nearest of all is the image itself.
    nearest = [
        squared_distances(part).topk(min(2, count), largest=False).values[:, -1]
        for part in normal.split(1024)
    ]
    bandwidth = max(float(torch.cat(nearest).sqrt().quantile(0.5)), 1e-6)
    log_norm = math.log(count) + dim * math.log(bandwidth * math.sqrt(2 * math.pi))
    return lambda vectors: log_norm - (squared_distances(vectors) / (-2 * bandwidth**2)).logsumexp(-1)
