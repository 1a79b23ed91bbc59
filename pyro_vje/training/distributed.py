"""What makes processes with equal shares of a batch compute what one would: latent noise, batch statistics."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce
from torch.distributions import Normal
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vje.distributions.numerics import at_least_float32


class GlobalNoise(Messenger):
    """Pyro handler in which a normal latent of plate ``image`` gets this process's part of the global batch's noise.

    ``generator`` is in the same state in every process. Other latents are drawn correctly, but by how many processes.
    """

    def __init__(self, generator: torch.Generator, rank: int, world_size: int) -> None:
        super().__init__()
        self.generator, self.rank, self.world_size = generator, rank, world_size

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        normal = getattr(fn, "base_dist", fn)
        frame = next((frame for frame in msg["cond_indep_stack"] if frame.name == "image"), None)
        given = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if given or frame is None or frame.dim is None or not isinstance(normal, Normal):
            return
        loc, axis = normal.loc, frame.dim - fn.event_dim
        share, shape = loc.shape[axis], list(loc.shape)
        shape[axis] = share * self.world_size
        noise = torch.empty(shape, dtype=loc.dtype, device=loc.device).normal_(generator=self.generator)
        msg["value"], msg["done"] = loc + noise.narrow(axis, self.rank * share, share) * normal.scale, True


class CPUSyncBatchNorm(LayerSync):
    """Batch norm over the global batch on CPUs, which ``SyncBatchNorm`` lacks: every process gathers all of it."""

    def apply(self, model: torch.nn.Module) -> torch.nn.Module:
        """Synchronise all batch norms of the model."""
        for module in model.modules():
            # Another forward is another computation: a user's, or one that synchronises already.
            if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
                module.forward = partial(_global_batch_norm, module)  # type: ignore[method-assign]
        return model

    def revert(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give the batch norms back the forward of their class."""
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                vars(module).pop("forward", None)
        return model


def _global_batch_norm(module: _BatchNorm, images: Tensor) -> Tensor:
    forward = type(module).forward
    if not module.training:
        return forward(module, images)
    own = at_least_float32(images)
    rank, shares = distributed.get_rank(), [torch.zeros_like(own)] * distributed.get_world_size()
    shares[rank] = own
    # Channels last, in which the encoder's convolutions are fastest.
    batch = all_reduce(torch.cat(shares).movedim(1, -1)).movedim(-1, 1)
    return forward(module, batch).narrow(0, rank * len(own), len(own)).to(images.dtype)
