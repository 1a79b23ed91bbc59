"""The paper's likelihood over embeddings: a direction on the sphere times a radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_vje.distributions.numerics import (
    Scalar,
    StudentTDistribution,
    at_least_float32,
    inverse_mixing_scale,
    squared_distance,
    student_t_log_density,
    unit,
    unit_and_norm,
)
from pyro_vje.distributions.projected import projected_student_t_log_prob, sample_direction
from pyro_vje.distributions.quadrature import log_restricted_mass

Direction = Literal["restricted", "projected"]
Radius = Literal["student-t", "log-student-t"]


class PolarStudentT(StudentTDistribution):
    """Heavy-tailed density over R^D, factorised into direction u = t/‖t‖ and radius r = ‖t‖.

    ::

        log p(t) = log p_direction(u) + log p_radius(r) - (D - 1) log r

    The last term is the Jacobian of t -> (r, u). Source: Oji & Fieguth, "Joint Embedding Variational Bayes"
    (arXiv 2602.05639), whose likelihood is the default; the other factors are ours.

    Parameters
    ----------
    df : float or Tensor
        Degrees of freedom, shape ``batch_shape``; ``inf`` gives the Gaussian limit.
    loc : Tensor
        Location, shape ``batch_shape + (D,)``.
    scale : Tensor
        Scale of each feature, shape ``batch_shape + (D,)``.
    unit_radius : float
        Radius of the sphere on which directions are measured, in units of ``loc`` and ``scale``: the
        directional factor has location loc/‖loc‖ and scale ``scale / unit_radius`` on the unit sphere. Its
        density is with respect to the surface measure of the *unit* sphere.
    radius_scale : Tensor, optional
        Scale of the radius, shape ``batch_shape``. By default ``sqrt(sum((loc/‖loc‖)² scale²))``:
        diag(scale²) projected onto the direction of ``loc`` (the mean scale where ``loc`` is zero).
    direction : {"restricted", "projected"}
        ``restricted`` evaluates the ambient Student-t on the sphere (the paper's "spherical subdensity"): it
        does not integrate to one, and its mass depends on ``scale`` (:attr:`log_direction_mass`).
        ``projected`` is the exact law of x/‖x‖ for Student-t x, see :class:`ProjectedStudentT`.
    radius : {"student-t", "log-student-t"} or None
        ``student-t`` is the paper's: univariate Student-t with location ‖loc‖ at r. It is *not* truncated to
        r > 0, so it leaves the mass below zero out. ``log-student-t`` is Student-t in log r with location
        log ‖loc‖ and scale radius_scale/‖loc‖, with its Jacobian 1/r: it integrates to one. ``None`` drops
        the factor; what is left is improper.

    Notes
    -----
    No mean is offered: the log-radius factor has no moments, and the direction's mean has no closed form.
    Half-precision arguments are upcast to float32. Norms are clamped below at sqrt(finfo.tiny): a zero vector
    gives a finite value and finite gradients, not NaN.

    Raises
    ------
    ValueError
        If ``direction``, ``radius`` or ``unit_radius`` is none of the above, or an argument is out of range.
    """

    arg_constraints = {  # noqa: RUF012
        **StudentTDistribution.arg_constraints,
        "radius_scale": constraints.positive,
    }
    support = constraints.real_vector

    def __init__(
        self,
        df: Scalar,
        loc: Tensor,
        scale: Tensor,
        *,
        unit_radius: float = 1.0,
        radius_scale: Scalar | None = None,
        direction: Direction = "restricted",
        radius: Radius | None = "student-t",
        validate_args: bool | None = None,
    ) -> None:
        if direction not in ("restricted", "projected"):
            raise ValueError(f"direction must be 'restricted' or 'projected', not {direction!r}")
        if radius not in ("student-t", "log-student-t", None):
            raise ValueError(f"radius must be 'student-t', 'log-student-t' or None, not {radius!r}")
        if not 0 < unit_radius < math.inf:
            raise ValueError(f"unit_radius must be positive and finite, not {unit_radius!r}")
        self._df = df
        self._radius_scale: Tensor | None = None
        self.unit_radius = float(unit_radius)
        self.direction = direction
        self.radius = radius
        optional = {} if radius_scale is None else {"_radius_scale": radius_scale}
        self._set_parameters(validate_args, loc=loc, scale=scale, df=df, **optional)

    @property
    def radius_scale(self) -> Tensor:
        """Scale of the radius, shape ``batch_shape``."""
        return self._get_radius_scale(unit(self.loc))

    @property
    def is_normalized(self) -> bool:
        """Whether the density integrates to one over R^D."""
        return self.direction == "projected" and self.radius == "log-student-t"

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether :meth:`rsample` is implemented for these factors."""
        return self.is_normalized

    @property
    def log_direction_mass(self) -> Tensor:
        """Log of the directional factor's integral over the sphere, shape ``batch_shape``, in float64.

        Zero for the projected factor. The restricted factor's mass is computed where ``scale`` is the same for
        all features; it shows how far the factor is from a density.

        Raises
        ------
        ValueError
            If the direction is restricted and ``scale`` differs between features.
        """
        if self.direction == "projected":
            return torch.zeros_like(self.df, dtype=torch.float64)
        if not torch.equal(self.scale, self.scale[..., :1].expand_as(self.scale)):
            raise ValueError(
                "log_direction_mass is known only for a scale equal in all features; pass such a scale, or use "
                "direction='projected', whose mass is one for any"
            )
        return log_restricted_mass(self.df, self.scale[..., 0] / self.unit_radius, self.event_shape[0])

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        u, r = unit_and_norm(value)
        m, loc_norm = unit_and_norm(self.loc)
        r = r.squeeze(-1)
        log_prob = self._log_prob_direction(u, m, matrix) - (self.event_shape[0] - 1) * r.log()
        if self.radius is None:
            return log_prob
        return log_prob + self._log_prob_radius(r, loc_norm.squeeze(-1), m)

    def log_prob_direction(self, value: Tensor) -> Tensor:
        """Log of the directional factor at value/‖value‖; value (..., D) need not be a unit vector."""
        return self._log_prob_direction(unit(at_least_float32(value)), unit(self.loc))

    def log_prob_radius(self, radius: Tensor) -> Tensor:
        """Log of the radial factor at radius (...) > 0; zero where the factor is dropped."""
        radius = at_least_float32(radius)
        if self.radius is None:
            return torch.zeros_like(radius).expand(torch.broadcast_shapes(radius.shape, self.batch_shape))
        m, loc_norm = unit_and_norm(self.loc)
        return self._log_prob_radius(radius, loc_norm.squeeze(-1), m)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised; log radii are clamped to what the dtype can hold.

        Raises
        ------
        NotImplementedError
            Unless ``direction="projected"`` and ``radius="log-student-t"``. A radius in ``student-t`` has
            :meth:`sample`, which has no gradient.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                f"no such draws of PolarStudentT with direction={self.direction!r}, radius={self.radius!r}: "
                "direction='projected' with radius='log-student-t' has sample() and rsample(), with "
                "radius='student-t' it has sample()"
            )
        m, loc_norm = unit_and_norm(self.loc)
        loc_norm = loc_norm.squeeze(-1)
        z = self._radial_noise(sample_shape) * self._get_radius_scale(m) / loc_norm
        limit = 0.49 * math.log(torch.finfo(z.dtype).max)  # leaves room for the square of the norm
        r = (loc_norm.log() + z).clamp(-limit, limit).exp()
        return r.unsqueeze(-1) * self._sample_direction(m, sample_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly; ``student-t`` radii are drawn again until positive, which renormalises the factor.

        Raises
        ------
        NotImplementedError
            If ``direction="restricted"`` or ``radius=None``.
        """
        if self.direction != "projected" or self.radius != "student-t":
            return self.rsample(sample_shape)
        m, loc_norm = unit_and_norm(self.loc)
        loc_norm, scale = loc_norm.squeeze(-1), self._get_radius_scale(m)
        r = loc_norm + scale * self._radial_noise(sample_shape)
        while (r <= 0).any():  # at most half of the draws are redone
            r = torch.where(r <= 0, loc_norm + scale * self._radial_noise(sample_shape), r)
        return r.unsqueeze(-1) * self._sample_direction(m, sample_shape)

    def _radial_noise(self, sample_shape: Sequence[int]) -> Tensor:
        mixing = inverse_mixing_scale(self.df, sample_shape)
        return torch.randn_like(mixing) / mixing.clamp_min(torch.finfo(mixing.dtype).tiny)

    def _sample_direction(self, m: Tensor, sample_shape: Sequence[int]) -> Tensor:
        noise = self._standard_normal(sample_shape, m)
        return sample_direction(self.df, m, self.scale / self.unit_radius, noise, sample_shape)

    def _log_prob_direction(self, u: Tensor, m: Tensor, matrix: bool = False) -> Tensor:
        if self.direction == "projected":
            return projected_student_t_log_prob(self._df, m, self.scale / self.unit_radius, u, matrix)
        dim = self.event_shape[0]
        squared = squared_distance(u, m, self.scale, matrix) * self.unit_radius**2
        log_scale = self.scale.log().sum(-1) - dim * math.log(self.unit_radius)
        return student_t_log_density(self._df, dim, squared) - log_scale

    def _log_prob_radius(self, r: Tensor, loc_norm: Tensor, m: Tensor) -> Tensor:
        scale = self._get_radius_scale(m)
        if self.radius == "student-t":
            return student_t_log_density(self._df, 1, ((r - loc_norm) / scale).square()) - scale.log()
        scale = scale / loc_norm
        log_r = r.log()
        squared = ((log_r - loc_norm.log()) / scale).square()
        return student_t_log_density(self._df, 1, squared) - scale.log() - log_r

    def _get_radius_scale(self, m: Tensor) -> Tensor:
        if self._radius_scale is not None:
            return self._radius_scale
        # A zero loc has no direction to project on: any scale will do, as long as it and its gradient are finite.
        projected = torch.linalg.vector_norm(m * self.scale, dim=-1)
        return torch.where(projected > 0, projected, self.scale.mean(-1))
