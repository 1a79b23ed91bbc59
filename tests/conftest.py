"""Shared fixtures: a fresh Pyro state, a small encoder, a small folder of images, and a run trained on it."""

import logging

import numpy as np
import pyro
import pytest
import torch
from tiny import draw_image, tiny_encoder

from pyro_vje import TrainConfig, train
from pyro_vje.model import encoders
from pyro_vje.pages import pictures

CLASSES = ("normal", "stripes", "spots")


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from seed 0 with no parameters, and leaves Pyro's validation and the log as they were."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    log = logging.getLogger("pyro_vje")
    handlers, propagate, level = log.handlers, log.propagate, log.level
    yield
    pyro.enable_validation(True)
    log.handlers, log.propagate = handlers, propagate  # a command in this process takes the log for itself
    log.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _tiny_encoder_by_name():
    encoders.ENCODERS["tiny"] = tiny_encoder
    yield
    del encoders.ENCODERS["tiny"]


@pytest.fixture(scope="session", autouse=True)
def _coarse_pictures():
    """A third of the resolution and no search for a layout, which are most of the time of a small run.

    Processes of their own, as of `test_commands_print_no_librarys_warnings`, draw in full.
    """
    figure = pictures.Figure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "Figure", lambda **settings: figure(**settings | {"dpi": 40, "layout": None}))
        yield


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """``train/`` with 16 and ``test/`` with 6 images of each of three classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for kind in CLASSES:
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                draw_image(kind, rng).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_config(image_folder):
    """Settings of a run of about a second."""
    return TrainConfig(
        dataset="folder",
        data_dir=str(image_folder),
        encoder="tiny",
        embedding_dim=8,
        hidden_dim=16,
        epochs=3,
        batch_size=16,
        knn_every=1,
        precision="32",
        image_size=16,
        logger="csv",
    )


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, tiny_config):
    """A finished run folder; tests must not change it."""
    return train(tiny_config, tmp_path_factory.mktemp("runs") / "run")
