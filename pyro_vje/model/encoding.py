"""Running a model over a set of images: features, embeddings and posteriors, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vje.model.vje import VJE
from pyro_vje.progress import Progress, clear_line


class Images(Protocol):
    """What is asked of a set of images: `pyro_vje.data.ImageSet` is one."""

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and uint8 images ``(B, 3, S, S)`` of those that can be decoded, in order."""


View = Callable[[Tensor], Tensor]  # uint8 images to what the encoder takes: `pyro_vje.data.CleanView`


class Encoded(NamedTuple):
    """What a model says of N images, all float32: embeddings, and the posterior given each."""

    embeddings: Tensor  # (N, D), as are loc and scale
    loc: Tensor
    scale: Tensor
    features: Any = None  # the encoder's, (N, F), where it was run
    indices: Any = None  # int64 (N,), positions in the image set: one that could not be decoded is missing
    log_rotation: Any = None  # (N,), of a model with rotations: `VJE.log_rotation`

    def to(self, device: str | torch.device) -> Encoded:
        """The same on another device."""
        return Encoded._make(None if x is None else x.to(device) for x in self)

    def split(self, count: int) -> Iterator[Encoded]:
        """Parts of at most ``count`` images."""
        return map(Encoded, *(repeat(None) if x is None else x.split(count) for x in self))

    @staticmethod
    def cat(parts: Sequence[Encoded]) -> Encoded:
        """The images of all parts, and what each of them has."""
        columns = zip(*parts, strict=True)
        return Encoded._make(None if any(x is None for x in part) else torch.cat(part) for part in columns)


def cpu_rows(side: int) -> int:
    """Images of ``side`` pixels in every pass of the encoder on a CPU: fewer are filled up, and more are no faster."""
    return max(8, min(128, 2**17 // side**2))


def in_equal_parts(function: Callable[..., Sequence[Tensor]], *tensors: Tensor, rows: int) -> list[Tensor]:
    """``function`` of tensors, one row an image, on a CPU ``rows`` at a time, the last ones filled up.

    Kernels choose their order of summation by the shape of their input: in batches of one shape an image comes out the
    same in its last digits, whatever its neighbours.
    """
    if tensors[0].device.type != "cpu":
        return list(function(*tensors))
    count = len(tensors[0])
    missing = -count % rows
    if missing:
        tensors = tuple(torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in tensors)
    parts = [function(*part) for part in zip(*(x.split(rows) for x in tensors), strict=True)]
    return [torch.cat(column)[:count] for column in zip(*parts, strict=True)]


def images_at_once(images: Images, batch_size: int, device: torch.device) -> int:
    """How many images to read at a time so that every pass of the encoder is full."""
    rows = cpu_rows(images.image_size) if device.type == "cpu" else 1
    return -(-batch_size // rows) * rows


def head(vje: VJE, features: Tensor) -> tuple[Tensor, ...]:
    """Embeddings, loc and scale, ``(N, D)`` each, of the encoder's features ``(N, F)``."""
    embeddings = vje.project(features)
    return embeddings, *vje.posterior(embeddings)


def encode_images(vje: VJE, view: View, images: Tensor, *, turns: bool = False) -> Encoded:
    """`encode_batches` of one batch ``(N, 3, S, S)`` on the model's device, in one pass, or four with ``turns``."""
    features = vje.features(view(images))
    encoded = Encoded(*head(vje, features))._replace(features=features)
    if not (turns and vje.rotations):
        return encoded
    turned = (view(images.rot90(quarters, (-2, -1))) for quarters in (1, 2, 3))
    locs = [encoded.loc, *(vje.posterior(vje.embed(each))[0] for each in turned)]
    return encoded._replace(log_rotation=vje.log_rotation(locs))


def encode_batches(
    vje: VJE, images: Images, view: View, *, batch_size: int = 256, turns: bool = False
) -> Iterator[Encoded]:
    """Encode clean images in order, a batch at a time, in evaluation mode and float32; results stay on the device.

    On a CPU they do not depend on ``batch_size``, which is raised to a multiple of `cpu_rows`, nor on the other images.
    With ``turns`` four turns of each image are encoded too, for `VJE.log_rotation`, by a model that has rotations.
    """

    def forward(batch: Tensor) -> list[Tensor]:
        return [x for x in encode_images(vje, view, batch, turns=turns) if x is not None]

    @torch.no_grad()
    def run(batch: Tensor) -> list[Tensor]:
        return in_equal_parts(forward, batch.to(vje.device), rows=cpu_rows(batch.shape[-1]))

    was_training = vje.training
    vje.eval()
    try:
        for indices, batch in images.batches(images_at_once(images, batch_size, vje.device)):
            embeddings, loc, scale, features, *log_rotation = run(batch)
            yield Encoded(embeddings, loc, scale, features, indices, *log_rotation)
    finally:
        vje.train(was_training)


def encode(vje: VJE, images: Images, view: View, *, batch_size: int = 256, turns: bool = False) -> Encoded:
    """`encode_batches` of all ``images``, collected on the CPU; ``ValueError`` if none could be decoded."""
    parts, progress = [], Progress("encoding", len(images))
    for batch in encode_batches(vje, images, view, batch_size=batch_size, turns=turns):
        parts.append(batch.to("cpu"))
        progress.add(len(batch.indices))
    clear_line()
    if not parts:
        raise ValueError("no image could be encoded: not one of them could be decoded")
    return Encoded.cat(parts)


@torch.no_grad()
def encode_features(vje: VJE, features: Tensor) -> Encoded:
    """What a model says, on its device, of images whose encoder's features ``(N, F)`` are at hand."""
    features, was_training = features.to(vje.device), vje.training
    vje.eval()
    parts = in_equal_parts(partial(head, vje), features, rows=128)
    vje.train(was_training)
    embeddings, loc, scale = parts
    return Encoded(embeddings, loc, scale, features, torch.arange(len(features)))
