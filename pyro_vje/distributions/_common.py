"""What the distributions share: precision, unit vectors, and the Student-t's scalar part."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Size, Tensor

# (1 + q/df)^(-df/2) equals exp(-q/2) to float64 rounding long before this df, and df * log1p(q/df) is still
# computed exactly in float32: capping df here makes df = inf the Gaussian, without a branch or a NaN.
_LARGEST_DF = 1e20

Scalar = float | Tensor


def at_least_float32(value: Tensor) -> Tensor:
    """Upcast half precision: sums of D squares and n = (df + D)/2 times a logarithm do not survive in it."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def unit_and_norm(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split vectors (..., D) into direction (..., D) and norm (..., 1).

    Norms are clamped below at sqrt(finfo.tiny), where squares underflow and no norm can be computed: the zero
    vector has direction zero and finite gradients instead of NaN.
    """
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    norm = norm.clamp_min(math.sqrt(torch.finfo(value.dtype).tiny))
    return value / norm, norm


def unit(value: Tensor) -> Tensor:
    """Direction of vectors (..., D), as in :func:`unit_and_norm`."""
    return unit_and_norm(value)[0]


def expanded(value: Scalar, like: Tensor, shape: Size) -> Tensor:
    """Make a number or a tensor one of the given shape, on ``like``'s device."""
    return (value if isinstance(value, Tensor) else like.new_full((), value)).expand(shape)


def shape_of(value: Scalar) -> Size:
    """Shape of a number or a tensor."""
    return value.shape if isinstance(value, Tensor) else Size()


def capped_df(df: Scalar) -> Scalar:
    """Replace df = inf by a number that gives the Gaussian to rounding."""
    return df.clamp(max=_LARGEST_DF) if isinstance(df, Tensor) else min(float(df), _LARGEST_DF)


def student_t_log_normalizer(df: Scalar, dim: int) -> Scalar:
    """Log normaliser of the standard ``dim``-variate Student-t: its log density at the origin.

    lgamma((df + dim)/2) - lgamma(df/2) - (dim/2) log(pi df), without the cancellation at large df. A number
    gives a number (no kernel is launched), a tensor a float64 tensor of its shape.
    """
    return _tensor_log_normalizer(df, dim) if isinstance(df, Tensor) else _float_log_normalizer(df, dim)


@lru_cache(maxsize=256)
def _float_log_normalizer(df: float, dim: int) -> float:
    return _tensor_log_normalizer(torch.tensor(df, dtype=torch.float64), dim).item()


def _tensor_log_normalizer(df: Tensor, dim: int) -> Tensor:
    x, a = 0.5 * df.double(), 0.5 * dim
    direct = torch.lgamma(x + a) - torch.lgamma(x) - a * torch.log(2 * math.pi * x)
    big = x.clamp_min(16.0)  # Stirling's series: its next term is below 1e-14
    series = (big + a - 0.5) * torch.log1p(a / big) - a + _stirling(big + a) - _stirling(big)
    return torch.where(x < 16.0, direct, series - a * math.log(2 * math.pi))


def _stirling(x: Tensor) -> Tensor:
    y = x.reciprocal().square()
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y / 1680))) / x


def student_t_log_density(df: Scalar, dim: int, squared: Tensor) -> Tensor:
    """Log density of the standard ``dim``-variate Student-t where the squared norm is ``squared``."""
    df = capped_df(df)
    normalizer = student_t_log_normalizer(df, dim)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(squared.dtype)
    return normalizer - (0.5 * dim + 0.5 * df) * torch.log1p(squared / df)
