"""Densities of a direction and a radius, and the law of a vector whose direction and radius are independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_vje.distributions.backend import TorchDistribution, broadcast_shape, polar_vector
from pyro_vje.distributions.numerics import VectorDistribution, at_least_float32, unit, unit_and_norm
from pyro_vje.distributions.pairwise import pairwise_log_prob


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


class PolarProduct(PolarDensity):
    """Density over R^D of t = r·u with independent direction u and radius r.

    ::

        log p(t) = log p_direction(u) + log p_radius(r) - (D - 1) log r

    with the Jacobian of t -> (r, u) as in :class:`PolarStudentT`, of which it is the general case (ours). It is
    normalised if both factors are.

    Parameters
    ----------
    direction : TorchDistribution
        On the unit sphere, with respect to surface measure; event shape ``(D,)``.
    radius : TorchDistribution
        On the positive numbers; event shape ``()``.

    Raises
    ------
    ValueError
        If an event shape is another one, or the batch shapes do not broadcast.
    """

    arg_constraints = {}  # noqa: RUF012 (the factors check their own)

    def __init__(
        self, direction: TorchDistribution, radius: TorchDistribution, *, validate_args: bool | None = None
    ) -> None:
        if len(direction.event_shape) != 1 or len(radius.event_shape) != 0:
            raise ValueError(
                "direction and radius must have event shapes (D,) and (), "
                f"not {tuple(direction.event_shape)} and {tuple(radius.event_shape)}"
            )
        batch_shape = Size(broadcast_shape(direction.batch_shape, radius.batch_shape))
        self.direction, self.radius = direction.expand(batch_shape), radius.expand(batch_shape)
        TorchDistribution.__init__(self, batch_shape, direction.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether both factors have ``rsample``."""
        return bool(self.direction.has_rsample and self.radius.has_rsample)

    @property
    def direction_factor(self) -> TorchDistribution:
        """The law of the direction, on the sphere."""
        return self.direction

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[Size, Size]:
        """Infer ``(batch_shape, event_shape)`` from the shapes of a draw of ``direction`` and one of ``radius``."""
        direction, radius = Size(arg_shapes["direction"]), Size(arg_shapes["radius"])
        return broadcast_shape(direction[:-1], radius), direction[-1:]

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

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """Expand the batch shape of both factors."""
        new = self._get_checked_instance(PolarProduct, _instance)
        shape = Size(batch_shape)
        new.direction, new.radius = self.direction.expand(shape), self.radius.expand(shape)
        TorchDistribution.__init__(new, shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

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
