"""The controls: SimSiam and VI-SimSiam on VJE's own networks, and objectives of a user's own in general."""

import csv
import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# benchmarks/ is no installed package: it is run from the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import controls
from pyro_vje import VJE, ablate, evaluate, score, train
from pyro_vje.model.build import build_model

CONTROLS = ("simsiam", "vi_simsiam")


@pytest.fixture
def vje():
    return VJE(nn.Flatten(), 12, projector="linear", embedding_dim=3, hidden_dim=8).eval()


@pytest.fixture
def views():
    return torch.randn(2, 5, 3, 2, 2)


def both_directions(vje, views):
    """Predicted loc and scale from one view, embedding of the other, each (10, 3), one view at a time."""
    e1, e2 = (vje.embed(view) for view in views)
    posteriors = [vje.posterior(e) for e in (e1, e2)]
    return (torch.cat(part) for part in ([p[0] for p in posteriors], [p[1] for p in posteriors], [e2, e1]))


def test_simsiam_is_the_symmetric_negative_cosine(vje, views):
    loc, _, target = both_directions(vje, views)
    cosines = [
        sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))
        for a, b in zip(loc.double().detach().numpy(), target.double().detach().numpy(), strict=True)
    ]
    assert controls.simsiam(vje, views).item() == pytest.approx(3 * (1 - sum(cosines) / 10), rel=1e-5)


def test_vi_simsiam_is_the_power_spherical_density(vje, views):
    """Against the closed form at D = 3, where 1 + cos is uniform to a power: (κ + 1) (1 + t)^κ / (2π 2^(κ + 1))."""
    loc, scale, target = (x.double() for x in both_directions(vje, views))
    concentration = 2 * 3 / scale.square().mean(-1)  # of a tangent variance σ²/D at radius √D
    t = torch.cosine_similarity(loc, target, dim=-1)
    log_density = (
        (concentration + 1).log()
        + concentration * (1 + t).log()
        - math.log(2 * math.pi)
        - (concentration + 1) * math.log(2)
    )
    assert controls.vi_simsiam(vje, views).item() == pytest.approx(-log_density.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_are_symmetric_and_stop_the_targets_gradient(vje, views, name):
    objective = getattr(controls, name)
    assert objective(vje, views).item() == pytest.approx(objective(vje, views.flip(0)).item(), rel=1e-6)
    nn.init.zeros_(vje.posterior_network.loc.weight)  # a prediction that does not depend on its input
    nn.init.zeros_(vje.posterior_network.raw_scale.weight)
    objective(vje, views).backward()
    assert vje.projector[0].weight.grad.abs().max() == 0
    assert vje.posterior_network.loc.bias.grad.abs().max() > 0


@pytest.mark.parametrize("name", CONTROLS)
def test_control_trains_scores_and_evaluates_like_any_run(tiny_config, tmp_path, name):
    config = dataclasses.replace(tiny_config, objective=f"benchmarks.controls:{name}", epochs=10)
    folder = train(config, tmp_path / "run")
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert rows[-1]["kl"] == ""  # there is none
    assert evaluate(folder, k=5)["rows"][0]["knn"] > 0.4  # of three classes
    assert score(folder, score_likelihood="power-spherical").scored == 18


def test_objectives_are_an_axis_of_an_ablation(tiny_config, tmp_path):
    axes = {"objective": ("elbo", "benchmarks.controls:simsiam")}
    result = ablate(dataclasses.replace(tiny_config, epochs=1), axes, tmp_path / "ablation")
    assert [cell.status for cell in result.cells] == ["finished"] * 2
    assert "benchmarks.controls:simsiam" in result.table


def test_unusable_objective_is_known_before_anything_is_written(tiny_config, tmp_path):
    for name, message in (
        ("nothing", "unknown objective 'nothing'"),
        ("benchmarks.controls:nothing", "no attribute 'nothing'"),
        ("benchmarks.controls:__doc__", "must be a function"),
    ):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(tiny_config, objective=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_same_networks_whatever_the_objective(tiny_config):
    config = tiny_config.resolved()
    other = dataclasses.replace(config, objective="benchmarks.controls:simsiam")
    first, second = (build_model(c, 16).state_dict() for c in (config, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    json.dumps(other.to_dict())
