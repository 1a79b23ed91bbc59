"""A set of images: in memory as one uint8 tensor, or decoded one by one when asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vje.data.decode import ImageError, decode_image

logger = logging.getLogger("pyro_vje")

RESIDENCIES = ("auto", "memory", "stream")
_WARNINGS = 10  # damaged files named one by one in the log; all of them are in ImageSet.failed


class LazyImages:
    """Images that are decoded when indexed.

    Parameters
    ----------
    paths
        Image files.
    size
        Side of the decoded square.
    """

    def __init__(self, paths: Sequence[str], size: int) -> None:
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Decode one image, uint8 (3, size, size); raises :class:`ImageError`."""
        return decode_image(self.paths[index], self.size)


@dataclass
class ImageSet:
    """Images with what is known about each.

    Attributes
    ----------
    images
        uint8 (N, 3, S, S), or :class:`LazyImages` of length N.
    paths
        N names: the file, or for instance ``"cifar10/test/00012"``.
    labels
        int64 (N,), -1 where an image has no label; ``None`` when none has.
    classes
        The name of each label.
    failed
        (path, reason) of every image that could not be decoded. In memory these are no longer among the N;
        a lazy set learns of them when it is read.
    """

    images: Tensor | LazyImages
    paths: list[str]
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def __post_init__(self) -> None:
        if len(self.images) != len(self.paths) or (self.labels is not None and len(self.labels) != len(self)):
            raise ValueError(
                f"images, paths and labels differ in length: {len(self.images)}, {len(self.paths)}, "
                f"{None if self.labels is None else len(self.labels)}"
            )

    @property
    def image_size(self) -> int:
        """Side S of the images in pixels."""
        return self.images.size if isinstance(self.images, LazyImages) else self.images.shape[-1]

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` is a tensor."""
        return isinstance(self.images, Tensor)

    def select(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """Return the images at ``indices``, a sequence of integers or a boolean mask (N,)."""
        index = torch.as_tensor(indices)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        paths = [self.paths[i] for i in index.tolist()]
        return ImageSet(
            LazyImages(paths, self.images.size)
            if isinstance(self.images, LazyImages)
            else self.images[index],
            paths,
            None if self.labels is None else self.labels[index],
            self.classes,
            list(self.failed),
        )

    def labels_at(self, indices: Tensor) -> Tensor:
        """Return the labels of the images at ``indices``; raises ``ValueError`` when there are no labels."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self.labels[indices]

    def labelled(self) -> ImageSet:
        """Return the images that have a label; raises ``ValueError`` when none has."""
        if self.labels is None or not bool((self.labels >= 0).any()):
            raise ValueError(
                "these images have no labels: for labels, sort a folder's images into one subfolder a class"
            )
        mask = self.labels >= 0
        return self if bool(mask.all()) else self.select(mask)

    def class_index(self, which: str | int) -> int:
        """Return the label of a class given by name, or by index; a name is tried first.

        Raises
        ------
        ValueError
            There is no such class; the message lists those there are.
        """
        classes = self.classes or ()
        if isinstance(which, str) and which in classes:
            return classes.index(which)
        if str(which).isdecimal() and int(which) < len(classes):
            return int(which)
        known = (
            ", ".join(f"{i}: {name}" for i, name in enumerate(classes[:100])) or "none, they are unlabelled"
        )
        raise ValueError(f"no class {which!r} in these images; classes: {known}")

    def of_class(self, which: str | int) -> ImageSet:
        """Return the images of one class (see :meth:`class_index`); raises ``ValueError`` when there are no labels."""
        label = self.class_index(which)
        mask = torch.zeros(len(self), dtype=torch.bool) if self.labels is None else self.labels == label
        if not bool(mask.any()):
            raise ValueError(f"no image of class {which!r} in this split")
        return self.select(mask)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, for evaluation and scoring.

        At most two batches of decoded images are held. Images that cannot be decoded are left out and noted in
        ``self.failed``.

        Yields
        ------
        tuple[Tensor, Tensor]
            Indices int64 (B,) into the set, and uint8 images (B, 3, S, S), B at most ``batch_size``.

        Raises
        ------
        ValueError
            If ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts = torch.arange(len(self)).split(batch_size)
        if isinstance(self.images, Tensor):
            for index in parts:
                yield index, self.images[index[0] : index[-1] + 1]
            return
        decoder = Decoded(self.images)
        with ThreadPoolExecutor(min(32, cpu_count())) as pool:
            ahead = pool.map(decoder.__getitem__, parts[0].tolist())
            for i, index in enumerate(parts):
                now = ahead
                if i + 1 < len(parts):
                    ahead = pool.map(decoder.__getitem__, parts[i + 1].tolist())
                items = list(now)
                self.add_failed([item for item in items if not isinstance(item, Tensor)])
                good = [k for k, item in enumerate(items) if isinstance(item, Tensor)]
                if good:
                    yield index[good], torch.stack([items[k] for k in good])  # type: ignore[misc]

    def add_failed(self, failed: Sequence[tuple[str, str]]) -> None:
        """Note images that could not be decoded, with one warning for each that is new."""
        known = {path for path, _ in self.failed}
        new = [(path, reason) for path, reason in failed if path not in known]
        for path, reason in new[: max(0, _WARNINGS - len(known))]:
            logger.warning("left out %s: %s", path, reason)
        if len(known) < _WARNINGS < len(known) + len(new):
            logger.warning("more images could not be decoded; the rest are left out without a line each")
        self.failed += new


class Decoded(Dataset[Any]):
    """Each image, or (path, reason) where it cannot be decoded."""

    def __init__(self, images: LazyImages) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        try:
            return self.images[index]
        except ImageError as error:
            return error.path, error.reason


def read_images(
    paths: Sequence[str],
    labels: Tensor | None,
    classes: tuple[str, ...] | None,
    image_size: int,
    *,
    residency: str = "auto",
    memory_budget: int | None = None,
) -> ImageSet:
    """Make an :class:`ImageSet` of image files, decoded once into memory where they fit.

    Parameters
    ----------
    paths, labels, classes
        As in :class:`ImageSet`.
    image_size
        Side of the decoded square.
    residency
        ``"memory"`` or ``"stream"`` (decode on every read); ``"auto"`` takes memory when the decoded images
        fit in ``memory_budget``.
    memory_budget
        Bytes; by default half of the memory that is free now.

    Raises
    ------
    ValueError
        An unknown ``residency``, or not one image could be decoded.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"unknown residency {residency!r}; known: {', '.join(RESIDENCIES)}")
    need = len(paths) * 3 * image_size**2
    budget = free_memory() // 2 if memory_budget is None else memory_budget
    in_memory = residency == "memory" or (residency == "auto" and need <= budget)
    logger.info(
        "%s of %d x %d: %.2f GB decoded, %.2f GB allowed: %s (residency %s)",
        *(counted(len(paths)), image_size, image_size, need / 1e9, budget / 1e9),
        *("decoded into memory" if in_memory else "decoded when read", residency),
    )
    if not in_memory:
        return ImageSet(LazyImages(paths, image_size), list(paths), labels, classes)

    images = torch.empty((len(paths), 3, image_size, image_size), dtype=torch.uint8)

    def decode(i: int) -> str | None:
        try:
            images[i] = decode_image(paths[i], image_size)
        except ImageError as error:
            return error.reason
        return None

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:  # Pillow decodes outside the GIL
        reasons = list(pool.map(decode, range(len(paths))))
    failed = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason is not None]
    good = [i for i, reason in enumerate(reasons) if reason is None]
    if not good:
        raise ValueError(
            f"not one of {len(paths)} images could be decoded; the first: {': '.join(failed[0])}"
        )
    if failed:
        for to, source in enumerate(good):  # close the gaps in place: a copy would double the peak memory
            if to != source:
                images[to] = images[source]
    result = ImageSet(
        images[: len(good)], [paths[i] for i in good], None if labels is None else labels[good], classes
    )
    result.add_failed(failed)
    return result


def counted(images: int) -> str:
    """``1 image``, ``2 images``: for the log."""
    return f"{images} image{'s' * (images != 1)}"


def free_memory() -> int:
    """Bytes of memory that this process can still take, as far as the system tells."""
    free = 4 << 30
    try:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")  # a container's own limit; "max" (not a number) when it has none
        free = min(
            free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        )
    except (OSError, ValueError, AttributeError, StopIteration):
        pass  # the best answer so far
    return max(free, 0)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
