"""ProjectedStudentT against 40-digit integrals, closed forms, other libraries, and its own samples."""

import math
from itertools import pairwise

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from oracles import (
    angle_p_value,
    cosine_density,
    integrate,
    log_area,
    log_projected_student_t,
    log_radial_integral_quad,
    log_radial_integral_series,
    neighbor_p_value,
    uniform_directions,
)
from scipy import integrate as scipy_integrate
from scipy import stats

from pyro_vje.distributions import ProjectedStudentT
from pyro_vje.distributions.quadrature import log_directional_integral
from pyro_vje.distributions.student_t import directional_log_density

DIMS = (2, 3, 64, 2048)
DFS = (0.5, 1000.0)
KAPPAS = (-0.999, -0.7, 0.0, 0.3, 0.9, 0.99, 0.999, 0.99999, 1 - 1e-10)
GOF_FAILURE_RATE = 1e-3  # p-values are of seeded draws: a failure means a change, not bad luck


def axis(dim, dtype=torch.float64):
    return torch.eye(dim, dtype=dtype)[0]


@pytest.mark.parametrize("point", [(2, 0.5, 0.9), (3, 1.0, 0.99999), (64, 3.0, 0.3), (2048, 1000.0, 0.9)])
def test_the_two_references_agree(point):
    assert mp.almosteq(log_radial_integral_series(*point), log_radial_integral_quad(*point), rel_eps=1e-25)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("df", DFS)
def test_log_prob_agrees_with_40_digits(dim, df):
    kappa = torch.tensor(KAPPAS, dtype=torch.float64)
    length = (df * kappa.square() / (1 - kappa.square())).sqrt()
    locs = length[:, None] * axis(dim)
    values = torch.where(kappa < 0, -1.0, 1.0)[:, None] * axis(dim)
    got = ProjectedStudentT(df, locs, torch.ones(dim)).log_prob(values)
    e = axis(dim)[:2].tolist() + [0.0] * (dim - 2)
    for i, log_prob in enumerate(got.tolist()):
        loc, value = locs[i].tolist(), [x * float(values[i, 0]) for x in e]
        want = float(log_projected_student_t(df, loc, [1.0] * dim, value))
        assert abs(log_prob - want) <= 2e-9 + 1e-12 * abs(want), (KAPPAS[i], log_prob, want)


@pytest.mark.parametrize("dim", [2, 5, 40])
@pytest.mark.parametrize("df", [0.5, 2.0, 300.0])
def test_unequal_scales_agree_with_40_digits(dim, df):
    loc, scale = torch.randn(3, dim, dtype=torch.float64), torch.rand(dim, dtype=torch.float64) + 0.05
    value = uniform_directions(3, dim)
    got = ProjectedStudentT(df, loc, scale).log_prob(value)
    want = [float(log_projected_student_t(df, loc[i], scale, value[i])) for i in range(3)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=2e-9)


@pytest.mark.parametrize("df", [0.5, 1.0, 5.0])
def test_is_the_radial_integral_of_scipys_density(df):
    loc, scale = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.2
    value = uniform_directions(1, 4)[0]
    ambient = stats.multivariate_t(loc.numpy(), torch.diag(scale.square()).numpy(), df)
    want, _ = scipy_integrate.quad(lambda r: ambient.pdf(r * value.numpy()) * r**3, 0, math.inf, epsabs=0, epsrel=1e-9)
    got = ProjectedStudentT(df, loc, scale).log_prob(value).exp().item()
    assert got == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("df", [0.5, 1.0, 5.0, 1000.0, math.inf])
@pytest.mark.parametrize(("dim", "count"), [(2, 4000), (3, 150)])
def test_integrates_to_one_in_low_dimension(df, dim, count):
    loc, scale = torch.tensor([0.7, -1.1, 0.4])[:dim].double(), torch.tensor([0.5, 1.3, 0.8])[:dim].double()
    assert integrate(ProjectedStudentT(df, loc, scale).log_prob, dim, count) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(("dim", "df", "scale"), [(512, 0.5, 0.02), (2048, 30.0, 0.05)])
def test_integrates_to_one_in_high_dimension_with_equal_scales(dim, df, scale):
    distribution = ProjectedStudentT(df, axis(dim), torch.full((dim,), scale, dtype=torch.float64))
    angle, density = cosine_density(distribution.log_prob, axis(dim), count=8001)
    assert torch.trapezoid(density, angle).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("dim", "df"), [(512, 1.0), (2048, 30.0)])
