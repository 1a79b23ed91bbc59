"""The Student-t density at the points of the sphere."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vje.distributions.numerics import StudentTDistribution, squared_distance, student_t_log_density
from pyro_vje.distributions.quadrature import log_restricted_mass


class RestrictedStudentT(StudentTDistribution):
    """The ambient Student-t density on the unit sphere, the paper's "spherical subdensity".

    It does not integrate to one. Source: Oji & Fieguth (arXiv 2602.05639).
    """

    support = constraints.sphere

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        squared = squared_distance(value, self.loc, self.scale, matrix)
        return student_t_log_density(self._df, self.event_shape[0], squared) - self.scale.log().sum(-1)

    @property
    def log_mass(self) -> Tensor:
        """Log of the integral over the sphere, shape ``batch_shape``, in float64; for unit ``loc``.

        Raises
        ------
        ValueError
            If ``scale`` differs between features.
        """
        if not torch.equal(self.scale, self.scale[..., :1].expand_as(self.scale)):
            raise ValueError(
                "log_direction_mass is known only for a scale equal in all features; pass such a scale, or use "
                "direction='projected', whose mass is one for any"
            )
        return log_restricted_mass(self.df, self.scale[..., 0], self.event_shape[0])
