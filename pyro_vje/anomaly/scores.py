"""Anomaly scores by name: each a function of what the model says of an image; higher is stranger.

A new score is one function and its registry line; one of your own is a function in a file of yours, named as
``module:function``, or an entry point in ``pyro_vje.scores``. Imports nothing heavy, so that ``--help`` can name them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyro_vje.plugins import look_up

if TYPE_CHECKING:
    from torch import Tensor

    from pyro_vje.anomaly.parts import LikelihoodParts


@dataclass(frozen=True)
class Score:
    """A named score: its function, its meaning in a line, and whether it compares with the reference images."""

    name: str
    function: Callable[[LikelihoodParts], Tensor]
    description: str
    needs_reference: bool = False

    def __call__(self, parts: LikelihoodParts) -> Tensor:
        """Evaluate the score ``(N,)``."""
        return self.function(parts)


SCORES: dict[str, Score] = {}


def register(*, needs_reference: bool = False) -> Callable[[Callable[[LikelihoodParts], Tensor]], Score]:
    """Enter a score under its function's name; the first line of the docstring describes it."""

    def enter(function: Callable[[LikelihoodParts], Tensor]) -> Score:
        score = Score(function.__name__, function, _first_line(function), needs_reference)
        SCORES[score.name] = score
        return score

    return enter


def get_score(name: str) -> Score:
    """Look a score up by registered name, ``module:function``, or entry point in ``pyro_vje.scores``.

    Raises
    ------
    ValueError
        If there is none; the message lists the known ones.
    """
    found = look_up(name, SCORES, what="score", group="pyro_vje.scores")
    if isinstance(found, Score):
        return found
    if not callable(found):
        raise ValueError(f"score {name!r} is no function of LikelihoodParts")
    return Score(name, found, _first_line(found) or "user-defined")


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").partition("\n")[0].rstrip(".")


@register()
def conditional(parts: LikelihoodParts) -> Tensor:
    """Negative expected log-likelihood of the embedding under the image's own posterior.

    -E_q log p(t | z, v) = -log p(t | c) + KL(q(z | c) ‖ p(z | c, t)), t and c the image as target and as context: how
    unlikely the embedding is, plus how far seeing it would move the belief about z.
    """
    return -parts.log_likelihood


@register()
def elbo(parts: LikelihoodParts) -> Tensor:
    """Negative ELBO as it was trained: `conditional` plus the KL divergence from the prior at the trained weight."""
    return parts.scorer.kl_weight * parts.kl - parts.log_likelihood


@register(needs_reference=True)
def aggregate(parts: LikelihoodParts) -> Tensor:
    """Negative log-density of the embedding under a mixture of kernels at the reference images' embeddings.

    A kernel density estimate whose kernels are the likelihood family with each reference image's learned variances.
    """
    return -parts.log_aggregate


@register()
def pivot(parts: LikelihoodParts) -> Tensor:
    """Squared distance of the embedding's direction from the posterior's, in units of the variances.

    What the directional factor is a function of, without its log-determinant, which rewards small variances.
    """
    return parts.pivot


@register()
def direction(parts: LikelihoodParts) -> Tensor:
    """Negative log of the directional factor alone."""
    return -parts.log_direction


@register()
def radius(parts: LikelihoodParts) -> Tensor:
    """Negative log of the radial factor alone."""
    return -parts.log_radius


@register(needs_reference=True)
def typicality(parts: LikelihoodParts) -> Tensor:
    """Distance of the log-likelihood from its median over the reference images.

    An image can be too likely to be normal: Nalisnick et al., "Detecting out-of-distribution inputs to deep
    generative models using typicality" (arXiv 1906.02994).
    """
    return (parts.log_likelihood - parts.scorer.typical).abs()


@register()
def variance(parts: LikelihoodParts) -> Tensor:
    """Mean posterior variance."""
    return parts.variance


@register(needs_reference=True)
def mahalanobis(parts: LikelihoodParts) -> Tensor:
    """Squared Mahalanobis distance of the embedding from those of the reference images (Ledoit-Wolf covariance)."""
    return parts.by_detector("mahalanobis")


@register(needs_reference=True)
def knn(parts: LikelihoodParts) -> Tensor:
    """Cosine distance of the embedding to the fifth nearest of the reference images."""
    return parts.by_detector("nearest_neighbour")


@register(needs_reference=True)
def kde(parts: LikelihoodParts) -> Tensor:
    """Negative log-density of the embedding's direction under equal Gaussian kernels at the reference images."""
    return parts.by_detector("kernel_density")
