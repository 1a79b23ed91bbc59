"""The posterior predictive of VJE by Pyro's own means: the default family can be drawn, and its residuals fit."""

import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from scipy import stats
from torch import nn

from pyro_vje import VJE
from pyro_vje.distributions import directional_pit
from pyro_vje.model.likelihoods import FAMILIES


def model(likelihood="polar-student-t"):
    return VJE(nn.Linear(6, 5), 5, hidden_dim=8, likelihood=likelihood).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_targets_can_be_predicted_and_unconditioned(name):
    vje, views = model(name), torch.randn(2, 7, 6)
    drawn = poutine.uncondition(vje.model)(views)
    assert drawn.shape == (2, 7, 5)
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, vje.encode_views(views).target)
    unconditioned = poutine.uncondition(vje.model)
    samples = Predictive(unconditioned, guide=vje.guide, num_samples=3, return_sites=["z", "target"])(views)
    assert samples["z"].shape == samples["target"].shape == (3, 2, 7, 5)
    assert samples["target"].isfinite().all()


def test_directional_residuals_of_predictions_are_uniform():
    vje, views = model(), torch.randn(2, 200, 6)
    with poutine.trace() as tracer:
        target = poutine.uncondition(vje.model)(views)
    likelihood = tracer.trace.nodes["target"]["fn"]
    values = directional_pit(likelihood, target, num_samples=200)
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
