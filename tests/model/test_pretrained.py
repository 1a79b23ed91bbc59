"""Encoders of timm and torchvision: their weights from files, and runs that leave them as they are."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import entropy
from sklearn.covariance import LedoitWolf
from torch import nn
from torchvision import models

from pyro_vje import load_run, train
from pyro_vje.data import decode_image, load_train_set
from pyro_vje.data.datasets import say_fit
from pyro_vje.model import projector, whitened_dim
from pyro_vje.model.encoders import build_encoder, feature_dim
from pyro_vje.model.pretrained import load_state, preprocessing
from pyro_vje.runs.folder import LoadedRun, RunInfo, decoded_as, describe_run, load_folds, load_split

timm = pytest.importorskip("timm")
NAME = "timm:test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def state():
    """Random weights, and statistics of batch norms that are not those of a new network."""
    torch.manual_seed(7)
    network = timm.create_model("test_resnet.r160_in1k")
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.1 * torch.randn(buffer.shape) + ("var" in name))
    return network.state_dict()


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_file(state, folder / "network.safetensors")
    torch.save({"state_dict": state}, folder / "network.pth")
    return folder


@pytest.fixture(scope="module")
def config(tiny_config, weights):
    settings = {"encoder": NAME, "weights": str(weights / "network.safetensors"), "image_size": 32}
    return dataclasses.replace(
        tiny_config, **settings, embedding_dim=None, holdout=None, epochs=2, feature_views=2, folds=2
    )


def same(state, name, value):
    return state[name].numpy().tobytes() == value.detach().numpy().tobytes()


def test_weights_come_from_either_kind_of_file(state, weights):
    for name in ("network.safetensors", "network.pth"):
        encoder = build_encoder(NAME, 32, str(weights / name))
        assert all(same(state, key, value) for key, value in encoder.state_dict().items())
        assert state.keys() - encoder.state_dict().keys() == {"fc.weight", "fc.bias"}
        assert feature_dim(encoder, 32) == 96


def test_what_does_not_fit_is_named(state, tmp_path):
    first, *_ = state
    damaged = {name: value for name, value in state.items() if name != first} | {"head.extra": torch.ones(1)}
    torch.save(damaged, tmp_path / "keys.pth")
    with pytest.raises(ValueError, match=rf"lacks {first} \(1 tensors\) and has head\.extra \(1\)"):
        build_encoder(NAME, 32, str(tmp_path / "keys.pth"))
    torch.save({**state, first: torch.ones(2, 2)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=rf"size mismatch for {first}: .*\[2, 2\]"):
        build_encoder(NAME, 32, str(tmp_path / "shape.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="no readable file of weights"):
        build_encoder(NAME, 32, str(tmp_path / "text.pth"))
    for name, weights, said in (
        (NAME, "missing.pth", "no such file of weights"),
        ("timm:no_such", "none", "timm has no model 'no_such'"),
        ("torchvision:no_such", "none", "torchvision has no model 'no_such'"),
        ("resnet18", "default", "has no pretrained weights"),
    ):
        with pytest.raises(ValueError, match=said):
            build_encoder(name, 32, weights)


def test_torchvision_with_a_classifier_of_another_width(tmp_path):
    network = models.resnet18(num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "own.pth")
    encoder = build_encoder("torchvision:resnet18", 64, str(tmp_path / "own.pth")).eval()
    network.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(images), network(images))
    wanted = preprocessing("torchvision:resnet18")
    assert (wanted.image_size, wanted.mean[0], wanted.interpolation) == (224, 0.485, "bilinear")


def test_an_encoder_of_ones_own_gets_its_last_layer_too(tmp_path):
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state(one, two.state_dict(), tmp_path)
    assert torch.equal(one.weight, two.weight)


def test_a_frozen_run_leaves_the_encoder_and_stands_alone(config, state, weights, tmp_path):
    file = tmp_path / "network.safetensors"
    file.write_bytes((weights / "network.safetensors").read_bytes())
    folder = train(dataclasses.replace(config, weights=str(file)), tmp_path / "run")
    file.unlink()
    kept = load_file(folder / "weights.safetensors")
    encoder = {name: value for name, value in kept.items() if name.startswith("encoder.")}
    assert len(encoder) == len(state) - 2
    assert all(same(state, name.removeprefix("encoder."), value) for name, value in encoder.items())
    run = load_run(folder)
    assert (run.info.config.projector, run.vje.embedding_dim, run.vje.frozen) == ("whiten", 96, True)
    assert not (folder / "cache").exists()
    fold, features, heads = load_folds(run)
    assert (fold.bincount().tolist(), len(heads)) == ([24, 24], 2)
    for k, head in enumerate(heads):  # each knows the other fold alone
        directions = nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(head.projector.mean, directions[fold != k].mean(0))
        assert not torch.allclose(head.projector.mean, directions.mean(0), rtol=1e-6, atol=1e-8)


def test_broad_images_keep_more_directions_than_narrow_ones():
    noise = torch.randn(1000, 700, generator=torch.Generator().manual_seed(0))
    for equal, kept in ((20, 256), (100, None), (700, 700)):  # as many variances are equal
        scale = torch.full((700,), 1e-3)
        scale[:equal] = 1.0
        directions = nn.functional.normalize((noise * scale).double(), dim=-1).numpy()
        spectrum = np.linalg.svd(LedoitWolf().fit(directions).covariance_, compute_uv=False)
        assert whitened_dim(noise * scale) == (kept or round(4 * np.exp(entropy(spectrum))))


def test_a_frozen_run_chooses_its_directions_by_its_images_and_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setitem(projector.DEFAULT_DIM, "whiten", 4)  # its 96 features are fewer than any real one's 256
    run = load_run(folder := train(config, tmp_path / "run"))
    _, features, heads = load_folds(run)
    wanted = whitened_dim(features)
    assert 4 < wanted < 96
    assert {vje.embedding_dim for vje in (run.vje, *heads)} == {run.info.config.embedding_dim} == {wanted}
    longer = dataclasses.replace(config, epochs=2 * run.info.config.epochs)
    assert load_run(train(longer, folder, resume=True)).vje.embedding_dim == wanted


def test_what_does_not_fit_a_square_is_cropped_or_whole_wherever_it_is_read(config, tmp_path, caplog):
    """A central square is cut twice, as the network was trained; a whole image is cut nowhere, now or later."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(pixels).save(tmp_path / name)
    for fit, side in (("crop", round(32 / preprocessing(NAME).crop)), ("pad", 32), ("squeeze", 32)):
        own = dataclasses.replace(config, dataset="folder", data_dir=str(tmp_path), fit=fit, holdout=0.0, batch_size=2)
        size, how = decoded_as(own)
        images, _ = load_train_set(own, size, how)
        info = RunInfo.from_dict(json.loads(json.dumps(describe_run(own, images).to_dict())))
        assert (info.fit, info.image_size, info.view_size) == (fit, side, 32)
        again = load_split(LoadedRun(None, info, None), "all")
        wanted = decode_image(tmp_path / "a/0.png", side, how, fit)
        assert torch.equal(images.images[0], wanted)
        assert torch.equal(again.images[0], wanted)
        assert info.view(again.images).shape[-1] == 32
        with caplog.at_level("INFO", "pyro_vje"):
            say_fit(images, fit)
    assert caplog.text.count("not square (such as 80 x 40 pixels): ") == 3
    assert "50% is cut off (--fit pad or squeeze keeps all)" in caplog.text


def test_fine_tuning_changes_the_encoder(config, state, tmp_path):
    folder = train(dataclasses.replace(config, encoder_lr_scale=0.1, epochs=1), tmp_path / "run")
    kept = load_file(folder / "weights.safetensors")
    name = next(iter(state))
    assert not same(state, name, kept[f"encoder.{name}"])
    assert load_run(folder).info.config.projector == "none"
