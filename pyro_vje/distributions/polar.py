"""The paper's likelihood over embeddings: a direction on the sphere times a radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor

from pyro_vje.distributions._common import (
    Scalar,
    at_least_float32,
    expanded,
    shape_of,
    student_t_log_density,
    unit_and_norm,
)

Direction = Literal["restricted", "projected"]
Radius = Literal["student-t", "log-student-t"]


class PolarStudentT(TorchDistribution):
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
        diag(scale²) projected onto the direction of ``loc``.
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
    Half-precision arguments are upcast to float32. Norms are clamped below at sqrt(finfo.tiny): a zero vector
    gives a finite value and finite gradients, not NaN.

    Raises
    ------
    ValueError
        If ``direction``, ``radius`` or ``unit_radius`` is none of the above, or an argument is out of range.
    """

    arg_constraints = {  # noqa: RUF012
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
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
        radius_scale: Tensor | None = None,
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
        loc, scale = torch.broadcast_tensors(at_least_float32(loc), at_least_float32(scale))
        radius_shape = Size() if radius_scale is None else radius_scale.shape
        batch_shape = torch.broadcast_shapes(shape_of(df), loc.shape[:-1], radius_shape)
        event_shape = loc.shape[-1:]
        self._df = df
        self.loc = loc.expand(batch_shape + event_shape)
        self.scale = scale.expand(batch_shape + event_shape)
        self._radius_scale = None if radius_scale is None else at_least_float32(radius_scale)
        self.unit_radius = float(unit_radius)
        self.direction = direction
        self.radius = radius
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, shape ``batch_shape``."""
        return expanded(self._df, self.loc, self.batch_shape)

    @property
    def radius_scale(self) -> Tensor:
        """Scale of the radius, shape ``batch_shape``."""
        return self._get_radius_scale(unit_and_norm(self.loc)[0]).expand(self.batch_shape)

    @property
    def is_normalized(self) -> bool:
        """Whether the density integrates to one over R^D."""
        return self.direction == "projected" and self.radius == "log-student-t"

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[Size, Size]:
        """Infer (batch_shape, event_shape) from the shapes of the arguments."""
        tails = {name: cls.arg_constraints[name].event_dim for name in arg_shapes}
        batch = (shape[: len(shape) - tails[name]] for name, shape in arg_shapes.items())
        event = (shape[-1:] for name, shape in arg_shapes.items() if tails[name] == 1)
        return Size(broadcast_shape(*batch)), Size(broadcast_shape(*event))

    def expand(self, batch_shape: Sequence[int], _instance: PolarStudentT | None = None) -> PolarStudentT:
        """Expand to a new batch shape."""
        new = self._get_checked_instance(PolarStudentT, _instance)
        batch_shape = torch.Size(batch_shape)
        new._df = self._df
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.scale = self.scale.expand(batch_shape + self.event_shape)
        new._radius_scale = self._radius_scale
        new.unit_radius, new.direction, new.radius = self.unit_radius, self.direction, self.radius
        super(PolarStudentT, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self.__dict__.get("_validate_args")
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (..., D) with respect to Lebesgue measure, shape ``(...)``."""
        if self._validate_args:
            self._validate_sample(value)
        u, r = unit_and_norm(at_least_float32(value))
        m, loc_norm = unit_and_norm(self.loc)
        r = r.squeeze(-1)
        log_prob = self._log_prob_direction(u, m) - (self.event_shape[0] - 1) * r.log()
        if self.radius is None:
            return log_prob
        return log_prob + self._log_prob_radius(r, loc_norm.squeeze(-1), m)

    def log_prob_direction(self, value: Tensor) -> Tensor:
        """Log of the directional factor at value/‖value‖; value (..., D) need not be a unit vector."""
        return self._log_prob_direction(unit_and_norm(at_least_float32(value))[0], unit_and_norm(self.loc)[0])

    def log_prob_radius(self, radius: Tensor) -> Tensor:
        """Log of the radial factor at radius (...) > 0; zero where the factor is dropped."""
        m, loc_norm = unit_and_norm(self.loc)
        radius = at_least_float32(radius)
        if self.radius is None:
            return torch.zeros(torch.broadcast_shapes(radius.shape, self.batch_shape)).to(radius)
        return self._log_prob_radius(radius, loc_norm.squeeze(-1), m)

    def _log_prob_direction(self, u: Tensor, m: Tensor) -> Tensor:
        dim = self.event_shape[0]
        if self.direction == "projected":
            raise NotImplementedError("direction='projected' is not implemented yet; use 'restricted'")
        squared = ((u - m) / self.scale).square().sum(-1) * self.unit_radius**2
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
        # A zero loc has no direction to project on; the clamp inside keeps its scale and gradients finite.
        return unit_and_norm(m * self.scale)[1].squeeze(-1)
