"""Batches of uint8 images, from memory or worker processes; an epoch's order is a function of (seed, epoch) alone."""

import hashlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_vje.data.imageset import Decoded, ImageSet, LazyImages, check_residency, free_memory

logger = logging.getLogger("pyro_vje")


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit seed, so that (seed, epoch) pairs give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def check_batch(batch_size: int, count: int, processes: int = 1) -> None:
    """Raise ``ValueError`` unless the images make a batch, in equal shares for the processes."""
    why = ""
    if batch_size < 1 or batch_size % processes:  # gradients and statistics are averaged over equal shares
        why = f"cannot be shared equally by {processes} processes: choose a multiple of {processes}"
    elif batch_size > count:
        why = f"is larger than the data, {count} images: choose at most {count}"
    if why:
        raise ValueError(f"batch_size {batch_size} {why}")


class _EpochLoader:
    """Length, order and shard of the batches; a last one that would be short is left out.

    ``batch_size`` counts the images of all ranks together; each takes the ``rank``-th of ``world_size`` equal parts of
    every batch. A CPU and a GPU draw different orders, hence the ``device``.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int = 0, device: Any = "cpu", rank: int = 0, world_size: int = 1
    ) -> None:
        check_batch(batch_size, n, world_size)
        self.count, self.batch_size, self.seed, self.device = n, batch_size, seed, torch.device(device)
        self.rank, self.share = rank, batch_size // world_size
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
        for batch in range(self.taken, len(self)):
            yield order[batch * self.batch_size + self.rank * self.share :][: self.share]


class ResidentLoader(_EpochLoader):
    """Shuffled batches, uint8 (batch_size / world_size, 3, S, S), of images that were copied to ``device`` once."""

    def __init__(self, images: Tensor, batch_size: int, **order: Any) -> None:
        super().__init__(len(images), batch_size, **order)
        self.images = images.to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        self.taken, self._start = self._start, 0
        for index in self._indices():
            self.taken += 1
            yield self.images[index]


class StreamingLoader(_EpochLoader):
    """Shuffled batches of :class:`LazyImages` that ``num_workers`` processes (0: this one) decode ahead of their use.

    They lie in host memory, pinned where there is a GPU, in the order of a :class:`ResidentLoader` on a CPU. In the
    place of an image that cannot be decoded stands another one of its batch; it is noted in ``image_set.failed``.
    """

    def __init__(self, image_set: ImageSet, batch_size: int, *, num_workers: int = 0, **order: Any) -> None:
        super().__init__(len(image_set), batch_size, **order)
        if not isinstance(image_set.images, LazyImages):
            raise ValueError("these images are in memory already: take ResidentLoader, or make_loader")
        self.image_set = image_set
        workers = {"num_workers": num_workers, "persistent_workers": True, "prefetch_factor": 4}
        how: dict[str, Any] = {"pin_memory": torch.cuda.is_available(), **(workers if num_workers else {})}
        # A circle would leave the workers to the garbage collector, which waits five seconds for each.
        order_now, decoded = _EpochBatches(weakref.proxy(self)), Decoded(image_set.images)
        self._batches = DataLoader(decoded, batch_sampler=order_now, collate_fn=_collate, **how)

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
    image_set: ImageSet, batch_size: int, residency: str = "auto", num_workers: int = 0, **order: Any
) -> ResidentLoader | StreamingLoader:
    """Choose the loader for a set of images, in batches of ``batch_size`` over all processes, and log the choice.

    Images in memory lie on the training ``device`` where ``residency`` says ``"memory"``, or ``"auto"`` and they take
    at most half of what is free; else in host memory. A lazy set is decoded by ``num_workers`` processes (0: this one).
    ``order``: ``device``, ``seed``, ``rank``, ``world_size``. ``ValueError``: no batch, or no equal parts of one.
    """
    check_residency(residency)
    device = torch.device(order.pop("device", "cpu"))
    if isinstance(image_set.images, LazyImages):
        if residency == "memory":
            raise ValueError("these images are decoded when read: load them with residency='memory' first")
        logger.debug("%d images: decoded by %d worker processes when read", len(image_set), num_workers)
        return StreamingLoader(image_set, batch_size, num_workers=num_workers, **order)
    need = image_set.images.nbytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    on_device = residency == "memory" or (residency == "auto" and need <= free // 2)
    place = device if on_device else torch.device("cpu")
    sizes = (len(image_set), need / 1e9, place, device, free / 1e9)
    logger.debug("%d images, %.2f GB, in the memory of %s (free on %s: %.2f GB)", *sizes)
    return ResidentLoader(image_set.images, batch_size, device=place, **order)


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
