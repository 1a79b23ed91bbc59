"""Pyro's base class and constraints where Pyro is installed, else PyTorch's with the little that is missing."""

from typing import Any

import torch

try:
    from pyro.distributions import TorchDistribution, constraints

    HAS_PYRO = True
except ModuleNotFoundError:
    from torch.distributions import constraints  # type: ignore[no-redef]

    HAS_PYRO = False

    class _Sphere(constraints.Constraint):
        """Unit vectors, as ``pyro.distributions.constraints.sphere``."""

        event_dim = 1
        reltol = 10.0

        def check(self, value: torch.Tensor) -> torch.Tensor:
            tolerance = self.reltol * torch.finfo(value.dtype).eps * value.size(-1) ** 0.5
            return (torch.linalg.vector_norm(value, dim=-1) - 1).abs() < tolerance

    constraints.sphere = _Sphere()  # type: ignore[assignment]

    class TorchDistribution(torch.distributions.Distribution):  # type: ignore[no-redef]
        """What these distributions use of Pyro's class of that name."""

        def shape(self, sample_shape: Any = ()) -> torch.Size:
            """Shape of a draw."""
            return torch.Size(sample_shape) + self.batch_shape + self.event_shape


class _PolarVector(constraints.Constraint):
    """Real vectors by direction and radius: as ``real_vector``, but nobody's location-scale family lies there."""

    event_dim = 1

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return constraints.real_vector.check(value)


polar_vector = _PolarVector()
for registry in (torch.distributions.biject_to, torch.distributions.transform_to):
    registry.register(polar_vector, lambda _: torch.distributions.identity_transform)

__all__ = ["HAS_PYRO", "TorchDistribution", "constraints", "polar_vector"]
