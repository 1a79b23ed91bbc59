"""Student-t vectors, the Student-t density on the sphere, and the law of a Student-t vector's direction."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_vje.distributions import numerics
from pyro_vje.distributions.base import VectorDistribution
from pyro_vje.distributions.numerics import Scalar, student_t_log_density, unit
from pyro_vje.distributions.quadrature import log_directional_integral, log_radial_integral, rational_law
from pyro_vje.distributions.spherical import DirectionalDistribution

_LARGE_DF = 1e6  # above it the integral over angles loses digits as sqrt(df) grows, that over radii none
_INFINITE_DF = 1e30  # the Gaussian, for any location within 1e6 scales
_LARGEST_DF = 1e8  # of draws: the Gaussian differs by q² / (4 df) at the squared distance q


class StudentTDistribution(VectorDistribution):
    """Base (ours) of those made from a Student-t vector: df (...), and loc and scale (..., D)."""

    arg_constraints = {
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }

    df: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, df: Scalar, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self._df = df  # a number stays one: its normaliser launches no kernel
        self._set_parameters(validate_args, loc=loc, scale=scale, df=df)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        squared = numerics.squared_distance(value, self.loc, self.scale, matrix)
        return student_t_log_density(self._df, self.event_shape[0], squared) - self.scale.log().sum(-1)


class DirectionalStudentT(StudentTDistribution):
    """Base (ours) of those whose ``loc`` and ``scale`` are not the values': Pyro's ``LocScaleReparam`` is stopped."""

    arg_constraints = {**StudentTDistribution.arg_constraints, "location_scale_form": constraints.dependent}

    @property
    def location_scale_form(self) -> Any:
        """Raise an AttributeError: there is none. LocScaleReparam asks for all of ``arg_constraints``."""
        raise AttributeError(
            f"{type(self).__name__} is no location-scale family, and LocScaleReparam would change its law: use "
            "pyro_vje.distributions.SphereReparam for a latent on the sphere, and nothing elsewhere"
        )


class DiagonalStudentT(StudentTDistribution):
    """Multivariate Student-t with a scale for each feature and one mixing variable for the vector.

    Pyro's ``MultivariateStudentT`` with diagonal ``scale_tril``, in O(D) time and memory instead of O(D²). The
    features are uncorrelated but not independent. Degrees of freedom ``df``, a number or of shape ``batch_shape``
    (``inf`` is the normal distribution); location ``loc`` and ``scale`` of each feature ``batch_shape + (D,)``.
    """

    support = constraints.real_vector
    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in df, loc and scale."""
        noise = self._standard_normal(sample_shape, self.loc)
        mixing = numerics.inverse_mixing_scale(self.df, sample_shape).unsqueeze(-1)
        return self.loc + self.scale * noise / mixing

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        degrees = samples.new_tensor(torch.inf if df is None else df)
        share = (1 - 2 / degrees).clamp_min(0.1)
        return {"df": degrees, "loc": samples.mean(0), "scale": (samples.var(0) * share).sqrt()}

    @property
    def mode(self) -> Tensor:
        """Most likely value, ``loc``."""
        return self.loc

    def entropy(self) -> Tensor:
        """Differential entropy, shape ``batch_shape``."""
        dim, df = self.event_shape[0], self.df.double().clamp(max=1e20)
        mean_log1p = numerics.digamma_difference(0.5 * df, 0.5 * dim)
        entropy = 0.5 * (df + dim) * mean_log1p - numerics.student_t_log_normalizer(df, dim)
        return entropy.to(self.loc.dtype) + self.scale.log().sum(-1)

    @property
    def mean(self) -> Tensor:
        """Mean, NaN where df <= 1."""
        return torch.where(self.df.unsqueeze(-1) > 1, self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, infinite where 1 < df <= 2 and NaN where df <= 1."""
        df = self.df.clamp(max=1e20).unsqueeze(-1)
        variance = self.scale.square() * (df / (df - 2))
        return variance.where(df > 2, torch.where(df > 1, torch.inf, torch.nan))


class RestrictedStudentT(DirectionalStudentT):
    """The ambient Student-t density on the unit sphere, the paper's "spherical subdensity".

    It does not integrate to one; draws are from the law that is proportional to it. Parameters are those of
    :class:`DiagonalStudentT`. Source: Oji & Fieguth (arXiv 2602.05639); mass and sampler are ours.
    """

    support = constraints.sphere
    has_rsample = False

    @property
    def log_mass(self) -> Tensor:
        """Log of the integral over the sphere, shape ``batch_shape``, in float64; for unit ``loc``.

        At the angle θ to ``loc`` the squared distance is 4 sin²(θ/2), which leaves one integral (in closed form a 2F1,
        which overflows at large D). A ValueError says if ``scale`` differs between features.
        """
        if not torch.equal(self.scale, self.scale[..., :1].expand_as(self.scale)):
            raise ValueError(
                "log_mass is known only for a scale equal in all features; pass such a scale, or take "
                "ProjectedStudentT, whose mass is one for any"
            )
        dim, df, scale = self.event_shape[0], self.df.double().clamp(max=1e12), self.scale[..., 0].double()
        law = rational_law(4 / (df * scale.square()), 0.5 * (df + dim), dim)
        return law.log_mass() + numerics.student_t_log_normalizer(df, dim) - dim * scale.log()

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, by rejection from an angular central Gaussian (derived here).

        With P = diag(scale^-2), v = P loc and S = df + loc' P loc, the density is proportional to a power -(df+D)/2
        of S - 2v'u + u'Pu. As -2v'u ≥ -t - (v'u)²/t for any t > 0, that is at least c + u'Ωu for
        Ω = P + g - vv'/t, g = S - t - c; and q^-(df+D)/2 is at most a constant times (q - c)^(-D/2), which is the
        angular central Gaussian of Ω (Tyler, 1987). t has a closed form given g, and g is searched. At least
        1 in 5 is accepted at D = 2 and 3, 1 in 14 at 16, 1 in 51 at 128, 1 in 220 at 2048 (any scale and df tried).
        """
        dim, df = self.event_shape[0], self.df.double().clamp(max=_LARGEST_DF)
        m, p = self.loc.double(), self.scale.double().square().reciprocal()
        v = p * m
        total = df + (v * m).sum(-1)

        def bound(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """D of Ω = D - vv'/t, t, the value of q where both sides meet, and the log acceptance but a constant."""
            d = p + g.unsqueeze(-1)
            h = (v.square() / d).sum(-1)
            b = h * (df - 1)
            t = (b + (b.square() + 4 * df * h * (total - g)).clamp_min(0).sqrt()) / (2 * df)
            t = t.clamp_min(torch.finfo(t.dtype).tiny)
            q = (total - t - g) * (df + dim) / df
            log_acceptance = 0.5 * (df * q.log() + d.log().sum(-1) + (-h / t).log1p())
            return d, t, q, log_acceptance.nan_to_num(nan=-torch.inf)

        # Feasible g lie around 0, at a distance of the order of this unit.
        low, unit_g = -p.amin(-1) * (1 - 1e-9), (df / (m.square() / p).sum(-1).clamp_min(1e-30)).sqrt()
        unit_g = unit_g.minimum(total + p.amax(-1))
        y = numerics.highest(lambda y: bound((unit_g * y.sinh()).clamp_min(low))[3], df)
        d, t, q, _ = bound((unit_g * y.sinh()).clamp_min(low))
        w = v / (d * t.unsqueeze(-1)).sqrt()
        length = w.square().sum(-1, keepdim=True)
        stretch = ((1 - length).rsqrt() - 1) / length.clamp_min(torch.finfo(length.dtype).tiny)
        shape = Size(sample_shape) + self.batch_shape + self.event_shape

        def propose() -> tuple[Tensor, Tensor]:
            noise = torch.randn(shape, dtype=p.dtype, device=p.device)
            u = unit((noise + stretch * (w * noise).sum(-1, keepdim=True) * w) / d.sqrt())
            along = (v * u).sum(-1)
            form = (d * u.square()).sum(-1) - along.square() / t
            base = total - 2 * along + (p * u.square()).sum(-1)
            log_ratio = 0.5 * (dim * (form * (df + dim) / (q * dim)).log() - (df + dim) * (base / q).log())
            return u, log_ratio >= torch.rand_like(log_ratio).log()

        return unit(numerics.first_accepted(propose).to(self.loc.dtype))


class ProjectedStudentT(DirectionalDistribution, DirectionalStudentT):
    """Law of x/‖x‖ on the unit sphere S^(D-1), for x Student-t with diagonal scale.

    Exactly normalised (with respect to surface measure) in any dimension and for any scale of each feature.
    df = 1 is the projected Cauchy, df = inf the projected normal, loc = 0 with equal scales the uniform law;
    multiplying loc and scale by the same number changes nothing. Parameters are those of x, as in
    :class:`DiagonalStudentT`, with df of 0.1 or more: the integral would lose digits below. Ours; the derivation is at
    :func:`directional_log_density`. The scalar part is computed in float64.
    """

    arg_constraints = {**DirectionalStudentT.arg_constraints, "df": constraints.greater_than_eq(0.1)}
    has_rsample = True

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        tiny = torch.finfo(value.dtype).tiny  # a zero value is outside the support, but gives no NaN
        if matrix:  # the residual by a difference, whose error is about 1e-16 ‖loc/scale‖²
            u, m, precision = value.double(), self.loc.double(), self.scale.double().square().reciprocal()
            a = numerics.row_products(u.square(), precision).clamp_min(tiny)
            b = numerics.row_products(u, m * precision)
            residual = ((m.square() * precision).sum(-1) - b.square() / a).clamp_min(0)
        else:
            direction, location = value / self.scale, self.loc / self.scale
            a = direction.square().sum(-1).clamp_min(tiny)
            b = (direction * location).sum(-1)
            residual = (location - (b / a).unsqueeze(-1) * direction).square().sum(-1)
        log_density = directional_log_density(self._df, self.event_shape[0], a, b, residual)
        return (log_density - self.scale.log().sum(-1)).to(torch.result_type(value, self.loc))

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in df, loc and scale."""
        noise = self._standard_normal(sample_shape, self.loc)
        mixing = numerics.inverse_mixing_scale(self.df, sample_shape).unsqueeze(-1)
        return unit(self.loc * mixing + self.scale * noise)  # x times its mixing variable, which may vanish

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        degrees = samples.new_tensor(torch.inf if df is None else df)
        mean = samples.mean(0)
        loc = unit(mean)

        def resultant(y: Tensor) -> Tensor:
            return cls(degrees, loc, (-y).exp().expand_as(loc), validate_args=False).resultant_length

        y = numerics.match(resultant, torch.linalg.vector_norm(mean))
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
        log_w = numerics.log_gamma_ratio(0.5 * df, 0.5) - 0.5 * (0.5 * df).log()
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

        best = numerics.highest(lambda y: self._log_prob(direction(y)), largest.squeeze(-1))
        return direction(best).to(self.loc.dtype)


def directional_log_density(df: Scalar, dim: int, a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
    """Log density of the projected Student-t plus Σ log scale, from its reductions, in float64 (derived here).

    The density of x at x = r u, times r^(D-1), is integrated over r > 0. With whitened direction u/scale and
    location loc/scale, all that enters is A = ‖u/scale‖², B = <u/scale, loc/scale> and the squared distance R
    of loc/scale from the line through u/scale (R = C - B²/A for C = ‖loc/scale‖², but that cancels).

    Completing the square in r, A r² - 2 B r + C = R + A (r - B/A)². Put cot(angle) = -B / sqrt(A (df + R)) and
    r = (B + sqrt(A (df + R)) cot(angle - α)) / A, with α from 0 to angle: powers of sines remain,

        log p + Σ log scale = log t_df(0) - df/2 log(1 + R/df) - D/2 log(A/df) - (D-1) log sin(angle) + log I,

    where log t_df(0) is the log density of the standard D-variate Student-t at the origin and
    I = ∫_0^angle sin(α)^(D-1) sin(angle - α)^(df-1) dα is :func:`log_directional_integral`. For large df, and the
    projected normal, the integral over x = sqrt(A) r is taken as it is (:func:`log_radial_integral`).

    df broadcasts with a = A, b = B and residual = R.
    """
    a, b, residual = a.double(), b.double(), residual.double()

    def angles(df: Scalar) -> Tensor:
        across = (a * (df + residual)).sqrt()
        angle = torch.atan2(across, -b)
        log_sin = across.log() - torch.hypot(across, b).log()
        log_power = 0.5 * df * torch.log1p(residual / df) + 0.5 * dim * (a / df).log() + (dim - 1) * log_sin
        log_integral = log_directional_integral(angle, df, dim)
        return numerics.student_t_log_normalizer(df, dim) - log_power + log_integral

    def radii(df: Tensor) -> Tensor:
        log_integral = log_radial_integral(b / a.sqrt(), df + residual, df, dim)
        log_power = 0.5 * (df + dim) * torch.log1p(residual / df) + 0.5 * dim * a.log()
        return numerics.student_t_log_normalizer(df, dim) - log_power + log_integral

    if not isinstance(df, Tensor):
        return angles(df) if df <= _LARGE_DF else radii(a.new_full((), df).clamp(max=_INFINITE_DF))
    df = df.double()
    far = radii(df.clamp(_LARGE_DF, _INFINITE_DF))
    return torch.where(df > _LARGE_DF, far, angles(df.clamp(max=_LARGE_DF)))
