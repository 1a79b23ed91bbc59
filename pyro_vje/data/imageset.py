"""A set of images: in memory as one uint8 tensor, or decoded one by one when asked for."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from pyro_vje.data.decode import ImageError, Source, decode_image
from pyro_vje.progress import Progress

logger = logging.getLogger("pyro_vje")

RESIDENCIES = ("auto", "memory", "stream")
_WARNINGS = 10  # damaged files named one by one in the log; all of them are in ImageSet.failed


@dataclass(frozen=True)
class LazyImages:
    """Image files that are decoded (`decode_image`) to uint8 (3, size, size) when indexed, or raise ImageError."""

    paths: Sequence[Source]
    size: int
    interpolation: str = "bilinear"
    fit: str = "crop"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self.paths[index], self.size, self.interpolation, self.fit)


@dataclass
class ImageSet:
    """Images with what is known about each; ``ValueError`` if lengths differ, or images are not uint8 (N, 3, S, S)."""

    images: Tensor | LazyImages
    """uint8 (N, 3, S, S), or :class:`LazyImages` of length N."""
    paths: list[str]
    """N names: the file, or for instance ``"cifar10/test/00012"``."""
    labels: Tensor | None = None
    """int64 (N,), -1 where an image has no label; ``None`` when none has. ``classes`` are their names."""
    classes: tuple[str, ...] | None = None
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(path, reason) of images that could not be decoded: in memory no longer of the N; lazy, when they are read."""
    root: str | None = None
    """The folder that holds all the files, where there is one."""

    def __len__(self) -> int:
        return len(self.paths)

    def __post_init__(self) -> None:
        lengths = [len(part) for part in (self.images, self.paths, self.labels) if part is not None]
        if len(set(lengths)) > 1:
            raise ValueError(f"images, paths and labels differ in length: {', '.join(map(str, lengths))}")
        if isinstance(self.images, Tensor):
            kind, shape = self.images.dtype, tuple(self.images.shape)
            if kind != torch.uint8 or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
                how = "floats in [0, 1] become it by (255 * images).round().to(torch.uint8), one grey channel by "
                how += "images.expand(-1, 3, -1, -1)"
                raise ValueError(f"images must be uint8 (N, 3, S, S), got {kind} {shape}: {how}")

    @property
    def image_size(self) -> int:
        """Side S in pixels."""
        return self.images.size if isinstance(self.images, LazyImages) else self.images.shape[-1]

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` is a tensor."""
        return isinstance(self.images, Tensor)

    @property
    def names(self) -> list[str]:
        """The paths within ``root``, with ``/`` between the folders: the same wherever the folder is moved to."""
        if self.root is None:
            return self.paths
        return [path.removeprefix(os.path.join(self.root, "")).replace(os.sep, "/") for path in self.paths]

    def fingerprint(self) -> str:
        """SHA-256 of the classes, names and file sizes, in any order: what says whether these are the same images."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for name, path in sorted(zip(self.names, self.paths, strict=True)):
            size = os.path.getsize(path) if self.root is not None and os.path.isfile(path) else -1
            digest.update(f"\0{name}\0{size}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def select(self, indices: Tensor | Sequence[int]) -> Self:
        """Return the images at ``indices``: integers, or a boolean mask (N,)."""
        index = torch.as_tensor(indices)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        paths, old = [self.paths[i] for i in index.tolist()], self.images
        chosen = old[index] if isinstance(old, Tensor) else replace(old, paths=paths)
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=chosen, paths=paths, labels=labels, failed=list(self.failed))

    def labels_at(self, indices: Tensor) -> Tensor:
        """Return the labels of the images at ``indices``; raises ``ValueError`` when there are no labels."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self.labels[indices]

    def labelled(self) -> Self:
        """Return the images that have a label; raises ``ValueError`` when none has."""
        if self.labels is None or (self.labels < 0).all():
            raise ValueError("these images have no labels: sort a folder's images into one subfolder a class")
        return self.select(self.labels >= 0)

    def class_index(self, which: str | int) -> int:
        """Return the label of a class given by name, or by index; raises ``ValueError`` if there is no such class."""
        classes = self.classes or ()
        if which in classes:
            return classes.index(str(which))
        if str(which).isdecimal() and int(which) < len(classes):
            return int(which)
        known = [f"{i}: {name}" for i, name in enumerate(classes[:100])] or ["none, they are unlabelled"]
        raise ValueError(f"no class {which!r} in these images; classes: {', '.join(known)}")

    def class_name(self, which: str | int) -> str:
        """Return the name of a class given by name or index: an index means another class in other data."""
        return (self.classes or ())[self.class_index(which)]

    def of_class(self, which: str | int) -> Self:
        """Return the images of one class (see :meth:`class_index`); raises ``ValueError`` where there are none."""
        label = self.class_index(which)
        if self.labels is None or label not in self.labels:
            raise ValueError(f"no image of class {which!r} in this split")
        return self.select(self.labels == label)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order: indices int64 (B,) into the set, and uint8 images (B, 3, S, S).

        Holds two batches of decoded images. What cannot be decoded is left out and noted in ``self.failed``.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts = torch.arange(len(self)).split(batch_size)
        if isinstance(self.images, Tensor):
            yield from zip(parts, self.images.split(batch_size), strict=True)
            return
        lazy = self.images

        def decode(index: int) -> Tensor | ImageError:
            try:
                return lazy[index]
            except ImageError as error:
                return error

        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
            ahead = pool.map(decode, parts[0].tolist())
            for index, following in zip(parts, (*parts[1:], parts[0][:0]), strict=True):
                now, ahead = ahead, pool.map(decode, following.tolist())
                items = list(now)
                self.add_failed([(item.path, item.reason) for item in items if isinstance(item, ImageError)])
                good = [isinstance(item, Tensor) for item in items]
                if any(good):
                    yield index[good], torch.stack([item for item in items if isinstance(item, Tensor)])

    def add_failed(self, failed: Sequence[tuple[str, str]]) -> None:
        """Note images that could not be decoded, with one warning for each that is new."""
        known = {path for path, _ in self.failed}
        new = [(path, reason) for path, reason in failed if path not in known]
        for path, reason in new[: max(0, _WARNINGS - len(known))]:
            logger.warning("left out %s: %s", path, reason)
        if len(known) < _WARNINGS < len(known) + len(new):
            logger.warning("more images could not be decoded; the rest are left out without a line each")
        self.failed += new


def read_images(files: ImageSet, residency: str = "auto") -> ImageSet:
    """Decode a lazy set into memory, if half of what is free holds it or ``residency`` says so, or return it as it is.

    Raises ``ValueError`` if not one image can be decoded.
    """
    count, side = len(files), files.image_size
    need, allowed = count * 3 * side**2, free_memory() // 2
    in_memory = residency == "memory" or (residency == "auto" and need <= allowed)
    what = f"{counted(count)} of {side} x {side}: {need / 1e9:.2f} GB decoded, {allowed / 1e9:.2f} GB allowed"
    logger.debug("%s: decoded %s (%s)", what, "into memory" if in_memory else "when read", residency)
    if not in_memory:
        return files
    images = torch.empty((count, 3, side, side), dtype=torch.uint8)
    good: list[int] = []
    progress = Progress("reading", count)
    for index, batch in files.batches(256):
        images[len(good) : len(good) + len(batch)] = batch
        good += index.tolist()
        progress.add(min(256, count - progress.done))
    if not good:
        first = ": ".join(files.failed[0])
        raise ValueError(f"not one of {count} images could be decoded; the first: {first}")
    labels = None if files.labels is None else files.labels[good]
    return replace(files, images=images[: len(good)], paths=[files.paths[i] for i in good], labels=labels)


def counted(images: int) -> str:
    """``1 image``, ``2 images``: for the log."""
    return f"{images} image{'s' * (images != 1)}"


def free_memory() -> int:
    """Bytes of memory that this process can still take, as far as the system tells."""
    free = 4 << 30
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):  # the best answer so far
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")  # a container's own limit; "max" (not a number) when it has none
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)
