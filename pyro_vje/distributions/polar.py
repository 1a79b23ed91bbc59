"""Densities over R^D of a direction on the sphere times a radius: the paper's likelihood, and the general case."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from pyro_vje.distributions.base import VectorDistribution, pairwise_log_prob
from pyro_vje.distributions.numerics import (
    Scalar,
    at_least_float32,
    first_accepted,
    inverse_mixing_scale,
    student_t_log_density,
    unit,
    unit_and_norm,
)
from pyro_vje.distributions.student_t import DirectionalStudentT, ProjectedStudentT, RestrictedStudentT

Radius = Literal["student-t", "log-student-t"]


class _PolarVector(constraints.Constraint):
    """Real vectors by direction and radius: as ``real_vector``, but nobody's location-scale family lies there."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return constraints.real_vector.check(value)


polar_vector = _PolarVector()
for registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    registry.register(polar_vector, lambda _: torch.distributions.identity_transform)


class PolarDensity(VectorDistribution):
    """Base of densities over R^D made of a directional and a radial factor (ours)."""

    support = polar_vector

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        u, r = unit_and_norm(value)
        r = r.squeeze(-1)
        jacobian = (self.event_shape[0] - 1) * r.log()
        return self._log_prob_direction(u, matrix) + self.log_prob_radius(r) - jacobian

    def _log_prob_direction(self, u: Tensor, matrix: bool = False) -> Tensor:
        raise NotImplementedError

    def log_prob_direction(self, value: Tensor) -> Tensor:
        """Log of the directional factor at value/‖value‖; value (..., D) need not be a unit vector."""
        return self._log_prob_direction(unit(self._upcast(value)))

    def log_prob_radius(self, radius: Tensor) -> Tensor:
        """Log of the radial factor at radius (...) > 0."""
        raise NotImplementedError


