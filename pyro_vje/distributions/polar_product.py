"""The law of a vector whose direction and radius are independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor

from pyro_vje.distributions.numerics import as_column, at_least_float32, unit, unit_and_norm
from pyro_vje.distributions.pairwise import pairwise_log_prob


class PolarProduct(TorchDistribution):
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

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (the factors check their own)
    support = constraints.real_vector

    def __init__(
        self, direction: TorchDistribution, radius: TorchDistribution, *, validate_args: bool | None = None
    ) -> None:
        if len(direction.event_shape) != 1 or len(radius.event_shape) != 0:
            raise ValueError(
                "direction and radius must have event shapes (D,) and (), "
                f"not {tuple(direction.event_shape)} and {tuple(radius.event_shape)}"
            )
        batch_shape = Size(broadcast_shape(direction.batch_shape, radius.batch_shape))
        self.direction = direction.expand(batch_shape)
        self.radius = radius.expand(batch_shape)
        super().__init__(batch_shape, direction.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether both factors have ``rsample``."""
        return bool(self.direction.has_rsample and self.radius.has_rsample)

    def expand(self, batch_shape: Sequence[int], _instance: PolarProduct | None = None) -> PolarProduct:
        """Expand the batch shape of both factors."""
        new = self._get_checked_instance(PolarProduct, _instance)
        new.direction = self.direction.expand(Size(batch_shape))
        new.radius = self.radius.expand(Size(batch_shape))
        super(PolarProduct, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (..., D) with respect to Lebesgue measure, shape ``(...)``."""
        return self._log_prob(value, self.direction.log_prob)

    def pairwise_log_prob(self, value: Tensor) -> Tensor:
        """Log density of every value (M, D) under every batch element, as in :func:`pairwise_log_prob`."""

        def log_prob_direction(u: Tensor) -> Tensor:
            return pairwise_log_prob(self.direction, u.flatten(0, -2)).movedim(-1, 0)

        return self._log_prob(as_column(self, value), log_prob_direction).movedim(0, -1)

    def _log_prob(self, value: Tensor, log_prob_direction: Callable[[Tensor], Tensor]) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u, r = unit_and_norm(at_least_float32(value))
        r = r.squeeze(-1)
        jacobian = (self.event_shape[0] - 1) * r.log()
        return log_prob_direction(u) + self.radius.log_prob(r) - jacobian

    def log_prob_direction(self, value: Tensor) -> Tensor:
        """Log of the directional factor at value/‖value‖."""
        return self.direction.log_prob(unit(at_least_float32(value)))

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
