"""Optimisers by name, a predictor of constant rate, clipped gradients, targets by averaged weights."""

import copy
import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from pyro_vje import TrainConfig, train
from pyro_vje.data.splits import load_train_set
from pyro_vje.model.build import build_model
from pyro_vje.training import run as training
from pyro_vje.training.module import Pretraining


def weights(config, folder, **settings):
    return load_file(train(dataclasses.replace(config, **settings), folder) / "weights.safetensors")


def module(config, **settings):
    config = dataclasses.replace(config, **settings).resolved()
    images, _ = load_train_set(config)
    return Pretraining(build_model(config, 16), config.fitted(len(images)), images)


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.2), ("adamw", 1e-3), ("lars", 0.3)])
def test_an_optimiser_trains_at_its_own_rate(tiny_config, tmp_path, name, lr):
    made = module(tiny_config, optimizer=name).configure_optimizers()["optimizer"]
    assert (type(made).__name__.lower(), made.param_groups[0]["initial_lr"]) == (name, pytest.approx(lr / 16))
    folder = train(dataclasses.replace(tiny_config, optimizer=name, epochs=10), tmp_path / "run")
    losses = [float(line.split(",")[1]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_constant_predictor_keeps_its_rate_while_the_others_decay(tiny_config):
    made = module(tiny_config, predictor_lr="constant")
    parts = made.configure_optimizers()
    owner = {id(parameter): name.partition(".")[0] for name, parameter in made.vje.named_parameters()}
    step = parts["lr_scheduler"]["scheduler"]
    for _ in range(6):  # three epochs of two steps
        parts["optimizer"].step()
        step.step()
    for group in parts["optimizer"].param_groups:
        fixed = owner[id(group["params"][0])] == "posterior_network"
        assert all((owner[id(parameter)] == "posterior_network") == fixed for parameter in group["params"])
        assert group["lr"] == pytest.approx(0.2 / 16 if fixed else 0.0)


def test_a_clipped_gradient_moves_no_weight_further_than_its_norm(tiny_config, tmp_path):
    settings = {"epochs": 1, "weight_decay": 0.0, "lr": 16.0}  # 16 images: a rate of 1; two steps, the first of half
    before = build_model(tiny_config.resolved(), 16).state_dict()
    learned = [name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    for clip, free in ((1e-4, False), (None, True)):
        after = weights(tiny_config, tmp_path / str(clip), clip_norm=clip, **settings)
        moved = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in learned))
        assert (moved > 1e-2) if free else (0 < moved < 3e-4)


def test_targets_of_averaged_weights(trained_run, tiny_config, tmp_path, monkeypatch):
    """A decay of 0 is the network itself; 0.5 is the average as one writes it down, and goes through a stop."""
    plain, own = load_file(trained_run / "weights.safetensors"), weights(tiny_config, tmp_path / "0", ema=0.0)
    assert all(torch.equal(plain[name], own[name]) for name in plain)

    slow, seen = {}, []
    step, end = Pretraining.training_step, Pretraining.on_train_batch_end

    def note(self, batch, batch_idx):
        if self.global_step == 3 and stop:
            raise RuntimeError("power cut")
        slow.setdefault("weight", copy.deepcopy(self.vje.posterior_network.loc.weight))
        return step(self, batch, batch_idx)

    def compare(self, *arguments):
        end(self, *arguments)
        slow["weight"] = 0.5 * slow["weight"] + 0.5 * self.vje.posterior_network.loc.weight
        seen.append((slow["weight"].detach(), self.target.posterior_network.loc.weight.clone()))

    monkeypatch.setattr(Pretraining, "on_train_batch_end", compare)
    monkeypatch.setattr(training.Pretraining, "training_step", note)
    stop = False
    whole = weights(tiny_config, tmp_path / "whole", ema=0.5)
    for expected, found in seen:
        torch.testing.assert_close(found, expected)
    assert not torch.equal(whole["posterior_network.loc.weight"], plain["posterior_network.loc.weight"])
    stop = True
    with pytest.raises(RuntimeError, match="power cut"):
        train(dataclasses.replace(tiny_config, ema=0.5), tmp_path / "cut")
    monkeypatch.undo()
    resumed = load_file(train(TrainConfig(), tmp_path / "cut", resume=True) / "weights.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
