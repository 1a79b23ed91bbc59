"""The images of a run: those trained on, held out for calibration, kept as reference, watched by k-NN."""

import logging
from typing import Any

import torch
from torch import Tensor

from pyro_vje.config import TrainConfig
from pyro_vje.data.datasets import load_dataset
from pyro_vje.data.imageset import ImageSet, counted
from pyro_vje.data.loaders import check_batch, derive_seed
from pyro_vje.launch import machines

log = logging.getLogger("pyro_vje")

REFERENCE_IMAGES = 10_000  # at most: a density over them costs less than an encoder's pass
FEW = 19
"""Images held out below which no new one has a p-value of 0.05."""
MONITOR_TRAIN, MONITOR_TEST = 10_000, 2_000  # at most, for the k-NN monitor; `evaluate` uses all


def _load(config: TrainConfig, split: str, image_size: int | None, interpolation: str) -> ImageSet:
    how: dict[str, Any] = {"image_size": image_size, "interpolation": interpolation}
    how |= {"download": config.download, "residency": config.residency, "fit": config.fit or "crop"}
    return load_dataset(config.dataset, config.data_dir, split, **how)


def load_train_set(
    config: TrainConfig, image_size: int | None = None, interpolation: str = "bilinear"
) -> tuple[ImageSet, ImageSet | None]:
    """Load the images that a run with these (resolved) settings pretrains on, and those it keeps out (`hold_out`).

    ``ValueError`` or ``FileNotFoundError``: there is no such data set or class, or it has fewer images than a batch.
    """
    train_set = _load(config, "pretrain", image_size or config.image_size, interpolation)
    if config.normal_class is not None:
        train_set = train_set.of_class(config.normal_class)
        log.info("%s of the class %s", counted(len(train_set)), train_set.class_name(config.normal_class))
    images = train_set.images
    if isinstance(images, Tensor) and len(images) and images.min() == images.max():
        raise ValueError(f"every pixel of the training images is {int(images.max())}: they show nothing")
    train_set, held_out = hold_out(train_set, config)
    if config.batch_size is not None:
        check_batch(config.batch_size, len(train_set), config.devices * machines())
    return train_set, held_out


def hold_out(images: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """Split off ``config.holdout`` of the images, drawn by the run's seed; ``None`` if that is not one image."""
    count = round((config.holdout or 0.0) * len(images))
    if count == 0:
        return images, None
    what = "%d of %d images are held out of training, to compare new ones with"
    if count < FEW:  # scoring cannot make up for it
        what += f", so that no p-value will be below {1 / (count + 1):.2g}: more holdout, or pyro-vje calibrate later"
    log.info(what, count, len(images))
    order = _order(len(images), "holdout", config.seed)
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def reference_images(train_set: ImageSet, seed: int) -> ImageSet:
    """The training images that scores compare with: all, or `REFERENCE_IMAGES` of them drawn by the run's seed."""
    if len(train_set) <= REFERENCE_IMAGES:
        return train_set
    return train_set.select(_order(len(train_set), "reference", seed)[:REFERENCE_IMAGES].sort().values)


def _order(count: int, purpose: str, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(purpose, seed)))


def monitor_sets(
    config: TrainConfig, image_size: int, train_set: ImageSet, interpolation: str = "bilinear"
) -> tuple[ImageSet, ImageSet] | None:
    """Labelled training and test images for the k-NN monitor, where there are labels of two classes."""
    if not config.knn_every or config.normal_class is not None or train_set.labels is None:
        return None
    if len(train_set.labels[train_set.labels >= 0].unique()) < 2:
        return None
    labelled = train_set.labelled()
    test = _load(config, "test", image_size, interpolation).labelled()
    warn_if_shared(train_set, test)
    spread = [evenly_spread(len(labelled), MONITOR_TRAIN), evenly_spread(len(test), MONITOR_TEST)]
    return labelled.select(spread[0]), test.select(spread[1])


def warn_if_shared(train: ImageSet, test: ImageSet) -> None:
    """Warn if most of the test images are among those of training, by their pixels, or their files if they are lazy."""

    def keys(images: ImageSet) -> set[int | str]:
        if isinstance(images.images, Tensor) and train.in_memory and test.in_memory:
            return {hash(image.numpy().tobytes()) for image in images.images}
        return set(images.paths)

    known, asked = keys(train), keys(test)
    if 2 * (shared := len(known & asked)) > len(asked):
        what = f"{shared} of {len(asked)} test images are training images too"
        log.warning("%s: numbers on them say nothing about new ones", what)


def evenly_spread(size: int, most: int) -> Tensor:
    """At most ``most`` indices spread evenly over ``range(size)``: files are often sorted by class."""
    return torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).round().long()
