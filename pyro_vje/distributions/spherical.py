"""Rotationally symmetric distributions on the unit sphere S^(D-1), in any dimension."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import transform_to

from pyro_vje.distributions.base import VectorDistribution
from pyro_vje.distributions.numerics import Scalar, first_accepted, log_gamma_ratio, match, row_products, unit
from pyro_vje.distributions.quadrature import PolarLaw, cosine_power_law, exponential_law, rational_law


class DirectionalDistribution(VectorDistribution):
    """Base of distributions on the unit sphere (ours), with what directional statistics asks of them."""

    support = constraints.sphere

    @property
    def dim(self) -> int:
        """Dimension D of the ambient space."""
        return self.event_shape[0]

    @property
    def resultant_length(self) -> Tensor:
        """Length of the mean vector, shape ``batch_shape``: 0 for the uniform law, 1 for a point."""
        return torch.linalg.vector_norm(self.mean, dim=-1)

    @property
    def dispersion(self) -> Tensor:
        """Spherical variance, 1 - :attr:`resultant_length`."""
        return 1 - self.resultant_length


class HypersphericalUniform(DirectionalDistribution):
    """Uniform distribution on the unit sphere in R^dim, as Pyro's ``ProjectedNormal`` at location zero.

    ``dtype`` and ``device`` are those of the draws. It raises a ValueError if ``dim`` is below 2.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(
        self,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if dim < 2:
            raise ValueError(f"dim must be 2 or more, not {dim}")
        self._like = torch.empty(0, dtype=dtype, device=device)
        TorchDistribution.__init__(self, Size(), Size([dim]), validate_args=validate_args)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -log_area(self.dim))

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly."""
        return unit(self._standard_normal(sample_shape, self._like))

    @property
    def mean(self) -> Tensor:
        """Mean vector, zero."""
        return self._like.new_zeros(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, 1/D."""
        return torch.full_like(self.mean, 1 / self.dim)

    def entropy(self) -> Tensor:
        """Differential entropy, shape ``batch_shape``: the log area of the sphere."""
        return self._like.new_full(self.batch_shape, log_area(self.dim))


class SymmetricDistribution(DirectionalDistribution):
    """Base (ours): unit vectors ``loc`` (..., D) and a ``concentration`` (...) around them; moments are to 1e-9."""

    loc: Tensor
    concentration: Tensor

    def __init__(self, loc: Tensor, concentration: Scalar, *, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, loc=loc, concentration=concentration)

    def polar_law(self) -> PolarLaw:
        """The density as a function of the angle to ``loc``, up to a constant."""
        raise NotImplementedError

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        mean = samples.mean(0)
        loc, constrain = unit(mean), transform_to(cls.arg_constraints["concentration"])

        def resultant(y: Tensor) -> Tensor:
            return cls(loc, constrain(y), validate_args=False).resultant_length

        return {"loc": loc, "concentration": constrain(match(resultant, torch.linalg.vector_norm(mean)))}

    def _half_gap(self, value: Tensor, matrix: bool = False) -> Tensor:
        """sin²(θ/2) = (1 - <loc, value>)/2, exact where it is small; with ``matrix``, to 1e-16."""
        if not matrix:
            return 0.25 * (value - self.loc).square().sum(-1)
        x, m = value.double(), self.loc.double()
        # Unit vectors in float32 have norms off by 1e-7, which (1 - <loc, value>)/2 would take for an angle.
        norms = x.square().sum(-1) + m.square().sum(-1)
        gap = 0.25 * torch.sub(norms, row_products(x, m), alpha=2)
        return gap.clamp_min(0).to(torch.result_type(value, self.loc))

    def _at_angle(self, cos: Tensor, sin: Tensor) -> Tensor:
        """Unit vectors at a given angle from ``loc`` (cosine and sine of shape ``(...)``), uniform around it."""
        noise = torch.randn(cos.shape + self.event_shape, dtype=cos.dtype, device=cos.device)
        across = unit(noise - (noise * self.loc).sum(-1, keepdim=True) * self.loc)
        return unit(cos.unsqueeze(-1) * self.loc + sin.unsqueeze(-1) * across)

    def _gap_moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means of z = (1 - cos θ)/2 and of sin² θ, and the variance of cos θ, shape ``(..., 1)``."""
        z, _, log_mass = self.polar_law().nodes()
        share = log_mass.softmax(-1)
        mean = (share * z).sum(-1, keepdim=True)
        sine = (share * 4 * z * (1 - z)).sum(-1, keepdim=True)
        return mean, sine, 4 * (share * (z - mean).square()).sum(-1, keepdim=True)

    @property
    def mean(self) -> Tensor:
        """Mean vector, :attr:`resultant_length` times ``loc``."""
        return self.loc * (1 - self.dispersion).unsqueeze(-1)

    @property
    def mode(self) -> Tensor:
        """Most likely direction, ``loc``."""
        return self.loc

    @property
    def dispersion(self) -> Tensor:
        """Spherical variance, 1 - :attr:`resultant_length`, without cancellation."""
        return 2 * self._gap_moments()[0].squeeze(-1).to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate."""
        _, sine, along = self._gap_moments()
        across, square = sine / (self.dim - 1), self.loc.double().square()
        return (square * along + (1 - square) * across).to(self.loc.dtype)

    def entropy(self) -> Tensor:
        """Differential entropy with respect to surface measure, shape ``batch_shape``."""
        _, log_density, log_mass = self.polar_law().nodes()
        entropy = log_mass.logsumexp(-1) - (log_mass.softmax(-1) * log_density).sum(-1)
        return entropy.to(self.loc.dtype)

    def angle_cdf(self, value: Tensor) -> Tensor:
        """Probability (...) that a draw lies nearer to ``loc`` than value (..., D) does, to 1e-9."""
        return self.polar_law().cdf(self._half_gap(self._checked(value)).double()).to(self.loc.dtype)


