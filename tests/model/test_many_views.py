"""More than two views: every pair is the model of two, two views are what they were, local ones are contexts only."""

import pyro
import torch
from torch import nn

from pyro_vje import VJE, SymmetricELBO


def make(**settings):
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
    return VJE(encoder, 6, hidden_dim=8, **settings).double()


def as_two_views(vje, views):
    """The symmetric objective of two views as it was written for two alone."""
    embeddings = vje.embed(views.flatten(0, 1))
    loc, scale = (x.unflatten(0, (2, -1)) for x in vje.posterior(embeddings))
    target = embeddings.unflatten(0, (2, -1)).detach().flip(0)
    z = pyro.distributions.Normal(loc, scale).to_event(1).rsample()
    prior = pyro.distributions.Normal(torch.zeros_like(loc), 1.0).to_event(1)
    kl = pyro.distributions.Normal(loc, scale).to_event(1).log_prob(z).sum() - prior.log_prob(z).sum()
    return (0.03 * kl - vje.likelihood(z, scale).log_prob(target).sum()) / (2 * views.shape[1])


def test_two_views_give_the_numbers_of_two_alone():
    views, losses, weights = torch.randn(2, 9, 3, 4, 4).double(), [], []
    for two_alone in (True, False):
        vje = make()
        elbo = SymmetricELBO(kl_weight=0.03)(vje.model, vje.guide)
        optimizer = torch.optim.SGD(vje.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(5)
        losses.append(as_two_views(vje, views) if two_alone else elbo(views))
        losses[-1].backward()
        optimizer.step()
        weights.append(vje.state_dict())
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-14)


def test_every_pair_is_the_model_of_its_two_views():
    vje, views = make().eval(), torch.randn(4, 9, 3, 4, 4).double()
    local = [torch.randn(9, 3, 2, 2).double() for _ in range(2)]
    found = vje.encode_views([*views, *local])
    embeddings = [vje.embed(view) for view in (*views, *local)]
    pairs = [(c, t) for c in range(6) for t in range(4) if c != t]
    assert found.loc.shape == (4 * 3 + 2 * 4, 9, 6)
    for row, (c, t) in enumerate(pairs):
        loc, scale = vje.posterior(embeddings[c])
        torch.testing.assert_close(tuple(x[row] for x in found), (loc, scale, embeddings[t]))
    assert not found.target.requires_grad
    trace = pyro.poutine.trace(vje.model).get_trace([*views, *local])
    assert [(frame.name, frame.size) for frame in trace.nodes["z"]["cond_indep_stack"]] == [
        ("direction", 20),
        ("image", 9),
    ]


def test_the_mean_of_the_others_is_one_target_of_each_context():
    vje, views = make(targets="mean").eval(), torch.randn(3, 9, 3, 4, 4).double()
    local = torch.randn(9, 3, 2, 2).double()
    loc, _, target = vje.encode_views([*views, local])
    e = [vje.embed(view) for view in views]
    assert loc.shape == (4, 9, 6)
    expected = [(e[1] + e[2]) / 2, (e[0] + e[2]) / 2, (e[0] + e[1]) / 2, sum(e) / 3]
    torch.testing.assert_close(target, torch.stack(expected))


def test_the_objective_is_the_mean_over_pairs():
    vje, views, found = make().eval(), torch.randn(3, 9, 3, 4, 4).double(), []
    objective = SymmetricELBO(monitor=lambda model, guide: found.append(guide.nodes["z"]["value"]))
    loss = objective(vje.model, vje.guide)(views)
    contexts, targets = zip(*((c, t) for c in range(3) for t in range(3) if c != t), strict=True)
    total = 0.0
    for z, c, t in zip(found[0], contexts, targets, strict=True):
        loc, scale = vje.posterior(vje.embed(views[c]))
        log_q = torch.distributions.Normal(loc, scale).log_prob(z).sum()
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        total += log_q - log_p - vje.likelihood(z, scale).log_prob(vje.embed(views[t])).sum()
    torch.testing.assert_close(loss, total / (6 * 9))
