"""Rotationally symmetric families against SciPy, mpmath, integrals over the sphere, and their own samples."""

import math

import mpmath as mp
import pytest
import torch
from oracles import angle_p_value, cosine_density, integrate, log_area, neighbor_p_value, uniform_directions
from scipy import stats

from pyro_vje.distributions import PowerSpherical, SphericalCauchy, VonMisesFisher

GOF_FAILURE_RATE = 1e-3
CASES = [
    *((PowerSpherical, k) for k in (0.0, 1.0, 20.0, 1e3)),
    *((SphericalCauchy, k) for k in (0.0, 0.3, 0.9)),
    *((VonMisesFisher, k) for k in (0.0, 0.5, 20.0, 1e3)),
]


@pytest.mark.parametrize("dim", [2, 3, 8, 64, 512, 2048])
@pytest.mark.parametrize("concentration", [1e-6, 0.1, 1.0, 10.0, 300.0, 1e4, 1e6])
def test_von_mises_fisher_normaliser_agrees_with_mpmath(dim, concentration):
    loc = uniform_directions(1, dim)[0]
    with mp.workdps(40):
        k, half = mp.mpf(concentration), mp.mpf(dim) / 2
        want = k - mp.log(mp.besseli(half - 1, k)) + (half - 1) * mp.log(k) - half * mp.log(2 * mp.pi)
        mean = mp.besseli(half, k) / mp.besseli(half - 1, k)
    vmf = VonMisesFisher(loc, torch.tensor(concentration, dtype=torch.float64))
    assert vmf.log_prob(loc).item() == pytest.approx(float(want), rel=1e-12, abs=1e-10)
    assert (vmf.mean @ loc).item() == pytest.approx(float(mean), rel=1e-9)


@pytest.mark.parametrize("dim", [2, 3, 10])
def test_von_mises_fisher_agrees_with_scipy(dim):
    loc, value = uniform_directions(1, dim)[0], uniform_directions(20, dim)
    got = VonMisesFisher(loc, torch.tensor(4.0).double()).log_prob(value)
    want = torch.from_numpy(stats.vonmises_fisher(loc.numpy(), 4.0).logpdf(value.numpy()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.95])
def test_spherical_cauchy_on_the_circle_is_wrapped_cauchy(rho):
    angle = torch.linspace(0, 6.28, 50, dtype=torch.float64)
    value = torch.stack([angle.cos(), angle.sin()], -1)
    got = SphericalCauchy(torch.tensor([1.0, 0.0]).double(), torch.tensor(rho).double()).log_prob(value)
    want = (1 - rho**2) / (2 * math.pi * (1 + rho**2 - 2 * rho * angle.cos()))
    torch.testing.assert_close(got, want.log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [PowerSpherical, SphericalCauchy, VonMisesFisher])
@pytest.mark.parametrize("dim", [2, 3, 512, 2048])
def test_is_uniform_at_concentration_zero(family, dim):
    value = uniform_directions(5, dim)
    got = family(uniform_directions(1, dim)[0], 0.0).log_prob(value)
    torch.testing.assert_close(got, torch.full_like(got, -log_area(dim)), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("family", "concentration"), CASES)
@pytest.mark.parametrize(("dim", "count"), [(2, 4000), (3, 150)])
def test_integrates_to_one_in_low_dimension(family, concentration, dim, count):
    distribution = family(uniform_directions(1, dim)[0], torch.tensor(concentration).double())
    assert integrate(distribution.log_prob, dim, count) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(
    ("family", "concentration"),
    [
        *((PowerSpherical, k) for k in (50.0, 1e5)),
        *((SphericalCauchy, k) for k in (0.2, 0.9)),
        *((VonMisesFisher, k) for k in (50.0, 1e5)),
    ],
)
@pytest.mark.parametrize("dim", [512])
def test_integrates_to_one_and_samples_fit_in_high_dimension(family, concentration, dim):
    axis = torch.eye(dim, dtype=torch.float64)[0]
    distribution = family(axis, torch.tensor(concentration, dtype=torch.float64))
    angle, density = cosine_density(distribution.log_prob, axis, count=8001)
    assert torch.trapezoid(density, angle).item() == pytest.approx(1, abs=1e-6)
    assert angle_p_value(distribution, axis, distribution.sample((2000,))) > GOF_FAILURE_RATE


