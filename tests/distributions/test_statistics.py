"""What a statistician asks: moments, modes, entropies, divergences, fits, residuals; against integrals and draws."""

import math

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from oracles import circle_nodes, log_area, sphere_nodes, uniform_directions
from scipy import stats
from torch.distributions import kl_divergence

from pyro_vje.distributions import (
    DiagonalStudentT,
    HypersphericalUniform,
    PolarProduct,
    PolarStudentT,
    PowerSpherical,
    ProjectedStudentT,
    SphericalCauchy,
    VonMisesFisher,
    directional_pit,
)

NODES = {2: circle_nodes(1000), 3: sphere_nodes(60)}
SYMMETRIC = [(PowerSpherical, 5.0), (PowerSpherical, 30.0), (SphericalCauchy, 0.0), (SphericalCauchy, 0.7)]
SYMMETRIC += [(VonMisesFisher, 0.5), (VonMisesFisher, 30.0)]


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def expectation(distribution, function):
    points, weights = NODES[distribution.event_shape[0]]
    mass = distribution.log_prob(points).exp() * weights
    values = function(points)
    return (mass.view(-1, *(1 for _ in values.shape[1:])) * values).sum(0)


def near(got, want, tolerance=1e-8):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim", NODES)
@pytest.mark.parametrize(("family", "concentration"), SYMMETRIC)
def test_symmetric_families_by_integrals_over_the_sphere(family, concentration, dim):
    law = family(uniform_directions(1, dim)[0], double(concentration))
    mean = expectation(law, lambda x: x)
    near(law.mean, mean)
    near(law.resultant_length, mean.norm())
    near(law.dispersion, 1 - mean.norm())
    near(law.variance, expectation(law, torch.square) - mean.square())
    near(law.entropy(), -expectation(law, law.log_prob))
    near(kl_divergence(law, HypersphericalUniform(dim)), expectation(law, law.log_prob) + log_area(dim))
    assert (law.log_prob(law.mode) >= law.log_prob(NODES[dim][0])).all()


@pytest.mark.parametrize("dim", NODES)
@pytest.mark.parametrize("df", [0.5, 3.0, math.inf])
def test_projected_student_t_by_integrals_over_the_sphere(df, dim):
    loc, scale = torch.randn(2, dim).double(), torch.rand(2, dim).double() + 0.5
    law = ProjectedStudentT(double(df), loc, scale)
    for i, each in enumerate(ProjectedStudentT(df, loc[i], scale[i]) for i in range(2)):
        mean = expectation(each, lambda x: x)
        near(law.mean[i], mean)
        near(law.variance[i], expectation(each, torch.square) - mean.square())
        assert (each.log_prob(each.mode) >= each.log_prob(NODES[dim][0])).all()
        near(law.mode[i], each.mode)


@pytest.mark.parametrize("dim", [128, 2048])
@pytest.mark.parametrize("df", [1.0, math.inf])
def test_moments_of_the_projected_student_t_are_those_of_draws(df, dim):
    loc, scale = torch.randn(dim).double() / 4, torch.rand(dim).double() + 0.2
    law = ProjectedStudentT(df, loc, scale)
    draws = law.sample((2000,))
    z = (draws.mean(0) - law.mean) / (law.variance / 2000).sqrt()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert (draws.var(0) / law.variance).mean() == pytest.approx(1, abs=0.01)
    assert law.variance.sum() + law.mean.square().sum() == pytest.approx(1, abs=1e-9)
    assert law.log_prob(law.mode) >= law.log_prob(torch.cat([draws, loc[None] / loc.norm()])).max()


@pytest.mark.parametrize("dim", [128, 512])
def test_entropy_and_divergence_by_draws_in_high_dimension(dim):
    loc, other = uniform_directions(2, dim)
    for p, q in [
        (PowerSpherical(loc, double(300.0)), VonMisesFisher(loc, double(100.0))),
        (SphericalCauchy(loc, double(0.5)), SphericalCauchy((loc + other) / (loc + other).norm(), double(0.3))),
        (PowerSpherical(loc, double(300.0)), PowerSpherical((loc + other) / (loc + other).norm(), double(99.0))),
    ]:
        draws = p.sample((2000,))
        entropy, divergence = -p.log_prob(draws), p.log_prob(draws) - q.log_prob(draws)
        for got, of in ((p.entropy(), entropy), (kl_divergence(p, q), divergence)):
            assert abs(got - of.mean()) < 4 * of.std() / math.sqrt(2000)


