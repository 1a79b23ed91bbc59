"""TensorBoard logs are written where TensorBoard is installed, and nothing breaks where it is not."""

import dataclasses
import importlib.util

import pytest

from pyro_vje import train

INSTALLED = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.filterwarnings("default")  # TensorBoard's own deprecations
def test_logs_follow_the_installation(tiny_config, tmp_path):
    folder = train(dataclasses.replace(tiny_config, epochs=1), tmp_path / "run")
    events = list(folder.glob("tensorboard/events.*"))
    assert bool(events) == INSTALLED
    if INSTALLED:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert {"loss", "kl", "knn_accuracy", "effective_rank"} <= set(log.Tags()["scalars"])
