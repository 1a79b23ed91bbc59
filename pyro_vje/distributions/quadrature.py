"""One-dimensional integrals that normalise the directional densities, to about 1e-9 in float64.

All are integrals over z in (0, 1) that behave like z^(a-1) at one end and (1-z)^(b-1) at the other. In the logit
t of z they are analytic on the real line and decay exponentially, so the trapezoid rule converges
geometrically; t = mode + width * sinh(tau) follows the peak (of relative width 1/sqrt(D)) and the tails (of
length 1/df) with the same nodes.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vje.distributions.numerics import Scalar

# Error of log J over D in 2..2048, df in 0.1..1000, kappa in -0.999..0.99999: 5e-9 (df = 0.1),
# 7e-12 (df of 0.5 and more). Nodes end at sinh(_LAST_NODE) times the width of the peak.
_NUM_NODES = 150
_LAST_NODE = 6.8
_TABLE_SIZE = 1 << 12
_TABULATE_ABOVE = 1 << 16  # elements; the table costs what 2^12 of them do


Integrand = Callable[..., tuple[Tensor, ...]]


def logit_nodes(mode: Tensor, width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes for ∫ f(z) dz / (z (1-z)) over (0, 1), where f peaks at logit ``mode`` (...) with ``width`` (...).

    Returns log z, log(1-z) and log weight, each of shape ``(..., num_nodes)``.
    """
    shift, log_weight = _sinh_nodes(width)
    logit = mode.unsqueeze(-1) + shift
    log_z = torch.nn.functional.logsigmoid(logit)
    return log_z, log_z - logit, log_weight


