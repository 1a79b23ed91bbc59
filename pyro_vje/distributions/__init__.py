"""Distributions for directions and probabilistic embeddings, in any Pyro program or without Pyro."""

from pyro_vje.distributions import divergence  # registers with kl_divergence
from pyro_vje.distributions.backend import HAS_PYRO
from pyro_vje.distributions.base import pairwise_log_prob
from pyro_vje.distributions.polar import PolarProduct, PolarStudentT
from pyro_vje.distributions.spherical import (
    HypersphericalUniform,
    PowerSpherical,
    SphericalCauchy,
    VonMisesFisher,
    directional_pit,
)
from pyro_vje.distributions.student_t import DiagonalStudentT, ProjectedStudentT

__all__ = [
    "DiagonalStudentT", "HypersphericalUniform", "PolarProduct", "PolarStudentT", "PowerSpherical",
    "ProjectedStudentT", "SphericalCauchy", "VonMisesFisher", "directional_pit", "pairwise_log_prob",
]  # fmt: skip

if HAS_PYRO:
    from pyro_vje.distributions.reparam import SphereReparam

    __all__ += ["SphereReparam"]