class PolarStudentT(PolarDensity, DirectionalStudentT):
    """Heavy-tailed density over R^D, factorised into direction u = t/‖t‖ and radius r = ‖t‖.

    ::

        log p(t) = log p_direction(u) + log p_radius(r) - (D - 1) log r

    The last term is the Jacobian of t -> (r, u). Source: Oji & Fieguth, "Joint Embedding Variational Bayes"
    (arXiv 2602.05639), whose likelihood is the default; the other factors are ours. Half-precision arguments are
    upcast to float32; a zero vector gives a finite value and gradient, not NaN.

    Parameters
    ----------
    df, loc, scale
        As in :class:`DiagonalStudentT`.
    unit_radius : float
        Radius of the sphere on which directions are measured, in units of ``loc`` and ``scale``: the
        directional factor has location loc/‖loc‖ and scale ``scale / unit_radius``, with respect to the surface
        measure of the *unit* sphere.
    radius_scale : Tensor, optional
        Scale of the radius, shape ``batch_shape``. By default ``sqrt(sum((loc/‖loc‖)² scale²))``:
        diag(scale²) projected onto the direction of ``loc`` (the mean scale where ``loc`` is zero).
    direction : {"restricted", "projected"}
        ``restricted`` is the ambient Student-t at the points of the sphere (the paper's "spherical subdensity"):
        it does not integrate to one, and its mass depends on ``scale`` (``direction_factor.log_mass``).
        ``projected`` is the law of x/‖x‖ for Student-t x, :class:`ProjectedStudentT`.
    radius : {"student-t", "log-student-t"} or None
        ``student-t``, the paper's, has location ‖loc‖ and is *not* truncated to r > 0: the mass below zero is left
        out. ``log-student-t`` is Student-t in log r with location log ‖loc‖ and scale radius_scale/‖loc‖, and
        integrates to one. ``None`` drops the factor; what is left is improper.

    A ValueError says if ``direction``, ``radius`` or ``unit_radius`` is none of these, or an argument out of range.
    """

    arg_constraints = {**DirectionalStudentT.arg_constraints, "radius_scale": constraints.positive}

    def __init__(
        self,
        df: Scalar,
        loc: Tensor,
        scale: Tensor,
        *,
        unit_radius: float = 1.0,
        radius_scale: Scalar | None = None,
        direction: Literal["restricted", "projected"] = "restricted",
        radius: Radius | None = "student-t",
        validate_args: bool | None = None,
    ) -> None:
        if direction not in ("restricted", "projected"):
            raise ValueError(f"direction must be 'restricted' or 'projected', not {direction!r}")
        if radius not in ("student-t", "log-student-t", None):
            raise ValueError(f"radius must be 'student-t', 'log-student-t' or None, not {radius!r}")
        if not 0 < unit_radius < math.inf:
            raise ValueError(f"unit_radius must be positive and finite, not {unit_radius!r}")
        self._df, self._radius_scale = df, None
        self.unit_radius, self.direction, self.radius = float(unit_radius), direction, radius
        self.has_rsample = self.is_normalized
        if direction == "projected":
            self.arg_constraints = self.arg_constraints | {"df": ProjectedStudentT.arg_constraints["df"]}
        optional = {} if radius_scale is None else {"_radius_scale": radius_scale}
        self._set_parameters(validate_args, loc=loc, scale=scale, df=df, **optional)

    @property
    def radius_scale(self) -> Tensor:
        """Scale of the radius, shape ``batch_shape``."""
        if self._radius_scale is not None:
            return self._radius_scale
        # A zero loc has no direction to project on: any scale will do, as long as it and its gradient are finite.
        projected = torch.linalg.vector_norm(unit(self.loc) * self.scale, dim=-1)
        return torch.where(projected > 0, projected, self.scale.mean(-1))

    @property
    def is_normalized(self) -> bool:
        """Whether the density integrates to one over R^D."""
        return self.direction == "projected" and self.radius == "log-student-t"

    @property
    def direction_factor(self) -> ProjectedStudentT | RestrictedStudentT:
        """The directional factor, a distribution on the unit sphere."""
        family = ProjectedStudentT if self.direction == "projected" else RestrictedStudentT
        factor = family(self._df, unit(self.loc), self.scale / self.unit_radius, validate_args=False)
        return factor.expand(self.batch_shape)

    def _log_prob_direction(self, u: Tensor, matrix: bool = False) -> Tensor:
        return self.direction_factor._log_prob(u, matrix)

    def log_prob_radius(self, radius: Tensor) -> Tensor:
        """Log of the radial factor at radius (...) > 0; zero where the factor is dropped."""
        r = self._upcast(radius)
        if self.radius is None:
            return torch.zeros_like(r).expand(torch.broadcast_shapes(r.shape, self.batch_shape))
        loc, scale = unit_and_norm(self.loc)[1].squeeze(-1), self.radius_scale
        if self.radius == "student-t":
            return student_t_log_density(self._df, 1, ((r - loc) / scale).square()) - scale.log()
        scale, log_r = scale / loc, r.log()
        squared = ((log_r - loc.log()) / scale).square()
        return student_t_log_density(self._df, 1, squared) - scale.log() - log_r

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised; log radii are clamped to what the dtype can hold.

        A NotImplementedError unless ``direction="projected"``, ``radius="log-student-t"``: others have :meth:`sample`.
        """
        if not self.is_normalized:
            raise NotImplementedError(
                f"PolarStudentT with direction={self.direction!r}, radius={self.radius!r} has sample() alone: "
                "direction='projected' with radius='log-student-t' has rsample()"
            )
        return self._sample_radius(sample_shape) * self.direction_factor.rsample(Size(sample_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly from the law that is proportional to the density.

        ``student-t`` radii are drawn again until positive, restricted directions by rejection from an angular central
        Gaussian. A NotImplementedError if ``radius=None``, which is improper.
        """
        if self.radius is None:
            raise NotImplementedError("PolarStudentT with radius=None is improper: name a radius to draw it")
        return self._sample_radius(sample_shape) * self.direction_factor.sample(Size(sample_shape))

    def _sample_radius(self, sample_shape: Sequence[int]) -> Tensor:
        loc, scale = unit_and_norm(self.loc)[1].squeeze(-1), self.radius_scale

        def noise() -> Tensor:
            mixing = inverse_mixing_scale(self.df, sample_shape)
            return torch.randn_like(mixing) / mixing.clamp_min(torch.finfo(mixing.dtype).tiny)

        def propose() -> tuple[Tensor, Tensor]:  # at most half of the draws are redone
            r = loc + scale * noise()
            return r.unsqueeze(-1), r > 0

        if self.radius == "student-t":
            return first_accepted(propose)
        limit = 0.49 * math.log(torch.finfo(loc.dtype).max)  # leaves room for the square of the norm
        return (loc.log() + noise() * scale / loc).clamp(-limit, limit).exp().unsqueeze(-1)


