"""Where the epochs' metrics go beside ``metrics.csv``: Lightning's loggers, with whose log a resumed run goes on."""

from __future__ import annotations

import os
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from pyro_vje.config import TrainConfig
from pyro_vje.launch import is_first_process
from pyro_vje.runs.files import read_json, write_json

KEPT = "logger.json"
"""What a run is called where its log is kept, to go on with it."""
PROJECT = "pyro_vje"
WAYS = {"wandb": "wandb login, or WANDB_MODE=offline", "mlflow": "MLFLOW_TRACKING_URI says where"}


def choose_logger(name: str) -> str:
    """What ``auto`` stands for here; ``ValueError`` if the package that a logger needs is not installed."""
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else "csv"
    if name != "csv" and find_spec(name) is None:
        raise ValueError(f"logger {name} is not installed: pip install 'pyro-vje[{name}]'")
    return name


def open_logger(folder: Path, config: TrainConfig) -> Logger | None:
    """The logger of a run, at work in its first process: a log that was begun goes on, and a new one has the settings.

    Raises ``ValueError`` if it cannot be written: an account, a server, a place.
    """
    name, path = choose_logger(config.logger), folder / KEPT
    if name == "csv":
        return None
    before: dict[str, Any] = read_json(path, dict) if path.is_file() else {}
    try:
        logger = _make(name, folder, before.get(name))
        if is_first_process():
            _ = logger.experiment
            if name not in before:
                logger.log_hyperparams(config.to_dict())
                write_json(path, {**before, name: logger.run_id if name == "mlflow" else logger.version})
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"logger {name} cannot be written: {why} ({WAYS.get(name, folder)})") from error
    return logger


def _make(name: str, folder: Path, known: str | None) -> Any:
    title = folder.resolve().name
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="", version=name, default_hp_metric=False)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return WandbLogger(title, folder, id=known or uuid.uuid4().hex[:8], project=project)
    from mlflow import get_tracking_uri

    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    return MLFlowLogger(experiment, title, tracking_uri=get_tracking_uri(), run_id=known)


def close_logger(logger: Logger | None) -> None:
    """End what the process has begun: the next run's log is another."""
    if isinstance(logger, WandbLogger) and is_first_process():
        logger.experiment.finish()
