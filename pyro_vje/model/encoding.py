"""Running a model over a set of images: features, embeddings and posteriors, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vje.model.vje import VJE


class Images(Protocol):
    """What is asked of a set of images: `pyro_vje.data.ImageSet` is one."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and uint8 images ``(B, 3, S, S)`` of those that can be decoded, in order."""


View = Callable[[Tensor], Tensor]  # uint8 images to what the encoder takes: `pyro_vje.data.CleanView`


class Posteriors(NamedTuple):
    """Embeddings of N images and the posterior given each (or given another view of it), ``(N, D)`` each."""

    embeddings: Tensor
    loc: Tensor
    scale: Tensor

    def to(self, device: str | torch.device) -> Posteriors:
        """The same on another device."""
        return Posteriors(*(tensor.to(device) for tensor in self))

    def split(self, count: int) -> Iterator[Posteriors]:
        """Parts of at most ``count`` images."""
        return map(Posteriors, *(tensor.split(count) for tensor in self))


class Encoded(NamedTuple):
    """What a model says of N images, all float32: encoder features, embeddings, and the posterior given each.

    ``indices`` are positions in the image set; an image that could not be decoded is missing.
    """

    indices: Tensor  # int64 (N,)
    features: Tensor  # (N, F)
    embeddings: Tensor  # (N, D), as are loc and scale
    loc: Tensor
    scale: Tensor

    @property
    def posteriors(self) -> Posteriors:
        """Embeddings and posteriors without the rest."""
        return Posteriors(self.embeddings, self.loc, self.scale)


def cpu_rows(side: int) -> int:
    """Images of ``side`` pixels in every pass of the encoder on a CPU: fewer are filled up, and more are no faster."""
    return max(8, min(128, 2**17 // side**2))


def in_equal_parts(function: Callable[..., Sequence[Tensor]], *tensors: Tensor, rows: int) -> list[Tensor]:
    """``function(*tensors)``, on a CPU computed for ``rows`` rows at a time, the last ones filled up.

    Kernels choose their order of summation by the shape of their input, so that an image encoded alone or among 7
    others comes out different in its last digits. In batches of one shape it does not, whatever its neighbours.
    ``function`` takes tensors with one row an image, and returns such.
    """
    if tensors[0].device.type != "cpu":
        return list(function(*tensors))
    count = len(tensors[0])
    missing = -count % rows
    if missing:
        tensors = tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in tensors)
    parts = [function(*part) for part in zip(*(x.split(rows) for x in tensors), strict=True)]
    return [torch.cat(column)[:count] for column in zip(*parts, strict=True)]


def images_at_once(images: Images, batch_size: int, device: str | torch.device) -> int:
    """How many images to read at a time so that every pass of the encoder is full."""
    rows = cpu_rows(images.image_size) if torch.device(device).type == "cpu" else 1
    return -(-batch_size // rows) * rows


def _head(vje: VJE, features: Tensor) -> tuple[Tensor, ...]:
    embeddings = vje.project(features)
    return embeddings, *vje.posterior(embeddings)


def encode_batches(
    vje: VJE, images: Images, view: View, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Iterator[Encoded]:
    """Encode clean images in order, a batch at a time, in evaluation mode and float32; results stay on the device.

    On a CPU they do not depend on ``batch_size``, which is raised to a multiple of `cpu_rows`, nor on the other images.
    """

    def forward(batch: Tensor) -> tuple[Tensor, ...]:
        features = vje.features(view(batch))
        return features, *_head(vje, features)

    @torch.no_grad()
    def run(batch: Tensor) -> list[Tensor]:
        return in_equal_parts(forward, batch.to(device), rows=cpu_rows(batch.shape[-1]))

    was_training = vje.training
    vje.eval()
    try:
        for indices, batch in images.batches(images_at_once(images, batch_size, device)):
            yield Encoded(indices, *run(batch))
    finally:
        vje.train(was_training)


def encode(
    vje: VJE, images: Images, view: View, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Encoded:
    """Encode all of ``images``, collected on the CPU; ``ValueError`` if not one of them could be decoded."""
    batches = encode_batches(vje, images, view, batch_size=batch_size, device=device)
    parts = [[tensor.cpu() for tensor in batch] for batch in batches]
    if not parts:
        raise ValueError("no image could be encoded: not one of them could be decoded")
    return Encoded(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def encode_features(vje: VJE, features: Tensor) -> Encoded:
    """What a model says of images whose encoder's features ``(N, F)`` are at hand, on their device."""
    was_training = vje.training
    vje.eval()
    parts = in_equal_parts(partial(_head, vje), features, rows=128)
    vje.train(was_training)
    return Encoded(torch.arange(len(features)), features, *parts)
