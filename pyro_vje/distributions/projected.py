"""The exact law of the direction of a Student-t vector, in any dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_vje.distributions.numerics import (
    Scalar,
    StudentTDistribution,
    capped,
    inverse_mixing_scale,
    row_products,
    student_t_log_normalizer,
    unit,
)
from pyro_vje.distributions.quadrature import log_directional_integral

# Where df = inf is cut: the Gaussian differs by D²/(4 df), rounding grows with sqrt(df).
_LARGEST_DF = 1e12


class ProjectedStudentT(StudentTDistribution):
    """Law of x/‖x‖ on the unit sphere S^(D-1), for x Student-t with diagonal scale.

    Exactly normalised (with respect to surface measure) in any dimension and for any scale of each feature.
    df = 1 is the projected Cauchy, df = inf the projected normal, loc = 0 with equal scales the uniform law;
    multiplying loc and scale by the same number changes nothing.

    Ours; the derivation is at :func:`directional_log_density`. The scalar part is computed in float64.

    Parameters
    ----------
    df, loc, scale
        Those of x, as in :class:`DiagonalStudentT`.
    """

    support = constraints.sphere
    has_rsample = True

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        return projected_student_t_log_prob(self._df, self.loc, self.scale, value, matrix)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in df, loc and scale."""
        noise = self._standard_normal(sample_shape, self.loc)
        # x is multiplied by its mixing variable, which may vanish.
        return unit(self.loc * inverse_mixing_scale(self.df, sample_shape).unsqueeze(-1) + self.scale * noise)


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
    return directional_log_density(df, value.shape[-1], a, b, residual, log_scale).to(value.dtype)


def directional_log_density(
    df: Scalar, dim: int, a: Tensor, b: Tensor, residual: Tensor, log_scale: Tensor
) -> Tensor:
    """Log density of the projected Student-t from its reductions, in float64 (derived here).

    Completing the square in r, A r² - 2 B r + C = R + A (r - B/A)². Put cot(angle) = -B / sqrt(A (df + R)) and
    r = (B + sqrt(A (df + R)) cot(angle - α)) / A, with α from 0 to angle: powers of sines remain,

        log p = log t_df(0) - Σ log scale - df/2 log(1 + R/df) - D/2 log(A/df) - (D-1) log sin(angle) + log I,

    where log t_df(0) is the log density of the standard D-variate Student-t at the origin and
    I = ∫_0^angle sin(α)^(D-1) sin(angle - α)^(df-1) dα is :func:`log_directional_integral`.

    df broadcasts with a = A, b = B, residual = R (see :func:`projected_student_t_log_prob`), log_scale = Σ log scale.
    """
    df = capped(df, _LARGEST_DF)
    df = df.double() if isinstance(df, Tensor) else df
    a, b, residual = a.double(), b.double(), residual.double()
    across = (a * (df + residual)).sqrt()
    angle = torch.atan2(across, -b)
    log_sin = across.log() - torch.hypot(across, b).log()
    return (
        student_t_log_normalizer(df, dim)
        - log_scale.double()
        - 0.5 * df * torch.log1p(residual / df)
        - 0.5 * dim * (a / df).log()
        - (dim - 1) * log_sin
        + log_directional_integral(angle, df, dim)
    )
