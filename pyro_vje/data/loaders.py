"""Batches of uint8 images, from memory or worker processes; an epoch's order is a function of (seed, epoch) alone."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vje.data.decode import ImageError
from pyro_vje.data.imageset import ImageSet, LazyImages, free_memory

logger = logging.getLogger("pyro_vje")

Batch = tuple[Tensor, list[tuple[str, str]]]  # images, and (path, reason) of those that could not be decoded


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


class EpochOrder:
    """Indices of the batches of an epoch, in an order that is a function of (seed, epoch): a batch sampler.

    ``batch_size`` counts the images of all ranks together; each takes the ``rank``-th of ``world_size`` equal parts of
    every batch, and a last batch that would be short is left out. A CPU and a GPU draw different orders, hence the
    ``device``. The next pass leaves out its first ``start`` batches, which were taken before.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int = 0, device: Any = "cpu", rank: int = 0, world_size: int = 1
    ) -> None:
        check_batch(batch_size, count, world_size)
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, torch.device(device)
        self.rank, self.share = rank, batch_size // world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        generator = torch.Generator(self.device).manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator, device=self.device)
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size + self.rank * self.share :][: self.share]
            yield index if self.device.type == "cuda" else index.tolist()  # workers are sent no tensors


class Resident(Dataset[Any]):
    """Images, or features, that were copied to ``device`` once, and are taken a batch at once."""

    def __init__(self, images: Tensor, device: Any = "cpu") -> None:
        self.images = images.to(device)

    def __getitems__(self, indices: list[int] | Tensor) -> Batch:
        return self.images[indices], []


class Streamed(Dataset[Any]):
    """Images that are decoded when they are read: each, or the next one that can be (black where none can)."""

    def __init__(self, images: LazyImages) -> None:
        self.images = images

    def __getitems__(self, indices: list[int]) -> Batch:
        failed: dict[str, str] = {}
        return torch.stack([self._decodable(index, failed) for index in indices]), [*failed.items()]

    def _decodable(self, index: int, failed: dict[str, str]) -> Tensor:
        for at in range(index, index + len(self.images)):
            try:
                return self.images[at % len(self.images)]
            except ImageError as error:
                failed[error.path] = error.reason
        return torch.zeros((3, self.images.size, self.images.size), dtype=torch.uint8)


def make_loader(
    images: ImageSet | Tensor, batch_size: int, residency: str = "auto", num_workers: int = 0, **order: Any
) -> DataLoader[Any]:
    """Shuffled batches of ``batch_size`` over all processes: uint8 (B, 3, S, S), and (path, reason) of failures.

    Images in memory lie on the training ``device`` where ``residency`` says ``"memory"``, or ``"auto"`` and they take
    at most half of what is free; else in host memory. A lazy set is decoded by ``num_workers`` processes (0: this one)
    ahead of use into host memory, pinned where there is a GPU; in the place of an image that cannot be decoded stands
    the next one that can, or where none can a black one. ``order``: ``device``, ``seed``, ``rank``, ``world_size`` of
    `EpochOrder`. ``ValueError``: no batch, or no equal parts of one.
    """
    device = torch.device(order.pop("device", "cpu"))
    tensor = images.images if isinstance(images, ImageSet) else images
    how: dict[str, Any] = {"collate_fn": tuple}
    if isinstance(tensor, LazyImages):
        logger.debug("%d images: decoded by %d worker processes when read", len(tensor), num_workers)
        dataset: Dataset[Any] = Streamed(tensor)
        device = torch.device("cpu")
        how |= {"pin_memory": torch.cuda.is_available(), "num_workers": num_workers}
        how |= {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    else:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if residency != "memory" and (residency == "stream" or tensor.nbytes > free // 2):
            device = torch.device("cpu")
        sizes = (len(tensor), tensor.nbytes / 1e9, device, free / 1e9)
        logger.debug("%d images, %.2f GB, in the memory of %s (free: %.2f GB)", *sizes)
        dataset = Resident(tensor, device)
    return DataLoader(dataset, batch_sampler=EpochOrder(len(tensor), batch_size, device=device, **order), **how)