class PolarProduct(PolarDensity):
    """Density over R^D of t = r·u with independent direction u and radius r.

    ::

        log p(t) = log p_direction(u) + log p_radius(r) - (D - 1) log r

    with the Jacobian of t -> (r, u) as in :class:`PolarStudentT`, of which it is the general case (ours). It is
    normalised if both factors are.

    ``direction`` lies on the unit sphere, with respect to surface measure, and has event shape ``(D,)``; ``radius`` on
    the positive numbers, event shape ``()``. A ValueError says if an event shape is another one.
    """

    arg_constraints = {}  # the factors check their own

    def __init__(
        self, direction: TorchDistribution, radius: TorchDistribution, *, validate_args: bool | None = None
    ) -> None:
        if len(direction.event_shape) != 1 or len(radius.event_shape) != 0:
            raise ValueError(
                "direction and radius must have event shapes (D,) and (), "
                f"not {tuple(direction.event_shape)} and {tuple(radius.event_shape)}"
            )
        batch_shape = torch.broadcast_shapes(direction.batch_shape, radius.batch_shape)
        self.direction, self.radius = direction, radius
        self.has_rsample = bool(direction.has_rsample and radius.has_rsample)
        self._expand_parameters({}, batch_shape, direction.event_shape)
        TorchDistribution.__init__(self, batch_shape, direction.event_shape, validate_args=validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[Size, Size]:
        """Infer ``(batch_shape, event_shape)`` from the shapes of a draw of ``direction`` and one of ``radius``."""
        direction, radius = Size(arg_shapes["direction"]), Size(arg_shapes["radius"])
        return torch.broadcast_shapes(direction[:-1], radius), direction[-1:]

    @property
    def mean(self) -> Tensor:
        """Mean, where both factors have one."""
        return self.radius.mean.unsqueeze(-1) * self.direction.mean

    @property
    def variance(self) -> Tensor:
        """Variance of each feature, where both factors have one."""
        r, u = self.radius, self.direction
        square = (r.variance + r.mean.square()).unsqueeze(-1) * (u.variance + u.mean.square())
        return square - self.mean.square()

    def _expand_parameters(self, parameters: dict[str, Tensor], batch_shape: Size, event_shape: Size) -> None:
        self.direction, self.radius = self.direction.expand(batch_shape), self.radius.expand(batch_shape)
        self.direction_factor = self.direction

    def _log_prob_direction(self, u: Tensor, matrix: bool = False) -> Tensor:
        if matrix:
            return pairwise_log_prob(self.direction, u.flatten(0, -2)).movedim(-1, 0)
        return self.direction.log_prob(u)

    def _upcast(self, value: Tensor) -> Tensor:
        dtype = getattr(self.direction, "loc", value).dtype
        return at_least_float32(value.to(torch.promote_types(value.dtype, dtype)))

    def log_prob_radius(self, radius: Tensor) -> Tensor:
        """Log of the radial factor at radius (...) > 0."""
        return self.radius.log_prob(at_least_float32(radius))

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw direction and radius, reparameterised where both factors are."""
        shape = Size(sample_shape)
        return self.radius.rsample(shape).unsqueeze(-1) * self.direction.rsample(shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw direction and radius."""
        shape = Size(sample_shape)
        return self.radius.sample(shape).unsqueeze(-1) * self.direction.sample(shape)