@pytest.mark.parametrize("dim", NODES)
def test_divergences_by_integrals(dim):
    one, other = uniform_directions(2, dim)
    cauchy, vmf = SphericalCauchy(one, double(0.4)), VonMisesFisher(other, double(3.0))
    uniform = HypersphericalUniform(dim, dtype=torch.float64)
    pairs = [(cauchy, SphericalCauchy(other, double(0.7))), (cauchy, vmf), (uniform, vmf), (uniform, cauchy)]
    pairs += [(VonMisesFisher(one, double(20.0)), vmf), (PowerSpherical(one, double(20.0)), vmf)]
    for p, q in pairs:
        want = expectation(p, lambda x, p=p, q=q: p.log_prob(x) - q.log_prob(x))
        near(kl_divergence(p, q), want)
    for p in (cauchy, vmf, uniform, PowerSpherical(one, double(3.0))):
        near(kl_divergence(p, p), double(0.0))
    # (1 + t)/2 is Beta((D-1)/2, (D-1)/2) under the uniform law, of which the mean logarithm is known.
    half = (dim - 1) / 2
    mean = float(mp.digamma(half) - mp.digamma(2 * half))
    got = kl_divergence(uniform, PowerSpherical(one, double(2.0)))
    want = -log_area(dim) - 2 * mean - PowerSpherical(one, double(2.0)).log_prob(one).item()
    assert got.item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    ("dim", "one", "other", "angle"),
    [
        *((2, 20, 2, 0.3), (2, 2, 2, 3.0), (2, 7, 4, 1.5), (2, 1, 50, 2.5), (2, 0.3, 5, 2.0), (2, 20, 2, math.pi)),
        *((3, 1, 50, 1.5), (3, 2, 2, 3.0), (3, 0.5, 3, 2.0)),
    ],
)
def test_divergence_of_power_sphericals_in_low_dimension(dim, one, other, angle):
    """The cross entropy is singular within the range; on the sphere its mean over a latitude has a closed form."""
    with mp.workdps(20):
        k, j, cos = mp.mpf(one), mp.mpf(other), mp.cos(mp.mpf(angle))
        if dim == 2:
            norms = [mp.log(2 * mp.sqrt(mp.pi) * mp.gamma(x + mp.mpf(1) / 2) / mp.gamma(x + 1)) for x in (k, j)]
            at = sorted({-mp.pi, angle - mp.pi, mp.mpf(0), min(mp.mpf(angle), mp.pi), mp.pi})

            def integrand(x):
                own, its = (2 * mp.log(abs(mp.cos(y / 2))) for y in (x, x - angle))
                return mp.exp(k * own - norms[0]) * (k * own - norms[0] - j * its + norms[1])
        else:
            norms = [mp.log(4 * mp.pi / (x + 1)) for x in (k, j)]
            at = [-1, -cos, 1]

            def integrand(c):
                own, its = mp.log((1 + c) / 2), mp.log((1 + c * cos + abs(c + cos)) / 4)
                return 2 * mp.pi * mp.exp(k * own - norms[0]) * (k * own - norms[0] - j * its + norms[1])

        want = float(mp.quad(integrand, at))
    locs = torch.zeros(2, dim).double()
    locs[0, 0], locs[1, 0], locs[1, 1] = 1.0, math.cos(angle), math.sin(angle)
    p, q = PowerSpherical(locs[0], double(one)), PowerSpherical(locs[1], double(other))
    assert kl_divergence(p, q).item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("law", [PowerSpherical, SphericalCauchy, VonMisesFisher])
@pytest.mark.parametrize("dim", [2, 3, 64])
def test_the_slope_of_a_divergence_is_right_and_zero_where_both_laws_are_one(law, dim):
    y = uniform_directions(1, dim)[0]
    for x in (y, uniform_directions(1, dim)[0]):
        loc, concentration = x.clone().requires_grad_(), double(0.4).requires_grad_()

        def divergence(loc, concentration, y=y):
            p = law(loc / loc.norm(), concentration, validate_args=False)
            return kl_divergence(p, law(y, double(0.4)))

        slopes = torch.autograd.grad(divergence(loc, concentration), (loc, concentration))
        step = 1e-5 * uniform_directions(1, dim)[0]
        with torch.no_grad():
            along = divergence(loc + step, concentration) - divergence(loc - step, concentration)
            up = divergence(loc, concentration + 1e-5) - divergence(loc, concentration - 1e-5)
        assert (2 * slopes[0] @ step).item() == pytest.approx(along.item(), rel=1e-5, abs=1e-12)
        assert (2e-5 * slopes[1]).item() == pytest.approx(up.item(), rel=1e-5, abs=1e-12)
        if x is y:
            assert max(slope.abs().max() for slope in slopes) < 1e-7


