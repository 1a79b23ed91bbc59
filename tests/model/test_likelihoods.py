"""Families: what each is, checked against scipy and by integrating the densities that claim to be normalised."""

import dataclasses
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.nn import functional

from pyro_vje import VJE, SymmetricELBO
from pyro_vje.distributions import PolarProduct, PowerSpherical, ProjectedStudentT
from pyro_vje.model.likelihoods import FAMILIES, LikelihoodSettings, get_family

D = 4
every_family = pytest.mark.parametrize("name", FAMILIES)


def draw(batch=(3,), dim=D, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(*batch, dim, generator=generator, dtype=dtype) * 2
    scale = torch.rand(*batch, dim, generator=generator, dtype=dtype) + 0.3
    value = torch.randn(*batch, dim, generator=generator, dtype=dtype) * 2
    return loc, scale, value


@every_family
def test_family_is_a_distribution_over_embeddings(name):
    loc, scale, value = draw((2, 3), dtype=torch.float32)
    loc.requires_grad_(), scale.requires_grad_()
    for df in (1.0, 5.0, math.inf):
        family = get_family(name)(loc, scale, LikelihoodSettings(df=df, unit_radius=2.0))
        assert (family.batch_shape, family.event_shape) == ((2, 3), (D,))
        log_prob = family.log_prob(value)
        assert log_prob.shape == (2, 3)
        for gradient in torch.autograd.grad(log_prob.sum(), (loc, scale)):
            assert torch.isfinite(gradient).all()
            assert (gradient != 0).any()
        assert family.expand((5, 2, 3)).log_prob(value).shape == (5, 2, 3)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.is_normalized])
@pytest.mark.parametrize("df", [3.0, math.inf])
def test_families_that_claim_it_integrate_to_one(name, df):
    """Importance sampling in D = 3 from a heavier-tailed proposal around the same location."""
    loc, scale, _ = draw((1,), dim=3)
    scale = 0.5 * scale
    family = get_family(name)(loc[0], scale[0], LikelihoodSettings(df=df, unit_radius=math.sqrt(3)))
    generator = np.random.default_rng(0)
    size = 200_000
    # half around the location, half around the origin, where the polar densities pile up
    centres = np.where(generator.random(size)[:, None] < 0.5, loc[0].numpy(), 0.0)
    spread = 0.8
    samples = centres + spread * scipy.stats.multivariate_t(np.zeros(3), np.eye(3), df=1, seed=generator).rvs(size)
    kernel = [
        scipy.stats.multivariate_t(c, spread**2 * np.eye(3), df=1).pdf(samples) for c in (loc[0].numpy(), np.zeros(3))
    ]
    weights = family.log_prob(torch.from_numpy(samples)).exp().numpy() / (0.5 * (kernel[0] + kernel[1]))
    error = weights.std() / math.sqrt(size)
    assert error < 0.03
    assert abs(weights.mean() - 1) < 5 * error


def test_gaussian_limit_of_each_student_t():
    loc, scale, value = draw()
    settings = LikelihoodSettings(df=math.inf, unit_radius=2.0)
    expected = scipy.stats.norm(loc, scale).logpdf(value).sum(-1)
    for name in ("student-t", "student-t-independent", "normal"):
        np.testing.assert_allclose(get_family(name)(loc, scale, settings).log_prob(value), expected, rtol=1e-9)
    limit = get_family("polar-student-t")(loc, scale, settings).log_prob(value)
    torch.testing.assert_close(
        get_family("polar-normal")(loc, scale, LikelihoodSettings(unit_radius=2.0)).log_prob(value), limit
    )


def test_ambient_families_against_scipy():
    loc, scale, value = draw()
    settings = LikelihoodSettings(df=3.0)
    np.testing.assert_allclose(
        get_family("student-t")(loc, scale, settings).log_prob(value),
        [
            scipy.stats.multivariate_t(m, np.diag(s**2), df=3).logpdf(v)
            for m, s, v in zip(loc.numpy(), scale.numpy(), value.numpy(), strict=True)
        ],
    )
    np.testing.assert_allclose(
        get_family("student-t-independent")(loc, scale, settings).log_prob(value),
        scipy.stats.t(3, loc, scale).logpdf(value).sum(-1),
    )
    np.testing.assert_allclose(
        get_family("laplace")(loc, scale, settings).log_prob(value),
        scipy.stats.laplace(loc, scale).logpdf(value).sum(-1),
    )


