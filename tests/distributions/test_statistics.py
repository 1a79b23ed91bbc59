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


@pytest.mark.parametrize("angle", [0.3, 2.0, math.pi])
def test_divergence_of_power_sphericals_on_the_circle(angle):
    with mp.workdps(20):
        norm = [mp.log(2 * mp.sqrt(mp.pi) * mp.gamma(k + mp.mpf(1) / 2) / mp.gamma(k + 1)) for k in (20, 2)]

        def integrand(x):
            p = 20 * mp.log(mp.cos(x / 2) ** 2) - norm[0]
            return mp.exp(p) * (p - 2 * mp.log(mp.cos((x - angle) / 2) ** 2) + norm[1])

        want = float(mp.quad(integrand, [-mp.pi, angle - mp.pi - 1e-9, angle - mp.pi + 1e-9, 0, 1, mp.pi]))
    locs = double([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
    p, q = PowerSpherical(locs[0], double(20.0)), PowerSpherical(locs[1], double(2.0))
    assert kl_divergence(p, q).item() == pytest.approx(want, abs=2e-3)


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
