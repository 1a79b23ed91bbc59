"""From encoded images to what the likelihood says of them: the numbers behind every score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial

import pyro
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_vje.anomaly import detectors
from pyro_vje.anomaly.scores import get_score
from pyro_vje.distributions import DiagonalStudentT, PolarStudentT, pairwise_log_prob
from pyro_vje.distributions.numerics import student_t_log_density
from pyro_vje.model.encoding import Encoded, in_equal_parts
from pyro_vje.model.likelihoods import get_family
from pyro_vje.model.vje import VJE

_PAIRS = 1 << 22
"""Pairs of images in a chunk: more are no faster. A dozen matrices of so many numbers are held, 400 MB."""
_CPU_NUMBERS = 1 << 17
"""Numbers in a chunk of latents, images × particles × D: as many as a CPU's cache holds are twice as fast."""
_AT_ONCE = 4096
"""Images that are judged at once, where there are more: what a GPU's memory holds of latents and kernels."""


def latent_noise(num_particles: int, dim: int, seed: int) -> Tensor:
    """Standard normal noise ``(num_particles, D)``, antithetic in pairs, the same for every image.

    So the score of an image does not depend on its batch, and differences between images vary less.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((num_particles + 1) // 2, dim, generator=generator)
    return torch.cat([half, -half])[:num_particles]


@dataclass(eq=False)
class Scorer:
    """A model, a likelihood family and reference images, by which encoded images are judged.

    ``reference`` images were trained on: some scores compare with them. ``num_particles`` samples of the latent, drawn
    by ``seed``, make each expectation and cost no pass of the encoder; 0 takes the approximation `expected_log_prob`.
    ``likelihood`` is a family to score with instead of the trained one: which factor trains best and which scores best
    are two questions. ``kl_weight``, of the score `elbo`, is the trained one. ``ValueError``: the family is unknown, or
    ``num_particles`` negative.
    """

    vje: VJE
    _: KW_ONLY
    reference: Encoded | None = None
    num_particles: int = 16
    seed: int = 0
    likelihood: str | None = None
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.num_particles < 0:
            raise ValueError(f"num_particles must be at least 0, not {self.num_particles}")
        dim, self.device = self.vje.embedding_dim, self.vje.device
        self.family = self.vje.family if self.likelihood is None else get_family(self.likelihood)
        self.family.check(dim, self.vje.settings)
        self.reference = None if self.reference is None else self.reference.to(self.device)
        self.noise = latent_noise(self.num_particles, dim, self.seed).to(self.device)
        self.rotation_weight = self.vje.rotations * dim  # as trained
        self._fitted: dict[str, detectors.Fitted] = {}

    def scores(self, name: str, encoded: Encoded) -> Tensor:
        """Score ``name`` of N encoded images, float64 ``(N,)``."""
        return torch.cat([get_score(name)(self.parts(part)) for part in encoded.split(_AT_ONCE)])

    def parts(self, encoded: Encoded) -> LikelihoodParts:
        """What is known of N images; ``ValueError`` if a number is not finite or a scale not positive."""
        encoded = encoded.to(self.device)
        good = torch.stack([x.isfinite().all(-1) for x in encoded[:3]]).all(0) & (encoded.scale > 0).all(-1)
        if not good.all():
            raise ValueError(
                f"the posteriors of {int((~good).sum())} of {len(good)} images are not finite, or have a scale that is "
                "not positive: the model's weights or the numbers given to it are damaged"
            )
        return LikelihoodParts(self, encoded)

    def known(self) -> Encoded:
        """The reference images; ``ValueError`` where there are none."""
        if self.reference is None:
            raise ValueError(
                "this score compares with images that were trained on, and there are none at hand: score with a run "
                "folder that holds reference.safetensors (train --resume writes it into a finished run)"
            )
        return self.reference

    @cached_property
    def typical(self) -> float:
        """Median log-likelihood of the reference images."""
        parts = [self.parts(part).log_likelihood for part in self.known().split(_AT_ONCE)]
        return float(torch.cat(parts).median())

    def fitted(self, detector: str) -> detectors.Fitted:
        """A function of `detectors` by name, fitted on the reference images' embeddings once."""
        if detector not in self._fitted:
            self._fitted[detector] = getattr(detectors, detector)(self.known().embeddings)
        return self._fitted[detector]

    def log_likelihood(self, embeddings: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Expectations over the latent of the log-likelihood and of its two factors, float64 ``(N, 3)``."""
        if not len(self.noise):
            rms = (loc.square() + scale.square()).sqrt()
            return expected_log_prob(self.vje.likelihood(rms, scale, self.family), embeddings, loc, scale)
        z = loc + scale * self.noise[:, None]  # (particles, N, D)
        likelihood = self.vje.likelihood(z, scale.expand_as(z), self.family)
        if hasattr(likelihood, "log_prob_direction"):
            radius = torch.linalg.vector_norm(embeddings, dim=-1)
            direction, radial = likelihood.log_prob_direction(embeddings), likelihood.log_prob_radius(radius)
            joint = direction + radial - (embeddings.shape[-1] - 1) * radius.log()
        else:
            joint = likelihood.log_prob(embeddings)
            direction = radial = torch.full_like(joint, torch.nan)
        return torch.stack([joint, direction, radial], -1).double().mean(0)

    @torch.no_grad()
    def log_aggregate(self, embeddings: Tensor, *, chunk: int | None = None) -> Tensor:
        """Log-mean over the reference images i of p(t | e_i, v_i) for embeddings t ``(N, D)``, float64 ``(N,)``.

        Matrix products over ``chunk`` reference images at a time, by default as many as are fast.
        """
        chunk = chunk or max(1, _PAIRS // max(1, len(embeddings)))
        parts = self.known().split(chunk)
        kernels = (self.vje.likelihood(part.embeddings, part.scale, self.family) for part in parts)
        found = [pairwise_log_prob(kernel, embeddings).double().logsumexp(0) for kernel in kernels]
        return torch.stack(found).logsumexp(0) - math.log(len(self.known().loc))


class LikelihoodParts:
    """What scores are made of, each float64 ``(N,)`` and in nats an image unless said; computed when first asked for.

    A target t is an image's embedding, z the latent given its context: the image itself, or the other view of a pair.
    ``encoded`` holds embeddings t, and loc and scale of q(z | context), ``(N, D)`` each; ``scorer`` judges them. In an
    exported graph, which has no loops, all images are computed ``at_once``.
    """

    scorer: Scorer
    places: Tensor
    """Mean over the strangest pixels of the images' maps, where these were made."""

    def __init__(self, scorer: Scorer, encoded: Encoded, *, at_once: bool = False) -> None:
        self.scorer, self.encoded, self._at_once = scorer, encoded, at_once
        self._rows = 32 * min(8, max(1, 1024 // encoded.loc.shape[-1]))

    @torch.no_grad()
    def _evaluate(self, function: Callable[..., Tensor], *tensors: Tensor, rows: int) -> Tensor:
        """A function of images, on a CPU of ``rows`` at a time."""
        with pyro.validation_enabled(False):  # it takes two thirds as long as the density of a particle
            if self._at_once:
                return function(*tensors)
            return in_equal_parts(lambda *part: [function(*part)], *tensors, rows=rows)[0]

    @cached_property
    def _factors(self) -> Tensor:
        rows = min(self._rows, _CPU_NUMBERS // max(1, self.scorer.noise.numel()))
        return self._evaluate(self.scorer.log_likelihood, *self.encoded[:3], rows=max(1, rows))

    @property
    def log_likelihood(self) -> Tensor:
        """E_q log p(t | z, v), v the posterior's variances."""
        return self._factors[:, 0]

    @property
    def log_direction(self) -> Tensor:
        """The directional factor: log_likelihood = log_direction + log_radius - (D - 1) log ‖t‖; NaN if not split."""
        return self._factors[:, 1]

    @property
    def log_radius(self) -> Tensor:
        """The radial factor; NaN for a family that does not split them, and where the factor is dropped."""
        dropped = self.scorer.vje.settings.radius is None and "radius" in self.scorer.family.uses
        return torch.full_like(self._factors[:, 2], torch.nan) if dropped else self._factors[:, 2]

    @cached_property
    def kl(self) -> Tensor:
        """KL(q(z | context) ‖ p(z)), unweighted."""
        loc, scale = self.encoded.loc, self.encoded.scale
        return 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1).double()

    @property
    def log_rotation(self) -> Tensor:
        """Mean log-probability of the image's own turn, of four; ``ValueError`` if its turns were not encoded."""
        if self.encoded.log_rotation is None:
            raise ValueError("a score by rotations needs a run with them (train --rotations 1)")
        return self.encoded.log_rotation.double()

    @cached_property
    def variance(self) -> Tensor:
        """Mean posterior variance over features, in squared units of the latent."""
        return (self.encoded.scale**2).mean(-1).double()

    @cached_property
    def pivot(self) -> Tensor:
        """ρ² Σ (u - m)² / v of directions u of t and m of loc, ρ the radius of the sphere of directions; no unit."""
        t, loc, scale, *_ = self.encoded
        # The likelihood's variances are the posterior's, or learned ones: those of the Gaussian family.
        v = self.scorer.vje.likelihood(loc, scale, get_family("normal")).variance.double()
        residual = normalize(t.double(), dim=-1) - normalize(loc.double(), dim=-1)
        return self.scorer.vje.settings.unit_radius**2 * (residual.square() / v).sum(-1)

    @cached_property
    def log_aggregate(self) -> Tensor:
        """Log of the mean over reference images i of p(t | e_i, v_i)."""
        chunk = len(self.scorer.known().loc) if self._at_once else None
        log_aggregate = partial(self.scorer.log_aggregate, chunk=chunk)
        return self._evaluate(log_aggregate, self.encoded.embeddings, rows=self._rows)

    def by_detector(self, name: str) -> Tensor:
        """Scores of a function of `pyro_vje.anomaly.detectors`, fitted on the reference images' embeddings."""
        return self._evaluate(self.scorer.fitted(name), self.encoded.embeddings, rows=self._rows)


def expected_log_prob(
    likelihood: pyro.distributions.TorchDistribution, embeddings: Tensor, loc: Tensor, scale: Tensor
) -> Tensor:
    """Noise-free approximation of E log p(t | z), z ~ Normal(loc, scale), with its two factors, float64 ``(N, 3)``.

    The squared residual of a Student-t gives way to its expectation, exact but for ‖z‖, which is taken for its root
    mean square R (ours). So it lies below the expectation, by little where the residual varies little from sample to
    sample, as in hundreds of dimensions. ``likelihood`` is the one at the latent (loc² + scale²)^½, whose norm is R.
    """
    polar = isinstance(likelihood, PolarStudentT)
    closed = likelihood.direction == "restricted" and likelihood.radius != "log-student-t" if polar else False
    if not (closed or isinstance(likelihood, DiagonalStudentT)):
        raise ValueError(
            "num_particles 0 has a closed form for the families polar-student-t, polar-normal and student-t alone, "
            "and for a radius that is not log-student-t: ask for samples (--num-particles 16)"
        )
    t, mean, v, w = (x.double() for x in (embeddings, loc, scale**2, likelihood.scale**2))
    dim, df, noise, log_det = t.shape[-1], likelihood.df.double(), (v / w).sum(-1), 0.5 * w.log().sum(-1)
    if not polar:
        joint = student_t_log_density(df, dim, ((t - mean).square() / w).sum(-1) + noise) - log_det
        return torch.stack([joint, *2 * [torch.full_like(joint, torch.nan)]], -1)
    r, squared, rho = t.norm(dim=-1), (mean.square() + v).sum(-1), likelihood.unit_radius
    residual = (t / r[:, None] - mean / squared.sqrt()[:, None]).square() / w
    direction = student_t_log_density(df, dim, rho**2 * (residual.sum(-1) + noise / squared)) - log_det
    direction, radial = direction + dim * math.log(rho), torch.zeros_like(direction)
    if likelihood.radius is not None:
        spread = (mean.square() * v + 0.5 * v.square()).sum(-1) / squared  # the variance of ‖z‖, about
        gap = r - (squared - spread).clamp_min(0).sqrt()
        width = likelihood.radius_scale.double()
        radial = student_t_log_density(df, 1, (gap.square() + spread) / width.square()) - width.log()
    return torch.stack([direction + radial - (dim - 1) * r.log(), direction, radial], -1)
