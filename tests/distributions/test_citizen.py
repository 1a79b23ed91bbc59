"""What else Pyro and PyTorch ask of every distribution: interface, precision, reparameterisation, life without Pyro."""

import math
import pickle

import pyro
import pytest
import torch
from oracles import circle_nodes, uniform_directions
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from registry import FAMILIES, MEMBERS, build

from pyro_vje.distributions import (
    HypersphericalUniform,
    PowerSpherical,
    ProjectedStudentT,
    SphereReparam,
    SphericalCauchy,
    VonMisesFisher,
)


@pytest.fixture(params=MEMBERS)
def law(request):
    make, arguments, _ = build(request.param, (3, 1))
    return make(*arguments)


def test_interface(law):
    """Pyro's own list for its distributions, written anew."""
    sample = law.sample((2,))
    assert law.shape((2,)) == sample.shape == (2, 3, 1, 4)
    assert (law.event_dim, law.support.event_dim) == (1, 1)
    assert law.support.check(sample).shape == (2, 3, 1)
    assert law.log_prob(sample).shape == (2, 3, 1)
    assert law().shape == law.shape()
    assert law.expand_by((5,)).sample().shape == (5, 3, 1, 4)
    assert law.expand((5, 3, 2)).sample().shape == (5, 3, 2, 4)
    assert law.to_event(1).log_prob(sample).shape == (2, 3)
    assert (law.mask(False).log_prob(sample) == 0).all()
    again = pickle.loads(pickle.dumps(law))
    assert torch.equal(again.log_prob(sample), law.log_prob(sample))
    assert type(law).__name__ in repr(law)
    assert law.has_rsample in (True, False)
    assert not law.sample().requires_grad
    assert law.expand((0, 3, 1)).sample().shape == (0, 3, 1, 4)
    for value in (sample[..., :3], sample.new_zeros(7, 3, 2, 4)[..., :2]):
        with pytest.raises((ValueError, RuntimeError)):
            _validated(law).log_prob(value)
    for name in ("mean", "variance", "mode"):
        try:
            statistic = getattr(law, name)
        except (NotImplementedError, AttributeError):
            continue
        assert statistic.shape == (3, 1, 4)
    with pytest.raises((NotImplementedError, AttributeError)):
        law.enumerate_support()


def _validated(law):
    new = law.expand(law.batch_shape)
    new._validate_args = True
    return new


@pytest.mark.parametrize("name", MEMBERS)
def test_float32_values_under_float64_parameters_lose_nothing(name):
    make, arguments, value = build(name, (3,), 128)
    value = value.float()
    got = make(*arguments).log_prob(value)
    assert got.dtype == (torch.float32 if name == "HypersphericalUniform" else torch.float64)
    if name == "HypersphericalUniform":  # which has no parameters, but a precision of its draws
        return
    torch.testing.assert_close(got.double(), make(*arguments).log_prob(value.double()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", MEMBERS)
def test_reparameterisations_of_pyro_keep_the_law(name):
    """AutoReparam and LocScaleReparam decentre a location-scale family, and leave the others or raise."""
    make, arguments, _ = build(name, (), 3)

    def model():
        return pyro.sample("x", make(*arguments))

    with poutine.trace() as tracer:
        AutoReparam(centered=0.5)(model)()
    assert ("x_decentered" in tracer.trace.nodes) == (name == "DiagonalStudentT")
    decentred = poutine.reparam(model, {"x": LocScaleReparam(0.5)})
    if name == "DiagonalStudentT":
        draws = torch.stack([decentred() for _ in range(2000)])
        _, loc, scale = arguments
        median = draws.median(0).values
        assert ((median - loc) / scale).abs().max() < 0.15
    else:
        with pytest.raises(AttributeError, match=r"no location-scale family|has no attribute"):
            decentred()


KAPPA = 4.0


@pytest.mark.parametrize(
    ("family", "method", "most"),
    [
        *((family, "nuts", 0.15) for family in (ProjectedStudentT, HypersphericalUniform)),
        *((family, "svi", 0.35) for family in (ProjectedStudentT, SphericalCauchy)),
    ],
)
def test_latent_directions_have_their_known_posterior(family, method, most):
    """A prior on the circle, a von Mises-Fisher likelihood: the posterior mean by quadrature."""
    loc = torch.tensor([0.6, 0.8])
    prior = {
        ProjectedStudentT: lambda: ProjectedStudentT(3.0, 2 * loc, torch.tensor([1.0, 0.5])),
        HypersphericalUniform: lambda: HypersphericalUniform(2),
    }.get(family, lambda: family(loc, 0.7))()
    data = VonMisesFisher(torch.tensor([-1.0, 0.0]), KAPPA).sample((6,))

    @poutine.reparam(config={"u": SphereReparam()})
    def model():
        u = pyro.sample("u", prior)
        with pyro.plate("data", 6):
            pyro.sample("x", VonMisesFisher(u, KAPPA, validate_args=False), obs=data)
        return u

    points, _ = circle_nodes(2000)
    log_posterior = prior.log_prob(points.float()).double() + KAPPA * (points @ data.double().sum(0))
    want = (log_posterior.softmax(0)[:, None] * points).sum(0)
    if method == "svi":
        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
        for _ in range(100):
            svi.step()
        samples = torch.stack([poutine.condition(model, guide())() for _ in range(200)]).detach()
    else:
        mcmc = MCMC(NUTS(model, max_tree_depth=4), num_samples=120, warmup_steps=50, disable_progbar=True)
        mcmc.run()
        ambient = mcmc.get_samples()["u_ambient"]
        samples = torch.nn.functional.normalize(ambient, dim=-1)
    torch.testing.assert_close(samples.norm(dim=-1), torch.ones(len(samples)))
    angle = math.acos(float(torch.nn.functional.cosine_similarity(samples.mean(0), want.float(), dim=0)))
    assert angle < most
    assert samples.mean(0).norm().item() == pytest.approx(want.norm().item(), abs=0.1)


def test_sphere_reparam_draws_the_prior_and_refuses_observations():
    for prior in (
        PowerSpherical(uniform_directions(1, 5)[0].float(), 9.0).expand((3,)),
        VonMisesFisher(torch.eye(5)[:3], 3.0),
    ):
        with poutine.reparam(config={"u": SphereReparam()}), pyro.plate("n", 3), pyro.plate("m", 4000):
            u = pyro.sample("u", prior)
        z = (u.mean(0) - prior.mean) / (prior.variance / 4000).sqrt()
        assert z.abs().max() < 4
    with pytest.raises(NotImplementedError, match="observed"), poutine.reparam(config={"u": SphereReparam()}):
        pyro.sample("u", prior, obs=prior.sample())


def test_every_family_has_members():
    assert {type(make(*arguments)) for make, arguments, _ in map(build, MEMBERS)} == set(FAMILIES)
