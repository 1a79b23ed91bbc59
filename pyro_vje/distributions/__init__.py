"""Distributions for directions and probabilistic embeddings, in any Pyro program or without Pyro."""

from pyro_vje.distributions import divergence  # registers with kl_divergence
from pyro_vje.distributions.backend import HAS_PYRO
from pyro_vje.distributions.diagonal import DiagonalStudentT
from pyro_vje.distributions.fitting import directional_pit
from pyro_vje.distributions.pairwise import pairwise_log_prob
from pyro_vje.distributions.polar import PolarStudentT
from pyro_vje.distributions.polar_product import PolarProduct
from pyro_vje.distributions.projected import ProjectedStudentT
from pyro_vje.distributions.spherical import (
    HypersphericalUniform,
    PowerSpherical,
    SphericalCauchy,
    VonMisesFisher,
)

__all__ = [
    "DiagonalStudentT",
    "HypersphericalUniform",
    "PolarProduct",
    "PolarStudentT",
    "PowerSpherical",
    "ProjectedStudentT",
    "SphericalCauchy",
    "VonMisesFisher",
    "directional_pit",
    "pairwise_log_prob",
]

if HAS_PYRO:
    from pyro_vje.distributions.reparam import SphereReparam

    __all__ += ["SphereReparam"]
