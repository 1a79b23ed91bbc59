"""Anomaly scores by name: each a function of what the likelihood says of an image; higher is stranger.

A new score is one function with its registry line. Imports nothing heavy, so that ``--help`` can name them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LikelihoodParts:
    """What scores are made of, each float64 ``(N,)``, in nats an image unless said.

    Attributes
    ----------
    log_likelihood
        E_q log p(t | z, v) of a target embedding t under the latents z inferred from its context, v the posterior's
        variance. The image is its own context, or the other view of an augmented pair.
    log_direction, log_radius
        Its two factors, apart from the Jacobian: log_likelihood = log_direction + log_radius - (D - 1) log ‖t‖. NaN
        for a family that does not split them.
    kl
        KL(q(z | context) ‖ p(z)), unweighted.
    variance
        Mean posterior variance over features, in squared units of the latent.
    log_aggregate
        log of the mean over reference images i of p(t | e_i, v_i), a density of the embeddings that were trained
        on; NaN where nothing asked for it.
    typical
        Median over the reference images of their own log_likelihood, a number; NaN likewise.
    """

    log_likelihood: Tensor
    log_direction: Tensor
    log_radius: Tensor
    kl: Tensor
    variance: Tensor
    log_aggregate: Tensor
    typical: float


@dataclass(frozen=True)
class Score:
    """A named score: its function, its meaning in a line, and whether it compares with the reference images."""

    name: str
    function: Callable[[LikelihoodParts], Tensor]
    description: str
    needs_reference: bool

    def __call__(self, parts: LikelihoodParts) -> Tensor:
        """Evaluate the score ``(N,)``."""
        return self.function(parts)


SCORES: dict[str, Score] = {}


def register(*, needs_reference: bool = False) -> Callable[[Callable[[LikelihoodParts], Tensor]], Score]:
    """Enter a score under its function's name; the first line of the docstring describes it."""

    def enter(function: Callable[[LikelihoodParts], Tensor]) -> Score:
        description = (function.__doc__ or "").partition("\n")[0].rstrip(".")
        SCORES[function.__name__] = Score(function.__name__, function, description, needs_reference)
        return SCORES[function.__name__]

    return enter


@register()
def conditional(parts: LikelihoodParts) -> Tensor:
    """Negative expected log-likelihood of the embedding under the image's own posterior."""
    return -parts.log_likelihood


@register()
def elbo(parts: LikelihoodParts) -> Tensor:
    """Negative ELBO: `conditional` plus the KL divergence from the prior."""
    return parts.kl - parts.log_likelihood


@register(needs_reference=True)
def aggregate(parts: LikelihoodParts) -> Tensor:
    """Negative log-density of the embedding under a mixture of the reference images' likelihoods.

    A kernel density estimate whose kernels are the likelihood family with each image's own learned variances.
    """
    return -parts.log_aggregate


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
    return (parts.log_likelihood - parts.typical).abs()


@register()
def variance(parts: LikelihoodParts) -> Tensor:
    """Mean posterior variance."""
    return parts.variance
