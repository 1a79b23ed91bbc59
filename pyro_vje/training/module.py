"""A step of pretraining as a Lightning module: views, the objective, its random draws, the means of an epoch."""

import copy
import importlib
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import lightning
import numpy as np
import pyro
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader

from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, TwoViews, derive_seed, make_loader
from pyro_vje.model import VJE, SymmetricELBO, own_objective
from pyro_vje.model.vje import Views
from pyro_vje.training.distributed import GlobalNoise

HEAD_LR = 1e-3  # of AdamW, for a head on cached features
# Of Lightning's trainer.
QUIET: Any = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
PART_EVERY = 5
"""Steps between readings of the objective's parts: they cost a second evaluation of the likelihood."""


class Pretraining(lightning.LightningModule):
    """VJE pretraining: views of each image, the symmetric ELBO, an optimiser with a cosine schedule.

    ``train_set`` are images, of which ``views`` draws the views; or ``(N, V, feature_dim)``, what a frozen encoder
    has made of V views of each. All random draws of a step (views, latents) are functions of (seed, step), so a resumed
    run draws what an uninterrupted one would, and several processes draw what one would for their global batch.
    """

    def __init__(
        self, vje: VJE, config: TrainConfig, train_set: ImageSet | Tensor, views: TwoViews | None = None
    ) -> None:
        super().__init__()
        settings: Any = {"kl_weight": config.kl_weight, "analytic_kl": config.analytic_kl}
        several = config.num_particles > 1
        self.objective = SymmetricELBO(config.num_particles, vectorize_particles=several, **settings)
        self.elbo = self.objective(vje.model, vje.guide)
        self.own_objective = own_objective(config.objective)
        self.config, self.train_set, self.views = config, train_set, views
        full = views if config.local_views else None
        self.local = full and full.local(config.local_size or full.image_size // 2)
        self.target = None if config.ema is None else copy.deepcopy(vje).requires_grad_(False)
        self.batch_size = config.batch_size or 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.begun = self._validated = False
        self.first_loss = torch.tensor(math.inf)

    @property
    def vje(self) -> VJE:
        """The model being trained, which the ELBO module owns."""
        return self.elbo.vje  # type: ignore[return-value]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of uint8 images ``(B, 3, H, W)``, or of cached features ``(B, V, feature_dim)``, in nats an image."""
        rank, world_size = self.global_rank, self.trainer.world_size
        generator = self._seeded_generator(batch.device)
        given: list[Tensor] = []
        if self.config.rotations:
            # Each image lies in one of its turns: as good as all four in a step, by a quarter of the passes.
            drawn = torch.randint(4, (world_size, len(batch)), generator=generator, device=batch.device)
            given = [turns := drawn[rank]]
            turned = torch.stack([batch.rot90(quarters, (-2, -1)) for quarters in range(4)])
            batch = turned[turns, torch.arange(len(batch), device=batch.device)]
        views = self._draw_views(batch, generator, rank=rank, world_size=world_size)
        noise: GlobalNoise | nullcontext[None] = nullcontext()
        if world_size > 1:  # from the seed of the only process's latents, see below
            generator.manual_seed(derive_seed("latents", self.config.seed, self.global_step, 0))
            noise = GlobalNoise(generator, rank, world_size)
        self.objective.monitor = self._record_parts if batch_idx % PART_EVERY == 0 else None
        # Validation reads back from the device at every site; the shapes it checks do not change after step one.
        with pyro.validation_enabled(not self._validated), noise:
            own = self.own_objective
            loss = self.elbo(views, *given) if own is None else own(self.vje, views)
        self._validated = True
        self._add("loss", loss.detach())
        if self.global_step == 0:
            self.first_loss = loss.detach()
        # Nats a dimension keep one learning rate right for every D: the likelihood's gradient grows with D.
        return loss / self.vje.embedding_dim

    def _draw_views(self, batch: Tensor, generator: torch.Generator, **share: int) -> Views:
        """What the objective is given: views, or pairs where features or another network's targets are."""
        if self.views is None:
            return self.vje.pair(_some_of(batch, self.config.views, generator))
        how: dict[str, Any] = share
        full = self.views(batch, generator, num_views=self.config.views, **how)
        views: Views = full
        if self.local is not None:
            views = [*full, *self.local(batch, generator, num_views=self.config.local_views, **how)]
        if self.target is None:
            return views
        with torch.no_grad():
            targets = self.target.embed(full.flatten(0, 1)).unflatten(0, full.shape[:2])
        return self.vje.encode_views(views, targets)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser, with decay on matrices and kernels, after warm-up and cosine but for a constant predictor."""
        config = self.config
        lr = HEAD_LR if config.frozen else (config.lr or 0.0) * self.batch_size / 256
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.vje.named_parameters():
            if parameter.requires_grad:
                fixed = config.predictor_lr == "constant" and name.startswith("posterior_network.")
                which = (name.startswith("encoder."), parameter.dim() > 1, fixed)
                groups.setdefault(which, []).append(parameter)
        rates = {False: lr, True: lr * (config.encoder_lr_scale or 0.0)}
        named: list[Any] = [
            {"params": groups[which], "lr": rates[which[0]], "weight_decay": config.weight_decay * which[1]}
            for which in sorted(groups)  # whether of the encoder, and whether decayed
        ]
        optimizer = find_optimizer(config)(named)
        steps_per_epoch = len(self.train_set) // self.batch_size
        warmup = round((config.warmup_epochs or 0) * steps_per_epoch)
        total = (config.epochs or 1) * steps_per_epoch

        def schedule(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        schedules = [(lambda step: 1.0) if fixed else schedule for _, _, fixed in sorted(groups)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_end(self, *_: Any) -> None:
        """Let the target network follow."""
        if self.target is not None:
            with torch.no_grad():
                for slow, fast in zip(self.target.parameters(), self.vje.parameters(), strict=True):
                    slow.lerp_(fast, 1 - (self.config.ema or 0.0))

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's share of every global batch, in the order of (seed, epoch)."""
        loader = make_loader(
            self.train_set,
            self.batch_size,
            # Cached features are a mapped file.
            residency="stream" if isinstance(self.train_set, Tensor) else self.config.residency,
            num_workers=self.config.workers,
            device=self.device,
            seed=self.config.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )
        order: Any = loader.batch_sampler
        # Where the run goes on; workers read ahead from here, before an epoch is begun.
        order.epoch, order.start = divmod(self.global_step, len(order))
        return loader

    def on_train_epoch_start(self) -> None:
        """Choose the epoch's order."""
        self.begun = True
        self.trainer.train_dataloader.batch_sampler.set_epoch(self.current_epoch)  # type: ignore[union-attr]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        """Note what could not be decoded; ``ValueError`` if nothing could."""
        images, failed = batch
        if failed:
            known: Any = self.train_set
            known.add_failed(failed)
            if len(failed) == len(known):
                raise ValueError(f"not one of {len(known)} images could be decoded; {': '.join(failed[0])}")
        return images

    def _seeded_generator(self, device: torch.device) -> torch.Generator:
        step, cuda = (self.config.seed, self.global_step), device.type == "cuda"
        # Only the device's own generator: torch.manual_seed visits every backend, a millisecond a step.
        own = torch.cuda.default_generators[device.index or 0] if cuda else torch.default_generator
        own.manual_seed(derive_seed("latents", *step, self.global_rank))
        # An encoder of the user's own may draw from these.
        random.seed(derive_seed("python", *step, self.global_rank))
        np.random.seed(derive_seed("numpy", *step, self.global_rank) % 2**32)  # noqa: NPY002
        # Equal on every rank: the views of a global batch do not depend on how many processes share it.
        return torch.Generator(device).manual_seed(derive_seed("views", *step))

    def _record_parts(self, model_trace: Trace, guide_trace: Trace) -> None:
        target: Any = model_trace.nodes["target"]["value"]
        likelihood: Any = model_trace.nodes["target"]["fn"]
        latents: list[Any] = [trace.nodes["z"]["fn"] for trace in (guide_trace, model_trace)]
        self._add("kl", kl_divergence(*latents).mean())
        self._add("log_likelihood", likelihood.log_prob(target).mean())
        if hasattr(likelihood, "log_prob_direction"):
            self._add("log_direction", likelihood.log_prob_direction(target).mean())
            self._add("log_radius", likelihood.log_prob_radius(target.norm(dim=-1)).mean())

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value.clone()
        self.counts[name] = self.counts.get(name, 0) + 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of the epoch that is under way, a row for each process."""
        if self.sums:
            rows = cast(Tensor, self.all_gather(torch.stack(list(self.sums.values()))))
            checkpoint["sums"] = (list(self.sums), rows.reshape(-1, len(self.sums)).cpu(), self.counts)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take this process's sums; with another number of processes, the mean."""
        names, rows, self.counts = checkpoint.get("sums", ([], torch.empty(1, 0), {}))
        mine = rows[self.global_rank] if len(rows) == self.trainer.world_size else rows.mean(0)
        self.sums = dict(zip(names, mine, strict=True))

    def epoch_means(self) -> dict[str, float]:
        """Means over all processes since the last call: the one place that reads back from the device."""
        names, means = list(self.sums), [value / self.counts[name] for name, value in self.sums.items()]
        self.sums, self.counts = {}, {}
        return dict(zip(names, self.trainer.strategy.reduce(torch.stack(means)).tolist(), strict=True))


def find_optimizer(config: TrainConfig) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    """What makes a run's optimiser of groups of parameters; ``ValueError`` where timm, which has LARS, is missing."""
    if config.optimizer == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    if config.optimizer != "lars":
        return partial(torch.optim.SGD, momentum=0.9, fused=True)
    if not find_spec("timm"):
        how = "pip install 'pyro-vje[pretrained]', or choose sgd or adamw"
        raise ValueError(f"the optimizer lars is timm's: {how}")
    lars: Any = importlib.import_module("timm.optim").Lars
    return partial(lars, momentum=0.9)


def _some_of(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Different views ``(count, B, F)`` of each image, drawn from its ``(B, V, F)``."""
    batch, views, _ = features.shape
    drawn = torch.rand(batch, views, generator=generator, device=features.device).argsort(1)[:, :count]
    return features[torch.arange(batch, device=features.device)[:, None], drawn].transpose(0, 1)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints and its own deprecations off the user's screen."""
    before = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    for name in before:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
