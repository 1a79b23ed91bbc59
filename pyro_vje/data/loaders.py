"""Batches of uint8 images: from the device's memory, or decoded by worker processes.

The order of an epoch is a function of (seed, epoch) alone, so that a resumed run sees what an uninterrupted
one would have seen.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vje.data.images import ImageError
from pyro_vje.data.imageset import RESIDENCIES, ImageSet, LazyImages, free_memory

logger = logging.getLogger("pyro_vje")


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to a 63-bit seed, so that (seed, epoch) pairs give unrelated streams."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class _EpochLoader:
    """Length, order and shard of the batches; shared by both loaders.

    Parameters
    ----------
    count
        Number of images N.
    batch_size
        Of the global batch, all ranks together.
    seed
        Of the order, together with the epoch.
    device
        On which the order is drawn; a CPU and a GPU draw different ones.
    rank, world_size
        Each process takes its part, the ``rank``-th of ``world_size`` equal ones, of every global batch.
    drop_last
        Leave out the last batch when it is short. Otherwise it is kept, cut to a multiple of ``world_size``.
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
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size {batch_size} cannot be shared by world_size {world_size} processes: "
                f"take a positive multiple of {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among 0..{world_size - 1}")
        if count < world_size or (drop_last and batch_size > count):
            raise ValueError(
                f"batch_size {batch_size} is larger than the data, {count} images: "
                f"take a batch_size of at most {count}, or more images"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def _indices(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator, device=self.device)
        for batch in range(len(self)):
            whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            share = len(whole) // self.world_size
            yield whole[self.rank * share : (self.rank + 1) * share]


class ResidentLoader(_EpochLoader):
    """Shuffled batches of images that lie on the device.

    Iterating yields uint8 (batch_size / world_size, 3, S, S) on ``device``. The images are copied there once;
    each batch is read with a permutation drawn there.

    Parameters
    ----------
    images
        uint8 (N, 3, S, S).
    batch_size
        Of the global batch, all ranks together.
    seed, device, rank, world_size, drop_last
        The order is that of (seed, epoch) and of the kind of device; rank r takes the r-th part of each
        global batch; a short last batch is left out, or cut to a multiple of ``world_size``.

    Raises
    ------
    ValueError
        The batch is larger than the data, or is not a multiple of ``world_size``.
    """

    def __init__(self, images: Tensor, batch_size: int, **arguments: Any) -> None:
        super().__init__(len(images), batch_size, **arguments)
        self.images = images.to(self.device)

    def __iter__(self) -> Iterator[Tensor]:
        for index in self._indices():
            yield self.images[index]
