"""Rotationally symmetric distributions on the unit sphere S^(D-1), in any dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_vje.distributions.numerics import Scalar, VectorDistribution, log_gamma_ratio, row_products, unit
from pyro_vje.distributions.quadrature import exponential_polar_nodes


class _Symmetric(VectorDistribution):
    """Base: unit vectors ``loc`` (..., D) and a ``concentration`` (...) around them."""

    support = constraints.sphere

    loc: Tensor
    concentration: Tensor

    def __init__(self, loc: Tensor, concentration: Scalar, *, validate_args: bool | None = None) -> None:
        self._set_parameters(validate_args, loc=loc, concentration=concentration)

    @property
    def dim(self) -> int:
        """Dimension D of the ambient space."""
        return self.event_shape[0]

    def _half_gap(self, value: Tensor, matrix: bool) -> Tensor:
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


def log_area(dim: int) -> float:
    """Log of the surface area of the unit sphere in R^dim."""
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)


class PowerSpherical(_Symmetric):
    """Density proportional to (1 + <loc, x>)^concentration on the unit sphere.

    Source: De Cao & Aziz, "The Power Spherical distribution" (arXiv 2006.04437), equations 6 to 9.
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; concentration 0 is the uniform law.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}  # noqa: RUF012
    has_rsample = True

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        gap, other = self._half_gap(value, matrix), self._half_gap(-value, matrix)
        other = other.clamp_min(torch.finfo(value.dtype).tiny)  # zero density opposite to loc, but no NaN
        log_cos2 = torch.where(gap < 0.5, torch.log1p(-gap.clamp_max(0.5)), other.log())
        # Γ(α+β) / Γ(α) / (2^(α+β) π^β) (1 + t)^κ, α = β + κ, β = (D-1)/2, with 2^κ drawn into (1 + t)^κ.
        beta = 0.5 * (self.dim - 1)
        log_normalizer = log_gamma_ratio(beta + self.concentration.double(), beta) - beta * math.log(
            4 * math.pi
        )
        return log_normalizer.to(value.dtype) + self.concentration * log_cos2

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in loc and concentration."""
        beta = 0.5 * (self.dim - 1)
        shape = Size(sample_shape) + self.batch_shape
        near = torch._standard_gamma((beta + self.concentration).expand(shape))
        far = torch._standard_gamma(torch.full_like(near, beta))
        return self._at_angle((near - far) / (near + far), 2 * (near * far).sqrt() / (near + far))

    @property
    def mean(self) -> Tensor:
        """Mean vector, of length concentration / (D - 1 + concentration)."""
        return self.loc * (self.concentration / (self.dim - 1 + self.concentration)).unsqueeze(-1)


class SphericalCauchy(_Symmetric):
    """Density proportional to ((1 - ρ²) / (1 + ρ² - 2ρ <loc, x>))^(D-1) on the unit sphere.

    The image of the uniform law under a Möbius map of the ball. The restricted Student-t with df = D - 2 and
    equal scales is this law up to its mass.
    Source: Kato & McCullagh, "Some properties of a Cauchy family on the sphere" (arXiv 1510.07679).
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; the concentration is ρ in [0, 1), and 0 the uniform law.
    """

    arg_constraints = {  # noqa: RUF012
        "loc": constraints.sphere,
        "concentration": constraints.half_open_interval(0.0, 1.0),
    }
    has_rsample = True

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


class VonMisesFisher(_Symmetric):
    """Density proportional to exp(concentration <loc, x>) on the unit sphere.

    The normaliser is a quadrature in float64 (no Bessel function overflows, at any dimension or
    concentration). Samples are exact, by rejection (Wood, 1994), and so not reparameterised.
    ``loc`` is of unit length, shape ``batch_shape + (D,)``; concentration 0 is the uniform law.
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}  # noqa: RUF012
    has_rsample = False

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        log_mass = exponential_polar_nodes(self.concentration, self.dim)[1].logsumexp(-1)
        return -2 * self.concentration * self._half_gap(value, matrix) - log_mass.to(value.dtype)

    @property
    def mean(self) -> Tensor:
        """Mean vector, of length I_(D/2)(concentration) / I_(D/2-1)(concentration)."""
        z, log_mass = exponential_polar_nodes(self.concentration, self.dim)
        length = 1 - 2 * (log_mass.softmax(-1) * z).sum(-1, keepdim=True)
        return self.loc * length.to(self.loc.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly."""
        shape = Size(sample_shape) + self.batch_shape
        kappa, m = self.concentration.double().expand(shape), float(self.dim - 1)
        b = m / (2 * kappa + (4 * kappa.square() + m**2).sqrt())
        x0 = (1 - b) / (1 + b)
        beta = torch.distributions.Beta(torch.full_like(kappa, 0.5 * m), torch.full_like(kappa, 0.5 * m))
        # Wood's W = 1 - gap, of which log(1 - x0 W) and κ (W - x0) are formed without cancelling.
        gap = torch.full_like(kappa, torch.nan)
        pending = torch.ones_like(kappa, dtype=torch.bool)
        while pending.any():
            z = beta.sample()
            proposal = 2 * b * z / (1 - (1 - b) * z)
            gap_0 = 2 * b / (1 + b)  # 1 - x0
            log_ratio = torch.log((gap_0 + x0 * proposal) / (gap_0 * (1 + x0)))
            accept = kappa * (gap_0 - proposal) + m * log_ratio >= torch.rand_like(kappa).log()
            gap = torch.where(pending & accept, proposal, gap)
            pending &= ~accept
        cos, sin = 1 - gap, (gap * (2 - gap)).sqrt()
        return self._at_angle(cos.to(self.loc.dtype), sin.to(self.loc.dtype))
