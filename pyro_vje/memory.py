"""When memory is too small: scoring goes on with fewer images at once, training says how many would fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger("pyro_vje")

T = TypeVar("T")


class BatchTooLarge(MemoryError):
    """A batch does not fit in the device's memory; the message says which one would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left; on the CPU, PyTorch has no exception type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class InParts(Generic[T]):
    """Calls a function of a batch on as many of its rows at once as the memory holds: first all, then half of them.

    For functions that treat each row by itself, so that only the time depends on the parts.

    Parameters
    ----------
    function : callable
        From ``(B, ...)`` to anything.
    """

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self.function = function
        self.most = sys.maxsize

    def __call__(self, batch: Tensor) -> list[T]:
        """Results of the parts, in order.

        Raises
        ------
        BatchTooLarge
            If there is no memory for a single row.
        """
        done: list[T] = []
        while len(batch):
            part = batch[: self.most]
            try:
                done.append(self.function(part))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                batch = batch[self.most :]
                continue
            # Outside of "except", where the error would keep the tensors of the attempt alive.
            if len(part) == 1:
                raise BatchTooLarge(
                    f"not even one image fits in the memory of {batch.device}: free some of it"
                )
            self.most = len(part) // 2
            log.warning(
                "%d images do not fit in the memory of %s: going on with %d at once (--batch-size)",
                *(len(part), batch.device, self.most),
            )
        return done


def largest_that_fits(attempt: Callable[[int], None], size: int, step: int = 1) -> int:
    """The first of size / 2, size / 4, ..., as multiples of ``step``, at which ``attempt`` succeeds; or 0."""
    while size := size // 2 // step * step:
        try:
            attempt(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return size
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0
