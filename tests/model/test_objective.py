"""The symmetric ELBO against Pyro's own Trace_ELBO, SVI, and the formula written out by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import nn

from pyro_vje import VJE, SymmetricELBO
from pyro_vje.model.vje import stack_views

FEATURES, DIM, BATCH = 12, 6, 5


class CountingEncoder(nn.Module):
    """A linear encoder of feature vectors that counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, DIM)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.linear(x)


def make_vje(dtype=torch.float64, **settings):
    torch.manual_seed(1)
    return VJE(CountingEncoder(), DIM, **{"hidden_dim": 16, **settings}).to(dtype)


def make_views(dtype=torch.float64, seed=2):
    return torch.randn(2, BATCH, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class RecordGradients(torch.optim.SGD):
    """An optimiser that keeps each parameter's gradient instead of moving it."""

    seen: dict = {}  # noqa: RUF012 (PyroOptim makes one optimiser a parameter; they share this)

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.seen[id(parameter)] = parameter.grad.clone()


def hand_written_loss(vje, views, z, *, df, unit_radius, kl_weight):
    """½[ELBO(1→2) + ELBO(2→1)] in plain torch for latents z (2, B, D); see DESIGN of the polar density."""
    e = [vje.projector(vje.encoder(torch.cat(list(views))))[i * BATCH : (i + 1) * BATCH] for i in (0, 1)]
    loc, scale = vje.posterior_network(torch.cat(e))
    loc, scale = loc.view(2, BATCH, DIM), scale.view(2, BATCH, DIM)
    total = 0.0
    for i, target in ((0, e[1].detach()), (1, e[0].detach())):
        log_q = dist.Normal(loc[i], scale[i]).log_prob(z[i]).sum(-1)
        log_p = dist.Normal(0.0, 1.0).log_prob(z[i]).sum(-1)
        radius = target.norm(dim=-1)
        norm = z[i].norm(dim=-1)
        u, m = target / radius[:, None], z[i] / norm[:, None]
        v = (scale[i] / unit_radius) ** 2
        n = (df + DIM) / 2
        direction = (
            math.lgamma(n)
            - math.lgamma(df / 2)
            - DIM / 2 * math.log(df * math.pi)
            - 0.5 * v.log().sum(-1)
            - n * torch.log(1 + ((u - m) ** 2 / v).sum(-1) / df)
        )
        radial_scale = nn.functional.softplus(vje.raw_radius_scale) + 1e-3
        radial = torch.distributions.StudentT(df, norm, radial_scale).log_prob(radius)
        log_likelihood = direction + radial - (DIM - 1) * radius.log()
        total = total + (log_likelihood - kl_weight * (log_q - log_p)).sum()
    return -total / (2 * BATCH)


@pytest.mark.parametrize(("unit_radius", "value"), [("1", 1.0), ("sqrt-d", math.sqrt(DIM))])
@pytest.mark.parametrize("kl_weight", [1.0, 0.1])
def test_equals_the_hand_written_formula_and_its_gradients(unit_radius, value, kl_weight):
    vje, views = make_vje(df=3.0, unit_radius=unit_radius), make_views()
    traces = []
    objective = SymmetricELBO(kl_weight=kl_weight, monitor=lambda model, guide: traces.append(guide))
    loss = objective(vje.model, vje.guide)(views)
    noise = (
        (traces[0].nodes["z"]["value"] - traces[0].nodes["z"]["fn"].mean) / traces[0].nodes["z"]["fn"].stddev
    ).detach()
    gradients = torch.autograd.grad(loss, list(vje.parameters()))

    e = vje.projector(vje.encoder(torch.cat(list(views))))
    loc, scale = (x.view(2, BATCH, DIM) for x in vje.posterior_network(e))
    expected = hand_written_loss(vje, views, loc + scale * noise, df=3.0, unit_radius=value, kl_weight=kl_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(vje.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["polar-student-t", "normal"])
def test_torch_path_svi_and_trace_elbo_agree(likelihood):
    vje = make_vje(torch.float32, likelihood=likelihood)
    views = make_views(torch.float32)
    elbo = SymmetricELBO()

    torch.manual_seed(3)
    loss = elbo(vje.model, vje.guide)(views)
    gradients = torch.autograd.grad(loss, list(vje.parameters()))

    torch.manual_seed(3)
    reference = Trace_ELBO(max_plate_nesting=2).differentiable_loss(vje.model, vje.guide, views) / (2 * BATCH)
    torch.testing.assert_close(loss, reference)

    RecordGradients.seen = {}
    svi = SVI(vje.model, vje.guide, PyroOptim(RecordGradients, {"lr": 0.1}), elbo)
    torch.manual_seed(3)
    assert svi.step(views) == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(vje.parameters(), gradients, strict=True):
        torch.testing.assert_close(RecordGradients.seen[id(parameter)], gradient)


def test_svi_trains():
    vje = make_vje(torch.float32)
    svi = SVI(vje.model, vje.guide, pyro.optim.Adam({"lr": 1e-2}), SymmetricELBO())
    views = make_views(torch.float32)
    losses = [svi.step(views) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 1.0
    assert svi.evaluate_loss(views) < losses[0]


def test_exchanging_the_views_exchanges_the_directions(monkeypatch):
    vje, views = make_vje(), make_views()
    noise = torch.randn(2, BATCH, DIM, dtype=torch.float64)
    elbo = SymmetricELBO()(vje.model, vje.guide)
    losses = []
    for x, eps in ((views, noise), (views.flip(0), noise.flip(0))):
        monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *a, eps=eps, **k: eps)
        losses.append(elbo(x))
    torch.testing.assert_close(*losses)
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *a, **k: noise)
    assert abs(elbo(views.flip(0)) - losses[0]) > 1e-6  # the noise does matter


def test_particles_average_and_vectorise():
    vje, views = make_vje(), make_views()
    with torch.no_grad():
        one = torch.stack([SymmetricELBO()(vje.model, vje.guide)(views) for _ in range(400)])
        many = [
            SymmetricELBO(400, vectorize_particles=vectorise)(vje.model, vje.guide)(views)
            for vectorise in (False, True)
        ]
    error = one.std() / math.sqrt(400)
    for estimate in many:
        assert abs(estimate - one.mean()) < 5 * math.sqrt(2) * error


@pytest.mark.parametrize("particles", [1, 3])
def test_each_image_is_encoded_once(particles):
    vje, views = make_vje(), make_views()
    SymmetricELBO(particles)(vje.model, vje.guide)(views)
    assert vje.encoder.passes == 1
    SymmetricELBO(particles)(vje.model, vje.guide)(views)
    assert vje.encoder.passes == 2, "an encoding must not outlive the evaluation that made it"


@pytest.mark.parametrize("objective", [Trace_ELBO(), RenyiELBO(num_particles=1), SymmetricELBO(), None])
def test_raw_views_are_encoded_once_under_any_objective(objective):
    """Also batch norm counts once, and with dropout the likelihood has the guide's scale."""
    vje, views = make_vje(torch.float32, projector="mlp"), make_views(torch.float32)
    vje.encoder = nn.Sequential(vje.encoder, nn.Dropout(0.5))
    norm = next(module for module in vje.modules() if isinstance(module, nn.BatchNorm1d))
    if objective is None:
        guide_trace = poutine.trace(vje.guide).get_trace(views)
        replayed = poutine.trace(poutine.replay(vje.model, guide_trace)).get_trace(views)
        _, scale, target = guide_trace.nodes["z"]["infer"]["encoded"][1]
        assert replayed.nodes["target"]["value"] is target
        z = replayed.nodes["z"]["value"]
        torch.testing.assert_close(
            replayed.nodes["target"]["fn"].log_prob(target), vje.likelihood(z, scale).log_prob(target)
        )
    else:
        svi = SVI(vje.model, vje.guide, pyro.optim.Adam({"lr": 1e-2}), objective)
        assert math.isfinite(svi.step(views))
    assert (vje.encoder[0].passes, int(norm.num_batches_tracked)) == (1, 1)
    other = poutine.trace(vje.guide).get_trace(make_views(torch.float32, seed=7))
    replayed = poutine.trace(poutine.replay(vje.model, other)).get_trace(views)  # of other views: its own pass
    assert not torch.equal(replayed.nodes["target"]["value"], other.nodes["z"]["infer"]["encoded"][1].target)


def test_nothing_is_read_back_from_the_device(monkeypatch):
    vje, views = make_vje(), make_views()
    elbo = SymmetricELBO()(vje.model, vje.guide)
    calls = []
    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    with pyro.validation_enabled(False):
        elbo(views).backward()
    assert calls == []
    with pyro.validation_enabled(True):
        elbo(views)
    assert calls, "the spies must see what validation reads"


def test_elbo_module_owns_the_parameters():
    vje = make_vje()
    elbo = SymmetricELBO()(vje.model, vje.guide)
    assert set(elbo.parameters()) == set(vje.parameters())


def test_guide_without_rsample_is_refused():
    def model(views):
        with pyro.plate("direction", 2, dim=-2), pyro.plate("image", BATCH, dim=-1):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'z' is not reparameterised"):
        SymmetricELBO()(model, model)(make_views())


def test_second_model_in_the_parameter_store_is_refused():
    first, second = make_vje(torch.float32), make_vje(torch.float32)
    views = make_views(torch.float32)
    SVI(first.model, first.guide, pyro.optim.Adam({}), SymmetricELBO()).step(views)
    svi = SVI(second.model, second.guide, pyro.optim.Adam({}), SymmetricELBO())
    with pytest.raises(ValueError, match="clear_param_store"):
        svi.step(views)
    pyro.clear_param_store()
    assert math.isfinite(svi.step(views))


@pytest.mark.parametrize(
    "views", [torch.zeros(1, 4, 5), [torch.zeros(4, 5)], (torch.zeros(4, 5), torch.zeros(3, 5)), torch.zeros(2, 4)]
)
def test_views_of_a_wrong_shape_are_named(views):
    with pytest.raises(ValueError, match="views must"):
        stack_views(views)


def test_pair_of_views_equals_the_stacked_tensor():
    vje, views = make_vje(), make_views()
    elbo = SymmetricELBO()(vje.model, vje.guide)
    torch.manual_seed(5)
    stacked = elbo(views)
    torch.manual_seed(5)
    torch.testing.assert_close(elbo((views[0], views[1])), stacked)


def test_analytic_kl_is_the_mean_of_the_sampled_one():
    vje, views = make_vje(), make_views()
    pair = vje.encode_views(views)
    kl = 0.5 * (pair.scale**2 + pair.loc**2 - 1 - 2 * pair.scale.log()).sum(-1)

    def loss(**settings):
        torch.manual_seed(4)
        with torch.no_grad():
            return SymmetricELBO(vectorize_particles=True, **settings)(vje.model, vje.guide)(pair)

    likelihood = loss(kl_weight=0.0)
    torch.testing.assert_close(loss(analytic_kl=True) - likelihood, kl.mean())
    torch.testing.assert_close(loss(analytic_kl=True, kl_weight=0.3) - likelihood, 0.3 * kl.mean())
    sampled = loss(num_particles=20_000) - loss(num_particles=20_000, kl_weight=0.0)
    torch.testing.assert_close(sampled, kl.mean(), rtol=0.01, atol=0)


def test_the_kl_weight_is_the_objectives_alone():
    """Pyro's own ELBO of the model is the plain one, whatever the model is trained with."""
    vje, views = make_vje(), make_views()
    losses = []
    for weight in (0.03, 1.0):
        torch.manual_seed(3)
        losses.append(SymmetricELBO(kl_weight=weight)(vje.model, vje.guide)(views))
        torch.manual_seed(3)
        plain = Trace_ELBO(max_plate_nesting=2).differentiable_loss(vje.model, vje.guide, views) / (2 * BATCH)
    torch.testing.assert_close(losses[1], plain)
    assert losses[0] < plain - 0.1


def test_two_models_of_different_names_train_in_one_program():
    models = {name: make_vje(torch.float32, name=name) for name in ("a", "b")}

    def both(part):
        def program(views):
            for name, vje in models.items():
                with scope(prefix=name):
                    getattr(vje, part)(views)

        return program

    before = [p.clone() for vje in models.values() for p in vje.parameters()]
    svi = SVI(both("model"), both("guide"), pyro.optim.Adam({"lr": 1e-2}), SymmetricELBO())
    svi.step(make_views(torch.float32))
    after = [p for vje in models.values() for p in vje.parameters()]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))
    assert {key.partition("$$$")[0] for key in pyro.get_param_store().keys()} == {"a", "b"}  # noqa: SIM118
