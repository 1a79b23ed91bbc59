"""Rotations as a target of the latent: in the model, in a run, in its scores."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pyro
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

from pyro_vje import VJE, SymmetricELBO, config, export, learn_maps, load_run, score, train
from pyro_vje.data import TwoViews
from pyro_vje.experiments import one_class
from pyro_vje.runs.folder import REFERENCE, load_posteriors, load_split
from pyro_vje.runs.stopping import Interrupted


def test_a_step_sees_each_image_in_one_of_its_turns(tiny_config, monkeypatch, tmp_path):
    seen = []

    def note(self, views, turns):
        seen.append(turns)
        raise KeyboardInterrupt

    def images(self, batch, *arguments, **how):
        seen.append(batch)
        return draw(self, batch, *arguments, **how)

    def rot90(self, quarters, dims):  # the step's own images come by here, upright
        upright.append(self)
        return turn(self, quarters, dims)

    draw, turn, upright = TwoViews.__call__, torch.Tensor.rot90, []
    monkeypatch.setattr(TwoViews, "__call__", images)
    monkeypatch.setattr(torch.Tensor, "rot90", rot90)
    monkeypatch.setattr(VJE, "guide", note)
    with pytest.raises(Interrupted):
        train(dataclasses.replace(tiny_config, rotations=1.0), tmp_path / "run")
    batch, turns = seen
    assert batch.shape == upright[0].shape == (16, 3, 16, 16)
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, quarters, before in zip(batch, turns.tolist(), upright[0], strict=True):
        assert np.array_equal(image.numpy(), np.rot90(before.numpy(), quarters, (1, 2)))


def test_the_objective_gains_the_log_probability_of_the_turn():
    vje = VJE(nn.Linear(6, 4), 4, hidden_dim=8, rotations=0.5).double()
    views, turns, found = torch.randn(3, 9, 6).double(), torch.arange(9) % 4, []
    objective = SymmetricELBO(kl_weight=0.03, monitor=lambda model, guide: found.append(model))
    elbo = objective(vje.model, vje.guide)
    losses = []
    for given in ((), (turns,)):
        torch.manual_seed(3)
        losses.append(elbo(views, *given))
    assert "rotation" not in found[0].nodes
    logits = vje.rotation_network(found[1].nodes["z"]["value"])  # (6 pairs, 9, 4)
    log_prob = logits.log_softmax(-1).gather(-1, turns.expand(6, 9)[..., None])
    torch.testing.assert_close(losses[1], losses[0] - 0.5 * 4 * log_prob.mean())
    site = pyro.poutine.trace(vje.model).get_trace(views, turns).nodes["rotation"]
    assert (site["is_observed"], site["fn"].batch_shape, site["scale"]) == (True, (6, 9), 2.0)


@pytest.fixture(scope="module")
def turned_run(tiny_config, tmp_path_factory):
    config = dataclasses.replace(
        tiny_config, rotations=1.0, normal_class="stripes", epochs=2, knn_every=0, batch_size=8
    )
    return train(config, tmp_path_factory.mktemp("turned") / "run")


def test_a_run_scores_by_its_rotations(turned_run, tmp_path):
    run = load_run(turned_run)
    images, view = load_split(run, "test").images, run.info.view
    weights, bias = (p.detach().double().numpy() for p in run.vje.rotation_network.parameters())
    expected = []
    for image in images.numpy():
        total = 0.0
        for k in range(4):
            turned = torch.from_numpy(np.rot90(image, k, (1, 2)).copy())[None]
            loc, _ = run.vje.posterior(run.vje.embed(view(turned)))
            logits = weights @ loc[0].detach().double().numpy() + bias
            total += math.log(np.exp(logits).sum()) - logits[k]
        expected.append(total / 4)
    reference = load_posteriors(run, REFERENCE).embeddings.double().numpy()
    for name in ("rotation", "rotation-joint"):
        chosen = None if name == "rotation-joint" else name  # it is such a run's default
        result = score(turned_run, score=chosen, out=tmp_path / "scores.csv")
        assert (result.settings.score, result.passes) == (name, 4)
        with open(tmp_path / "scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        found = np.array([float(row["anomaly_score"]) for row in rows])
        if name == "rotation":
            np.testing.assert_allclose(found, expected, rtol=1e-4)
        else:
            half = 2 * (found - 8 * np.array(expected))
            embedded = run.vje.embed(view(images)).detach().double().numpy()
            np.testing.assert_allclose(half, LedoitWolf().fit(reference).mahalanobis(embedded), rtol=1e-3)
        assert all(0 < float(row["p_value"]) <= 1 for row in rows)
    assert score(turned_run, score="knn", out=tmp_path / "knn.csv").passes == 1
    exported = export(turned_run, format="torch", score="rotation-joint", out=tmp_path / "model.pt2").path
    scores = torch.export.load(exported).module()(images)["score"]
    np.testing.assert_allclose(scores, found, rtol=1e-4)


def test_maps_of_such_a_run_show_no_turns(turned_run, tmp_path, monkeypatch):
    run = shutil.copytree(turned_run, tmp_path / "run")
    monkeypatch.setattr(config, "HEAD_STEPS", 5)
    learn_maps(run)
    how = {"out": tmp_path / "scores.csv", "maps": True}
    result = score(run, **how)
    assert (result.settings.score, result.passes) == ("aggregate", 1)
    assert json.loads(result.summary.read_text())["score"]["forward_passes_an_image"] == 1
    with pytest.raises(ValueError, match="without the turns that 'rotation-joint' is of"):
        score(run, **how, score="rotation-joint")


def test_a_run_without_rotations_says_so(trained_run, tmp_path):
    with pytest.raises(ValueError, match=r"needs a run with them \(train --rotations 1\)"):
        score(trained_run, score="rotation", out=tmp_path / "scores.csv")


def test_the_protocol_has_their_rows(tiny_config, tmp_path):
    base = dataclasses.replace(tiny_config, rotations=1.0, epochs=1, knn_every=0, batch_size=8)
    result = one_class(base, tmp_path / "out", classes=["stripes"])
    assert {row["score"] for row in result.rows if row["on"] == "rotations"} == {"rotation", "rotation-joint"}
