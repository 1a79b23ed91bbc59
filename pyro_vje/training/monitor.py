"""What is watched during training: a row of ``metrics.csv`` an epoch, k-NN accuracy, signs of collapse."""

from __future__ import annotations

import logging
import math
import sys
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
from pyro_vje.runs.files import write_atomic
from pyro_vje.runs.folder import METRICS, PICTURES

log = logging.getLogger("pyro_vje")
Sets = tuple[ImageSet, ImageSet] | None

HEALTH_IMAGES = 2048  # training images on which effective rank, spread and signal-to-noise are measured
MAX_RISE = 10.0
"""Nats a dimension above the best epoch at which the loss counts as exploding; healthy runs stay within 3 of it."""
FEW_IMAGES = 8
"""In a batch below this the mean of a feature is off by a third of its deviation (1/√8) or more."""
TIMED_STEPS = 10  # steps after which the time of the whole run is known well enough to be said
CHECK_EVERY = 100  # steps between looks at whether the loss is finite: each waits for the device
SIGNS = ("effective_rank", "spread", "posterior_snr")  # of collapse
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
        self,
        folder: Path,
        train_set: ImageSet,
        knn_sets: Sets,
        view: CleanView,
        features: Tensor | None = None,
    ) -> None:
        self.path, self.view, self.knn_sets = folder / METRICS, view, knn_sets
        watched = evenly_spread(len(train_set), HEALTH_IMAGES)
        self.health_set = train_set.select(watched)
        self.health_features = None if features is None else features[watched, 0]
        self.rows: list[dict[str, Any]] = []
        self.started = self.shown = 0.0
        self.warned: set[str] = set()

    def _encode(self, vje: VJE, images: ImageSet) -> Encoded:
        device = next(vje.parameters()).device
        if images is self.health_set and self.health_features is not None:
            return encode_features(vje, self.health_features.to(device))
        return encode(vje, images, self.view, device=device)

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
            log.warning(
                "batch norm has %d images for its statistics: raise batch_size to %d or more",
                *(config.batch_size, FEW_IMAGES),
            )
        labels, classes = self.health_set.labels, self.health_set.classes or ()
        trained = {classes[label] for label in ([] if labels is None else labels.tolist()) if label >= 0}
        if config.normal_class is None and len(trained) > 1 and "normal" in trained:
            log.info("training on all %d classes; --normal-class normal trains on one alone", len(trained))

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the epoch's clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *arguments: Any) -> None:
        """Say how long it will take; `TrainingDiverged` long before the end of an epoch of many steps."""
        step, steps = trainer.fit_loop.batch_idx + 1, int(trainer.num_training_batches)
        if trainer.global_step % CHECK_EVERY == 0 and not math.isfinite(pl_module.sums["loss"].item()):
            raise TrainingDiverged(
                f"the loss became not finite by step {trainer.global_step}: {_gentler(pl_module.config)}"
            )
        if not trainer.is_global_zero:
            return
        now, epochs = time.perf_counter(), trainer.max_epochs or 0
        left = (now - self.started) / step * (steps - step + (epochs - trainer.current_epoch - 1) * steps)
        if not self.rows and step == min(TIMED_STEPS, steps):
            log.info("%d epochs of %d steps, about %s", epochs, steps, duration(left))
        if sys.stderr.isatty() and now - self.shown > 1:
            self.shown = now
            part = f"epoch {trainer.current_epoch + 1}/{epochs}  step {step}/{steps}  {duration(left)} left"
            print(f"\r{part:<78}", end="\r", file=sys.stderr, flush=True)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Write the row, print a line, and check the run's health; `TrainingDiverged` if the loss is not finite."""
        config, gentler, epochs = pl_module.config, _gentler(pl_module.config), trainer.max_epochs or 0
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, **pl_module.epoch_means()}
        seconds = time.perf_counter() - self.started
        row["seconds"] = round(seconds, 3)
        row["images_per_second"] = round(trainer.num_training_batches * pl_module.batch_size / seconds, 1)
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if not math.isfinite(row["loss"]):
            raise TrainingDiverged(f"the loss became {row['loss']} in epoch {row['epoch']}: {gentler}")
        best = min((earlier["loss"] for earlier in self.rows), default=pl_module.first_loss.item())
        self.rows.append(row)
        if not trainer.is_global_zero:
            return
        rise = (row["loss"] - best) / pl_module.vje.embedding_dim
        if rise > MAX_RISE and "loss" not in self.warned:
            self.warned.add("loss")
            log.warning(
                "epoch %d: the loss explodes, %.0f nats a dimension above its best (more than %g): %s",
                *(row["epoch"], rise, MAX_RISE, gentler),
            )
        last = row["epoch"] == epochs
        if last or (config.knn_every and row["epoch"] % config.knn_every == 0):
            row.update(self._measure(pl_module.vje, gentler))
            # A young posterior is noise in every run; what matters is whether it stays so.
            if last or row["epoch"] > max(config.warmup_epochs or 0, epochs / 2):
                self._warn(row, pl_module.vje.feature_dim, pl_module.own_objective is None, config.frozen)
        if trainer.logger is not None:  # TensorBoard, where it is installed
            trainer.logger.log_metrics(
                {name: row[name] for name in COLUMNS if name in row}, step=row["epoch"]
            )
        if last or not config.frozen:
            table = pd.DataFrame(self.rows, columns=COLUMNS)
            write_atomic(self.path, table.to_csv(index=False, lineterminator="\n"))
        if last or not config.frozen or row["epoch"] % max(1, epochs // 10) == 0:  # a head has hundreds
            log.info(_line(row, epochs))

    def draw(self, vje: VJE, classes: tuple[str, ...] | None) -> None:
        """Draw the curves and the embedding of held-out (else training) images into the run folder."""
        folder = self.path.parent / PICTURES
        folder.mkdir(exist_ok=True)
        history = {name: [row.get(name, math.nan) for row in self.rows] for name in COLUMNS}
        pictures.plot_training(history, folder / "training.png")
        shown = self.knn_sets[1] if self.knn_sets else self.health_set
        encoded = self._encode(vje, shown)
        labels = None if shown.labels is None else shown.labels[encoded.indices]
        pictures.plot_embedding(encoded.embeddings, labels, classes, folder / "embedding.png")

    def _measure(self, vje: VJE, gentler: str) -> dict[str, float]:
        encoded = self._encode(vje, self.health_set)
        if not all(tensor.isfinite().all() for tensor in encoded):
            raise TrainingDiverged(f"the embeddings are not finite after an epoch whose loss was: {gentler}")
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

    def _warn(self, row: dict[str, Any], dim: int, elbo: bool, frozen: bool) -> None:
        # A frozen encoder cannot collapse; without the ELBO the posterior's scale has no meaning.
        for sign in SIGNS[2 * frozen : 3 if elbo else 2]:
            # Each by itself, the others at infinity (healthy): one that lasts is said once, whatever joins it.
            rank, spread, snr = (row[name] if name == sign else math.inf for name in SIGNS)
            message = metrics.collapse_warning(rank, spread, snr, dim)
            if message is None:
                self.warned.discard(sign)
            elif sign not in self.warned:
                self.warned.add(sign)
                log.warning("epoch %d: %s", row["epoch"], message)


def _gentler(config: TrainConfig) -> str:
    return f"lower lr (now {config.lr:g}), raise warmup_epochs (now {config.warmup_epochs:g}), or use precision 32"


def duration(seconds: float) -> str:
    """Seconds in words: ``40 s``, ``3 min``, ``2 h 5 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.2f}"]
    names = [name for name in ("log_direction", "log_radius", "kl") if name in row]
    parts += [f"{name.removeprefix('log_')} {row[name]:.2f}" for name in names]
    parts += [f"k-NN {row['knn_accuracy']:.3f}"] if "knn_accuracy" in row else []
    return "  ".join([*parts, f"{row['images_per_second']:.0f} images/s"])
