"""Batches of uint8 images: from the device's memory, or decoded by worker processes.

The order of an epoch is a function of (seed, epoch) alone, so that a resumed run sees what an uninterrupted
one would have seen.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vje.data.imageset import RESIDENCIES, Decoded, ImageSet, LazyImages, free_memory

logger = logging.getLogger("pyro_vje")


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit seed, so that (seed, epoch) pairs give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_batch(batch_size: int, count: int, processes: int = 1) -> None:
    """Raise ``ValueError`` unless the images make a batch, in equal shares for the processes."""
    if batch_size < 1 or batch_size % processes:
        # Gradients and batch statistics are averaged over the processes, which is right for equal shares.
        raise ValueError(
            f"batch_size {batch_size} cannot be shared equally by {processes} processes: "
            f"choose a multiple of {processes}"
        )
    if batch_size > count:
        raise ValueError(
            f"batch_size {batch_size} is larger than the data, {count} images: choose at most {count}"
        )


class _EpochLoader:
    """Length, order and shard of the batches; a last one that would be short is left out.

    ``batch_size`` counts the images of all ranks together; each takes its part, the ``rank``-th of ``world_size`` equal
    ones, of every batch. A CPU and a GPU draw different orders, hence the ``device``.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batch(batch_size, count, world_size)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.epoch = self.taken = self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches that were taken."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next pass go on from there, without reading what was taken."""
        self.epoch, self._start = state_dict["epoch"], state_dict["taken"]

    def __len__(self) -> int:
        return self.count // self.batch_size

    def _indices(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator, device=self.device)
        share = self.batch_size // self.world_size
        for batch in range(self.taken, len(self)):
            start = batch * self.batch_size + self.rank * share
            yield order[start : start + share]


class ResidentLoader(_EpochLoader):
    """Shuffled batches, uint8 (batch_size / world_size, 3, S, S), of images that were copied to ``device`` once."""

    def __init__(self, images: Tensor, batch_size: int, **arguments: Any) -> None:
        super().__init__(len(images), batch_size, **arguments)
        self.images = images.to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        self.taken, self._start = self._start, 0
        for index in self._indices():
            self.taken += 1
            yield self.images[index]


class StreamingLoader(_EpochLoader):
    """Shuffled batches of :class:`LazyImages` that ``num_workers`` processes (0: this one) decode ahead of their use.

    They lie in host memory, pinned where there is a GPU, for ``batch.to(device, non_blocking=True)``; the order is that
    of a :class:`ResidentLoader` on a CPU. In the place of an image that cannot be decoded stands another one of its
    batch; it is noted in ``image_set.failed``.
    """

    def __init__(
        self, image_set: ImageSet, batch_size: int, *, num_workers: int = 0, **arguments: Any
    ) -> None:
        super().__init__(len(image_set), batch_size, **arguments)
        if not isinstance(image_set.images, LazyImages):
            raise ValueError("these images are in memory already: take ResidentLoader, or make_loader")
        self.image_set = image_set
        self._batches = DataLoader(
            Decoded(image_set.images),
            # A circle would leave the workers to the garbage collector, which waits five seconds for each.
            batch_sampler=_EpochBatches(weakref.proxy(self)),
            collate_fn=_collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=4 if num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Tensor]:
        # After resuming, from one before: it stands in for the next if that is damaged.
        before = self._start > 0
        self.taken, self._start = self._start - before, 0
        batch: Tensor | None = None
        for decoded, failed in self._batches:
            self.image_set.add_failed(failed)
            self.taken += 1
            if decoded is not None:
                batch = decoded
            elif batch is None and not before:
                raise ValueError(f"not one image of the first batch could be decoded: {failed[0]}")
            if not before:
                assert batch is not None
                yield batch  # the one before, where a whole batch is damaged: every rank makes the same steps
            before = False


def make_loader(
    image_set: ImageSet,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    residency: str = "auto",
    num_workers: int = 0,
    **arguments: Any,
) -> ResidentLoader | StreamingLoader:
    """Choose the loader for a set of images, in batches of ``batch_size`` over all processes, and log the choice.

    Parameters
    ----------
    device, residency
        Where training takes place, and whether the images of a set in memory lie there: ``"memory"`` yes, ``"stream"``
        no, ``"auto"`` if they take at most half of its free memory. Other batches lie in host memory.
    num_workers
        Processes that decode a lazy set; with 0 this one does.
    **arguments
        ``seed`` of the order; ``rank`` and ``world_size``: this process takes the ``rank``-th part of each batch.

    Raises
    ------
    ValueError
        If ``residency`` is none of these, or the batch is larger than the data or no multiple of ``world_size``.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"unknown residency {residency!r}; known: {', '.join(RESIDENCIES)}")
    device = torch.device(device)
    if isinstance(image_set.images, LazyImages):
        if residency == "memory":
            raise ValueError("these images are decoded when read: load them with residency='memory' first")
        logger.info("%d images: decoded by %d worker processes when read", len(image_set), num_workers)
        return StreamingLoader(image_set, batch_size, num_workers=num_workers, **arguments)
    need = image_set.images.nbytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    on_device = residency == "memory" or device.type == "cpu" or (residency == "auto" and need <= free // 2)
    place = device if on_device else torch.device("cpu")
    logger.info(
        "%d images, %.2f GB, in the memory of %s (free on %s: %.2f GB; residency %s)",
        *(len(image_set), need / 1e9, place, device, free / 1e9, residency),
    )
    return ResidentLoader(image_set.images, batch_size, device=place, **arguments)


class _EpochBatches:
    """The index lists of the loader's current epoch."""

    def __init__(self, loader: StreamingLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.loader._indices())


def _collate(items: list[Tensor | tuple[str, str]]) -> tuple[Tensor | None, list[tuple[str, str]]]:
    """Stack what was decoded, repeated up to the full batch, beside what failed."""
    good = [item for item in items if isinstance(item, Tensor)]
    failed = [item for item in items if not isinstance(item, Tensor)]
    batch = torch.stack([good[i % len(good)] for i in range(len(items))]) if good else None
    return batch, failed
