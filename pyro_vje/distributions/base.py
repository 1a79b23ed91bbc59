"""What all distributions here share: parameters and their shapes, densities of values and of all pairs, fits."""

import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions import Independent, Normal, transform_to
from torch.nn.functional import normalize

from pyro_vje.distributions.numerics import Scalar, at_least_float32, squared_distance


class VectorDistribution(TorchDistribution):
    """Base (ours) of distributions over vectors, of parameters ``batch_shape`` or ``(..., D)``."""

    arg_constraints: Any
    _parameter_names: tuple[str, ...] = ()

    def _set_parameters(self, validate_args: bool | None, **parameters: Scalar) -> None:
        """Upcast, broadcast and store; a leading underscore marks a parameter whose public name has a default."""
        stored: dict[str, Tensor] = {}
        like = next((at_least_float32(p) for p in parameters.values() if isinstance(p, Tensor)), torch.empty(0))
        for name, p in parameters.items():
            if not isinstance(p, Tensor | Real):
                raise TypeError(f"{name.lstrip('_')} must be a tensor or a number, not a {type(p).__name__}")
            # Sums of D squares do not survive half precision; new_full copies nothing from the host.
            stored[name] = at_least_float32(p) if isinstance(p, Tensor) else like.new_full((), float(p))
        shapes = {name.lstrip("_"): p.shape for name, p in stored.items()}
        batch_shape, event_shape = self.infer_shapes(**shapes)
        if len(event_shape) != 1 or event_shape[0] < 2:
            raise ValueError(f"parameters must be vectors (..., D) with D of 2 or more; got shapes {shapes}")
        self._parameter_names = tuple(stored)
        self._expand_parameters(stored, batch_shape, event_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _expand_parameters(self, parameters: dict[str, Tensor], batch_shape: Size, event_shape: Size) -> None:
        for name, p in parameters.items():
            setattr(self, name, p.expand(batch_shape + event_shape[: self._parameter_dim(name)]))

    @classmethod
    def _parameter_dim(cls, name: str) -> int:
        return cls.arg_constraints[name.lstrip("_")].event_dim

    @classmethod
    def infer_shapes(cls, **arg_shapes: Sequence[int]) -> tuple[Size, Size]:
        """Infer ``(batch_shape, event_shape)`` from the shapes of the arguments."""
        dims = {name: cls._parameter_dim(name) for name in arg_shapes}
        batch = (shape[: len(shape) - dims[name]] for name, shape in arg_shapes.items())
        event = (shape[-1:] for name, shape in arg_shapes.items() if dims[name] == 1)
        return torch.broadcast_shapes(*batch), torch.broadcast_shapes(*event)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """Expand the batch shape; no memory is copied."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        parameters = {name: getattr(self, name) for name in self._parameter_names}
        new._expand_parameters(parameters, Size(batch_shape), self.event_shape)
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at value (..., D), shape ``(...)``.

        It is with respect to surface measure where the support is the unit sphere, else to Lebesgue measure.
        """
        return self._log_prob(self._checked(value))

    def _log_prob(self, value: Tensor, matrix: bool = False) -> Tensor:
        """Log density; with ``matrix``, of values (M, 1, ..., 1, D), by matrix products (`pairwise_log_prob`)."""
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

    @classmethod
    def fit(cls, samples: Tensor, *, method: str = "mle", df: float | None = None) -> Self:
        """Distribution that fits independent samples (N, D), in float64 and returned in their precision.

        ``method`` is ``"mle"``, maximum likelihood by L-BFGS, or ``"moments"``, its start: mean direction and resultant
        length on the sphere (the maximum likelihood of :class:`VonMisesFisher`), mean and variance elsewhere. ``df``
        are degrees of freedom that are not to be fitted; ``moments`` without them takes the Gaussian limit. A
        ValueError says if an argument is another one, or the samples are outside the support or determine no law; a
        NotImplementedError if the family has no fit.
        """
        if not isinstance(samples, Tensor) or samples.dim() != 2 or len(samples) < 2:
            raise ValueError(f"samples must be a tensor (N, D) with N of 2 or more, not {samples!r:.80}")
        if method not in ("mle", "moments"):
            raise ValueError(f"method must be 'mle' or 'moments', not {method!r}")
        values = samples.detach().double()
        if not values.isfinite().all() or (values == values[0]).all():
            raise ValueError("samples must be finite, and not all the same")
        if cls.support is constraints.sphere and (values.norm(dim=-1) - 1).abs().max() > 1e-2:
            raise ValueError("samples must be unit vectors")
        if df is not None and not ("df" in cls.arg_constraints and _lies_in(cls.arg_constraints["df"], df)):
            raise ValueError(f"df {df} is no degrees of freedom of {cls.__name__}")
        parameters = cls._start(values, df)
        if method == "mle":
            if df is None and "df" in parameters:
                parameters["df"] = parameters["df"].clamp(max=10.0)
            parameters = cls._maximize(values, parameters, () if df is None else ("df",))
        for name, p in parameters.items():
            if not _lies_in(cls.arg_constraints[name], p) or (p.isinf().any() and name != "df"):
                raise ValueError(
                    f"these samples determine no {cls.__name__} ({name}): are some or all of them constant?"
                )
        made: Any = partial(cls, validate_args=False)
        dtype = samples.dtype if samples.is_floating_point() else torch.get_default_dtype()
        return made(**{name: p.to(dtype) for name, p in parameters.items()})

    @classmethod
    def _start(cls, samples: Tensor, df: float | None) -> dict[str, Tensor]:
        """Parameters by moments of samples (N, D); df where it is given."""
        raise NotImplementedError(f"{cls.__name__} has no fit")

    @classmethod
    def _maximize(cls, values: Tensor, start: dict[str, Tensor], fixed: Sequence[str]) -> dict[str, Tensor]:
        """Parameters at which the likelihood is largest; ``loc`` is moved freely, and on the sphere normalised."""
        made: Any = partial(cls, validate_args=False)
        spherical = cls.arg_constraints["loc"] is constraints.sphere
        maps = {name: transform_to(cls.arg_constraints[name]) for name in start if name != "loc"}
        maps["loc"] = torch.distributions.identity_transform
        free = {n: maps[n].inv(p).clone().requires_grad_() for n, p in start.items() if n not in fixed}
        optimizer = torch.optim.LBFGS(
            list(free.values()),
            max_iter=200,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def parameters() -> dict[str, Tensor]:
            now = start | {name: maps[name](p) for name, p in free.items()}
            return now | ({"loc": normalize(now["loc"], dim=-1)} if spherical else {})

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -made(**parameters()).log_prob(values).mean()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        return {name: p.detach() for name, p in parameters().items()}


def _lies_in(constraint: Any, value: Scalar) -> bool:
    return bool(torch.as_tensor(constraint.check(torch.as_tensor(value, dtype=torch.float64))).all())


def pairwise_log_prob(distribution: TorchDistribution, value: Tensor) -> Tensor:
    """Log density of every value (M, D) under every element of a batch, shape ``batch_shape + (M,)``.

    ``log_prob`` of the outer product, for a distribution of event shape ``(D,)`` and any batch shape. Those of this
    package and the diagonal normal, ``Normal(loc, scale).to_event(1)``, are evaluated by matrix products of values with
    parameters, in float64: accurate as ``log_prob`` for scales down to 1e-5 of the length of ``loc`` (0.002 nats at
    1e-6, D = 128). Any other goes through its ``log_prob``, a few values at a time. Memory without gradients is 20 to
    35 bytes for each pair, 150 with a projected factor: it is the caller who takes the values in chunks. A ValueError
    says if the shape of an event or of ``value`` is another one, or (validated) a value lies outside the support.
    """
    if len(distribution.event_shape) != 1:
        raise ValueError(f"distribution must have event shape (D,), not {tuple(distribution.event_shape)}")
    if not isinstance(value, Tensor) or value.shape[1:] != distribution.event_shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        dim = tuple(distribution.event_shape)
        raise ValueError(f"value must be a tensor of shape (M, D) for event shape (D,) = {dim}, not {found}")
    # len() would fix the number of values in an exported graph.
    column = value.reshape(value.shape[0], *(1 for _ in distribution.batch_shape), *distribution.event_shape)
    if isinstance(distribution, VectorDistribution):
        return distribution._log_prob(distribution._checked(column), matrix=True).movedim(0, -1)
    normal = getattr(distribution, "base_dist", None)
    if isinstance(distribution, Independent) and isinstance(normal, Normal):
        if distribution._validate_args:
            distribution._validate_sample(column)
        x, loc, scale = map(at_least_float32, (column, normal.loc, normal.scale))
        squared = squared_distance(x, loc, scale, matrix=True)
        log_norm = scale.log().sum(-1) + 0.5 * len(value[0]) * math.log(2 * math.pi)
        return (-0.5 * squared - log_norm).movedim(0, -1)
    if torch.compiler.is_exporting():  # the number of values is open, and there are no loops
        return distribution.log_prob(column).movedim(0, -1)
    chunks = column.split(max(1, len(value) // max(1, distribution.batch_shape.numel())))
    return torch.cat([distribution.log_prob(chunk) for chunk in chunks]).movedim(0, -1)
