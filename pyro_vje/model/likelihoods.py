"""Likelihood families: a posterior sample and a scale become a Pyro distribution over target embeddings.

A family is a function ``(loc, scale, settings) -> Distribution`` over R^D and one registry line. A user's own
family is such a function in a file of theirs, named as ``module:function``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.nn import functional

from pyro_vje import distributions as own
from pyro_vje.distributions.polar import Radius
from pyro_vje.plugins import look_up


@dataclass(frozen=True)
class LikelihoodSettings:
    """What a family may use beside loc and scale."""

    df: float = 5.0  # degrees of freedom of the heavy-tailed families; inf is the Gaussian limit
    unit_radius: float = 1.0  # of the sphere on which directions are measured, in the latent's units
    radius: Radius | None = "student-t"  # the radial factor of the polar families, or None to drop it
    radius_scale: Tensor | None = None  # its scale, a learned number (shape ()); None: that of the features


FamilyFunction = Callable[[Tensor, Tensor, LikelihoodSettings], TorchDistribution]
SETTINGS = tuple(field.name for field in fields(LikelihoodSettings))


@dataclass(frozen=True)
class LikelihoodFamily:
    """A named family; ``uses`` are the fields of `LikelihoodSettings` it looks at: an ablation varies no others."""

    name: str
    function: FamilyFunction
    is_normalized: bool | None  # whether its density integrates to one over R^D; None where nobody has said
    description: str
    uses: tuple[str, ...] = SETTINGS

    def __call__(self, loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
        """Make the distribution over R^D with batch shape ``loc.shape[:-1]`` and event shape ``(D,)``."""
        return self.function(loc, scale, settings)

    def check(self, dim: int, settings: LikelihoodSettings) -> None:
        """Try the family on a small batch, so that an unfit one is known early, by a ``ValueError``."""
        found = self.function(torch.ones(2, 3, dim), torch.ones(2, 3, dim), settings)
        must = f"likelihood {self.name!r} must"
        if not isinstance(found, TorchDistributionMixin):  # Pyro's Normal, Independent, ... share only this
            raise ValueError(f"{must} give a Pyro distribution, but gave {type(found).__name__}")
        if (found.batch_shape, found.event_shape) != ((2, 3), (dim,)):
            raise ValueError(
                f"{must} have batch shape (2, 3) and event shape ({dim},) for loc of shape (2, 3, {dim}), but has "
                f"{tuple(found.batch_shape)} and {tuple(found.event_shape)}: is a .to_event(1) missing?"
            )


FAMILIES: dict[str, LikelihoodFamily] = {}


def register(
    name: str, description: str, *, is_normalized: bool, uses: tuple[str, ...] = SETTINGS
) -> Callable[[FamilyFunction], FamilyFunction]:
    """Enter a family function in the registry under ``name``; the rest as in `LikelihoodFamily`."""

    def enter(function: FamilyFunction) -> FamilyFunction:
        FAMILIES[name] = LikelihoodFamily(name, function, is_normalized, description, uses)
        return function

    return enter


def get_family(name: str) -> LikelihoodFamily:
    """A family by registered name, ``module:function``, or entry point; a ``ValueError`` lists the known ones."""
    form = "(loc, scale, settings) -> Distribution"
    found = look_up(name, FAMILIES, what="likelihood family", form=form, group="pyro_vje.likelihoods")
    return found if isinstance(found, LikelihoodFamily) else LikelihoodFamily(name, found, None, "user-defined")


POLAR = ("df", "unit_radius", "radius_scale")
_register = partial(register, is_normalized=True)
_register_subdensity = partial(register, is_normalized=False)


@_register_subdensity("polar-student-t", "direction and radius apart, restricted Student-t (the paper's)")
def polar_student_t(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Oji & Fieguth (arXiv 2602.05639): a spherical subdensity times a radial Student-t."""
    return own.PolarStudentT(loc=loc, scale=scale, **vars(settings))