def test_integrates_to_one_in_high_dimension_with_unequal_scales(dim, df):
    # Importance sampling from the angular central Gaussian (Tyler, 1987), whose density has a closed form.
    scale = torch.rand(dim, dtype=torch.float64) + 0.2
    loc = torch.nn.functional.normalize(torch.randn(dim, dtype=torch.float64), dim=0) * scale
    value = torch.nn.functional.normalize(scale * torch.randn(4000, dim, dtype=torch.float64), dim=-1)
    proposal = -log_area(dim) - scale.log().sum() - dim / 2 * (value / scale).square().sum(-1).log()
    weights = (ProjectedStudentT(df, loc, scale).log_prob(value) - proposal).exp()
    standard_error = weights.std().item() / math.sqrt(len(weights))
    assert standard_error < 0.05
    assert abs(weights.mean().item() - 1) < 4 * standard_error


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("df", [0.5, 5.0, math.inf])
def test_is_uniform_without_location(dim, df):
    got = ProjectedStudentT(df, torch.zeros(dim), torch.full((dim,), 0.3)).log_prob(uniform_directions(5, dim))
    torch.testing.assert_close(got, torch.full_like(got, -log_area(dim)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [2, 3])
def test_tends_to_pyros_projected_normal(dim):
    loc = torch.randn(100, dim, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0, 6.0]).repeat(25)[:, None]
    normal = dist.ProjectedNormal(loc)
    value = normal.sample()
    gaps = [
        (ProjectedStudentT(df, loc, torch.ones(dim)).log_prob(value) - normal.log_prob(value)).abs().max().item()
        for df in (1e2, 1e4, 1e6, 1e8, math.inf)
    ]
    assert all(after < 0.02 * before for before, after in pairwise(gaps[:4])), gaps
    assert gaps[-1] < 1e-8


def log_projected_normal(loc, scale, value):
    """40-digit log density for one scale, by Weber's parabolic cylinder function."""
    with mp.workdps(50):
        dim, s = len(loc), mp.mpf(scale)
        dot, square = (mp.fsum(mp.mpf(a) * mp.mpf(b) for a, b in zip(loc, x, strict=True)) for x in (value, loc))
        t = dot / s
        log_integral = mp.log(mp.pcfu(mp.mpf(dim) - mp.mpf(1) / 2, -t) * mp.gamma(dim)) - t**2 / 4
        return -mp.mpf(dim) / 2 * mp.log(2 * mp.pi) - (square - dot**2) / s**2 / 2 + log_integral


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("scale", [0.001, 0.1, 2.0])
@pytest.mark.parametrize("df", [math.inf, 1e25])
def test_infinite_df_is_the_projected_normal_also_far_from_loc(dim, scale, df):
    across = torch.nn.functional.normalize(torch.tensor([0.01, 1.0]).double(), dim=0)
    value = torch.nn.functional.pad(across, (0, dim - 2))
    loc = axis(dim) * (1.0 if dim == 2 else math.sqrt(dim))
    scales = torch.full((dim,), scale, dtype=torch.float64)
    want = float(log_projected_normal(loc.tolist(), scale, value.tolist()))
    for each in (df, torch.tensor(df, dtype=torch.float64)):
        got = ProjectedStudentT(each, loc, scales).log_prob(value)
        assert got.item() == pytest.approx(want, rel=1e-14, abs=1e-8)


@pytest.mark.parametrize("df", [9e5, 1.1e6])
def test_both_integrals_agree_where_they_meet(df):
    loc, scale, value = torch.randn(9).double(), torch.rand(9).double() + 0.1, uniform_directions(5, 9)
    got = ProjectedStudentT(df, loc, scale).log_prob(value)
    want = [float(log_projected_student_t(df, loc, scale, u)) for u in value]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-9)
    leaves = [x.requires_grad_() for x in (torch.tensor(df).double(), loc, scale)]
    assert torch.autograd.gradcheck(lambda *x: ProjectedStudentT(*x).log_prob(value[:2]), leaves)


@pytest.mark.parametrize("df", [0.1, 0.2])
@pytest.mark.parametrize("dim", [2, 64])
def test_least_df_has_right_values_and_gradients_and_smaller_ones_are_refused(dim, df):
    loc, scale, value = torch.randn(dim).double(), torch.rand(dim).double() + 0.1, uniform_directions(3, dim)
    got = ProjectedStudentT(df, loc, scale).log_prob(value)
    want = [float(log_projected_student_t(df, loc, scale, u)) for u in value]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-7)
    for sign in (-1, 1):
        leaves = [torch.tensor(df), sign * 1e4 * value[0].float(), scale.float()]
        leaves = [x.requires_grad_() for x in leaves]
        grads = torch.autograd.grad(ProjectedStudentT(*leaves).log_prob(value[0]), leaves)
        assert all(grad.isfinite().all() for grad in grads)
    with pytest.raises(ValueError, match="df"):
        ProjectedStudentT(df - 0.11 if df > 0.15 else 0.05, loc, scale)


