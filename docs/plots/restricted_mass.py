"""How much mass the restricted Student-t has on the sphere, by scale and dimension."""

import torch
from common import BLUE, GREEN, GREY, VERMILION, figure

from pyro_vje.distributions import PolarStudentT

_, (ax, close) = figure(2)
scale = torch.logspace(-2.5, 0, 100)
for dim, colour in ((3, GREEN), (64, BLUE), (512, VERMILION)):
    likelihood = PolarStudentT(3.0, torch.ones(100, dim), scale.unsqueeze(1).expand(100, dim))
    for panel in (ax, close):
        panel.plot(scale, likelihood.direction_factor.log_mass, color=colour, label=f"D = {dim}")
for panel in (ax, close):
    panel.axhline(0, color=GREY, lw=1)
    panel.set(xscale="log", xlabel="scale σ of each feature", ylabel="log of the mass on the sphere")
close.set_ylim(-12, 6)
close.set_title("the same, near a density's 0", fontsize=10)
ax.set_title("df 3", fontsize=10)
ax.legend(frameon=False)
