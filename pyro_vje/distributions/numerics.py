"""Numbers under the distributions: precision, unit vectors, matrix products, searches, scalar functions."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Size, Tensor

Scalar = float | Tensor


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of x (M, 1, ..., 1, D) with y (*batch, D), shape ``(M, *batch)``, as a matrix product."""
    return torch.tensordot(x.flatten(0, -2), y, dims=([-1], [-1]))


def squared_distance(value: Tensor, loc: Tensor, scale: Tensor, matrix: bool = False) -> Tensor:
    """Squared norm (...) of (value - loc) / scale.

    With ``matrix`` it is expanded into A - 2B + C of ``value`` (M, 1, ..., 1, D): one product of (M, 2D) with
    (N, 2D). The expansion cancels, so it is in float64 (2.4 times the time of float32 on a CPU), which neither
    TF32 nor autocast touches: the error is about 1e-16 (A + C).
    """
    if not matrix:
        return ((value - loc) / scale).square().sum(-1)
    x, m, precision = value.double().flatten(0, -2), loc.double(), scale.double().square().reciprocal()
    rows = torch.cat([precision, -2 * m * precision], -1)
    c = (m.square() * precision).sum(-1)
    squared = torch.addmm(c.reshape(-1), torch.cat([x.square(), x], -1), rows.reshape(-1, rows.shape[-1]).T)
    return squared.clamp_min(0).to(torch.result_type(value, loc)).reshape(x.shape[0], *c.shape)


def at_least_float32(value: Tensor) -> Tensor:
    """Upcast half precision, of any shape, to float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def unit_and_norm(value: Tensor) -> tuple[Tensor, Tensor]:
    """Split vectors (..., D) into direction (..., D) and norm (..., 1).

    Norms are clamped at sqrt(finfo.tiny), where squares underflow: the zero vector has direction zero, not NaN.
    """
    norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    norm = norm.clamp_min(math.sqrt(torch.finfo(value.dtype).tiny))
    return value / norm, norm


def unit(value: Tensor) -> Tensor:
    """Direction of vectors (..., D), as in :func:`unit_and_norm`."""
    return unit_and_norm(value)[0]


def first_accepted(propose: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """For each element the first proposal (..., k) that is accepted (...); all are proposed anew each time."""
    value, accepted = propose()
    while not accepted.all():
        other, also = propose()
        value = torch.where((also & ~accepted).unsqueeze(-1), other, value)
        accepted = accepted | also
    return value


def highest(function: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The y (...) in (-42, 42) at which a unimodal function is largest, by six grids, each 20 times finer."""
    y, step = torch.zeros_like(like), 40.0
    for _ in range(6):
        offsets = torch.linspace(-step, step, 41, dtype=y.dtype, device=y.device)
        ys = y + offsets.view(-1, *(1 for _ in y.shape))
        best = torch.stack([function(each) for each in ys]).argmax(0, keepdim=True)
        y, step = ys.gather(0, best).squeeze(0), step / 20
    return y


def match(increasing: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """The scalar y in (-18, 18) at which an increasing function is ``wanted``, by bisection."""
    low, high = wanted.new_tensor(-18.0), wanted.new_tensor(18.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = increasing(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def log_gamma_ratio(x: Tensor, a: float) -> Tensor:
    """lgamma(x + a) - lgamma(x) (...) in float64, without the cancellation at large x."""
    x = x.double()
    big = x.clamp_min(16.0)  # Stirling's series: its next term is below 1e-14
    series = a * big.log() + (big + a - 0.5) * torch.log1p(a / big) - a + _stirling(big + a) - _stirling(big)
    return torch.where(x < 16.0, torch.lgamma(x + a) - torch.lgamma(x), series)


def digamma_difference(x: Tensor, a: float) -> Tensor:
    """digamma(x + a) - digamma(x) (...), the derivative of :func:`log_gamma_ratio`."""
    big = x.clamp_min(100.0)  # the next term is below 1e-14
    series = torch.log1p(a / big) + a / (2 * big * (big + a))
    series = series + ((big + a).pow(-2) - big.pow(-2)) * (-1 / 12)
    return torch.where(x < 100.0, torch.digamma(x + a) - torch.digamma(x), series)


def _stirling(x: Tensor) -> Tensor:
    y = x.reciprocal().square()
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y / 1680))) / x


def student_t_log_normalizer(df: Scalar, dim: int) -> Scalar:
    """Log density at the origin of the standard ``dim``-variate Student-t: a number for one, else float64."""
    if isinstance(df, Tensor):
        return log_gamma_ratio(0.5 * df, 0.5 * dim) - 0.5 * dim * (math.pi * df.double()).log()
    return _cached_log_normalizer(df, dim)


@lru_cache(maxsize=256)
def _cached_log_normalizer(df: float, dim: int) -> float:
    normalizer: Any = student_t_log_normalizer(torch.tensor(df, dtype=torch.float64), dim)
    return normalizer.item()


def student_t_log_density(df: Scalar, dim: int, squared: Tensor) -> Tensor:
    """Log density of the standard ``dim``-variate Student-t where the squared norm is squared (...)."""
    # The Gaussian to rounding; df * log1p(squared / df) is still exact in float32, and inf * 0 is met nowhere.
    df = df.clamp(max=1e20) if isinstance(df, Tensor) else min(float(df), 1e20)
    normalizer = student_t_log_normalizer(df, dim)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(squared.dtype)
    return normalizer - (0.5 * dim + 0.5 * df) * torch.log1p(squared / df)


def inverse_mixing_scale(df: Tensor, sample_shape: Sequence[int]) -> Tensor:
    """Draw sqrt(chi2_df / df) (...), by which a standard normal is divided to make it Student-t; reparameterised."""
    df = df.clamp(max=1e20)
    half = (0.5 * df).expand(Size(sample_shape) + df.shape)
    return (torch._standard_gamma(half) / half).sqrt()
