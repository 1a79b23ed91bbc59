"""Distributions for directions and probabilistic embeddings, in any Pyro program."""

from pyro_vje.distributions import divergence  # registers with kl_divergence
from pyro_vje.distributions.base import pairwise_log_prob
from pyro_vje.distributions.polar import PolarProduct, PolarStudentT
from pyro_vje.distributions.reparam import SphereReparam
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
    "ProjectedStudentT", "SphereReparam", "SphericalCauchy", "VonMisesFisher", "directional_pit", "pairwise_log_prob",
]  # fmt: skip
