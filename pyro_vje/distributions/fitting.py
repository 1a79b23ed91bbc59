"""Fitting a distribution to samples, and asking whether it fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vje.distributions.backend import TorchDistribution, constraints


class FittedDistribution(TorchDistribution):
    """Base (ours) of distributions with a ``fit``."""

    arg_constraints: Any
    _moments_are_mle = False

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        """Parameters by moments of samples (N, D); df where it is given."""
        raise NotImplementedError(f"{cls.__name__} has no fit")

    @classmethod
    def fit(cls, samples: Tensor, *, method: str = "mle", df: float | None = None) -> Self:
        """Distribution that fits samples (N, D), in float64 and returned in their precision.

        Parameters
        ----------
        samples : Tensor
            Independent draws, shape ``(N, D)``.
        method : {"mle", "moments"}
            Maximum likelihood by L-BFGS, or its start: mean direction and resultant length on the sphere (the maximum
            likelihood of :class:`VonMisesFisher`), mean and variance elsewhere.
        df : float, optional
            Degrees of freedom that are not to be fitted; ``moments`` without them takes the Gaussian limit.

        Raises
        ------
        NotImplementedError
            If the family has no fit.
        ValueError
            If an argument is another one.
        """
        if not isinstance(samples, Tensor) or samples.dim() != 2 or len(samples) < 2:
            raise ValueError(f"samples must be a tensor (N, D) with N of 2 or more, not {samples!r:.80}")
        if method not in ("mle", "moments"):
            raise ValueError(f"method must be 'mle' or 'moments', not {method!r}")
        values = samples.detach().double()
        parameters = cls._start(values, df)
        if method == "mle" and not cls._moments_are_mle:
            if df is None and "df" in parameters:
                parameters["df"] = parameters["df"].clamp(max=10.0)
            parameters = cls._maximize(values, parameters, frozenset() if df is None else {"df"})
        made: Any = cls
        return made(**{name: p.to(samples.dtype) for name, p in parameters.items()}, validate_args=False)

    @classmethod
    def _maximize(cls, values: Tensor, start: dict[str, Tensor], fixed: Any) -> dict[str, Tensor]:
        spherical = cls.arg_constraints["loc"] is constraints.sphere

        def constrain(name: str, free: Tensor) -> Tensor:
            if name == "loc":
                return torch.nn.functional.normalize(free, dim=-1) if spherical else free
            return transform_to(cls.arg_constraints[name])(free)

        free = {
            name: (p if name == "loc" else transform_to(cls.arg_constraints[name]).inv(p)).clone()
            for name, p in start.items()
            if name not in fixed
        }
        tensors = [p.requires_grad_() for p in free.values()]
        optimizer = torch.optim.LBFGS(
            tensors, max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            now = start | {name: constrain(name, p) for name, p in free.items()}
            made: Any = cls
            value = -made(**now, validate_args=False).log_prob(values).mean()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return start | {name: constrain(name, p).detach() for name, p in free.items()}


def match(increasing: Callable[[Tensor], Tensor], wanted: Tensor) -> Tensor:
    """The scalar y in (-18, 18) at which an increasing function is ``wanted``, by bisection."""
    low, high = wanted.new_tensor(-18.0), wanted.new_tensor(18.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = increasing(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low


def directional_pit(distribution: Any, value: Tensor, num_samples: int = 1000) -> Tensor:
    """Probability-integral transform of the directional residual, for posterior predictive checks.

    The residual is the angle between the direction of value (..., D) and the distribution's ``loc``; its probability
    to be smaller, shape (...), is uniform on (0, 1) if value is a draw. It is exact where the law has an
    ``angle_cdf``; elsewhere the randomised rank among ``num_samples`` draws for each batch element is uniform too.
    """
    distribution = getattr(distribution, "direction_factor", distribution)
    direction = torch.nn.functional.normalize(value, dim=-1)
    if hasattr(distribution, "angle_cdf"):
        return distribution.angle_cdf(direction)
    loc = torch.nn.functional.normalize(distribution.loc, dim=-1)
    draws = torch.nn.functional.normalize(distribution.sample((num_samples,)), dim=-1)
    own, others = ((x - loc).square().sum(-1) for x in (direction, draws))
    leading = own.dim() - len(distribution.batch_shape)
    others = others.view(num_samples, *(1 for _ in range(leading)), *distribution.batch_shape)
    rank = (others < own).sum(0) + torch.rand_like(own)
    return rank / (num_samples + 1)
