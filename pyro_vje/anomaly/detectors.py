"""Classical detectors: each is fitted on vectors of normal images and scores others, higher for stranger ones.

A detector takes vectors ``(n, D)`` of normal images and gives a function of vectors ``(N, D)`` to float64 scores
``(N,)``; on a GPU if the vectors are there.
"""

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
    return lambda vectors: (((vectors.double() - loc) @ precision) * (vectors.double() - loc)).sum(-1)


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
    to_other = nearest_neighbour(normal, k=2)  # the nearest of all is the image itself
    squared = 2 * torch.cat([to_other(part) for part in normal.split(1024)]).clamp_min(0)
    bandwidth = max(float(squared.sqrt().quantile(0.5)), 1e-6)
    log_norm = math.log(count) + dim * math.log(bandwidth * math.sqrt(2 * math.pi))

    def score(vectors: Tensor) -> Tensor:
        squared = (2 - 2 * normalize(vectors.double()) @ directions.T).clamp_min(0)
        return log_norm - (squared / (-2 * bandwidth**2)).logsumexp(-1)

    return score