def test_is_the_projected_cauchy_at_one_degree_of_freedom():
    # In D = 2, J(κ) = 1 / (1 - κ): the density is 1 / (2π |V|^½ A √(C+1) (1-κ)).
    loc, scale = torch.tensor([0.3, -2.0]).double(), torch.tensor([0.4, 1.5]).double()
    u = uniform_directions(50, 2)
    a, b, c = (u / scale).square().sum(-1), (u * loc / scale**2).sum(-1), (loc / scale).square().sum()
    want = -(2 * math.pi * scale.prod() * a * (c + 1).sqrt() * (1 - b / (a * (c + 1)).sqrt())).log()
    torch.testing.assert_close(ProjectedStudentT(1.0, loc, scale).log_prob(u), want, rtol=0, atol=1e-9)


def test_depends_on_the_ratio_of_loc_to_scale_only():
    loc, scale, value = torch.randn(9).double(), torch.rand(9).double() + 0.1, uniform_directions(1, 9)[0]
    want = ProjectedStudentT(4.0, loc, scale).log_prob(value)
    for factor in (1e-6, 1e6):
        torch.testing.assert_close(ProjectedStudentT(4.0, factor * loc, factor * scale).log_prob(value), want)


@pytest.mark.parametrize("dim", [2, 4])
@pytest.mark.parametrize("df", [0.5, 5.0, math.inf])
def test_samples_fit_log_prob(dim, df):
    loc = torch.tensor([1.0, 0.5, -0.5, 0.2, 0.7])[:dim].double()
    scale = torch.tensor([0.5, 1.0, 0.7, 0.9, 0.6])[:dim].double()
    distribution = ProjectedStudentT(df, loc, scale)
    assert distribution.support.check(distribution.sample((100,))).all()
    assert neighbor_p_value(distribution, dim - 1) > GOF_FAILURE_RATE


@pytest.mark.parametrize(("dim", "df"), [(512, 0.5), (2048, 1000.0)])
def test_samples_fit_log_prob_in_high_dimension(dim, df):
    distribution = ProjectedStudentT(df, axis(dim), torch.full((dim,), 0.04, dtype=torch.float64))
    assert angle_p_value(distribution, axis(dim), distribution.sample((4000,))) > GOF_FAILURE_RATE


