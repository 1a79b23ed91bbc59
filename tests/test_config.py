"""Settings, and what the package shows of itself."""

import dataclasses

import pytest

import pyro_vje
from pyro_vje import TrainConfig
from pyro_vje.config import DATASET_DEFAULTS
from pyro_vje.data import DATASETS


def test_every_data_set_has_defaults():
    """The command line offers those that have."""
    assert DATASET_DEFAULTS.keys() == DATASETS.keys()


def test_a_default_batch_is_fitted_to_few_images():
    config = TrainConfig("folder", "photos").resolved()
    for images, processes, batch_size in (
        (256, 1, 256),
        (255, 1, 63),
        (100, 1, 25),
        (100, 3, 24),
        (17, 1, 16),
        (5, 1, 5),
    ):
        assert config.fitted(images, processes) == dataclasses.replace(config, batch_size=batch_size)
    for images, processes in ((1, 1), (2, 3)):
        with pytest.raises(ValueError, match=f"at least two images, .* has {images}$"):
            config.fitted(images, processes)


def test_limits_are_printed_in_full():
    with pytest.raises(ValueError, match=r"^seed must be at least 0 and at most 2147483647, not 4294967296$"):
        TrainConfig(seed=2**32).resolved()
    with pytest.raises(ValueError, match=r"^holdout must be at least 0 and at most 0\.5, not 0\.7$"):
        TrainConfig(holdout=0.7).resolved()


def test_the_package_lists_its_api_alone():
    shown = [name for name in dir(pyro_vje) if not (name.startswith("__") and name.endswith("__"))]
    assert shown == sorted(pyro_vje.__all__)
    assert "__version__" in dir(pyro_vje)