def log_area(dim: int) -> float:
    """Log of the surface area of the unit sphere in R^dim."""
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


class PowerSpherical(SymmetricDistribution):
    """Density proportional to (1 + <loc, x>)^concentration on the unit sphere.

    Source: De Cao & Aziz, "The Power Spherical distribution" (arXiv 2006.04437), equations 6 to 9.
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; concentration 0 is the uniform law.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    has_rsample = True

    def polar_law(self) -> PolarLaw:  # noqa: D102
        return cosine_power_law(self.concentration, self.dim)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        gap, other = self._half_gap(value, matrix), self._half_gap(-value, matrix)
        other = other.clamp_min(torch.finfo(value.dtype).tiny)  # zero density opposite to loc, but no NaN
        log_cos2 = torch.where(gap < 0.5, torch.log1p(-gap.clamp_max(0.5)), other.log())
        # Γ(α+β) / Γ(α) / (2^(α+β) π^β) (1 + t)^κ, α = β + κ, β = (D-1)/2, with 2^κ drawn into (1 + t)^κ.
        beta = 0.5 * (self.dim - 1)
        log_ratio = log_gamma_ratio(beta + self.concentration.double(), beta)
        return (log_ratio - beta * math.log(4 * math.pi)).to(value.dtype) + self.concentration * log_cos2

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in loc and concentration."""
        beta = 0.5 * (self.dim - 1)
        shape = Size(sample_shape) + self.batch_shape
        near = torch._standard_gamma((beta + self.concentration).expand(shape))
        far = torch._standard_gamma(torch.full_like(near, beta))
        return self._at_angle((near - far) / (near + far), 2 * (near * far).sqrt() / (near + far))


