"""The cache of a frozen encoder's features: what is in it, that it goes on after a kill, and that it is a file."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.data import ImageSet, LazyImages
from pyro_vje.data.splits import load_train_set
from pyro_vje.model.build import build_model
from pyro_vje.runs.folder import describe_run
from pyro_vje.training import features as caching


class PowerCut(Exception):
    pass


@pytest.fixture
def make(tiny_config, monkeypatch):
    monkeypatch.setattr(caching, "ROWS", 8)
    monkeypatch.setattr(caching, "SAVE_EVERY", 2)
    config = dataclasses.replace(tiny_config, encoder_lr_scale=0.0, feature_views=2, holdout=0.0).resolved()
    images, _ = load_train_set(config)
    info = describe_run(config, images)

    def call(folder, seed=0, stop=None, bf16=False, images=images):
        calls = []
        changed = dataclasses.replace(info, config=dataclasses.replace(config, seed=seed))
        vje = build_model(config, 16)
        forward = vje.features

        def counted(batch):
            if len(calls) == stop:
                raise PowerCut
            calls.append(len(batch))
            return forward(batch)

        vje.features = counted
        features, kept = caching.cache_features(vje, images, changed, folder, bf16=bf16)
        return features, calls, kept

    return call, images, info, build_model(config, 16).eval()


def test_the_cache_goes_on_after_a_kill(make, tmp_path):
    call, images, info, vje = make
    whole, calls, _ = call(tmp_path / "whole")
    assert whole.shape == (48, 3, 8)
    assert calls == [8] * 18
    with torch.no_grad():
        clean = torch.cat([vje.features(info.view(batch)) for _, batch in images.batches(8)])
    torch.testing.assert_close(whole[:, 0], clean)
    assert ((whole[:, 1] - whole[:, 0]).abs().amax(1) > 0).all()
    with pytest.raises(PowerCut):
        call(tmp_path / "cut", stop=14)  # in the fifth of six steps; four are noted
    resumed, calls, _ = call(tmp_path / "cut")
    assert calls == [8] * 6
    assert torch.equal(resumed, whole)
    assert call(tmp_path / "cut")[1] == []  # nothing is left to do
    other, calls, _ = call(tmp_path / "cut", seed=1)  # other views: made anew
    assert len(calls) == 18
    assert torch.equal(other[:, 0], whole[:, 0])
    assert not torch.equal(other, whole)


def test_views_alone_are_encoded_in_bfloat16(make, tmp_path):
    call, *_ = make
    whole, lower = call(tmp_path / "32")[0], call(tmp_path / "16", bf16=True)[0]
    assert torch.equal(lower[:, 0], whole[:, 0])
    assert not torch.equal(lower[:, 1], whole[:, 1])
    torch.testing.assert_close(lower, whole, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("damaged", [False, True])
def test_the_cache_is_a_file_and_not_in_memory(make, damaged, tmp_path):
    """Also where some images cannot be decoded, and after a kill: the others lie in it one after another."""
    call, images, info, vje = make
    paths = [str(tmp_path / f"{i:02d}.png") for i in range(len(images))]
    for path, image in zip(paths, images.images, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    bad = [0, 17, 47] if damaged else []
    for i in bad:
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    lazy = ImageSet(LazyImages(paths, 16), paths)
    with pytest.raises(PowerCut):
        call(tmp_path, images=lazy, stop=14)
    features, _, kept = call(tmp_path, images=lazy)
    assert kept.paths == [path for i, path in enumerate(paths) if i not in bad]
    good = [i for i in range(len(paths)) if i not in bad]
    with torch.no_grad():
        torch.testing.assert_close(features[:, 0], vje.features(info.view(images.images[good])))
    np.load(tmp_path / "features.npy", mmap_mode="r+")[3, 1, 2] = 7.0
    assert features[3, 1, 2] == 7.0
