"""Distributions for probabilistic embeddings, usable in any Pyro program."""

from pyro_vje.distributions.polar import PolarStudentT
from pyro_vje.distributions.projected import ProjectedStudentT

__all__ = ["PolarStudentT", "ProjectedStudentT"]