class SphericalCauchy(SymmetricDistribution):
    """Density proportional to ((1 - ρ²) / (1 + ρ² - 2ρ <loc, x>))^(D-1) on the unit sphere.

    The image of the uniform law under a Möbius map of the ball. The restricted Student-t with df = D - 2 and
    equal scales is this law up to its mass.
    Source: Kato & McCullagh, "Some properties of a Cauchy family on the sphere" (arXiv 1510.07679).
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; the concentration is ρ in [0, 1), and 0 the uniform law.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.half_open_interval(0.0, 1.0)}
    has_rsample = True

    def polar_law(self) -> PolarLaw:  # noqa: D102
        rho = self.concentration.double()
        return rational_law(4 * rho / (1 - rho).square(), self.dim - 1.0, self.dim)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        rho, gap = self.concentration, self._half_gap(value, matrix)
        # 1 + ρ² - 2ρt = (1-ρ)² + 4ρ (1-t)/2, which does not cancel near loc.
        log_ratio = torch.log1p(rho) + torch.log1p(-rho) - ((1 - rho).square() + 4 * rho * gap).log()
        return (self.dim - 1) * log_ratio - log_area(self.dim)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in loc and concentration: the Möbius map of a uniform direction."""
        center = self.loc * self.concentration.unsqueeze(-1)
        shifted = unit(self._standard_normal(sample_shape, self.loc)) + center
        ratio = (1 - self.concentration.square()).unsqueeze(-1) / shifted.square().sum(-1, keepdim=True)
        return unit(ratio * shifted + center)


class VonMisesFisher(SymmetricDistribution):
    """Density proportional to exp(concentration <loc, x>) on the unit sphere.

    The normaliser is a quadrature in float64 (no Bessel function overflows, at any dimension or
    concentration). Samples are exact, by rejection (Wood, 1994), and so not reparameterised.
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; concentration 0 is the uniform law.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    has_rsample = False

    def polar_law(self) -> PolarLaw:  # noqa: D102
        return exponential_law(self.concentration, self.dim)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        log_mass = self.polar_law().log_mass()
        return -2 * self.concentration * self._half_gap(value, matrix) - log_mass.to(value.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly."""
        shape = Size(sample_shape) + self.batch_shape
        kappa, m = self.concentration.double().expand(shape), float(self.dim - 1)
        b = m / (2 * kappa + (4 * kappa.square() + m**2).sqrt())
        x0, gap_0 = (1 - b) / (1 + b), 2 * b / (1 + b)  # gap_0 is 1 - x0
        half = torch.full_like(kappa, 0.5 * m)

        def propose() -> tuple[Tensor, Tensor]:
            # Wood's W = 1 - gap, of which log(1 - x0 W) and κ (W - x0) are formed without cancelling.
            near, far = torch._standard_gamma(half), torch._standard_gamma(half)
            z = near / (near + far)
            gap = 2 * b * z / (1 - (1 - b) * z)
            log_ratio = kappa * (gap_0 - gap) + m * torch.log((gap_0 + x0 * gap) / (gap_0 * (1 + x0)))
            return gap.unsqueeze(-1), log_ratio >= torch.rand_like(kappa).log()

        gap = first_accepted(propose).squeeze(-1)
        cos, sin = 1 - gap, (gap * (2 - gap)).sqrt()
        return self._at_angle(cos.to(self.loc.dtype), sin.to(self.loc.dtype))


def directional_pit(distribution: Any, value: Tensor, num_samples: int = 1000) -> Tensor:
    """Probability-integral transform of the directional residual, for posterior predictive checks.

    The residual is the angle between the direction of value (..., D) and the distribution's ``loc``; its probability
    to be smaller, shape (...), is uniform on (0, 1) if value is a draw. It is exact where the law has an
    ``angle_cdf``; elsewhere the randomised rank among ``num_samples`` draws for each batch element is uniform too.
    A ValueError says if the distribution has no ``loc``.
    """
    distribution = getattr(distribution, "direction_factor", distribution)
    if not hasattr(distribution, "loc"):
        raise ValueError(f"a {type(distribution).__name__} has no loc, to which there would be an angle")
    direction = torch.nn.functional.normalize(value, dim=-1)
    if hasattr(distribution, "angle_cdf"):
        return distribution.angle_cdf(direction)
    loc = torch.nn.functional.normalize(distribution.loc, dim=-1)
    draws = torch.nn.functional.normalize(distribution.sample((num_samples,)), dim=-1)
    own, others = ((x - loc).square().sum(-1) for x in (direction, draws))
    leading = own.dim() - len(distribution.batch_shape)
    others = others.view(num_samples, *(1 for _ in range(leading)), *distribution.batch_shape)
    rank = (others < own).sum(0) + torch.rand_like(own)
    return rank / (num_samples + 1)