@_register("polar-student-t-exact", "projected Student-t times log-radius Student-t", uses=POLAR)
def polar_student_t_exact(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """The same two ideas with factors that integrate to one (ours); the radial factor cannot be dropped."""
    settings = replace(settings, radius="log-student-t")
    return own.PolarStudentT(loc=loc, scale=scale, direction="projected", **vars(settings))


@_register_subdensity("polar-normal", "the Gaussian limit of polar-student-t", uses=SETTINGS[1:])
def polar_normal(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """`polar_student_t` at ``df = inf``: the paper reports that it fails."""
    return polar_student_t(loc, scale, replace(settings, df=math.inf))


@_register("student-t", "multivariate Student-t with diagonal scale, no polar split", uses=("df",))
def student_t(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """One heavy tail for all features together."""
    return own.DiagonalStudentT(settings.df, loc, scale)


@_register("student-t-independent", "a univariate Student-t for each feature", uses=("df",))
def student_t_independent(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """A product of univariate Student-t."""
    return _univariate(loc, scale, settings).to_event(1)


@_register("normal", "diagonal Gaussian, no polar split", uses=())
def normal(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Independent Normal for each feature."""
    return dist.Normal(loc, scale).to_event(1)


@_register("laplace", "a Laplace for each feature, no polar split", uses=())
def laplace(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Independent Laplace for each feature."""
    return dist.Laplace(loc, scale).to_event(1)


@_register("power-spherical", "power spherical direction times log-radius Student-t", uses=POLAR)
def power_spherical(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Isotropic: the concentration κ is 2/σ² for the mean variance σ² of the unit direction.

    Near its mode the density falls as exp(-κθ²/4), a tangent variance of 2/κ.
    """
    concentration = 2 / _direction_variance(scale, settings)
    direction = own.PowerSpherical(functional.normalize(loc, dim=-1), concentration)
    return _product(direction, loc, scale, settings)


@_register("spherical-cauchy", "spherical Cauchy direction times log-radius Student-t", uses=POLAR)
def spherical_cauchy(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Isotropic: the concentration ρ solves (1-ρ)²/ρ = (D-1) σ² for the mean variance σ² of the unit direction.

    Near its mode the density falls as (1 + θ²ρ/(1-ρ)²)^-(D-1), a Student-t of scale σ.
    """
    a = (loc.shape[-1] - 1) * _direction_variance(scale, settings)
    rho = 1 / (1 + a / 2 + (a + a.square() / 4).sqrt())  # the root below one, without cancellation
    rho = rho.clamp(max=1 - torch.finfo(rho.dtype).eps)  # rounding must not put it on the end of [0, 1)
    return _product(own.SphericalCauchy(functional.normalize(loc, dim=-1), rho), loc, scale, settings)


def _univariate(loc: Tensor, scale: Tensor, settings: LikelihoodSettings) -> TorchDistribution:
    """Student-t of each element, of which Pyro's has no Gaussian limit."""
    return dist.Normal(loc, scale) if math.isinf(settings.df) else dist.StudentT(settings.df, loc, scale)


def _direction_variance(scale: Tensor, settings: LikelihoodSettings) -> Tensor:
    return scale.square().mean(-1) / settings.unit_radius**2


def _product(
    direction: TorchDistribution, loc: Tensor, scale: Tensor, settings: LikelihoodSettings
) -> TorchDistribution:
    """A direction, and a Student-t in log-radius as of ``PolarStudentT(radius="log-student-t")``."""
    norm = torch.linalg.vector_norm(loc, dim=-1)
    if settings.radius_scale is not None:
        log_scale = settings.radius_scale / norm
    else:
        log_scale = torch.linalg.vector_norm(loc * scale, dim=-1) / norm.square()
    log_radius = _univariate(norm.log(), log_scale, settings)
    radius = dist.TransformedDistribution(log_radius, [dist.transforms.ExpTransform()])
    return own.PolarProduct(direction, radius)
