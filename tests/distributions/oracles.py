"""Independent references: 40-digit integrals, quadrature on low-dimensional spheres, goodness of fit."""

import math

import mpmath as mp
import numpy as np
import torch
from pyro.distributions.testing.gof import exp_goodness_of_fit, volume_of_sphere
from scipy import stats
from scipy.spatial import KDTree


def log_radial_integral_series(dim, df, kappa):
    """Log of J(κ) = ∫ x^(D-1) (x² - 2κx + 1)^(-n) dx by its expansion in κ, for κ >= 0 (40 digits)."""
    with mp.workdps(40):
        dim, df, kappa = mp.mpf(dim), mp.mpf(df), mp.mpf(kappa)
        even = mp.gamma(dim / 2) * mp.gamma(df / 2) * mp.hyp2f1(dim / 2, df / 2, 0.5, kappa**2)
        odd = mp.gamma((dim + 1) / 2) * mp.gamma((df + 1) / 2) * mp.hyp2f1((dim + 1) / 2, (df + 1) / 2, 1.5, kappa**2)
        return mp.log((even + 2 * kappa * odd) / (2 * mp.gamma((dim + df) / 2)))


def log_radial_integral_quad(dim, df, kappa):
    """Log of J(κ) by 40-digit quadrature in s = log x, with break points scaled to the peak; any κ."""
    with mp.workdps(40):
        dim, df, kappa = mp.mpf(dim), mp.mpf(df), mp.mpf(kappa)
        n = (dim + df) / 2

        def log_f(s):
            return (dim - df) / 2 * s - n * mp.log(2 * (mp.cosh(s) - kappa))

        low, high = mp.mpf(-60), mp.mpf(60)
        for _ in range(160):
            mode = (low + high) / 2
            rising = (dim - df) / 2 > n * mp.sinh(mode) / (mp.cosh(mode) - kappa)
            low, high = (mode, high) if rising else (low, mode)
        peak, width = log_f(mode), 1 / mp.sqrt(-mp.diff(log_f, mode, 2))
        steps = [mp.mpf(2) ** j for j in range(15)]
        points = [
            -mp.inf,
            *(mode - width * s for s in reversed(steps)),
            mode,
            *(mode + width * s for s in steps),
            mp.inf,
        ]
        return peak + mp.log(mp.quad(lambda s: mp.exp(log_f(s) - peak), points))


def log_projected_student_t(df, loc, scale, value):
    """40-digit log density of the projected Student-t from A, B, C and κ (the design's form, not the code's)."""
    with mp.workdps(40):
        df, dim = mp.mpf(df), len(loc)
        loc, scale, value = ([mp.mpf(float(x)) for x in vector] for vector in (loc, scale, value))
        rows = list(zip(loc, scale, value, strict=True))
        a = mp.fsum((u / s) ** 2 for _, s, u in rows)
        b = mp.fsum(u * m / s**2 for m, s, u in rows)
        c = mp.fsum((m / s) ** 2 for m, s, _ in rows)
        kappa = b / mp.sqrt(a * (c + df))
        integral = log_radial_integral_series if kappa >= 0 else log_radial_integral_quad
        return (
            mp.loggamma((df + dim) / 2) - mp.loggamma(df / 2) - mp.mpf(dim) / 2 * mp.log(mp.pi) + df / 2 * mp.log(df)
            - mp.fsum(mp.log(s) for s in scale) - mp.mpf(dim) / 2 * mp.log(a) - df / 2 * mp.log(c + df)
            + integral(dim, df, kappa)
        )  # fmt: skip


def log_area(dim):
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def uniform_directions(count, dim, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(count, dim, dtype=dtype), dim=-1)


def circle_nodes(count):
    """Points on S^1 and weights: the trapezoid rule, exact to rounding for smooth densities."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], -1), torch.full((count,), 2 * math.pi / count, dtype=torch.float64)


def sphere_nodes(count):
    """Points on S^2 and weights: Gauss-Legendre in height, trapezoid in longitude."""
    height, weight = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(count))
    circle, arc = circle_nodes(2 * count)
    ring = (1 - height.square()).sqrt()[:, None, None] * circle
    points = torch.cat([ring, height[:, None, None].expand(-1, 2 * count, 1)], -1)
    return points.reshape(-1, 3), (weight[:, None] * arc).reshape(-1)


def integrate(log_prob, dim, count):
    """Integral over S^1 or S^2 of exp(log_prob)."""
    points, weights = circle_nodes(count) if dim == 2 else sphere_nodes(count)
    return (log_prob(points).exp() * weights).sum().item()


def cosine_density(log_prob, axis, count=8001):
    """Angles, and density of the angle to ``axis``, of a law on the sphere that is symmetric around it."""
    dim = len(axis)
    other = torch.zeros_like(axis)
    other[int(axis.abs().argmin())] = 1.0
    other = torch.nn.functional.normalize(other - (other @ axis) * axis, dim=0)
    angle = torch.linspace(0, math.pi, count, dtype=torch.float64)[1:-1]
    logs = torch.cat([log_prob(a.cos()[:, None] * axis + a.sin()[:, None] * other) for a in angle.split(4096)])
    return angle, (logs + log_area(dim - 1) + (dim - 2) * angle.sin().log()).exp()


def angle_p_value(distribution, axis, samples):
    """Kolmogorov-Smirnov p-value of the samples' angles to ``axis`` under the law that ``log_prob`` says."""
    angle, density = cosine_density(distribution.log_prob, axis)
    cdf = torch.cumulative_trapezoid(density, angle)
    angles = torch.atan2((samples - (samples @ axis)[:, None] * axis).norm(dim=-1), samples @ axis)
    return stats.kstest(angles.numpy(), lambda x: np.interp(x, angle[1:].numpy(), cdf.numpy())).pvalue


def neighbor_p_value(distribution, dim, count=60_000, queries=2000):
    """p-value that samples have the density that ``log_prob`` says, on a ``dim``-dimensional manifold.

    The mass around a point out to the nearest of n samples is Exponential(n). Pyro's auto_goodness_of_fit asks
    this of all n points at once, whose distances are dependent (neighbours are often mutual): its p-values are
    far too small even for the uniform law. Here few points are asked, apart from the n.
    """
    samples, points = distribution.sample((count,)), distribution.sample((queries,))
    distances = torch.from_numpy(KDTree(samples.numpy()).query(points.numpy())[0])
    masses = count * distribution.log_prob(points).exp() * volume_of_sphere(dim, distances)
    return float(exp_goodness_of_fit(masses))