@pytest.mark.parametrize(("family", "concentration"), CASES)
@pytest.mark.parametrize("dim", [2, 4])
def test_samples_fit_log_prob(family, concentration, dim):
    distribution = family(uniform_directions(1, dim)[0], torch.tensor(concentration).double())
    assert distribution.support.check(distribution.sample((100,))).all()
    assert neighbor_p_value(distribution, dim - 1) > GOF_FAILURE_RATE


@pytest.mark.parametrize("family", [PowerSpherical, VonMisesFisher])
@pytest.mark.parametrize("concentration", [0.0, 2.0, 100.0])
def test_mean_is_that_of_samples(family, concentration):
    distribution = family(uniform_directions(1, 5)[0], torch.tensor(concentration).double())
    samples = distribution.sample((20_000,))
    z = (samples.mean(0) - distribution.mean) / (samples.std(0) / math.sqrt(20_000))
    assert z.abs().max() < 4


@pytest.mark.parametrize(
    ("family", "low", "high"), [(PowerSpherical, 0.1, 50), (SphericalCauchy, 0.05, 0.95), (VonMisesFisher, 0.1, 50)]
)
def test_gradcheck(family, low, high):
    loc = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    concentration = torch.linspace(low, high, 4, dtype=torch.float64, requires_grad=True)
    value = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def log_prob(loc, concentration, value):
        loc, value = (torch.nn.functional.normalize(x, dim=-1) for x in (loc, value))
        return family(loc, concentration).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (loc, concentration, value))


@pytest.mark.parametrize(("family", "concentration"), [(PowerSpherical, 3.0), (SphericalCauchy, 0.5)])
def test_rsample_gradients_are_those_of_the_expectation(family, concentration):
    loc = torch.tensor([0.6, 0.8], dtype=torch.float64)
    parameter = torch.tensor(concentration, dtype=torch.float64, requires_grad=True)
    angle = torch.arange(4000, dtype=torch.float64) * (2 * math.pi / 4000)
    nodes = torch.stack([angle.cos(), angle.sin()], -1)
    expectation = (family(loc, parameter).log_prob(nodes).exp() * nodes[:, 0]).sum() * (2 * math.pi / 4000)
    (want,) = torch.autograd.grad(expectation, parameter)
    draws = torch.full((100_000,), concentration, dtype=torch.float64, requires_grad=True)
    (pathwise,) = torch.autograd.grad(family(loc, draws).rsample()[:, 0].sum(), draws)
    assert abs(pathwise.mean() - want) < 4 * pathwise.std() / math.sqrt(100_000)


def test_von_mises_fisher_says_that_it_is_not_reparameterised():
    vmf = VonMisesFisher(torch.eye(3)[0], 2.0)
    assert not vmf.has_rsample
    with pytest.raises(NotImplementedError):
        vmf.rsample()


@pytest.mark.parametrize("family", [PowerSpherical, VonMisesFisher])
@pytest.mark.parametrize("dim", [3, 512])
def test_float32_is_accurate_at_high_concentration(family, dim):
    # <loc, x> rounds to 1 in float32 at this distance, which would lose 0.06 * concentration = 6e3 nats' worth.
    loc = uniform_directions(1, dim)[0].float()
    value = torch.nn.functional.normalize(loc + 1e-3 * torch.randn(20, dim) / math.sqrt(dim), dim=-1)
    got = family(loc, 1e6).log_prob(value)
    want = family(loc.double(), 1e6, validate_args=False).log_prob(value.double())
    gap = (value.double() - loc.double()).norm(dim=-1)
    # The error allowed: one rounding of each coordinate, 1e6 times the half squared distance.
    allowed = 1e6 * gap * torch.finfo(torch.float32).eps + 1e-6 * want.abs()
    assert ((got - want).abs() <= allowed).all()


@pytest.mark.parametrize("family", [PowerSpherical, SphericalCauchy, VonMisesFisher])
def test_opposite_point_is_finite(family):
    loc = uniform_directions(1, 4)[0].requires_grad_()
    concentration = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    log_prob = family(loc, concentration).log_prob(-loc.detach())
    assert log_prob.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(log_prob, (loc, concentration)))
