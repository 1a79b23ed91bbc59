"""What goes wrong in training, provoked by training: each has a message that names the setting to change."""

import dataclasses
import logging
import shutil

import pytest
import torch
from PIL import Image

from pyro_vje import train
from pyro_vje.data import make_loader
from pyro_vje.data.splits import load_train_set
from pyro_vje.model.build import build_model
from pyro_vje.runs.folder import read_info
from pyro_vje.training import run as training
from pyro_vje.training.monitor import TrainingDiverged

GENTLER = "lower lr (now {}), raise warmup_epochs (now 0), or use precision 32"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="pyro_vje")
    return lambda: [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def train_with(tiny_config, tmp_path):
    def call(**changes):
        changes = {"warmup_epochs": 0.0, **changes}
        return train(dataclasses.replace(tiny_config, **changes), tmp_path / "run")

    return call


def test_an_exploding_loss(train_with, said):
    train_with(lr=3000.0, epochs=1)
    (message,) = [line for line in said() if "explodes" in line]
    assert message.startswith("epoch 1: the loss explodes")
    assert message.endswith(GENTLER.format("3000"))


def test_a_rate_that_is_only_large_is_not_called_exploding(train_with, said):
    train_with(lr=30.0)
    assert not [line for line in said() if "explodes" in line]


@pytest.mark.parametrize("lr", [1000.0, 3000.0, 1e5, 1e18])
def test_a_diverging_rate_by_a_loss_or_embeddings_that_are_not_finite(train_with, lr):
    with pytest.raises(TrainingDiverged) as caught:
        train_with(lr=lr)
    assert str(caught.value).endswith(GENTLER.format(f"{lr:g}"))


def test_infinite_statistics_of_a_batch_norm_which_leave_loss_and_embeddings_finite(train_with, monkeypatch):
    """In training it takes the batch's, and in evaluation divides by infinity."""
    step = training.Pretraining.training_step

    def overflow(self, *batch):
        self.vje.posterior_network.trunk[1].running_var.fill_(torch.inf)
        return step(self, *batch)

    monkeypatch.setattr(training.Pretraining, "training_step", overflow)
    with pytest.raises(TrainingDiverged, match="embeddings or weights are not finite"):
        train_with(epochs=1)


def test_a_diverging_rate_is_seen_within_the_epoch(train_with, monkeypatch):
    monkeypatch.setattr("pyro_vje.training.monitor.CHECK_EVERY", 2)
    steps = []
    step = training.Pretraining.training_step
    monkeypatch.setattr(
        training.Pretraining, "training_step", lambda self, *batch: steps.append(1) or step(self, *batch)
    )
    with pytest.raises(TrainingDiverged, match=r"not finite by step [246]: lower lr"):
        train_with(lr=1e18, batch_size=4)  # 11 steps an epoch
    assert len(steps) in (2, 4, 6)


def test_a_dead_posterior(train_with, said):
    """A normalised direction at KL weight 1 ends uninformative, whatever the encoder; the advice helps."""
    ratios = []
    for weight in (1.0, 1e-3):
        folder = train_with(likelihood="polar-student-t-exact", kl_weight=weight, epochs=20, knn_every=20, lr=2.0)
        message = next(line for line in said() if "mostly noise" in line)
        assert "healthy from 0.7): train longer (epochs)" in message
        assert "a lower kl_weight" in message
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        ratios.append(saved["callbacks"]["EpochReport"]["rows"][-1]["posterior_snr"])
        shutil.rmtree(folder)
    assert ratios[0] < 0.35
    assert ratios[1] > 2 * ratios[0]


def test_a_collapsed_representation(train_with, said, tmp_path):
    """Images without any difference."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (90, 120, 40)).save(images / f"{i}.png")
    train_with(data_dir=str(images), epochs=1)
    assert any("may be collapsing" in line and "lower lr, raise warmup_epochs" in line for line in said())


def test_batch_norm_of_one_or_few_images(train_with, said, tiny_config, tmp_path):
    """A batch of one, and data for one, are refused; few images are warned of; no batch is ever shorter."""
    with pytest.raises(ValueError, match="batch_size must be at least 2, not 1"):
        train_with(batch_size=1)
    one = tmp_path / "one"
    one.mkdir()
    Image.new("RGB", (16, 16), "red").save(one / "a.png")
    (one / "train").mkdir()
    (one / "test").mkdir()
    (one / "a.png").rename(one / "train" / "a.png")
    Image.new("RGB", (16, 16), "red").save(one / "test" / "b.png")
    with pytest.raises(ValueError, match="training needs at least two images, and one a process, but has 1"):
        train_with(data_dir=str(one), batch_size=None)
    train_with(batch_size=3, epochs=1)
    assert any("raise batch_size to 8 or more" in line for line in said())
    config = read_info(tmp_path / "run").config
    module = training.Pretraining(build_model(config, 16), config, load_train_set(config)[0])
    assert len(module.train_set) % 3 == 1  # one is left over
    loader = make_loader(module.train_set, 3)
    assert {len(images) for images, _ in loader} == {3}
