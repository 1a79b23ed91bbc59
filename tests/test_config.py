"""Settings, and what the package shows of itself."""

import dataclasses
import math
import pickle
import re
from pathlib import Path

import pytest

import pyro_vje
from pyro_vje import ScoreConfig, TrainConfig
from pyro_vje.config import DATASET_DEFAULTS
from pyro_vje.data import DATASETS


def test_every_data_set_has_defaults():
    """The command line offers those that have."""
    assert DATASET_DEFAULTS.keys() == DATASETS.keys()


def test_a_default_batch_is_fitted_to_few_images():
    config = TrainConfig("folder", "photos").resolved()
    for images, processes, batch_size in (
        (10_000, 1, 128),
        (2_560, 1, 128),
        (2_500, 1, 125),
        (640, 1, 32),
        (640, 3, 30),
        (262, 1, 16),
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


def test_settings_are_checked_when_they_are_made_and_say_what_they_may_be():
    for wrong, message in (
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"epochs": True}, "setting epochs must be int | None, not True"),
        ({"epochs": "3"}, "setting epochs must be int | None, not '3'"),
        ({"radius": "gamma"}, "radius must be one of student-t, log-student-t, None, not 'gamma'"),
        ({"df": -1.0}, "df must be positive, not -1.0"),
        ({"lr": math.inf}, "lr must be at least 0 and finite, not inf"),
        ({"data_dir": 3}, "setting data_dir must be Text | None, not 3"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TrainConfig(**wrong)
    for wrong, message in (
        ({"alpha": 0.1, "fdr": 0.1}, "alpha and fdr are two rules for one decision: give one of them"),
        ({"data": "x", "dataset": "digits"}, "give either a folder of images"),
        ({"alpha": 1}, "alpha must be above 0 and below 1, not 1"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            ScoreConfig(**wrong)
    with pytest.raises(TypeError, match="no setting 'learning_rate': choose among dataset, "):
        TrainConfig(learning_rate=1.0)


def test_settings_are_values():
    config = TrainConfig("folder", Path("photos"), df=math.inf, radius=None, lr=0.2)
    assert config == pickle.loads(pickle.dumps(config)) == TrainConfig.from_dict(config.to_dict())
    assert {config: 1}[dataclasses.replace(config, lr=0.2)] == 1
    assert (config.data_dir, ScoreConfig(data="photos").data) == ("photos", Path("photos"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 0.1


def test_the_package_lists_its_api_alone():
    shown = [name for name in dir(pyro_vje) if not (name.startswith("__") and name.endswith("__"))]
    assert shown == sorted(pyro_vje.__all__)
    assert "__version__" in dir(pyro_vje)


def test_settings_that_would_do_nothing_are_refused():
    for settings, message in (
        ({"local_size": 16}, "local_size does nothing without local_views"),
        ({"targets": "mean"}, "the mean of one target is that target: views must be 3 or more"),
        ({"encoder_lr_scale": 0.0, "local_views": 2}, "local_views does nothing for the head of a frozen encoder"),
        ({"encoder_lr_scale": 0.0, "ema": 0.9}, "ema does nothing for the head of a frozen encoder"),
        ({"encoder_lr_scale": 0.0, "optimizer": "sgd"}, "optimizer does nothing for the head of a frozen encoder"),
        ({"encoder_lr_scale": 0.0, "views": 8}, "has 2 feature_views and the image, but views are 8"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**settings).resolved()