def test_divergences_broadcast_and_ask_for_one_dimension():
    uniform, law = HypersphericalUniform(3).expand((4,)), PowerSpherical(torch.eye(3)[:1], 2.0)
    for p, q in ((uniform, law), (law, uniform), (uniform, uniform), (law, law.expand((4,)))):
        assert kl_divergence(p, q).shape == (4,)
    for p, q in ((HypersphericalUniform(5), law), (law, HypersphericalUniform(5)), (HypersphericalUniform(5), uniform)):
        with pytest.raises(ValueError, match="different event shapes"):
            kl_divergence(p, q)


def test_polar_products():
    direction, other = (PowerSpherical(uniform_directions(1, 5)[0], double(k)) for k in (9.0, 30.0))
    one = PolarProduct(direction, dist.Gamma(double(3.0), 1.0))
    two = PolarProduct(VonMisesFisher(other.loc, double(2.0)), dist.Gamma(double(2.0), 1.0))
    draws = one.sample((20_000,))
    assert ((draws.mean(0) - one.mean) / (one.variance / 20_000).sqrt()).abs().max() < 4
    near(draws.var(0), one.variance, 0.1)
    log_ratio = one.log_prob(draws) - two.log_prob(draws)
    assert abs(log_ratio.mean() - kl_divergence(one, two)) < 4 * log_ratio.std() / math.sqrt(20_000)
    assert PolarProduct.infer_shapes(direction=(3, 1, 5), radius=(2,)) == ((3, 2), (5,))


@pytest.mark.parametrize("df", [0.5, 5.0, 300.0, 1e6, math.inf])
def test_entropy_of_the_ambient_student_t(df):
    loc, scale = torch.randn(4).double(), torch.rand(4).double() + 0.2
    law = DiagonalStudentT(double(df), loc, scale)
    if df < 1e6:
        want = stats.multivariate_t(loc.numpy(), scale.square().diag().numpy(), df).entropy()
    else:
        want = dist.Normal(loc, scale).to_event(1).entropy().item()
    assert law.entropy().item() == pytest.approx(want, abs=1e-5 if df == 1e6 else 1e-9)
    near(law.mode, loc)


# loc, scale of three features, concentration 20 of sixteen: fits take a second
TRUTHS = [
    VonMisesFisher(torch.eye(16)[0], 20.0),
    PowerSpherical(torch.eye(16)[0], 20.0),
    SphericalCauchy(torch.eye(16)[0], 0.6),
    ProjectedStudentT(3.0, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.5])),
    DiagonalStudentT(3.0, torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 1.5])),
]


@pytest.mark.parametrize("truth", TRUTHS, ids=lambda x: type(x).__name__)
def test_fits_find_the_truth(truth):
    samples, df = truth.sample((1000,)), 3.0 if hasattr(truth, "df") else None
    moments, likely = (type(truth).fit(samples, method=method, df=df) for method in ("moments", "mle"))
    assert likely.loc.dtype == samples.dtype
    if df is None:
        near(moments.resultant_length, samples.mean(0).norm(), 1e-4)
        assert likely.concentration == pytest.approx(truth.concentration.item(), rel=0.1)
        assert truth.support.check(likely.loc)
    else:
        assert likely.df == 3.0
        ratio = likely.scale / truth.scale
        near(ratio / ratio.mean(), torch.ones(3), 0.15)
    mean = [law.log_prob(samples).mean() for law in (moments, likely, truth)]
    assert mean[1] >= mean[0] - 1e-6
    # Wilks: twice the gain over the truth is chi-squared with as many degrees of freedom as parameters.
    assert -1e-6 <= 1000 * (mean[1] - mean[2]) < stats.chi2.ppf(1 - 1e-6, 17) / 2


def test_degrees_of_freedom_are_fitted():
    law = ProjectedStudentT(2.0, torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.0]))
    assert 1 < ProjectedStudentT.fit(law.sample((1000,))).df < 4


