"""What the degrees of freedom do: the price of a direction far from the location, and its slope."""

import math

import torch
from common import BLUE, GREEN, GREY, VERMILION, figure

from pyro_vje.distributions import PolarStudentT

dim, sigma = 128, 1.0
angle = torch.linspace(0, math.pi, 400, dtype=torch.float64).requires_grad_()
location = torch.zeros(dim, dtype=torch.float64)
location[0] = 1.0
u = torch.zeros(400, dim, dtype=torch.float64)
u = torch.cat([angle.cos().unsqueeze(1), angle.sin().unsqueeze(1), u[:, 2:]], 1)
_, (price, slope) = figure(2)
for df, colour in ((5.0, BLUE), (dim - 2.0, GREEN), (math.inf, VERMILION)):
    likelihood = PolarStudentT(df, location, torch.full((dim,), sigma, dtype=torch.float64), unit_radius=dim**0.5)
    log_prob = likelihood.log_prob_direction(u)
    (by_angle,) = torch.autograd.grad(log_prob.sum(), angle, retain_graph=True)
    degrees = angle.detach().rad2deg()
    label = "df ∞, Gaussian" if math.isinf(df) else f"df {df:g}"
    price.plot(degrees, (log_prob[0] - log_prob).detach(), color=colour, label=label)
    slope.plot(degrees, -by_angle, color=colour)
price.set(ylabel="nats below the mode", xlabel="angle between u and z, degrees")
slope.set(ylabel="nats a radian", xlabel="angle between u and z, degrees")
for panel in (price, slope):
    panel.axvline(90, color=GREY, lw=0.8)
    panel.set_xticks([0, 45, 90, 135, 180])
price.legend(frameon=False)