def _sinh_nodes(width: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes width * sinh(tau) and their log weights, (..., num_nodes)."""
    step = 2 * _LAST_NODE / (_NUM_NODES - 1)
    # linspace, which torch 2.8 exports to an ONNX graph with mixed types
    nodes = torch.arange(_NUM_NODES, dtype=width.dtype, device=width.device)
    tau = (nodes - 0.5 * (_NUM_NODES - 1)) * step
    log_weight = tau.cosh().log() + (width.log() + math.log(step)).unsqueeze(-1)
    return width.unsqueeze(-1) * tau.sinh(), log_weight


def log_directional_integral(angle: Tensor, df: Scalar, dim: int) -> Tensor:
    r"""Log of I(angle) = ∫_0^angle sin(a)^(dim-1) sin(angle - a)^(df-1) da, in float64.

    This is the radial integral of the projected Student-t. With κ = -cos(angle), n = (df + dim)/2 and
    x = sin(a) / sin(angle - a), which is κ + sin(angle) cot(angle - a),

        J(κ) = ∫_0^∞ x^(dim-1) (x² - 2κx + 1)^(-n) dx = sin(angle)^(1 - df - dim) I(angle).

    The form in angles is ours. Its integrand has no pole near the path as κ -> 1 (in x it has, at distance
    sin(angle)), and where angle comes from atan2 no 1 - κ² is ever formed by subtraction.

    angle in (0, π) and df have shapes that broadcast. First derivatives are taken under the integral sign with
    the value: backward costs nothing and keeps nothing of the size of the nodes. Elements are processed in
    chunks, so memory is bounded. Many elements that need no gradient and share one df (a number, at most 1000)
    are interpolated to 2e-9 in a table, some 100 times faster.
    """
    angle = angle.double()
    if isinstance(df, Tensor):
        arguments = torch.broadcast_tensors(angle, df.double())
        integrate = partial(_directional, dim=dim)
    else:
        arguments, integrate = (angle,), partial(_directional, df=df, dim=dim)
    needs_grad = torch.is_grad_enabled() and angle.requires_grad
    # An exported graph is for any number of elements: it must not depend on there being many.
    many = not torch.compiler.is_exporting() and not needs_grad and angle.numel() > _TABULATE_ABOVE
    if many and not isinstance(df, Tensor) and df <= 1000 and dim >= 4:
        return _interpolate(angle, float(df), dim)
    return _log_integral(integrate, *arguments)


class PolarLaw(NamedTuple):
    """Density on the unit sphere that is symmetric around an axis, as a function of z = sin²(θ/2), in float64.

    Its mass is area(S^(dim-2)) 2^(dim-2) ∫ (z (1-z))^((dim-3)/2) exp(log_density) dz (ours). ``mode`` and
    ``curvature`` (...) are those of the logarithm of the integrand times z (1-z), in the logit of z; ``log_density``
    is a function of z and log(1-z) (..., num_nodes), up to a constant.
    """

    dim: int
    mode: Tensor
    curvature: Tensor
    log_density: Callable[[Tensor, Tensor], Tensor]

    def nodes(self, cut: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes z, log densities and log masses there (..., num_nodes); masses sum to the normaliser.

        With ``cut`` (...) they are for functions that are singular at that z, and move with it: on either side those of
        tanh-sinh quadrature (Takahasi & Mori 1974) in the variable tau of `logit_nodes`.
        """
        mode, width = self.mode.logit().detach(), self.curvature.rsqrt().detach()
        if cut is None:
            return self._masses(*logit_nodes(mode, width))
        s = torch.linspace(-3.2, 3.2, 601, dtype=mode.dtype, device=mode.device)
        share, rest = (math.pi * s.sinh()).sigmoid(), (-math.pi * s.sinh()).sigmoid()
        weight = (s[1] - s[0]) * math.pi * s.cosh() * share * rest
        mode, width, tiny = mode.unsqueeze(-1), width.unsqueeze(-1), torch.finfo(mode.dtype).tiny
        logit = cut.clamp(tiny, 1 - torch.finfo(cut.dtype).eps).logit().unsqueeze(-1)
        middle = ((logit - mode) / width).asinh().clamp(-_LAST_NODE, _LAST_NODE)
        left, right = (middle + _LAST_NODE).clamp_min(tiny), (_LAST_NODE - middle).clamp_min(tiny)
        tau = torch.cat([left * share - _LAST_NODE, middle + right * share], -1)
        return self._at(mode, width, tau, torch.cat([left * weight, right * weight], -1))

    def _at(self, mode: Tensor, width: Tensor, tau: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `nodes` gives, at logits mode + width * sinh(tau), for weights in tau."""
        logit = mode + width * tau.sinh()
        log_z = torch.nn.functional.logsigmoid(logit)
        return self._masses(log_z, log_z - logit, (weight * width * tau.cosh()).log())

    def _masses(self, log_z: Tensor, log_1mz: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, half = log_z.exp(), 0.5 * (self.dim - 1)
        log_density = self.log_density(z, log_1mz)
        prefactor = (self.dim - 1) * math.log(2) + half * math.log(math.pi) - math.lgamma(half)
        return z, log_density, log_density + log_weight + half * (log_z + log_1mz) + prefactor

    def log_mass(self) -> Tensor:
        """Log of the integral over the sphere, shape ``(...)``; finite for any concentration."""
        return self.nodes()[2].logsumexp(-1)

    def cdf(self, z: Tensor) -> Tensor:
        """Share of the mass nearer to the axis than z (...), by Gauss-Legendre in the variable of `logit_nodes`."""
        x, weight = (torch.from_numpy(a).to(z.device) for a in np.polynomial.legendre.leggauss(_NUM_NODES))
        mode, width = self.mode.logit().unsqueeze(-1), self.curvature.rsqrt().unsqueeze(-1)
        last = ((z.unsqueeze(-1).logit() - mode) / width).asinh().clamp(-_LAST_NODE, _LAST_NODE)
        half = 0.5 * (last + _LAST_NODE)
        tau = half * (x + 1) - _LAST_NODE
        mass = self._at(mode, width, tau, weight * half)[2].logsumexp(-1)
        return (mass - self.log_mass()).exp().clamp(0, 1)


def exponential_law(concentration: Tensor, dim: int) -> PolarLaw:
    """exp(concentration (cos θ - 1)), shape (...); the mode solves a (1-2z) = 2 concentration z (1-z)."""
    k, a = concentration.double(), 0.5 * (dim - 1)
    z = a / (a + k + torch.hypot(k, k.new_full((), a)))
    curvature = 2 * z * (1 - z) * (a + k * (1 - 2 * z))
    return PolarLaw(dim, z, curvature, lambda z, _: -2 * k.unsqueeze(-1) * z)


def cosine_power_law(power: Tensor, dim: int) -> PolarLaw:
    """(1-z)^power = ((1 + cos θ) / 2)^power, shape (...)."""
    k, a = power.double(), 0.5 * (dim - 1)
    z = a / (2 * a + k)
    return PolarLaw(dim, z, (2 * a + k) * z * (1 - z), lambda _, log_1mz: k.unsqueeze(-1) * log_1mz)


def rational_law(slope: Tensor, power: Tensor | float, dim: int) -> PolarLaw:
    """(1 + slope z)^-power, shape (...), power > (dim-1)/2; the mode solves a (1-2z) (1+cz) = n c z (1-z)."""
    c, a = slope.double(), 0.5 * (dim - 1)
    n = torch.as_tensor(power, dtype=torch.float64, device=slope.device)
    linear = 2 * a + c * (n - a)
    z = 2 * a / (linear + (linear.square() - 4 * a * c * (n - 2 * a)).clamp_min(0).sqrt())
    curvature = 2 * a * z * (1 - z) + a * (1 - 2 * z).square() * (1 - a / n)
    return PolarLaw(dim, z, curvature, lambda z, _: -n.unsqueeze(-1) * (c.unsqueeze(-1) * z).log1p())


def log_radial_integral(location: Tensor, spread: Tensor, df: Tensor, dim: int) -> Tensor:
    """Log of ∫_0^∞ x^(dim-1) (1 + (x - location)² / spread)^(-(df+dim)/2) dx for df of 1e6 or more, in float64.

    The shapes broadcast. It loses nothing as df and spread grow together to the Gaussian, exp(-(x - location)²/2).
    """
    arguments = torch.broadcast_tensors(location, spread, df)
    return _log_integral(partial(_radial, dim=dim), *arguments)


def _log_integral(integrate: Integrand, *arguments: Tensor) -> Tensor:
    if torch.compiler.is_exporting():  # a graph for any number of elements: no chunks
        return integrate(*arguments, derivatives=False)[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments):
        return _LogIntegral.apply(integrate, *arguments)[0]
    return _in_chunks(integrate, arguments, False)[0]


class _LogIntegral(torch.autograd.Function):
    """``integrate(*arguments, derivatives)[0]`` of tensors of one shape, whose derivatives come with the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(integrate: Integrand, *arguments: Tensor) -> tuple[Tensor, ...]:
        return _in_chunks(integrate, arguments, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.integrate = inputs[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[1:], *output[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 2
        arguments, derivatives = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # higher derivatives are wanted: go through the nodes
            derivatives = ctx.integrate(*arguments, derivatives=True)[1:]
        return None, *(grad * by for by in derivatives)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> tuple[Tensor | None, ...]:
        derivatives = ctx.integrate(*ctx.saved_tensors, derivatives=True)[1:]
        tangent = sum(by * t for by, t in zip(derivatives, tangents, strict=True) if t is not None)
        return tangent, *(None for _ in derivatives)


def _in_chunks(integrate: Integrand, arguments: Sequence[Tensor], derivatives: bool) -> tuple[Tensor, ...]:
    # Elements at once: what a CPU's cache holds, and below 1 GB on a GPU.
    size = 1 << (11 if arguments[0].device.type == "cpu" else 16)
    chunks = zip(*(x.reshape(-1).split(size) for x in arguments), strict=True)
    parts = [integrate(*chunk, derivatives=derivatives) for chunk in chunks]
    return tuple(torch.cat(column).reshape(arguments[0].shape) for column in zip(*parts, strict=True))


def _directional(angle: Tensor, df: Scalar, dim: int, derivatives: bool) -> tuple[Tensor, ...]:
    """Log integral and, if wanted, its derivatives in angle and df, in one pass over the nodes."""
    # The mode of sin(a)^dim sin(b)^df, b = angle - a, solves dim cot(a) = df cot(b), in closed form. The integral
    # does not depend on where its nodes are: they are constants.
    fixed = angle.detach()
    power = df.detach() if isinstance(df, Tensor) else df
    a = 0.5 * (fixed + torch.asin((dim - power) / (dim + power) * fixed.sin()))
    b = fixed - a
    curvature = (a * b / fixed).square() * (dim / a.sin().square() + power / b.sin().square())
    log_z, log_1mz, log_weight = logit_nodes((a / b).log(), curvature.rsqrt())
    angle = angle.unsqueeze(-1)
    df = df.unsqueeze(-1) if isinstance(df, Tensor) else df
    log_a, log_b = log_z + angle.log(), log_1mz + angle.log()
    tiny = torch.finfo(angle.dtype).tiny  # where x cot(x) is one, not 0/0
    a, b = log_a.exp().clamp_min(tiny), log_b.exp().clamp_min(tiny)
    log_sin_b = _log_sin(b, log_b)
    log_f = log_weight + (dim - 1) * _log_sin(a, log_a) + log_a + (df - 1) * log_sin_b + log_1mz
    log_integral = log_f.logsumexp(-1)
    if not derivatives:
        return (log_integral,)
    density = (log_f - log_integral.unsqueeze(-1)).exp()
    # With z fixed, a = z * angle and b = (1-z) * angle: d log sin(a) / d angle = a cot(a) / angle.
    slope = 1 + (dim - 1) * a / a.tan() + (df - 1) * b / b.tan()
    by_angle = (density * slope / angle).sum(-1)
    return (log_integral, by_angle, (density * log_sin_b).sum(-1))[: 3 if isinstance(df, Tensor) else 2]


def _radial(t: Tensor, spread: Tensor, df: Tensor, dim: int, derivatives: bool) -> tuple[Tensor, ...]:
    """As `_directional`, in the logarithm of x: derivatives in t, spread and df."""
    fixed, s, nu = t.detach(), spread.detach(), df.detach()
    # The mode of x^dim (1 + (x-t)²/s)^-n solves df x² - (df - dim) t x = dim (s + t²).
    half, c = 0.5 * (1 - dim / nu) * fixed, dim * ((s + fixed.square()) / nu)
    root = torch.hypot(half, c.sqrt())
    mode = torch.where(half > 0, half + root, c / (root - half))
    gap = mode - fixed
    ratio = (nu + dim) / (s + gap.square())
    curvature = ratio * (mode.square() + mode * gap - 2 * (mode * gap).square() / (s + gap.square()))
    shift, log_weight = _sinh_nodes(curvature.rsqrt())
    shift = shift.clamp_max(100.0)  # where the integrand is zero long since
    mode, gap, fixed = (x.unsqueeze(-1) for x in (mode, gap, fixed))
    t, spread, n = t.unsqueeze(-1), spread.unsqueeze(-1), 0.5 * (df + dim).unsqueeze(-1)
    gap = gap + mode * shift.expm1() + (fixed - t)  # x - t, at nodes x that are constants
    squared = gap.square()
    log_tail = (squared / spread).log1p()
    log_f = log_weight + dim * (mode.log() + shift) - n * log_tail
    log_integral = log_f.logsumexp(-1)
    if not derivatives:
        return (log_integral,)
    density = (log_f - log_integral.unsqueeze(-1)).exp()
    slope = density * n / (spread + squared)
    by_spread = slope * squared / spread
    return log_integral, (2 * slope * gap).sum(-1), by_spread.sum(-1), (-0.5 * density * log_tail).sum(-1)


def _interpolate(angle: Tensor, df: float, dim: int) -> Tensor:
    """Cubic Hermite interpolation of the log integral less its singular part, log sin(angle/2)^(dim + df - 1)."""
    values, slopes = _table(df, dim, angle.device)
    position = angle * (_TABLE_SIZE / math.pi)
    left = position.long().clamp_(0, _TABLE_SIZE - 1)
    t = position - left
    rise, d0, d1 = (values[1:] - values[:-1])[left], slopes[left], slopes[left + 1]
    smooth = values[left] + t * (d0 + t * (3 * rise - 2 * d0 - d1 + t * (d0 + d1 - 2 * rise)))
    return smooth + (dim + df - 1) * (0.5 * angle).sin().log()


@lru_cache(maxsize=8)
@torch.no_grad()
def _table(df: float, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    step = math.pi / _TABLE_SIZE
    angle = torch.arange(_TABLE_SIZE + 1, dtype=torch.float64, device=device) * step
    angle[0] = 1e-8  # the smooth part is even: flat at zero
    value, slope = _directional(angle, df, dim, True)
    power = dim + df - 1
    slope = slope - 0.5 * power / (0.5 * angle).tan()
    slope[0] = 0
    return value - power * (0.5 * angle).sin().log(), slope * step


def _log_sin(x: Tensor, log_x: Tensor) -> Tensor:
    """Log of sin(x) for x in [0, π], relatively accurate at 0 and where sin is 1 (its power df may be huge)."""
    cos2 = x.cos().square()
    far, near = 0.5 * torch.log1p(-cos2.clamp_max(0.5)), log_x + torch.sinc(x / math.pi).log()
    return torch.where(cos2 < 0.5, far, near)
