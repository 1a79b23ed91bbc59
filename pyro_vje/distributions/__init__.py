"""Distributions for probabilistic embeddings, usable in any Pyro program."""

from pyro_vje.distributions.diagonal import DiagonalStudentT
from pyro_vje.distributions.pairwise import pairwise_log_prob
from pyro_vje.distributions.polar import PolarStudentT
from pyro_vje.distributions.polar_product import PolarProduct
from pyro_vje.distributions.projected import ProjectedStudentT
from pyro_vje.distributions.spherical import PowerSpherical, SphericalCauchy, VonMisesFisher

__all__ = [
    "DiagonalStudentT",
    "PolarProduct",
    "PolarStudentT",
    "PowerSpherical",
    "ProjectedStudentT",
    "SphericalCauchy",
    "VonMisesFisher",
    "pairwise_log_prob",
]
