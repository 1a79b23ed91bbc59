"""Likelihood families: a posterior sample and a scale become a Pyro distribution over target embeddings.

A family is a function ``(loc, scale, settings) -> Distribution`` over R^D and one registry line. A user's own
family is such a function in a file of theirs, named as ``module:function``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_vje.distributions import PolarStudentT
from pyro_vje.plugins import look_up

RadialFactor = Literal["student-t", "log-student-t"]


@dataclass(frozen=True)
class LikelihoodSettings:
    """What a family may use beside loc and scale.

    Attributes
    ----------
    df : float
        Degrees of freedom of the heavy-tailed families; ``inf`` is the Gaussian limit.
    unit_radius : float
        Radius of the sphere on which directions are measured, in the units of the latent and its scale.
    radius : str or None
        The radial factor of the polar families: ``student-t``, ``log-student-t``, or ``None`` to drop it.
    """

    df: float = 5.0
    unit_radius: float = 1.0
    radius: RadialFactor | None = "student-t"


FamilyFunction = Callable[[Tensor, Tensor, LikelihoodSettings], TorchDistribution]


@dataclass(frozen=True)
class LikelihoodFamily:
    """A named family: its function, whether its density integrates to one, and a line of description."""

    name: str
    function: FamilyFunction
    is_normalized: bool | None
    description: str

    def __call__(self, loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
        """Make the distribution over R^D with batch shape ``loc.shape[:-1]`` and event shape ``(D,)``."""
        return self.function(loc, scale, settings)


FAMILIES: dict[str, LikelihoodFamily] = {}


def register(
    name: str, description: str, *, is_normalized: bool
) -> Callable[[FamilyFunction], FamilyFunction]:
    """Enter a family function in the registry under ``name``."""

    def enter(function: FamilyFunction) -> FamilyFunction:
        FAMILIES[name] = LikelihoodFamily(name, function, is_normalized, description)
        return function

    return enter


def get_family(name: str) -> LikelihoodFamily:
    """Look a family up by registered name, ``module:function``, or entry point in ``pyro_vje.likelihoods``.

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones.
    """
    found = look_up(name, FAMILIES, what="likelihood family", group="pyro_vje.likelihoods")
    if isinstance(found, LikelihoodFamily):
        return found
    if not callable(found):
        raise ValueError(f"likelihood {name!r} is no function (loc, scale, settings) -> Distribution")
    return LikelihoodFamily(name, found, None, "user-defined")


@register(
    "polar-student-t", "direction and radius apart, restricted Student-t (the paper's)", is_normalized=False
)
def polar_student_t(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Oji & Fieguth (arXiv 2602.05639): a spherical subdensity times a radial Student-t."""
    return PolarStudentT(settings.df, loc, scale, unit_radius=settings.unit_radius, radius=settings.radius)


@register("normal", "diagonal Gaussian on the embedding, no polar split", is_normalized=True)
def normal(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Independent Normal per feature; ``df``, ``unit_radius`` and ``radius`` do not apply."""
    return dist.Normal(loc, scale).to_event(1)


def resolve_unit_radius(setting: str, dim: int) -> float:
    """Turn ``"1"`` or ``"sqrt-d"`` (the typical norm of z ~ Normal(0, I_D)) into a radius.

    Raises
    ------
    ValueError
        If the setting is neither of these.
    """
    if setting == "1":
        return 1.0
    if setting == "sqrt-d":
        return math.sqrt(dim)
    raise ValueError(f"unit_radius must be '1' or 'sqrt-d', not {setting!r}")


def resolve_radius(setting: str | None) -> RadialFactor | None:
    """Check the name of a radial factor.

    Raises
    ------
    ValueError
        If there is no such factor.
    """
    if setting is not None and setting not in get_args(RadialFactor):
        raise ValueError(
            f"radius must be one of {', '.join(get_args(RadialFactor))} or None, not {setting!r}"
        )
    return setting  # type: ignore[return-value]
