"""Kullback-Leibler divergences, registered with ``torch.distributions.kl_divergence`` (ours)."""

import torch
from torch import Tensor
from torch.distributions.kl import kl_divergence, register_kl

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


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _uniforms(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    return torch.zeros_like(p.entropy() + q.entropy())


@register_kl(SymmetricDistribution, HypersphericalUniform)
def _to_uniform(p: SymmetricDistribution, q: HypersphericalUniform) -> Tensor:
    return log_area(p.dim) - p.entropy()


@register_kl(HypersphericalUniform, SymmetricDistribution)
def _from_uniform(p: HypersphericalUniform, q: SymmetricDistribution) -> Tensor:
    law, uniform = q.polar_law(), exponential_law(torch.zeros_like(q.concentration), q.dim)
    log_density = uniform._replace(log_density=law.log_density).nodes()[1]
    mean = (uniform.nodes()[2].softmax(-1) * log_density).sum(-1)
    return (law.log_mass() - mean - log_area(q.dim)).to(q.loc.dtype)


@register_kl(SymmetricDistribution, VonMisesFisher)
def _to_von_mises_fisher(p: SymmetricDistribution, q: VonMisesFisher) -> Tensor:
    # 1 - <E x, loc> without cancellation: the cross entropy is linear in the mean.
    apart = p.dispersion + p.resultant_length * 2 * q._half_gap(p.loc)
    return q.polar_law().log_mass().to(p.loc.dtype) + q.concentration * apart - p.entropy()


@register_kl(SphericalCauchy, SphericalCauchy)
def _spherical_cauchys(p: SphericalCauchy, q: SphericalCauchy) -> Tensor:
    """A Möbius map takes p to the uniform law and q to another spherical Cauchy; the divergence stays."""
    a, b = (x.loc.double() * x.concentration.double().unsqueeze(-1) for x in (p, q))
    apart = (a - b).square().sum(-1)
    rest = (1 - a.square().sum(-1)) * (1 - b.square().sum(-1))
    image = SphericalCauchy(q.loc.double(), (apart / (apart + rest)).sqrt(), validate_args=False)
    return _from_uniform(HypersphericalUniform(p.dim), image).to(p.loc.dtype)


@register_kl(PowerSpherical, PowerSpherical)
def _power_sphericals(p: PowerSpherical, q: PowerSpherical) -> Tensor:
    """The cross entropy by quadrature over the angle to p's loc and over the circle of latitude."""
    z, _, log_mass = p.polar_law().nodes()
    if p.dim == 2:
        height, share = z.new_tensor([0.0, 1.0]), z.new_tensor([0.5, 0.5])
    else:
        height, _, log_share = exponential_law(z.new_zeros(()), p.dim - 1).nodes()
        share = log_share.softmax(-1)
    gap = q._half_gap(p.loc).double()[..., None, None]
    z = z.unsqueeze(-1)
    # cos²(θ/2) from q's loc, where θ/2 is half the sum of both angles on one side, the difference on the other.
    near, far = ((1 - z) * (1 - gap)).sqrt(), (z * gap).sqrt()
    cosine = (near - far).square() * height + (near + far).square() * (1 - height)
    mean = log_mass.softmax(-1) * (share * cosine.clamp_min(1e-300).log()).sum(-1)
    cross = q.polar_law().log_mass() - q.concentration.double() * mean.sum(-1)
    return cross.to(p.loc.dtype) - p.entropy()


@register_kl(PolarProduct, PolarProduct)
def _polar_products(p: PolarProduct, q: PolarProduct) -> Tensor:
    return kl_divergence(p.direction, q.direction) + kl_divergence(p.radius, q.radius)
