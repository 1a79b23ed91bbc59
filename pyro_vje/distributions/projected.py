"""The exact law of the direction of a Student-t vector, in any dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Size, Tensor

from pyro_vje.distributions.backend import constraints
from pyro_vje.distributions.fitting import match
from pyro_vje.distributions.numerics import (
    DirectionalStudentT,
    Scalar,
    highest,
    inverse_mixing_scale,
    log_gamma_ratio,
    row_products,
    student_t_log_normalizer,
    unit,
)
from pyro_vje.distributions.quadrature import log_directional_integral, log_radial_integral
from pyro_vje.distributions.spherical import DirectionalDistribution

_LARGE_DF = 1e6  # above it the integral over angles loses digits as sqrt(df) grows, that over radii none
_INFINITE_DF = 1e30  # the Gaussian, for any location within 1e6 scales


class ProjectedStudentT(DirectionalDistribution, DirectionalStudentT):
    """Law of x/‖x‖ on the unit sphere S^(D-1), for x Student-t with diagonal scale.

    Exactly normalised (with respect to surface measure) in any dimension and for any scale of each feature.
    df = 1 is the projected Cauchy, df = inf the projected normal, loc = 0 with equal scales the uniform law;
    multiplying loc and scale by the same number changes nothing.

    df is 0.1 or more: the integral would lose digits below.
    Ours; the derivation is at :func:`directional_log_density`. The scalar part is computed in float64.

    Parameters
    ----------
    df, loc, scale
        Those of x, as in :class:`DiagonalStudentT`.
    """

    arg_constraints = {**DirectionalStudentT.arg_constraints, "df": constraints.greater_than_eq(0.1)}  # noqa: RUF012
    has_rsample = True

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        return projected_student_t_log_prob(self._df, self.loc, self.scale, value, matrix)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in df, loc and scale."""
        noise = self._standard_normal(sample_shape, self.loc)
        # x is multiplied by its mixing variable, which may vanish.
        return unit(self.loc * inverse_mixing_scale(self.df, sample_shape).unsqueeze(-1) + self.scale * noise)

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        degrees = samples.new_tensor(torch.inf if df is None else df)
        mean = samples.mean(0)
        loc = unit(mean)

        def resultant(y: Tensor) -> Tensor:
            return cls(degrees, loc, (-y).exp().expand_as(loc), validate_args=False).resultant_length

        y = match(resultant, torch.linalg.vector_norm(mean))
        return {"df": degrees, "loc": y.exp() * loc, "scale": torch.ones_like(loc)}

    @property
    def mean(self) -> Tensor:
        """Mean vector, to about 1e-10; it costs 256 times the memory of ``loc``."""
        return self._first_and_second_moments()[0].to(self.loc.dtype)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, as :attr:`mean`."""
        first, second = self._first_and_second_moments()
        return (second - first.square()).to(self.loc.dtype)

    def _first_and_second_moments(self) -> tuple[Tensor, Tensor]:
        """E u and E u², by 1/‖x‖ = 2/√π ∫ exp(-λ²‖x‖²) dλ and 1/‖x‖² = ∫ exp(-λ²‖x‖²) dλ² (derived here).

        Given its mixing variable w, x is a vector of independent normals, whose expectations under the exponential
        are Gaussian; that over w² ~ Gamma(df/2, df/2) is a power. One integral over log λ remains, analytic up to
        an imaginary part of π/2: the trapezoid rule converges geometrically.
        """
        m, v, df = self.loc.double(), self.scale.double().square(), self.df.double().clamp(max=1e15)
        with torch.no_grad():
            low = -0.5 * (2 * (m.square() + v).sum(-1)).log() - 24
            step = (20 - 0.5 * (2 * v.amin(-1)).log() - low) / 255
            s = low.unsqueeze(-1) + step.unsqueeze(-1) * torch.arange(256, dtype=low.dtype, device=low.device)
            square = (2 * s).exp().unsqueeze(-1)
        m, v, df = m.unsqueeze(-2), v.unsqueeze(-2), df.unsqueeze(-1)
        g = 1 / (1 + 2 * square * v)
        tail = (2 * (square * m.square() * g).sum(-1) / df).log1p()
        log_f = 0.5 * g.log().sum(-1) - 0.5 * df * tail + step.log().unsqueeze(-1)
        log_w = log_gamma_ratio(0.5 * df, 0.5) - 0.5 * (0.5 * df).log()
        first = 2 / math.sqrt(math.pi) * (log_f + s - 0.5 * tail + log_w).exp().unsqueeze(-1) * m * g
        given_w = v + m.square() * g * (-tail).exp().unsqueeze(-1)
        return first.sum(-2), (2 * square * log_f.exp().unsqueeze(-1) * given_w * g).sum(-2)

    @property
    def mode(self) -> Tensor:
        """Most likely direction, where ``loc`` is not zero along the axis of largest scale; to 1e-6.

        The density is a function of A and B that is homogeneous in u of degree -D, so at a maximum on the sphere the
        multiplier is -D, and u is proportional to loc / (c - scale²) for a c above the largest scale² (derived
        here). One search over c remains.
        """
        m, square = self.loc.double(), self.scale.double().square()
        largest = square.amax(-1, keepdim=True)

        def direction(y: Tensor) -> Tensor:
            return unit(m / (largest - square + largest * y.exp().unsqueeze(-1)))

        best = highest(lambda y: self._log_prob(direction(y)), largest.squeeze(-1))
        return direction(best).to(self.loc.dtype)


def projected_student_t_log_prob(
    df: Scalar, loc: Tensor, scale: Tensor, value: Tensor, matrix: bool = False
) -> Tensor:
    """Log density of :class:`ProjectedStudentT` at unit vectors value (..., D), shape ``(...)``.

    The density of x at x = r u, times r^(D-1), is integrated over r > 0. With whitened direction u/scale and
    location loc/scale, all that enters is A = ‖u/scale‖², B = <u/scale, loc/scale> and the squared distance R
    of loc/scale from the line through u/scale (R = C - B²/A for C = ‖loc/scale‖², but that cancels).

    With ``matrix``, A and B are matrix products in float64, of value (M, 1, ..., 1, D), and R is formed by the
    difference: its error is about 1e-16 C.
    """
    tiny = torch.finfo(value.dtype).tiny  # a zero value is outside the support, but gives no NaN
    if matrix:
        u, m, precision = value.double(), loc.double(), scale.double().square().reciprocal()
        a = row_products(u.square(), precision).clamp_min(tiny)
        b = row_products(u, m * precision)
        residual = ((m.square() * precision).sum(-1) - b.square() / a).clamp_min(0)
    else:
        direction, location = value / scale, loc / scale
        a = direction.square().sum(-1).clamp_min(tiny)
        b = (direction * location).sum(-1)
        residual = (location - (b / a).unsqueeze(-1) * direction).square().sum(-1)
    log_scale = scale.log().sum(-1)
    return directional_log_density(df, value.shape[-1], a, b, residual, log_scale).to(
        torch.result_type(value, loc)
    )


def directional_log_density(
    df: Scalar, dim: int, a: Tensor, b: Tensor, residual: Tensor, log_scale: Tensor
) -> Tensor:
    """Log density of the projected Student-t from its reductions, in float64 (derived here).

    Completing the square in r, A r² - 2 B r + C = R + A (r - B/A)². Put cot(angle) = -B / sqrt(A (df + R)) and
    r = (B + sqrt(A (df + R)) cot(angle - α)) / A, with α from 0 to angle: powers of sines remain,

        log p = log t_df(0) - Σ log scale - df/2 log(1 + R/df) - D/2 log(A/df) - (D-1) log sin(angle) + log I,

    where log t_df(0) is the log density of the standard D-variate Student-t at the origin and
    I = ∫_0^angle sin(α)^(D-1) sin(angle - α)^(df-1) dα is :func:`log_directional_integral`. For large df, and the
    projected normal, the integral over x = sqrt(A) r is taken as it is (:func:`log_radial_integral`).

    df broadcasts with a = A, b = B, residual = R (see :func:`projected_student_t_log_prob`), log_scale = Σ log scale.
    """
    a, b, residual, log_scale = a.double(), b.double(), residual.double(), log_scale.double()

    def angles(df: Scalar) -> Tensor:
        across = (a * (df + residual)).sqrt()
        angle = torch.atan2(across, -b)
        log_sin = across.log() - torch.hypot(across, b).log()
        log_power = 0.5 * df * torch.log1p(residual / df) + 0.5 * dim * (a / df).log() + (dim - 1) * log_sin
        log_integral = log_directional_integral(angle, df, dim)
        return student_t_log_normalizer(df, dim) - log_scale - log_power + log_integral

    def radii(df: Tensor) -> Tensor:
        log_integral = log_radial_integral(b / a.sqrt(), df + residual, df, dim)
        log_power = 0.5 * (df + dim) * torch.log1p(residual / df) + 0.5 * dim * a.log()
        return student_t_log_normalizer(df, dim) - log_scale - log_power + log_integral

    if not isinstance(df, Tensor):
        return angles(df) if df <= _LARGE_DF else radii(a.new_full((), df).clamp(max=_INFINITE_DF))
    df = df.double()
    far = radii(df.clamp(_LARGE_DF, _INFINITE_DF))
    return torch.where(df > _LARGE_DF, far, angles(df.clamp(max=_LARGE_DF)))