def test_fits_name_what_is_wrong():
    with pytest.raises(ValueError, match="samples must be"):
        VonMisesFisher.fit(torch.ones(3))
    with pytest.raises(ValueError, match="method must be"):
        VonMisesFisher.fit(torch.eye(3), method="map")
    with pytest.raises(NotImplementedError, match="PolarStudentT has no fit"):
        PolarStudentT.fit(torch.randn(5, 3))
    unit, real = uniform_directions(50, 3), torch.randn(50, 3)
    for law, samples, df, message in (
        (VonMisesFisher, 10 * unit, None, "unit vectors"),
        (DiagonalStudentT, real * torch.inf, None, "must be finite"),
        (DiagonalStudentT, real, -3.0, "df -3.0 is no degrees of freedom"),
        (ProjectedStudentT, unit, 0.01, "df 0.01 is no degrees of freedom"),
        (PowerSpherical, unit, 3.0, "df 3.0 is no degrees of freedom of PowerSpherical"),
        (DiagonalStudentT, real * torch.tensor([1.0, 1.0, 0.0]), 3.0, "determine no DiagonalStudentT"),
        (PowerSpherical, unit[:1].expand(50, 3), None, "not all the same"),
    ):
        for method in ("moments", "mle"):
            with pytest.raises(ValueError, match=message):
                law.fit(samples, df=df, method=method)
    with pytest.raises(ValueError, match="HypersphericalUniform has no loc"):
        directional_pit(HypersphericalUniform(3), unit)


def test_whole_numbers_are_fitted_as_real_ones():
    whole = torch.randint(0, 5, (200, 3))
    one, other = (DiagonalStudentT.fit(samples, method="moments") for samples in (whole, whole.float()))
    assert one.scale.dtype == torch.float32
    near(one.scale, other.scale, 1e-6)


@pytest.mark.parametrize("dim", [2, 17, 128, 512])
@pytest.mark.parametrize(("family", "concentration"), SYMMETRIC)
def test_angles_of_draws_have_the_law_that_the_density_says(family, concentration, dim):
    law = family(uniform_directions(1, dim)[0], double(concentration))
    assert stats.kstest(directional_pit(law, law.sample((2000,))).numpy(), "uniform").pvalue > 1e-3
    near(law.angle_cdf(torch.stack([law.loc, -law.loc])), double([0.0, 1.0]))


@pytest.mark.parametrize("law", [TRUTHS[3], PolarStudentT(3.0, torch.ones(3), torch.rand(3) + 0.2)], ids=str)
def test_residuals_without_a_closed_law_are_ranked_among_draws(law):
    # All values are ranked among the same draws, whose own noise must be small beside that of the values.
    values = directional_pit(law, law.sample((1000,)), num_samples=20_000)
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    others = type(law)(3.0, -law.loc, law.scale).sample((1000,))
    assert stats.kstest(directional_pit(law, others).numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("dim", [17, 64, 512])
@pytest.mark.parametrize("df", [0.5, 5.0, math.inf])
def test_random_projections_of_draws_have_their_law_in_any_dimension(df, dim):
    """<u, a> for an axis a across loc: given the cosine t to loc it is sqrt(1 - t²) times that of a uniform law."""
    axis = torch.eye(dim, dtype=torch.float64)
    law = ProjectedStudentT(df, axis[0], torch.full((dim,), 0.2, dtype=torch.float64))
    draws = law.sample((3000,))
    across = draws[:, 1:] / draws[:, 1:].norm(dim=-1, keepdim=True)
    direction = torch.nn.functional.normalize(torch.randn(dim - 1, dtype=torch.float64), dim=0)
    beta = stats.beta((dim - 2) / 2, (dim - 2) / 2)
    assert stats.kstest((across @ direction).numpy(), lambda x: beta.cdf((x + 1) / 2)).pvalue > 1e-3
    # ... and with unequal scales, sign(<u, a>) = sign(<x, a>), of which the ambient law is known
    scale = torch.rand(dim, dtype=torch.float64) + 0.1
    a = torch.randn(dim, dtype=torch.float64)
    positive = (ProjectedStudentT(df, a, scale).sample((3000,)) @ a > 0).double().mean().item()
    ratio = (a @ a / (a * scale).norm()).item()
    share = stats.norm.cdf(ratio) if math.isinf(df) else stats.t.cdf(ratio, df)
    assert positive == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 3000) + 1e-3)