@pytest.mark.parametrize("dim", [2, 3, 17])
def test_gradcheck(dim):
    df = (torch.rand(3, dtype=torch.float64) * 5 + 0.4).requires_grad_()
    loc = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(3, dim, dtype=torch.float64) + 0.3).requires_grad_()
    value = torch.randn(3, dim, dtype=torch.float64, requires_grad=True)

    def log_prob(df, loc, scale, value):
        return ProjectedStudentT(df, loc, scale).log_prob(torch.nn.functional.normalize(value, dim=-1))

    assert torch.autograd.gradcheck(log_prob, (df, loc, scale, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [2, 512])
@pytest.mark.parametrize("width", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("sign", [1, 0, -1])
def test_finite_at_the_edges(dtype, dim, width, sign):
    value = uniform_directions(1, dim, dtype)[0].requires_grad_()
    loc = (sign * value.detach()).requires_grad_()
    scale = torch.full((dim,), width, dtype=dtype, requires_grad=True)
    for number in (0.5, 3.0, 1000.0, math.inf):
        df = torch.tensor(number, dtype=dtype, requires_grad=True)
        log_prob = ProjectedStudentT(df, loc, scale).log_prob(value)
        grads = torch.autograd.grad(log_prob, (df, loc, scale, value))
        assert log_prob.isfinite()
        assert all(grad.isfinite().all() for grad in grads), (number, grads)


@pytest.mark.parametrize("dim", [2, 64, 2048])
@pytest.mark.parametrize("df", [0.5, 1000.0])
@pytest.mark.parametrize("width", [1e-3, 1.0, 30.0])
def test_float32_loses_only_the_rounding_of_the_reductions(dim, df, width):
    # First-order error bound: |∂ log p / ∂x| |x| eps for each reduction x, and for the rounded result itself.
    loc = uniform_directions(20, dim, torch.float32)
    value = torch.nn.functional.normalize(loc + width * torch.randn(20, dim), dim=-1)
    scale = width * (torch.rand(20, dim) + 0.5)
    got = ProjectedStudentT(df, loc, scale).log_prob(value)
    loc, scale, value = loc.double(), scale.double(), value.double()
    direction, location = value / scale, loc / scale
    a, b, c = direction.square().sum(-1), (direction * location).sum(-1), location.square().sum(-1)
    residual = (location - (b / a)[:, None] * direction).square().sum(-1)
    reductions = [x.requires_grad_() for x in (a, b, residual)]
    density = directional_log_density(df, dim, *reductions)
    grads = torch.autograd.grad(density.sum(), reductions)
    want = density - scale.log().sum(-1)
    # A and B are relatively accurate to √(A C); the residual's terms are differences of terms of C.
    sizes = (a, (a * c).sqrt(), 2 * (residual * c).sqrt() + residual)
    bound = sum(grad.abs() * size for grad, size in zip(grads, sizes, strict=True)) + want.abs()
    bound = bound + scale.log().abs().sum(-1)
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= 4 * torch.finfo(torch.float32).eps * bound + 2e-9).all()


def test_rsample_gradients_are_those_of_the_expectation():
    # In D = 2, d E[u_1] / d parameter by quadrature of the density against the mean of pathwise gradients.
    angle = torch.arange(2000, dtype=torch.float64) * (2 * math.pi / 2000)
    nodes = torch.stack([angle.cos(), angle.sin()], -1)
    parameters = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, [0.8, 0.3], [0.5, 0.9])]
    expectation = (ProjectedStudentT(*parameters).log_prob(nodes).exp() * nodes[:, 0]).sum() * (2 * math.pi / 2000)
    want = torch.cat([x.reshape(-1) for x in torch.autograd.grad(expectation, parameters)])
    draws = [x.detach().expand(200_000, *x.shape).clone().requires_grad_() for x in parameters]
    pathwise = torch.autograd.grad(ProjectedStudentT(*draws).rsample()[:, 0].sum(), draws)
    pathwise = torch.cat([x.reshape(200_000, -1) for x in pathwise], -1)
    z = (pathwise.mean(0) - want) / (pathwise.std(0) / math.sqrt(200_000))
    assert z.abs().max() < 4, (pathwise.mean(0), want)


def test_heaviest_tails_sample_without_overflow():
    samples = ProjectedStudentT(0.1, torch.ones(8), torch.ones(8)).rsample((2000,))
    assert samples.isfinite().all()


def test_integral_is_the_same_in_chunks_and_takes_df_of_any_shape():
    angle = (torch.rand(3, 2000, dtype=torch.float64) * 3 + 0.05).requires_grad_()
    df = torch.tensor([[0.7], [4.0], [50.0]], dtype=torch.float64, requires_grad=True)
    whole = log_directional_integral(angle, df, 6)
    rows = torch.stack([log_directional_integral(angle[i], df[i].item(), 6) for i in range(3)])
    torch.testing.assert_close(whole, rows, rtol=1e-13, atol=0)
    grads = torch.autograd.grad(whole.sum(), (angle, df))
    assert [g.shape for g in grads] == [angle.shape, df.shape]


@pytest.mark.parametrize(("dim", "df"), [(4, 0.5), (128, 5.0), (2048, 1000.0)])
def test_many_elements_are_interpolated_to_the_same_accuracy(dim, df):
    edge = torch.logspace(-9, -1, 500, dtype=torch.float64)
    angle = torch.cat([edge, torch.linspace(0.1, math.pi - 0.1, 1500, dtype=torch.float64), math.pi - edge])
    one_by_one = log_directional_integral(angle, df, dim)
    many = log_directional_integral(angle.repeat(40), df, dim)[: len(angle)]
    torch.testing.assert_close(many, one_by_one, rtol=1e-13, atol=4e-9)
    assert not torch.equal(many, one_by_one)  # the table was used
    needs_grad = angle.repeat(40).requires_grad_()
    assert torch.equal(log_directional_integral(needs_grad[: 1 << 16], df, dim)[: len(angle)], one_by_one)


def test_second_derivatives():
    df = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    loc = torch.randn(3, dtype=torch.float64, requires_grad=True)
    scale = (torch.rand(3, dtype=torch.float64) + 0.3).requires_grad_()

    def log_prob(df, loc, scale):
        return ProjectedStudentT(df, loc, scale).log_prob(axis(3))

    assert torch.autograd.gradgradcheck(log_prob, (df, loc, scale))
    assert torch.autograd.gradgradcheck(lambda loc: ProjectedStudentT(2.5, loc, scale).log_prob(axis(3)), (loc,))
