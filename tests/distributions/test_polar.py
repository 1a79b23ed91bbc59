"""PolarStudentT against Pyro's and SciPy's densities, its factors' masses, and its own samples."""

import math
from itertools import pairwise

import mpmath as mp
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from oracles import angle_p_value, integrate, log_area, neighbor_p_value, uniform_directions
from scipy import integrate as scipy_integrate
from scipy import stats

from pyro_vje.distributions import PolarStudentT, ProjectedStudentT, SphericalCauchy, student_t

FACTORS = [(d, r) for d in ("restricted", "projected") for r in ("student-t", "log-student-t", None)]
GOF_FAILURE_RATE = 1e-3


def parameters(dim, batch=(), dtype=torch.float64):
    return torch.randn(*batch, dim, dtype=dtype), torch.rand(*batch, dim, dtype=dtype) + 0.2


@pytest.mark.parametrize("df", [0.5, 5.0, 200.0])
def test_default_is_the_papers_density(df):
    loc, scale = parameters(6, (4,))
    value, unit_radius = 3 * torch.randn(4, 6).double(), math.sqrt(6)
    r, loc_norm = value.norm(dim=-1), loc.norm(dim=-1)
    u, m = value / r[:, None], loc / loc_norm[:, None]
    direction = dist.MultivariateStudentT(df, m, torch.diag_embed(scale / unit_radius)).log_prob(u)
    radius = dist.StudentT(df, loc_norm, (m * scale).norm(dim=-1)).log_prob(r)
    polar = PolarStudentT(df, loc, scale, unit_radius=unit_radius)
    torch.testing.assert_close(polar.log_prob_direction(value), direction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(polar.log_prob_radius(r), radius, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(polar.log_prob(value), direction + radius - 5 * r.log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("df", [math.inf, torch.tensor(math.inf), torch.full((4,), math.inf)], ids=str)
def test_infinite_df_is_gaussian(df, dtype):
    loc, scale = parameters(6, (4,), dtype)
    value = torch.randn(4, 6, dtype=dtype)
    r, loc_norm = value.norm(dim=-1), loc.norm(dim=-1)
    u, m = value / r[:, None], loc / loc_norm[:, None]
    polar = PolarStudentT(df, loc, scale)
    want = dist.Normal(m, scale).to_event(1).log_prob(u)
    torch.testing.assert_close(polar.log_prob_direction(value), want, rtol=2e-6, atol=2e-6)
    want = dist.Normal(loc_norm, (m * scale).norm(dim=-1)).log_prob(r)
    torch.testing.assert_close(polar.log_prob_radius(r), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("direction", "radius"), FACTORS)
def test_log_prob_is_the_sum_of_its_factors(direction, radius):
    loc, scale = parameters(5, (3,))
    value = torch.randn(7, 3, 5).double()
    polar = PolarStudentT(3.0, loc, scale, direction=direction, radius=radius, unit_radius=2.0)
    r = value.norm(dim=-1)
    total = polar.log_prob_direction(value) + polar.log_prob_radius(r) - 4 * r.log()
    torch.testing.assert_close(polar.log_prob(value), total, rtol=1e-12, atol=1e-12)
    if radius is None:
        assert (polar.log_prob_radius(r) == 0).all()


def test_radius_scale_of_each_batch_element_expands():
    loc, scale = parameters(5, (3,))
    radius_scale = torch.tensor([0.1, 1.0, 10.0]).double()
    polar = PolarStudentT(3.0, loc, scale, radius_scale=radius_scale)
    value = torch.randn(2, 3, 5).double()
    torch.testing.assert_close(polar.expand((2, 3)).log_prob(value), polar.log_prob(value))
    assert torch.equal(polar.expand((2, 3)).radius_scale[1], radius_scale)
    shapes = {"df": (), "loc": (3, 5), "scale": (5,), "radius_scale": (2, 1)}
    assert PolarStudentT.infer_shapes(**shapes) == ((2, 3), (5,))


def test_projected_direction_is_the_projected_student_t_in_units_of_the_radius():
    loc, scale = parameters(5)
    value = uniform_directions(10, 5)
    polar = PolarStudentT(3.0, loc, scale, direction="projected", unit_radius=2.0)
    want = ProjectedStudentT(3.0, loc / loc.norm(), scale / 2.0).log_prob(value)
    torch.testing.assert_close(polar.log_prob_direction(4 * value), want)


@pytest.mark.parametrize(("df", "radius_scale"), [(0.5, None), (5.0, 0.7), (math.inf, None)])
def test_projected_with_log_radius_integrates_to_one_over_the_plane(df, radius_scale):
    loc, scale = torch.tensor([0.9, -0.4]).double(), torch.tensor([0.6, 1.2]).double()
    polar = PolarStudentT(df, loc, scale, radius_scale=radius_scale, direction="projected", radius="log-student-t")
    assert polar.is_normalized
    # A polar grid whose log radii reach out to 350, beyond which lies the tail's known mass.
    x = torch.linspace(-math.asinh(350), math.asinh(350), 601, dtype=torch.float64)
    log_r, step = x.sinh(), 2 * math.asinh(350) / 600

    def over_radius(u):
        log_prob = polar.log_prob(log_r.exp()[:, None, None] * u)
        return (log_prob + 2 * log_r[:, None] + x.cosh().log()[:, None]).logsumexp(0) + math.log(step)

    tail = 2 * stats.t.sf(350 / float(polar.radius_scale / loc.norm()), df)
    assert integrate(over_radius, 2, 60) == pytest.approx(1 - tail, abs=1e-3 if df < 1 else 1e-6)


@pytest.mark.parametrize("df", [0.5, 3.0, math.inf])
def test_each_radial_factor_has_the_mass_that_it_claims(df):
    loc, scale = parameters(4)
    for radius in ("student-t", "log-student-t"):
        polar = PolarStudentT(df, loc, scale, radius=radius)
        location, width = float(loc.norm()), float(polar.radius_scale)

        def density(x, polar=polar, location=location):
            r = torch.tensor(location * math.exp(x), dtype=torch.float64)
            return float(polar.log_prob_radius(r).exp() * r)

        edges = [-300, -30, -3, 0, 3, 30, 300]
        mass = sum(scipy_integrate.quad(density, a, b, limit=200)[0] for a, b in pairwise(edges))
        cut = 2 * stats.t.sf(300 * location / width, df)
        # The untruncated Student-t loses what lies below zero.
        want = stats.t.cdf(location / width, df) if radius == "student-t" else 1 - cut
        assert mass == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(("dim", "masses"), [(512, (-130.96, -37.56, -7.90, 1.33)), (64, (-12.82, -1.69, 1.93, 3.54))])
def test_restricted_mass_of_the_papers_setting(dim, masses):
    for variance, mass in zip((0.1, 0.01, 1e-3, 1e-4), masses, strict=True):
        polar = PolarStudentT(3.0, torch.ones(dim), torch.full((dim,), math.sqrt(variance)))
        assert polar.direction_factor.log_mass.item() == pytest.approx(mass, abs=0.006)


@pytest.mark.parametrize("dim", [2, 3, 64, 2048])
@pytest.mark.parametrize("df", [0.5, 1000.0])
@pytest.mark.parametrize("scale", [0.03, 0.3, 3.0])
def test_restricted_mass_agrees_with_2f1(dim, df, scale):
    with mp.workdps(40):
        v, nu = mp.mpf(scale) ** 2, mp.mpf(df)
        n, half = (nu + dim) / 2, mp.mpf(dim) / 2
        want = mp.log(mp.hyp2f1(n / 2, (n + 1) / 2, half, (2 / (nu * v + 2)) ** 2)) - n * mp.log(1 + 2 / (nu * v))
        want += mp.log(2) - mp.loggamma(half) + mp.loggamma(n) - mp.loggamma(nu / 2) - half * mp.log(nu * v)
    polar = PolarStudentT(df, torch.ones(dim, dtype=torch.float64), torch.full((dim,), 2 * scale), unit_radius=2.0)
    rounding = 1e-6 * dim  # of the float32 scale, log Σ
    assert polar.direction_factor.log_mass.item() == pytest.approx(float(want), rel=1e-6, abs=rounding)
    exact = PolarStudentT(df, torch.ones(dim).double(), torch.full((dim,), scale, dtype=torch.float64))
    assert exact.direction_factor.log_mass.item() == pytest.approx(float(want), rel=1e-10, abs=1e-8)


@pytest.mark.parametrize(("dim", "count"), [(2, 20000), (3, 200)])
def test_restricted_mass_is_the_integral(dim, count):
    polar = PolarStudentT(3.0, torch.randn(dim).double(), torch.full((dim,), 0.4).double())
    mass = integrate(polar.log_prob_direction, dim, count)
    assert polar.direction_factor.log_mass.item() == pytest.approx(math.log(mass), abs=1e-9)


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_restricted_over_its_mass_is_the_spherical_cauchy(dim):
    # At df = D - 2 (arXiv 1510.07679): 1 + q/df = (1 + ρ² - 2ρt) / ρ c for a ρ in (0, 1).
    loc, scale = uniform_directions(1, dim)[0], 0.3
    value = uniform_directions(10, dim)
    polar = PolarStudentT(dim - 2.0, loc, torch.full((dim,), scale).double())
    slope = 2 / ((dim - 2) * scale**2)
    ratio = slope / (1 + slope)  # = 2ρ / (1 + ρ²)
    rho = (1 - math.sqrt(1 - ratio**2)) / ratio
    want = SphericalCauchy(loc, torch.tensor(rho, dtype=torch.float64)).log_prob(value)
    got = polar.log_prob_direction(value) - polar.direction_factor.log_mass
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # float32 rounding of scale


def test_mass_of_unequal_scales_names_the_way_out():
    loc, scale = parameters(4)
    with pytest.raises(ValueError, match="ProjectedStudentT"):
        _ = PolarStudentT(3.0, loc, scale).direction_factor.log_mass


@pytest.mark.parametrize("df", [2.0, math.inf])
@pytest.mark.parametrize("dim", [2, 3])
def test_samples_fit_log_prob(dim, df):
    loc, scale = torch.tensor([1.0, -0.5, 2.0])[:dim].double(), torch.tensor([0.3, 0.6, 0.4])[:dim].double()
    polar = PolarStudentT(df, loc, scale, direction="projected", radius="log-student-t")
    assert polar.has_rsample
    assert neighbor_p_value(polar, dim) > GOF_FAILURE_RATE


@pytest.mark.parametrize("df", [0.7, 5.0])
def test_student_t_radius_is_sampled_above_zero(df):
    loc, scale = torch.tensor([0.3, 0.4]).double(), torch.tensor([0.6, 0.6]).double()
    polar = PolarStudentT(df, loc, scale, direction="projected")
    r = polar.sample((20_000,)).norm(dim=-1)
    below = stats.t.cdf(-0.5 / 0.6, df)
    result = stats.kstest(r.numpy(), lambda x: (stats.t.cdf((x - 0.5) / 0.6, df) - below) / (1 - below))
    assert result.pvalue > GOF_FAILURE_RATE


def test_log_radius_and_direction_of_samples_in_high_dimension():
    dim = 512
    polar = PolarStudentT(
        4.0, torch.full((dim,), 0.5), torch.full((dim,), 0.1), direction="projected", radius="log-student-t"
    )
    samples = polar.rsample((4000,)).double()
    z = (samples.norm(dim=-1).log() - math.log(0.5 * math.sqrt(dim))) / (0.1 / (0.5 * math.sqrt(dim)))
    assert stats.kstest(z.numpy(), stats.t(4.0).cdf).pvalue > GOF_FAILURE_RATE
    assert stats.spearmanr(z, samples.sum(-1) / samples.norm(dim=-1)).pvalue > GOF_FAILURE_RATE


def test_heaviest_log_radius_stays_finite():
    polar = PolarStudentT(0.1, torch.ones(3), torch.ones(3), direction="projected", radius="log-student-t")
    samples = polar.rsample((5000,))
    assert samples.isfinite().all()
    assert polar.log_prob(samples).isfinite().all()


@pytest.mark.parametrize(("direction", "radius"), [factors for factors in FACTORS if factors != FACTORS[4]])
def test_rsample_that_does_not_exist_names_the_way_out(direction, radius):
    polar = PolarStudentT(3.0, torch.ones(3), torch.ones(3), direction=direction, radius=radius)
    assert not polar.is_normalized
    assert not polar.has_rsample
    with pytest.raises(NotImplementedError, match="direction='projected'"):
        polar.rsample()
    if radius is None:
        with pytest.raises(NotImplementedError, match="radius=None is improper"):
            polar.sample()


class Normalised:
    """The restricted factor over its mass, as an oracle takes a law."""

    def __init__(self, polar):
        self.polar = polar

    def log_prob(self, value):
        return self.polar.log_prob_direction(value) - self.polar.direction_factor.log_mass

    def sample(self, shape):
        return torch.nn.functional.normalize(self.polar.sample(shape), dim=-1)


@pytest.mark.parametrize(
    ("dim", "df", "scale"),
    [(dim, df, scale) for dim in (2, 17) for df in (0.5, 15.0, math.inf) for scale in (0.05, 5.0)]
    + [(128, 126.0, 0.09), (128, 0.5, 0.5), (512, 510.0, 0.2)],
)
def test_restricted_directions_are_drawn_from_their_density(dim, df, scale):
    loc = uniform_directions(1, dim)[0]
    law = Normalised(PolarStudentT(df, loc, torch.full((dim,), scale, dtype=torch.float64)))
    assert angle_p_value(law, loc, law.sample((1000,))) > GOF_FAILURE_RATE


@pytest.mark.parametrize("df", [1.0, math.inf])
def test_restricted_directions_with_unequal_scales_are_drawn_from_their_density(df):
    polar = PolarStudentT(df, torch.tensor([1.0, -0.5, 2.0]).double(), torch.tensor([0.3, 1.5, 0.4]).double())
    mass = integrate(polar.log_prob_direction, 3, 100)
    law = Normalised(polar)
    law.log_prob = lambda value: polar.log_prob_direction(value) - math.log(mass)
    assert neighbor_p_value(law, 2) > GOF_FAILURE_RATE


@pytest.mark.parametrize(("dim", "least"), [(2, 0.2), (16, 0.05), (128, 0.01), (1024, 0.002)])
def test_acceptance_of_restricted_draws_is_as_stated(dim, least, monkeypatch):
    rates = []

    def once(propose):
        value, accepted = propose()
        rates.append(accepted.double().mean().item())
        return value

    monkeypatch.setattr(student_t.numerics, "first_accepted", once)
    for scale in (1e-3, dim**-0.5, 3.0):
        for df in (0.5, max(1.0, dim - 2.0), math.inf):
            scales = scale * (0.5 * torch.randn(dim, dtype=torch.float64)).exp()
            student_t.RestrictedStudentT(df, uniform_directions(1, dim)[0], scales).sample(
                (2000 if dim < 1000 else 500,)
            )
    assert len(rates) == 9
    assert min(rates) > least


def test_restricted_draws_keep_batch_and_radius_and_take_a_zero_location():
    loc = torch.stack([torch.zeros(4), torch.ones(4)])
    polar = PolarStudentT(3.0, loc, torch.rand(4) + 0.2, radius="log-student-t")
    samples = polar.sample((500, 3)[:1])
    assert samples.shape == (500, 2, 4)
    assert samples.isfinite().all()
    r = polar.expand((500, 2)).sample()[:, 1].norm(dim=-1).double()
    z = (r.log() - math.log(2)) / (polar.radius_scale[1].item() / 2)
    assert stats.kstest(z.numpy(), stats.t(3.0).cdf).pvalue > GOF_FAILURE_RATE


def test_projected_factor_refuses_df_that_its_integral_cannot_take():
    with pytest.raises(ValueError, match="df"):
        PolarStudentT(0.05, torch.ones(3), torch.ones(3), direction="projected")
    PolarStudentT(0.05, torch.ones(3), torch.ones(3))


@pytest.mark.parametrize(("direction", "radius"), FACTORS)
def test_gradcheck(direction, radius):
    loc, scale = (x.requires_grad_() for x in parameters(4, (2,)))
    df = torch.tensor([0.6, 9.0], dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def log_prob(df, loc, scale, value):
        return PolarStudentT(df, loc, scale, direction=direction, radius=radius, unit_radius=2.0).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (df, loc, scale, value))


@pytest.mark.parametrize(("direction", "radius"), FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_and_extreme_scales_stay_finite(direction, radius, dtype):
    zero, one = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    for loc, value, width in [
        (zero, one, 1.0),
        (one, zero, 1.0),
        (one, one, 1e-6),
        (one, -one, 1e6),
        (one, 1e-9 * one, 1.0),
    ]:
        arguments = [x.clone().requires_grad_() for x in (loc, width * one, value)]
        log_prob = PolarStudentT(3.0, *arguments[:2], direction=direction, radius=radius).log_prob(arguments[2])
        grads = torch.autograd.grad(log_prob, arguments)
        assert log_prob.isfinite()
        assert not any(grad.isnan().any() for grad in grads), (loc, value, width, grads)


@pytest.mark.parametrize(("direction", "radius"), FACTORS)
def test_float32_agrees_with_float64_at_512_features(direction, radius):
    loc, scale = torch.randn(20, 512), torch.rand(20, 512) + 0.5
    value = loc + scale * torch.randn(20, 512)
    polar = PolarStudentT(5.0, loc, scale, direction=direction, radius=radius, unit_radius=math.sqrt(512))
    exact = PolarStudentT(
        5.0, loc.double(), scale.double(), direction=direction, radius=radius, unit_radius=math.sqrt(512)
    )
    got, want = polar.log_prob(value), exact.log_prob(value.double())
    assert got.dtype == torch.float32
    # Terms are of size (D-1) log r = 1600: a few ulps of that.
    assert (got - want).abs().max() < 10 * 1600 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_upcast(dtype):
    loc, scale = (x.to(dtype) for x in parameters(512))
    value = torch.randn(512).to(dtype)
    got = PolarStudentT(5.0, loc, scale).log_prob(value)
    assert got.dtype == torch.float32
    assert got == PolarStudentT(5.0, loc.float(), scale.float()).log_prob(value.float())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"direction": "folded"}, "direction must be"),
        ({"radius": "gamma"}, "radius must be"),
        ({"unit_radius": 0.0}, "unit_radius must be"),
        ({"unit_radius": math.nan}, "unit_radius must be"),
        ({"radius_scale": torch.tensor(-1.0)}, "radius_scale"),
    ],
)
def test_wrong_arguments_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        PolarStudentT(3.0, torch.ones(3), torch.ones(3), **keywords)


def test_restricted_density_exceeds_one_in_mass_at_small_scales():
    # Why likelihoods of different scales are not comparable through the restricted factor.
    masses = [
        PolarStudentT(3.0, torch.ones(512), torch.full((512,), s)).direction_factor.log_mass.item() for s in (1.0, 0.01)
    ]
    assert masses[0] < -100
    assert masses[1] > 1
    assert np.isfinite(masses).all()
    assert log_area(512) < 0
