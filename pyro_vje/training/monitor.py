"""What is watched during training: a row of ``metrics.csv`` an epoch, k-NN accuracy, signs of collapse."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.config import TrainConfig
from pyro_vje.data import CleanView, ImageSet
from pyro_vje.data.splits import evenly_spread
from pyro_vje.model import VJE, Encoded, encode, encode_features
from pyro_vje.pages import pictures
from pyro_vje.progress import Progress, clear_line, duration
from pyro_vje.runs.files import write_atomic
from pyro_vje.runs.folder import METRICS, PICTURES

log = logging.getLogger("pyro_vje")
Sets = tuple[ImageSet, ImageSet] | None

HEALTH_IMAGES = 2048  # training images on which effective rank, spread and signal-to-noise are measured
MAX_RISE = 10.0
"""Nats a dimension above the best epoch at which the loss counts as exploding; healthy runs stay within 3 of it."""
FEW_IMAGES = 8
"""In a batch below this the mean of a feature is off by a third of its deviation (1/√8) or more."""
CHECK_EVERY = 100  # steps between looks at whether the loss is finite: each waits for the device
SIGNS = ("effective_rank", "spread", "posterior_snr")  # of collapse
LITTLE_LEARNED = (
    "little is learned from these images so far, and the scores may be weak: more good images help, or a pretrained "
    "network (pip install 'pyro-vje[pretrained]')"
)
PARTS = ("loss", "log_likelihood", "log_direction", "log_radius", "kl")
COLUMNS = ("epoch", *PARTS, "knn_accuracy", *SIGNS, "lr", "images_per_second", "seconds")


class TrainingDiverged(FloatingPointError):
    """The loss became NaN or infinite."""


class EpochReport(lightning.pytorch.Callback):
    """Writes a row of ``metrics.csv`` after each epoch, warns of collapse, stops on a loss that is not finite.

    ``knn_sets`` are labelled training and test images for the k-NN monitor; ``features`` ``(N, V, feature_dim)`` what
    a frozen encoder has made of the training images.
    """

    def __init__(
        self, folder: Path, train_set: ImageSet, knn_sets: Sets, view: CleanView, features: Tensor | None = None
    ) -> None:
        self.path, self.view, self.knn_sets = folder / METRICS, view, knn_sets
        watched = evenly_spread(len(train_set), HEALTH_IMAGES)
        self.health_set = train_set.select(watched)
        self.health_features = None if features is None else features[watched, 0]
        self.rows: list[dict[str, Any]] = []
        self.started = 0.0
        self.warned: set[str] = set()
        self.progress = Progress()

    def _encode(self, vje: VJE, images: ImageSet) -> Encoded:
        if images is self.health_set and self.health_features is not None:
            return encode_features(vje, self.health_features)
        return encode(vje, images, self.view)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, so that a resumed run's file holds each epoch once, what was said, the epoch's seconds."""
        seconds = time.perf_counter() - self.started
        return {"rows": self.rows, "warned": sorted(self.warned), "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the rows of the run that is resumed."""
        self.rows, self.warned = state_dict["rows"], set(state_dict.get("warned", ()))
        # The start of the epoch for a run that goes on inside one; another epoch sets it anew.
        self.started = time.perf_counter() - state_dict.get("seconds", 0.0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Warn of tiny batches; say so where the images look like the one-class protocol and all are trained on."""
        config: TrainConfig = pl_module.config
        if not trainer.is_global_zero:
            return
        if (config.batch_size or 0) < FEW_IMAGES:
            few = f"{config.batch_size} images at a time are too few to learn from"
            how = (
                "train on more"
                if len(pl_module.train_set) < FEW_IMAGES
                else f"raise batch_size to {FEW_IMAGES} or more"
            )
            log.warning("%s (batch norm has no more for its statistics): %s", few, how)
        labels, classes = self.health_set.labels, self.health_set.classes or ()
        trained = {classes[label] for label in ([] if labels is None else labels.tolist()) if label >= 0}
        if config.normal_class is None and len(trained) > 1 and "normal" in trained:
            log.info("training on all %d classes; --normal-class normal trains on one alone", len(trained))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the epoch's clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *arguments: Any) -> None:
        """Say how far it is; `TrainingDiverged` long before the end of an epoch of many steps."""
        if trainer.global_step % CHECK_EVERY == 0 and not math.isfinite(pl_module.sums["loss"].item()):
            raise TrainingDiverged(
                f"the loss became not finite by step {trainer.global_step}: {_gentler(pl_module.config)}"
            )
        if not trainer.is_global_zero or not self.progress.due():
            return
        step, steps = trainer.fit_loop.batch_idx + 1, int(trainer.num_training_batches)
        done, epochs = trainer.current_epoch, trainer.max_epochs or 0
        left = (time.perf_counter() - self.started) / step * ((epochs - done) * steps - step)
        sums, counts = pl_module.sums, pl_module.counts
        means = {name: float(sums[name] / counts[name]) for name in sums}  # waits for the device
        what = f"epoch {done + 1}/{epochs}  step {step}/{steps}  {duration(left)} left"
        self.progress.show(what + _said(means, pl_module.config, 0))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the row, print a line, and check the run's health; `TrainingDiverged` if the loss is not finite."""
        config, gentler = pl_module.config, _gentler(pl_module.config)
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        row: dict[str, Any] = {"epoch": epoch, **pl_module.epoch_means()}
        seconds = time.perf_counter() - self.started
        row["seconds"] = round(seconds, 3)
        row["images_per_second"] = round(trainer.num_training_batches * pl_module.batch_size / seconds, 1)
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if not math.isfinite(row["loss"]):
            raise TrainingDiverged(f"the loss became {row['loss']} in epoch {epoch}: {gentler}")
        best = min((earlier["loss"] for earlier in self.rows), default=pl_module.first_loss.item())
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        rise = (row["loss"] - best) / pl_module.vje.embedding_dim
        if rise > MAX_RISE and "loss" not in self.warned:
            self.warned.add("loss")
            log.warning("epoch %d: the loss explodes, and what was learned is lost: %s", epoch, gentler)
            log.debug("%.0f nats a dimension above its best, where %g are too many", rise, MAX_RISE)
        last = epoch == epochs
        clear_line()
        if last or (config.knn_every and epoch % config.knn_every == 0):
            row.update(self._measure(pl_module.vje, gentler))
            # A young posterior is noise in every run; what matters is whether it stays so.
            if last or epoch > max(config.warmup_epochs or 0, epochs / 2):
                self._warn(row, pl_module.vje.feature_dim, pl_module.own_objective is None, config)
        if last or not config.frozen:
            self._log(trainer.logger, self.rows if config.frozen else [row])
            table = pd.DataFrame(self.rows, columns=COLUMNS)
            write_atomic(self.path, table.to_csv(index=False, lineterminator="\n"))
        if last or not config.frozen or epoch % max(1, epochs // 10) == 0:  # a head has hundreds
            knn = f"  k-NN {row['knn_accuracy']:.3f}" if "knn_accuracy" in row else ""
            left = "" if last else f"  {duration(seconds * (epochs - epoch))} left"
            log.log(level(config), f"epoch {epoch}/{epochs}{_said(row, config)}{knn}{left}")

    def _log(self, logger: Any, rows: list[dict[str, Any]]) -> None:
        """Hand rows to the logger; a server that is gone costs its log, not the run."""
        try:
            for row in rows if logger is not None else ():
                numbers = {name: row[name] for name in COLUMNS[1:] if name in row}
                logger.log_metrics({"epoch": float(row["epoch"]), **numbers}, step=row["epoch"])
        except Exception as error:
            log.warning("epoch %d is not in the log of %s: %s", rows[-1]["epoch"], type(logger).__name__, error)

    def draw(self) -> None:
        """Draw the curves into the run folder."""
        folder = self.path.parent / PICTURES
        folder.mkdir(exist_ok=True)
        history = {name: [row.get(name, math.nan) for row in self.rows] for name in COLUMNS}
        pictures.plot_training(history, folder / "training.png")

    def _measure(self, vje: VJE, gentler: str) -> dict[str, float]:
        encoded = self._encode(vje, self.health_set)
        # Weights too: the statistics of a batch norm may be infinite, and what it gives in evaluation is then zero.
        if not all(tensor.isfinite().all() for tensor in (*encoded[:3], *vje.state_dict().values())):
            raise TrainingDiverged(f"embeddings or weights are not finite after an epoch whose loss was: {gentler}")
        row = {
            "effective_rank": metrics.effective_rank(encoded.features),
            "spread": metrics.embedding_spread(encoded.embeddings),
            "posterior_snr": metrics.posterior_snr(encoded.loc, encoded.scale),
        }
        if self.knn_sets is not None:
            train, test = (self._encode(vje, images) for images in self.knn_sets)
            labels = self.knn_sets[0].labels_at(train.indices), self.knn_sets[1].labels_at(test.indices)
            predicted = metrics.knn_predict(train.features, labels[0], test.features)
            row["knn_accuracy"] = (predicted == labels[1]).double().mean().item()
        return row

    def _warn(self, row: dict[str, Any], dim: int, elbo: bool, config: TrainConfig) -> None:
        found = metrics.unhealthy(row["effective_rank"], row["spread"], row["posterior_snr"], dim)
        if config.frozen:  # it cannot collapse
            found = {sign: message for sign, message in found.items() if sign == "posterior_snr"}
        if not elbo:  # the posterior's scale has no meaning
            found.pop("posterior_snr", None)
        new = [sign for sign in found if sign not in self.warned]  # one that lasts is said once
        plain = level(config) == logging.DEBUG
        if new and plain:
            log.warning(LITTLE_LEARNED)
        for sign in new:
            log.log(logging.DEBUG if plain else logging.WARNING, "epoch %d: %s", row["epoch"], found[sign])
        self.warned = {*found, *self.warned.difference(SIGNS)}


def _gentler(config: TrainConfig) -> str:
    return f"lower lr (now {config.lr:g}), raise warmup_epochs (now {config.warmup_epochs:g}), or use precision 32"


def level(config: TrainConfig) -> int:
    """The log's level of what tells of losses: debug where a folder's strange images are asked for, not a network."""
    return logging.DEBUG if config.dataset == "images" else logging.INFO


def _said(row: dict[str, Any], config: TrainConfig, digits: int = 1) -> str:
    """The loss, and its parts in brackets, where they are of interest (`level`)."""
    if not log.isEnabledFor(level(config)):
        return ""
    parts = [f"{name.removeprefix('log_')} {row[name]:.{digits}f}" for name in PARTS[2:] if name in row]
    return f"  loss {row['loss']:.1f}" + f" ({', '.join(parts)})" * bool(parts)
