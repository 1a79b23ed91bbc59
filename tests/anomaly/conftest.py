import dataclasses

import pytest

from pyro_vje.data.splits import load_train_set
from pyro_vje.model.build import build_model
from pyro_vje.model.encoding import encode
from pyro_vje.runs.folder import CALIBRATION, REFERENCE, describe_run, save_posteriors, save_weights


@pytest.fixture(scope="session")
def wide_run(tmp_path_factory, tiny_config):
    """An untrained encoder of usual width, where kernels differ by the shape of a batch; D is no power of two."""
    folder = tmp_path_factory.mktemp("wide")
    config = dataclasses.replace(
        tiny_config, encoder="resnet-small", projector="linear", embedding_dim=100, hidden_dim=128
    ).resolved()
    train_set, held_out = load_train_set(config)
    info = describe_run(config, train_set)
    vje = build_model(config, info.image_size)
    for name, images in ((CALIBRATION, held_out), (REFERENCE, train_set)):
        save_posteriors(folder / name, encode(vje, images, info.view))
    save_weights(folder, vje, info)
    return folder
