"""The projected Student-t on the circle: its density, its draws, and the restricted factor beside it."""

import math

import torch
from common import BLUE, GREY, VERMILION, figure

from pyro_vje.distributions import PolarStudentT, ProjectedStudentT

torch.manual_seed(0)
angle = torch.linspace(-math.pi, math.pi, 721)
circle = torch.stack([angle.cos(), angle.sin()], -1)
_, panels = figure(2, sharey=True)
for panel, (df, scale) in zip(panels, ((3.0, (0.5, 0.5)), (3.0, (1.2, 0.4))), strict=True):
    loc, scale = torch.tensor([1.0, 0.3]), torch.tensor(scale)
    projected = ProjectedStudentT(df, loc, scale)
    draws = projected.sample((20_000,))
    panel.hist(torch.atan2(draws[:, 1], draws[:, 0]), bins=90, density=True, color="0.88", label="20,000 draws")
    density = projected.log_prob(circle).exp()
    panel.plot(angle, density, color=BLUE, label=f"projected, mass {torch.trapezoid(density, angle):.3f}")
    restricted = PolarStudentT(df, loc, scale).log_prob_direction(circle).exp()
    mass = torch.trapezoid(restricted, angle)
    panel.plot(angle, restricted, color=VERMILION, ls="--", label=f"restricted, mass {mass:.3f}")
    panel.set_title(f"df {df:g}, scale ({scale[0]:.1f}, {scale[1]:.1f})", fontsize=10)
    panel.set(xlabel="angle of u", ylabel="density", xticks=[-math.pi, 0, math.pi])
    panel.set_xticklabels(["−π", "0", "π"])
    panel.axvline(math.atan2(0.3, 1.0), color=GREY, lw=0.8)
    panel.legend(frameon=False, fontsize=8)
