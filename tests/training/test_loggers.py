"""Loggers, with the packages that are installed: each has every epoch once, in one log, also of a run that goes on."""

import csv
import dataclasses
import importlib.util
import logging
from pathlib import Path

import pytest

from pyro_vje import train
from pyro_vje.config import TrainConfig, choices_of, fields_of
from pyro_vje.training import loggers


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def wandb_records(file):
    """The records of a file of wandb: after 7 bytes, LevelDB's log format of parts in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for a part's head
            at += 2**15 - at % 2**15
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a last part
            yield Record.FromString(record)
            record = b""


def wandb(folder):
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1, "the log goes on under another name"
    found = {}
    for record in (record for file in files for record in wandb_records(file)):
        items = record.history.item
        row = {item.key or ".".join(item.nested_key): float(item.value_json) for item in items}
        for name, value in row.items():
            found.setdefault(name, []).append((row["trainer/global_step"], value))
    return found


def mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'pyro_vje'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (folder.name, "FINISHED")
    assert run.data.params["encoder"] == "tiny"
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(point.step, point.value) for point in points] for name, points in history.items()}


READ = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other


@pytest.mark.filterwarnings("default")  # the packages' own deprecations
@pytest.mark.parametrize("name", READ)
def test_a_log_has_every_epoch_once_also_where_the_run_goes_on(tiny_config, tmp_path, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    config = dataclasses.replace(tiny_config, epochs=1, logger=name)
    folder = train(config, tmp_path / "run")
    train(dataclasses.replace(config, epochs=3), folder, resume=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = READ[name](folder)
    for metric in ("loss", "kl", "knn_accuracy", "effective_rank", "epoch"):
        steps, values = zip(*found[metric], strict=True)
        assert steps == (1, 2, 3)
        assert values == pytest.approx([float(row[metric]) for row in rows], rel=1e-6)


def test_the_logger_is_a_choice_of_what_is_installed(monkeypatch, tmp_path, tiny_config):
    assert set(choices_of(fields_of(TrainConfig)["logger"])) == {"auto", "csv", *READ}
    for there, name in ((True, "tensorboard"), (None, "csv")):
        monkeypatch.setattr(loggers, "find_spec", lambda _, there=there: there)
        assert loggers.choose_logger("auto") == name
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'pyro-vje\[wandb\]'"):
        train(dataclasses.replace(tiny_config, logger="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    folder = train(dataclasses.replace(tiny_config, logger="csv", epochs=1), tmp_path / "run")
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {
        *("checkpoints", "config.json", "held_out.json", "metrics.csv", "pictures")
    }


class Broken:
    def log_metrics(self, *_, **__):
        raise ConnectionError("no route")


def test_a_server_that_is_gone_costs_its_log_and_not_the_run(tiny_config, tmp_path, monkeypatch, caplog):
    from lightning.pytorch.loggers.logger import DummyLogger

    monkeypatch.setattr(DummyLogger, "log_metrics", Broken.log_metrics)
    monkeypatch.setattr("pyro_vje.training.run.open_logger", lambda *_: DummyLogger())
    with caplog.at_level(logging.WARNING, "pyro_vje"):
        folder = train(dataclasses.replace(tiny_config, epochs=1), tmp_path / "run")
    assert "epoch 1 is not in the log of DummyLogger: no route" in caplog.text
    assert (Path(folder) / "weights.safetensors").is_file()
