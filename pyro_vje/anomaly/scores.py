"""Anomaly scores by name: each a function of what the model says of an image; higher is stranger.

A new score is one entry. One of your own is a function in a file of yours, named as ``module:function``, or an entry
point in ``pyro_vje.scores``. Imports nothing heavy, so that ``--help`` can name them at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro_vje.plugins import look_up


@dataclass(frozen=True)
class Score:
    """A named score: meaning in a line, function, whether it compares with the reference images, what it looks at.

    The function is one of `pyro_vje.anomaly.parts.LikelihoodParts` to a tensor ``(N,)``.
    """

    name: str
    description: str
    function: Callable[[Any], Any]
    needs_reference: bool = False
    of: str = "likelihood"

    def __call__(self, parts: Any) -> Any:
        """Evaluate the score ``(N,)``; ``ValueError`` if the function gives another shape."""
        values = self.function(parts)
        if values.dim() != 1:
            raise ValueError(f"score {self.name!r} must be a number an image, (N,), not of shape {tuple(values.shape)}")
        return values


# fmt: off
_SCORES = [
    Score("conditional", "negative expected log-likelihood of the embedding under the image's own posterior",
          lambda parts: -parts.log_likelihood),
    Score("aggregate", "negative log-density of the embedding, by kernels at the reference images' embeddings",
          lambda parts: -parts.log_aggregate, True),
    Score("elbo", "negative ELBO as it was trained: conditional plus the weighted KL divergence from the prior",
          lambda parts: parts.scorer.kl_weight * parts.kl - parts.log_likelihood),
    Score("pivot", "squared distance of the embedding's direction from the posterior's, in units of the variances",
          lambda parts: parts.pivot, of="posterior"),
    Score("direction", "negative log of the directional factor alone", lambda parts: -parts.log_direction),
    Score("radius", "negative log of the radial factor alone", lambda parts: -parts.log_radius),
    # Nalisnick et al., "Detecting out-of-distribution inputs ... using typicality" (arXiv 1906.02994)
    Score("typicality", "distance of the log-likelihood from its median over the reference images",
          lambda parts: (parts.log_likelihood - parts.scorer.typical).abs(), True),
    Score("variance", "mean posterior variance", lambda parts: parts.variance, of="posterior"),
    Score("mahalanobis", "squared Mahalanobis distance from the reference images' embeddings (Ledoit-Wolf covariance)",
          lambda parts: parts.by_detector("mahalanobis"), True, "embeddings"),
    Score("knn", "cosine distance of the embedding to the fifth nearest of the reference images'",
          lambda parts: parts.by_detector("nearest_neighbour"), True, "embeddings"),
    Score("kde", "negative log-density of the embedding's direction, by equal Gaussian kernels at the references",
          lambda parts: parts.by_detector("kernel_density"), True, "embeddings"),
    # Golan & El-Yaniv (arXiv 1805.10917), Hendrycks et al. (arXiv 1906.12340)
    Score("rotation", "negative log-probability of the image's own rotation, mean over its four turns (--rotations)",
          lambda parts: -parts.log_rotation, of="rotations"),
    Score("rotation-joint", "rotation at its trained weight, and half of mahalanobis: both in nats (--rotations)",
          lambda parts: 0.5 * parts.by_detector("mahalanobis") - parts.scorer.rotation_weight * parts.log_rotation,
          True, "rotations"),
]
# fmt: on
SCORES = {score.name: score for score in _SCORES}
PLACES = Score("places", "mean over the strangest 3 % of the image's map (with --maps)", lambda parts: parts.places)
"""The score of a map: it needs a run that has learned maps, which the others do not."""


def get_score(name: str) -> Score:
    """A score by name, ``module:function``, or entry point in ``pyro_vje.scores``; ``ValueError`` lists those known."""
    known = {**SCORES, PLACES.name: PLACES}
    found = look_up(name, known, what="score", form="of LikelihoodParts", group="pyro_vje.scores")
    if isinstance(found, Score):
        return found
    return Score(name, (found.__doc__ or "user-defined").partition("\n")[0].rstrip("."), found)
