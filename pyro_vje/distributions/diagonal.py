"""Student-t over vectors, without a polar split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Size, Tensor

from pyro_vje.distributions.numerics import (
    StudentTDistribution,
    inverse_mixing_scale,
    squared_distance,
    student_t_log_density,
)


class DiagonalStudentT(StudentTDistribution):
    """Multivariate Student-t with a scale for each feature and one mixing variable for the vector.

    Pyro's ``MultivariateStudentT`` with diagonal ``scale_tril``, in O(D) time and memory instead of O(D²). The
    features are uncorrelated but not independent.

    Parameters
    ----------
    df : float or Tensor
        Degrees of freedom, shape ``batch_shape``; ``inf`` is the normal distribution.
    loc : Tensor
        Location, shape ``batch_shape + (D,)``.
    scale : Tensor
        Scale of each feature, shape ``batch_shape + (D,)``.
    """

    support = constraints.real_vector
    has_rsample = True

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        squared = squared_distance(value, self.loc, self.scale, matrix)
        return student_t_log_density(self._df, self.event_shape[0], squared) - self.scale.log().sum(-1)

    def rsample(self, sample_shape: Sequence[int] = Size()) -> Tensor:
        """Draw exactly, reparameterised in df, loc and scale."""
        noise = self._standard_normal(sample_shape, self.loc)
        return self.loc + self.scale * noise / inverse_mixing_scale(self.df, sample_shape).unsqueeze(-1)

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
