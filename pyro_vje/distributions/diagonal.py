"""Student-t over vectors, without a polar split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from pyro_vje.distributions.backend import constraints
from pyro_vje.distributions.numerics import (
    StudentTDistribution,
    digamma_difference,
    inverse_mixing_scale,
    squared_distance,
    student_t_log_density,
    student_t_log_normalizer,
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
        mean_log1p = digamma_difference(0.5 * df, 0.5 * dim)
        entropy = 0.5 * (df + dim) * mean_log1p - student_t_log_normalizer(df, dim)
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
