"""One or more members of every distribution that the package exports: tests of all of them start here."""

import pyro.distributions as dist
import torch
from torch.nn.functional import normalize

from pyro_vje import distributions
from pyro_vje.distributions import PolarProduct


def _symmetric(family):
    return {
        family.__name__: (
            lambda loc, concentration: family(normalize(loc, dim=-1), concentration, validate_args=False),
            lambda draw, batch, dim: (draw(*batch, dim), draw(*batch).sigmoid()),
        )
    }


def _student_t(family, **keywords):
    name = "-".join([family.__name__, *(str(value) for value in keywords.values())])
    return {
        name: (
            lambda df, loc, scale: family(df, loc, scale, **keywords, validate_args=False),
            lambda draw, batch, dim: (1 + draw(*batch).exp(), draw(*batch, dim), 0.3 + draw(*batch, dim).sigmoid()),
        )
    }


def _product(loc, concentration):
    direction = distributions.PowerSpherical(normalize(loc, dim=-1), concentration, validate_args=False)
    return PolarProduct(direction, dist.Gamma(1 + concentration, 2.0, validate_args=False), validate_args=False)


_POLAR = [
    {"direction": direction, "radius": radius}
    for direction in ("restricted", "projected")
    for radius in ("student-t", "log-student-t")
]
_OTHERS = {
    "HypersphericalUniform": lambda family: {
        "HypersphericalUniform": (
            lambda like: family(like.shape[-1], dtype=like.dtype, validate_args=False).expand(like.shape[:-1]),
            lambda draw, batch, dim: (draw(*batch, dim),),
        )
    },
    "PolarProduct": lambda _: {
        "PolarProduct": (_product, lambda draw, batch, dim: (draw(*batch, dim), draw(*batch).sigmoid()))
    },
    "PolarStudentT": lambda family: {k: v for x in _POLAR for k, v in _student_t(family, **x).items()},
}


def _members(family):
    if family.__name__ in _OTHERS:
        return _OTHERS[family.__name__](family)
    return (_symmetric if "concentration" in family.arg_constraints else _student_t)(family)


FAMILIES = [
    each
    for each in map(vars(distributions).get, distributions.__all__)
    if isinstance(each, type) and issubclass(each, torch.distributions.Distribution)
]
MEMBERS = {name: member for family in FAMILIES for name, member in _members(family).items()}
"""Name to (make, draw parameters): ``make(*draw(torch.randn, batch_shape, D))`` is a distribution."""


def build(name, batch=(), dim=4, dtype=torch.float64, seed=0):
    """A function of parameters, some parameters, and values in the support, one for each batch element."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    make, parameters = MEMBERS[name]
    arguments = parameters(draw, batch, dim)
    value = draw(*batch, dim)
    if make(*arguments).support.event_dim and not isinstance(make(*arguments), POLAR_OR_AMBIENT):
        value = normalize(value, dim=-1)
    return make, arguments, value


POLAR_OR_AMBIENT = (distributions.PolarStudentT, PolarProduct, distributions.DiagonalStudentT)
