"""Kullback-Leibler divergences, registered with ``torch.distributions.kl_divergence`` (ours)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from pyro_vje.distributions.polar import PolarProduct
from pyro_vje.distributions.quadrature import exponential_law
from pyro_vje.distributions.spherical import (
    HypersphericalUniform,
    PowerSpherical,
    SphericalCauchy,
    SymmetricDistribution,
    VonMisesFisher,
    log_area,
)

_SMALL = 1e-30  # below the square of any angle that counts: a root there has no slope, not an infinite one


def _register(p_class: type, q_class: type) -> Callable[[Callable[[Any, Any], Tensor]], Callable[[Any, Any], Tensor]]:
    """Enter a divergence of two laws of one dimension, whose batch shapes broadcast."""

    def enter(function: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        @register_kl(p_class, q_class)
        def divergence(p: Any, q: Any) -> Tensor:
            if p.event_shape != q.event_shape:
                shapes = f"{tuple(p.event_shape)} and {tuple(q.event_shape)}"
                raise ValueError(f"there is no divergence of laws of different event shapes, {shapes}")
            return function(p, q).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))

        return function

    return enter


@_register(HypersphericalUniform, HypersphericalUniform)
def _uniforms(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    return torch.zeros_like(p.entropy())


@_register(SymmetricDistribution, HypersphericalUniform)
def _to_uniform(p: SymmetricDistribution, q: HypersphericalUniform) -> Tensor:
    return log_area(p.dim) - p.entropy()


@_register(HypersphericalUniform, SymmetricDistribution)
def _from_uniform(p: HypersphericalUniform, q: SymmetricDistribution) -> Tensor:
    law, uniform = q.polar_law(), exponential_law(torch.zeros_like(q.concentration), q.dim)
    log_density = uniform._replace(log_density=law.log_density).nodes()[1]
    mean = (uniform.nodes()[2].softmax(-1) * log_density).sum(-1)
    return (law.log_mass() - mean - log_area(q.dim)).to(q.loc.dtype)


@_register(SymmetricDistribution, VonMisesFisher)
def _to_von_mises_fisher(p: SymmetricDistribution, q: VonMisesFisher) -> Tensor:
    # 1 - <E x, loc> without cancellation: the cross entropy is linear in the mean.
    apart = p.dispersion + p.resultant_length * 2 * q._half_gap(p.loc)
    return q.polar_law().log_mass().to(p.loc.dtype) + q.concentration * apart - p.entropy()


@_register(SphericalCauchy, SphericalCauchy)
def _spherical_cauchys(p: SphericalCauchy, q: SphericalCauchy) -> Tensor:
    """A Möbius map takes p to the uniform law and q to another spherical Cauchy; the divergence stays."""
    a, b = (x.loc.double() * x.concentration.double().unsqueeze(-1) for x in (p, q))
    apart = (a - b).square().sum(-1)
    rest = (1 - a.square().sum(-1)) * (1 - b.square().sum(-1))
    concentration = (apart / (apart + rest)).clamp_min(_SMALL).sqrt()
    image = SphericalCauchy(q.loc.double(), concentration, validate_args=False)
    return _from_uniform(HypersphericalUniform(p.dim), image).to(p.loc.dtype)


@_register(PowerSpherical, PowerSpherical)
def _power_sphericals(p: PowerSpherical, q: PowerSpherical) -> Tensor:
    """The cross entropy by quadrature over the angle to p's loc and over the circle of latitude.

    It is not smooth at the latitude on which the point opposite to q's loc lies: a logarithm in two dimensions, a kink
    in three, and from seven on too little to matter (1e-10).
    """
    gap = q._half_gap(p.loc).double()
    z, _, log_mass = p.polar_law().nodes(cut=1 - gap if p.dim < 7 else None)
    if p.dim == 2:
        height, share = z.new_tensor([0.0, 1.0]), z.new_tensor([0.5, 0.5])
    else:
        height, _, log_share = exponential_law(z.new_zeros(()), p.dim - 1).nodes()
        share = log_share.softmax(-1)
    gap, z = gap[..., None, None], z.unsqueeze(-1)
    # cos²(θ/2) from q's loc, where θ/2 is half the sum of both angles on one side, the difference on the other.
    near, far = (x.clamp_min(_SMALL).sqrt() for x in ((1 - z) * (1 - gap), z * gap))
    cosine = (near - far).square() * height + (near + far).square() * (1 - height)
    mean = log_mass.softmax(-1) * (share * cosine.clamp_min(1e-300).log()).sum(-1)
    cross = q.polar_law().log_mass() - q.concentration.double() * mean.sum(-1)
    return cross.to(p.loc.dtype) - p.entropy()


@_register(PolarProduct, PolarProduct)
def _polar_products(p: PolarProduct, q: PolarProduct) -> Tensor:
    return kl_divergence(p.direction, q.direction) + kl_divergence(p.radius, q.radius)
