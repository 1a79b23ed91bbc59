"""The marginal of a direction over the prior is uniform, at whatever scale."""

import torch
from common import BLUE, GREEN, GREY, VERMILION, figure

from pyro_vje.distributions import ProjectedStudentT

torch.manual_seed(0)
n, dim = 200_000, 3
z = torch.randn(n, dim)
_, (one, marginal) = figure(2, sharex=True)
edges = torch.linspace(-1, 1, 41)
for scale, colour in ((0.2, BLUE), (1.0, GREEN), (5.0, VERMILION)):
    sigma = torch.full((dim,), scale)
    first = torch.tensor([1.0, 0.0, 0.0])
    given = ProjectedStudentT(5.0, first * 3**0.5, sigma).sample((n,))[:, 0]
    one.hist(given, bins=edges, density=True, histtype="step", color=colour, label=f"σ = {scale}")
    u = ProjectedStudentT(5.0, z, sigma.expand(n, dim)).sample()[:, 0]
    marginal.hist(u, bins=edges, density=True, histtype="step", color=colour)
one.set_title("given one z on the first axis", fontsize=10)
marginal.set_title("marginal over z ~ Normal(0, I)", fontsize=10)
marginal.axhline(0.5, color=GREY, lw=1)
marginal.set_ylim(0, 1)
one.set(yscale="log", ylabel="density", xlabel="first coordinate of u")
marginal.set(xlabel="first coordinate of u (uniform on the sphere: 1/2)")
one.legend(frameon=False)
