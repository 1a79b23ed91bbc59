"""Distributions for probabilistic embeddings, usable in any Pyro program."""

from pyro_vje.distributions.polar import PolarStudentT

__all__ = ["PolarStudentT"]
