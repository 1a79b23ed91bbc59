"""What the distributions share: precision, parameters and their shapes, unit vectors, scalar functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, Self

import torch
from torch import Size, Tensor

from pyro_vje.distributions.backend import TorchDistribution, broadcast_shape, constraints
from pyro_vje.distributions.fitting import FittedDistribution

Scalar = float | Tensor


class VectorDistribution(FittedDistribution):
    """Base of distributions over vectors, of parameters ``batch_shape`` or ``(..., D)`` (ours)."""

    _parameter_names: tuple[str, ...]

    def _set_parameters(self, validate_args: bool | None, **parameters: Scalar) -> None:
        """Upcast, broadcast and store; a leading underscore marks a parameter whose public name has a default."""
        for name, p in parameters.items():
            if not isinstance(p, Tensor | Real):
                raise TypeError(f"{name.lstrip('_')} must be a tensor or a number, not a {type(p).__name__}")
        tensors = [p for p in parameters.values() if isinstance(p, Tensor)]
        if not tensors:
            raise TypeError(
                f"of the parameters {', '.join(parameters)} at least one must be a tensor (..., D)"
            )
        # Sums of D squares do not survive half precision; new_full copies nothing from the host.
        like = at_least_float32(tensors[0])
        stored = {
            name: at_least_float32(p) if isinstance(p, Tensor) else like.new_full((), p)
            for name, p in parameters.items()
        }
        shapes = {name.lstrip("_"): p.shape for name, p in stored.items()}
        batch_shape, event_shape = self.infer_shapes(**shapes)
        if len(event_shape) != 1 or event_shape[0] < 2:
            raise ValueError(f"parameters must be vectors (..., D) with D of 2 or more; got shapes {shapes}")
        self._parameter_names = tuple(stored)
        for name, p in stored.items():
            setattr(self, name, p.expand(batch_shape + event_shape[: self._parameter_dim(name)]))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @classmethod
    def _parameter_dim(cls, name: str) -> int:
        return cls.arg_constraints[name.lstrip("_")].event_dim

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[Size, Size]:
        """Infer ``(batch_shape, event_shape)`` from the shapes of the arguments."""
        dims = {name: cls._parameter_dim(name) for name in arg_shapes}
        batch = (shape[: len(shape) - dims[name]] for name, shape in arg_shapes.items())
        event = (shape[-1:] for name, shape in arg_shapes.items() if dims[name] == 1)
        return Size(broadcast_shape(*batch)), Size(broadcast_shape(*event))

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Expand the batch shape; no memory is copied."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        batch_shape = Size(batch_shape)
        for name in self._parameter_names:
            shape = batch_shape + self.event_shape[: self._parameter_dim(name)]
            setattr(new, name, getattr(self, name).expand(shape))
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (..., D), shape ``(...)``.

        It is with respect to surface measure where the support is the unit sphere, else to Lebesgue measure.
        """
        return self._log_prob(self._checked(value))

    def pairwise_log_prob(self, value: Tensor) -> Tensor:
        """Log density of every value (M, D) under every batch element, as in :func:`pairwise_log_prob`."""
        return self._log_prob(self._checked(as_column(self, value)), matrix=True).movedim(0, -1)

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        """Log density; with ``matrix``, value is that of `as_column` and reductions are matrix products."""
        raise NotImplementedError

    def _checked(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._upcast(value)

    def _upcast(self, value: Tensor) -> Tensor:
        """Value in the wider of its precision, that of ``loc``, and float32."""
        loc = getattr(self, "loc", value)
        return at_least_float32(value.to(torch.promote_types(value.dtype, loc.dtype)))

    def _standard_normal(self, sample_shape: Sequence[int], like: Tensor) -> Tensor:
        shape = self._extended_shape(Size(sample_shape))
        return torch.randn(shape, dtype=like.dtype, device=like.device)


class StudentTDistribution(VectorDistribution):
    """Base (ours) of those made from a Student-t vector: df (...), and loc and scale (..., D)."""

    arg_constraints = {  # noqa: RUF012
        "df": constraints.positive,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }

    df: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, df: Scalar, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self._df = df  # a number stays one: its normaliser launches no kernel
        self._set_parameters(validate_args, loc=loc, scale=scale, df=df)


class DirectionalStudentT(StudentTDistribution):
    """Base (ours) of those whose ``loc`` and ``scale`` are not the values': Pyro's ``LocScaleReparam`` is stopped."""

    arg_constraints = {  # noqa: RUF012
        **StudentTDistribution.arg_constraints,
        "location_scale_form": constraints.dependent,
    }

    @property
    def location_scale_form(self) -> Any:
        """Raise an AttributeError: there is none. LocScaleReparam asks for all of ``arg_constraints``."""
        raise AttributeError(
            f"{type(self).__name__} is no location-scale family, and LocScaleReparam would change its law: use "
            "pyro_vje.distributions.SphereReparam for a latent on the sphere, and nothing elsewhere"
        )


def as_column(distribution: TorchDistribution, value: Tensor) -> Tensor:
    """Shape values (M, D) as (M, 1, ..., 1, D), to broadcast against the batch shape, or raise a ValueError."""
    if not isinstance(value, Tensor) or value.shape[1:] != distribution.event_shape or value.dim() != 2:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        dim = tuple(distribution.event_shape)
        raise ValueError(f"value must be a tensor of shape (M, D) for event shape (D,) = {dim}, not {found}")
    return value.reshape(value.shape[0], *(1 for _ in distribution.batch_shape), *distribution.event_shape)


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