def test_isotropic_families_have_the_tangent_scale_they_are_asked_for():
    """For a small scale σ the direction deviates by σ in each tangent feature (median, as tails differ)."""
    dim, sigma = 64, 0.01
    loc = torch.zeros(dim, dtype=torch.float64)
    loc[0] = 3.0
    scale = torch.full((dim,), sigma, dtype=torch.float64)
    median = scipy.stats.norm.ppf(0.75)
    for name in ("power-spherical", "spherical-cauchy"):
        samples = get_family(name)(loc, scale, LikelihoodSettings(df=5.0)).sample((4000,))
        u = samples / samples.norm(dim=-1, keepdim=True)
        assert u[:, 1:].abs().median() / median == pytest.approx(sigma, rel=0.05), name


def test_polar_product_splits_its_density():
    direction = PowerSpherical(torch.eye(3)[0], torch.tensor(4.0))
    product = PolarProduct(direction, dist.Gamma(3.0, 1.0))
    value = torch.randn(10, 3)
    radius = value.norm(dim=-1)
    torch.testing.assert_close(
        product.log_prob(value), product.log_prob_direction(value) + product.log_prob_radius(radius) - 2 * radius.log()
    )
    assert product.has_rsample
    samples = product.sample((20_000,))
    assert samples.norm(dim=-1).mean() == pytest.approx(3.0, rel=0.03)
    torch.testing.assert_close(
        torch.nn.functional.normalize(samples, dim=-1).mean(0), direction.mean, rtol=0.05, atol=0.02
    )
    with pytest.raises(ValueError, match="event shapes"):
        PolarProduct(dist.Gamma(3.0, 1.0), dist.Gamma(3.0, 1.0))
    with pyro.plate("batch", 5):
        assert pyro.sample("t", product).shape == (5, 3)


def test_normalised_direction_learns_nothing_at_kl_weight_one():
    """A normalised isotropic direction with an isotropic prior has a uniform marginal: its ELBO is at most the
    uniform log-density, which an uninformative posterior attains, so no encoder can do better."""
    dim = 3
    uniform = -math.log(4 * math.pi)
    z = torch.randn(100_000, dim)
    u = torch.tensor([0.6, 0.0, 0.8])
    for sigma in (0.1, 0.5):
        scale = torch.full((dim,), sigma)
        family = get_family("polar-student-t-exact")(z, scale.expand_as(z), LikelihoodSettings(df=5.0))
        density = family.log_prob_direction(u).exp()
        error = density.std() / math.sqrt(len(z))
        assert abs(density.mean() - math.exp(uniform)) < 5 * error


def test_marginal_direction_under_scales_of_features_is_not_uniform():
    """It is the angular central Gaussian of 1 + v, which lies far above the uniform where v is large along u."""
    torch.manual_seed(0)

    def above_uniform(u, v):
        return -0.5 * (1 + v).log().sum() - 0.5 * len(u) * (u.square() / (1 + v)).sum().log()

    u = functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    v = 10 * 4 * u.square()
    z = torch.randn(200_000, 4, dtype=torch.float64)
    density = ProjectedStudentT(math.inf, z, v.sqrt().expand_as(z)).log_prob(u).exp()
    expected = above_uniform(u, v).exp() / (2 * math.pi**2)  # the area of the sphere in four dimensions
    assert abs(density.mean() - expected) < 5 * density.std() / math.sqrt(len(z))
    u = functional.normalize(torch.randn(128, dtype=torch.float64), dim=0)
    assert 20 < above_uniform(u, 128 * u.square()) < above_uniform(u, 1280 * u.square()) < 80


def test_look_up_errors_name_what_is_known(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown likelihood family 'cauchy'.*polar-student-t.*module:attribute"):
        get_family("cauchy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "family_for_test.py").write_text("number = 3\n")
    with pytest.raises(ValueError, match="no module 'nothing_here'"):
        get_family("nothing_here:family")
    with pytest.raises(ValueError, match="no attribute 'missing'"):
        get_family("family_for_test:missing")
    with pytest.raises(ValueError, match="must be a function"):
        get_family("family_for_test:number")


@every_family
def test_every_family_trains_a_step(name):
    vje = VJE(torch.nn.Linear(6, 6), 6, hidden_dim=8, likelihood=name)
    loss = SymmetricELBO()(vje.model, vje.guide)(torch.randn(2, 7, 6))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in vje.parameters())


@every_family
def test_families_use_what_they_say(name):
    loc, scale, value = draw()
    base = LikelihoodSettings(df=5.0, radius_scale=torch.tensor(1.0))
    changes = {"df": 3.0, "unit_radius": 2.0, "radius": "log-student-t", "radius_scale": torch.tensor(2.0)}
    assert changes.keys() == {field.name for field in dataclasses.fields(LikelihoodSettings)}
    family = get_family(name)
    before = family(loc, scale, base).log_prob(value)
    changed = {
        setting
        for setting, new in changes.items()
        if not torch.equal(family(loc, scale, dataclasses.replace(base, **{setting: new})).log_prob(value), before)
    }
    assert changed == set(family.uses)
