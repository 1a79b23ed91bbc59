"""Pretraining: a Lightning module around the symmetric ELBO, and `train`, which leaves a run folder behind."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import pickle
import random
import shutil
import signal
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import lightning
import numpy as np
import pyro
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pyro.distributions import Independent
from pyro.poutine import Trace
from torch import Tensor

from pyro_vje.checkpoints import AtomicCheckpointIO, Checkpoints, StoppedTraining
from pyro_vje.config import TrainConfig
from pyro_vje.data import (
    ImageSet,
    ResidentLoader,
    StreamingLoader,
    derive_seed,
    load_dataset,
    make_loader,
    views_for,
)
from pyro_vje.distributed import CPUSyncBatchNorm, GlobalNoise
from pyro_vje.encoding import encode
from pyro_vje.files import LOCK, check_form, is_begun, locked, write_json
from pyro_vje.interruption import (
    Interrupted,
    StopRequest,
    follow_parent,
    raise_interrupted,
    restored_handlers,
)
from pyro_vje.memory import BatchTooLarge, is_out_of_memory, largest_that_fits
from pyro_vje.model import VJE
from pyro_vje.monitoring import MONITOR_TEST, MONITOR_TRAIN, EpochReport, evenly_spread
from pyro_vje.objective import ELBO, SymmetricELBO, own_objective
from pyro_vje.runs import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    REFERENCE,
    WEIGHTS,
    RunInfo,
    build_model,
    check_state,
    describe_run,
    deterministic_kernels,
    read_info,
    save_posteriors,
    save_weights,
)

log = logging.getLogger("pyro_vje")

LAST = "last.ckpt"
REFERENCE_IMAGES = 10_000
"""At most: 15 MB at D = 128, and a density over them costs less than an encoder's pass."""
PART_EVERY = 5
"""Steps between readings of the objective's parts: they cost a second evaluation of the likelihood."""


class Pretraining(lightning.LightningModule):
    """VJE pretraining as a Lightning module: views, symmetric ELBO, SGD with a cosine schedule.

    All random draws of a step (views, latents) are functions of (seed, step), so a resumed run draws what an
    uninterrupted one would, and several processes draw what one would for their global batch.

    Parameters
    ----------
    vje : VJE
        The model to train.
    config : TrainConfig
        Resolved settings.
    train_set : ImageSet
        The images.
    """

    def __init__(self, vje: VJE, config: TrainConfig, train_set: ImageSet) -> None:
        super().__init__()
        self.objective = SymmetricELBO(config.num_particles, vectorize_particles=config.num_particles > 1)
        self.elbo = self.objective(vje.model, vje.guide)
        self.own_objective = own_objective(config.objective)
        self.config = config
        self.train_set = train_set
        self.views, _ = views_for(config.dataset, train_set.image_size)
        self.batch_size = config.batch_size or 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.begun = False
        self.first_loss = torch.tensor(math.inf)
        self._generator: torch.Generator | None = None
        self._validated = False

    @property
    def vje(self) -> VJE:
        """The model being trained, which the ELBO module owns."""
        return self.elbo.vje  # type: ignore[return-value]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum; decay on matrices and kernels only; linear warm-up, then cosine to zero."""
        parameters = [p for p in self.vje.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        lr = self.config.lr * self.batch_size / 256
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
        steps_per_epoch = len(self.train_set) // self.batch_size
        warmup = round((self.config.warmup_epochs or 0) * steps_per_epoch)
        total = (self.config.epochs or 1) * steps_per_epoch

        def schedule(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> ResidentLoader | StreamingLoader:
        """This process's share of every global batch, in the order of (seed, epoch)."""
        return make_loader(
            self.train_set,
            self.batch_size,
            device=self.device,
            residency=self.config.residency if self.train_set.in_memory else "auto",
            num_workers=self.config.workers,
            seed=self.config.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
        )

    def on_train_epoch_start(self) -> None:
        """Choose the epoch's order, also after resuming."""
        self.begun = True
        self.trainer.train_dataloader.set_epoch(self.current_epoch)  # type: ignore[union-attr]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of a uint8 image batch ``(B, 3, H, W)``, in nats an image."""
        rank, world_size = self.global_rank, self.trainer.world_size
        generator = self._seeded_generator(batch.device)
        views = self.views(batch, generator, rank=rank, world_size=world_size)
        noise: GlobalNoise | nullcontext[None] = nullcontext()
        if world_size > 1:  # from the seed of the only process's latents, see below
            generator.manual_seed(derive_seed("latents", self.config.seed, self.global_step, 0))
            noise = GlobalNoise(generator, rank, world_size)
        self.objective.monitor = self._record_parts if batch_idx % PART_EVERY == 0 else None
        # Validation reads back from the device at every site; the shapes it checks do not change after step one.
        with pyro.validation_enabled(not self._validated), noise:
            loss = self.elbo(views) if self.own_objective is None else self.own_objective(self.vje, views)
        self._validated = True
        self._add("loss", loss.detach())
        if self.global_step == 0:
            self.first_loss = loss.detach()
        if batch_idx % PART_EVERY == 0 and self.trainer.progress_bar_callback is not None:
            for name in ("loss", "log_direction", "log_radius", "kl"):
                if name in self.sums:
                    self.log(
                        name.removeprefix("log_"),
                        self.sums[name] / self.counts[name],
                        prog_bar=True,
                        logger=False,
                    )
        # Nats a dimension keep one learning rate right for every D: the likelihood's gradient grows with D.
        return loss / self.vje.embedding_dim

    def _seeded_generator(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device)
        step = (self.config.seed, self.global_step)
        # Only the device's own generator: torch.manual_seed visits every backend, a millisecond a step.
        latents = (
            torch.cuda.default_generators[device.index or 0]
            if device.type == "cuda"
            else torch.default_generator
        )
        latents.manual_seed(derive_seed("latents", *step, self.global_rank))
        # An encoder of the user's own may draw from these.
        random.seed(derive_seed("python", *step, self.global_rank))
        np.random.seed(derive_seed("numpy", *step, self.global_rank) % 2**32)  # noqa: NPY002
        # Equal on every rank: the views of a global batch do not depend on how many processes share it.
        return self._generator.manual_seed(derive_seed("views", *step))

    def _record_parts(self, model_trace: Trace, guide_trace: Trace) -> None:
        posterior = cast(Independent, guide_trace.nodes["z"]["fn"]).base_dist
        target, likelihood = (
            model_trace.nodes["target"]["value"],
            cast(Any, model_trace.nodes["target"]["fn"]),
        )
        kl = 0.5 * (posterior.variance + posterior.mean**2 - 1 - posterior.variance.log()).sum(-1)
        self._add("kl", kl.mean())
        self._add("log_likelihood", likelihood.log_prob(target).mean())
        if hasattr(likelihood, "log_prob_direction"):
            self._add("log_direction", likelihood.log_prob_direction(target).mean())
            radius = torch.linalg.vector_norm(target, dim=-1)
            self._add("log_radius", likelihood.log_prob_radius(radius).mean())

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
        means = torch.stack([value / self.counts[name] for name, value in self.sums.items()])
        names = list(self.sums)
        self.sums, self.counts = {}, {}
        # Equal shares of every batch: the mean over the processes is that over all images.
        return dict(zip(names, self.trainer.strategy.reduce(means).tolist(), strict=True))


def _load_split(config: TrainConfig, split: str, image_size: int | None) -> ImageSet:
    return load_dataset(
        config.dataset,
        config.data_dir,
        split,
        image_size=image_size,
        download=config.download,
        residency=config.residency,
    )


def load_train_set(config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """Load the images that a run with these (resolved) settings pretrains on, and those it keeps out (`hold_out`).

    Raises
    ------
    ValueError, FileNotFoundError
        If there is no such data set or class, or it has fewer images than a batch.
    """
    train_set = _load_split(config, "pretrain", config.image_size)
    if config.normal_class is not None:
        train_set = train_set.of_class(config.normal_class)
    train_set, held_out = hold_out(train_set, config)
    if len(train_set) < (config.batch_size or 0):
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the data, {len(train_set)} images: "
            f"choose at most {len(train_set)}"
        )
    processes = config.devices * _machines()
    if (config.batch_size or 0) % processes:
        # Gradients and batch statistics are averaged over the processes, which is right for equal shares.
        raise ValueError(
            f"batch_size {config.batch_size} cannot be shared equally by {processes} processes: "
            f"choose a multiple of {processes}"
        )
    return train_set, held_out


def train(
    config: TrainConfig, out: str | Path | None = None, *, resume: bool = False, overwrite: bool = False
) -> Path:
    """Pretrain a model and leave a run folder behind.

    Parameters
    ----------
    config : TrainConfig
        Settings; unset ones take the data set's defaults.
    out : path, optional
        The run folder; by default ``runs/<dataset>-<number>``.
    resume : bool
        Go on from the last checkpoint in ``out``, or from the beginning where there is none yet, with the settings
        stored there: the run ends as if it had never been interrupted.
    overwrite : bool
        Replace the run that ``out`` holds.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    FileExistsError
        If ``out`` already holds a run, or holds anything else, and neither flag was given.
    ValueError, FileNotFoundError
        If a setting or the data are unusable.
    BlockingIOError
        If another process is at work on ``out``.
    OSError
        If a checkpoint cannot be written; the one before stays.
    TrainingDiverged
        If the loss stops being finite; the last checkpoint stays.
    Interrupted
        On SIGINT, and on SIGTERM during the epochs: the step is finished and a checkpoint written.
    BatchTooLarge
        If the device's memory does not hold a step; the message says which batch size would fit.
    """
    unset = config.batch_size is None
    config, folder = _choose_folder(config, out, resume=resume, overwrite=overwrite)
    with ExitStack() as stack, restored_handlers(), deterministic_kernels(config.deterministic):
        try:
            if not _is_first_process():
                if "RANK" not in os.environ:  # it is Lightning that has launched it
                    follow_parent()
            elif (folder / CONFIG).is_file():
                stack.enter_context(locked(folder))
            return _train(config, folder, stack, unset=unset, resume=resume, overwrite=overwrite)
        except KeyboardInterrupt as stop:
            how = f"--resume --out {folder} goes on"
            if not (folder / CONFIG).is_file():
                how = "nothing was written, the same command begins anew"
            raise Interrupted.after(stop, f"stopped: {how}") from None


def _train(
    config: TrainConfig, folder: Path, stack: ExitStack, *, unset: bool, resume: bool, overwrite: bool
) -> Path:
    if unset and not resume:
        train_set, held_out = load_train_set(dataclasses.replace(config, batch_size=None))
        config = config.fitted(len(train_set), config.devices * _machines())
    else:
        train_set, held_out = load_train_set(config)
    info = describe_run(config, train_set)
    vje = build_model(config, info.image_size)
    # The encoder's convolutions are fastest with channels last on every device we measured.
    vje.encoder.to(memory_format=torch.channels_last)
    if config.compile:
        vje.encoder.compile()
    precision = choose_precision(config.precision)
    log.info(
        "%s, %s; likelihood %s; %s; %d images of %d×%d pixels",
        *(
            config.encoder,
            info.stem,
            config.likelihood,
            precision,
            len(train_set),
            info.image_size,
            info.image_size,
        ),
    )
    module = Pretraining(vje, config, train_set)
    report = EpochReport(folder, train_set, _monitor_sets(config, info, train_set), info.view)
    vje.family.check(vje.embedding_dim, vje.settings)
    checkpoint = folder / CHECKPOINTS / LAST
    if resume:
        _check_resumable(folder, info, module, checkpoint)
    # Only now, with data and model at hand, is anything on disk touched.
    if _is_first_process():
        if not (folder / CONFIG).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            if not resume:  # another process may have been faster
                _refuse_existing(folder, overwrite=overwrite)
        if overwrite:
            _empty(folder)
        write_json(folder / CONFIG, info.to_dict())
    stop = StopRequest()
    out_of_memory = False
    with _quiet_lightning():
        trainer = _trainer(folder, config, [report, Checkpoints(checkpoint, stop)], precision)
        begun = resume and checkpoint.is_file()
        try:
            trainer.fit(module, ckpt_path=checkpoint if begun else None, weights_only=True)
        except StoppedTraining:
            # The others end quietly: their launcher would take another end for a failure, and kill the first.
            if not _is_first_process():
                sys.exit(0)
        except SystemExit:  # how Lightning ends when it is interrupted
            stop.signum = stop.signum or signal.SIGINT
        except Exception as error:
            out_of_memory = is_out_of_memory(error)
            restoring = begun and not module.begun and not isinstance(error, ValueError | OSError)
            if restoring and not out_of_memory:  # a whole archive, but not what Lightning looks for in it
                raise ValueError(
                    f"{folder} cannot be gone on with ({type(error).__name__}: {error}): train anew with --overwrite"
                ) from error
            if not out_of_memory:
                raise
    if stop.signum:
        raise_interrupted(stop.signum, None)
    if out_of_memory:  # outside of "except", where the error would keep the tensors of the step alive
        fits = _batch_that_fits(module, precision, trainer.world_size)
        advice = (
            f"{fits} does (--batch-size {fits})" if fits else "nor does any smaller one: lower image_size"
        )
        raise BatchTooLarge(
            f"batch_size {config.batch_size} does not fit in the memory of {module.device}; {advice}"
        )
    if trainer.is_global_zero:
        device = next(vje.parameters()).device
        kept = {CALIBRATION: held_out, REFERENCE: reference_images(train_set, config.seed)}
        for name, images in kept.items():
            if images is not None:
                save_posteriors(folder / name, encode(vje, images, info.view, device=device).posteriors)
        save_weights(folder, vje, info)
        report.draw(vje, info.classes)
    return folder


def _batch_that_fits(module: Pretraining, precision: str, processes: int) -> int:
    """Half of the batch size, or half of that, ...: the first at which a forward and backward pass succeeds, or 0."""
    size, device = module.train_set.image_size, module.device

    def attempt(batch: int) -> None:
        module.zero_grad(set_to_none=True)
        views = torch.randn(2, batch // processes, 3, size, size, device=device)
        # Not the module, whose hooks would wait for the other processes.
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = module.objective.differentiable_loss(module.vje.model, module.vje.guide, views)
        loss.backward()

    return largest_that_fits(attempt, module.batch_size, processes)


def hold_out(images: ImageSet, config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """Split off ``config.holdout`` of the images, drawn by the run's seed; ``None`` if that is not one image."""
    count = round(config.holdout * len(images))
    if count == 0:
        return images, None
    log.info("%d of %d images are held out of training, to calibrate scores", count, len(images))
    generator = torch.Generator().manual_seed(derive_seed("holdout", config.seed))
    order = torch.randperm(len(images), generator=generator)
    return images.select(order[count:].sort().values), images.select(order[:count].sort().values)


def reference_images(train_set: ImageSet, seed: int) -> ImageSet:
    """The training images that scores compare with: all, or `REFERENCE_IMAGES` of them drawn by the run's seed."""
    if len(train_set) <= REFERENCE_IMAGES:
        return train_set
    generator = torch.Generator().manual_seed(derive_seed("reference", seed))
    order = torch.randperm(len(train_set), generator=generator)
    return train_set.select(order[:REFERENCE_IMAGES].sort().values)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints and its own deprecations off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def choose_precision(setting: str) -> Literal["32-true", "bf16-mixed"]:
    """Lightning's name of a precision setting; ``auto`` is bfloat16 autocast where the hardware multiplies in it."""
    if setting == "auto":
        if torch.cuda.is_available():
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            flags = (
                getattr(torch.cpu, name, lambda: False)
                for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            )
            supported = any(flag() for flag in flags)
        return "bf16-mixed" if supported else "32-true"
    return "bf16-mixed" if setting == "bf16" else "32-true"


def _choose_folder(
    config: TrainConfig, out: str | Path | None, *, resume: bool, overwrite: bool
) -> tuple[TrainConfig, Path]:
    """Check that the run folder may be written or resumed; return the settings to train with and the folder."""
    if out is None:
        if resume:
            raise ValueError("resuming needs the run folder to go on with: name it (--out RUN)")
        numbers = (Path("runs") / f"{config.dataset}-{number}" for number in itertools.count(1))
        out = next(path for path in numbers if not path.exists())
    folder = Path(out)
    if resume:
        return read_info(folder).config, folder
    if _is_first_process():  # when the others come, this one may have begun to fill the folder
        _refuse_existing(folder, overwrite=overwrite)
    return config.resolved(), folder


def _refuse_existing(folder: Path, *, overwrite: bool) -> None:
    if not is_begun(folder):
        return
    if not (folder / CONFIG).is_file():
        raise FileExistsError(f"{folder} exists and is no run folder: name another with --out")
    # A run that was stopped before its first checkpoint has nothing to lose.
    begun = (folder / WEIGHTS).exists() or (folder / CHECKPOINTS / LAST).exists()
    if begun and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a run: --resume goes on with it, --overwrite replaces it"
        )


def _empty(folder: Path) -> None:
    """Remove a run, but for the lock that is held, and for what makes it a run folder if this is interrupted."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, CONFIG):
            path.unlink()


def _check_resumable(folder: Path, info: RunInfo, module: Pretraining, checkpoint: Path) -> None:
    """Refuse to go on with a damaged checkpoint, or on other images than the run began with."""
    before = read_info(folder).train_images
    if before != info.train_images:
        raise ValueError(
            f"{folder} was trained on {before} images, but now there are {info.train_images}: the held-out images "
            "would no longer be those that calibrate it; restore the data, or train anew with --overwrite"
        )
    if not checkpoint.is_file():
        log.info("%s holds no checkpoint yet: from the beginning", folder)
        return
    _check_checkpoint(checkpoint, module)


def _check_checkpoint(path: Path, module: Pretraining) -> None:
    """Refuse a checkpoint that is damaged, of another model, or no checkpoint; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {broken}")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        form = {
            "state_dict": dict,
            "optimizer_states": list,
            "lr_schedulers": list,
            "loops": dict,
            "callbacks": dict,
        }
        check_form(saved, {**form, "epoch": int, "global_step": int})
        check_state(path, saved["state_dict"], module.state_dict())
        (momenta,) = saved["optimizer_states"]
        optimizer: Any = cast(dict[str, Any], module.configure_optimizers())["optimizer"]
        optimizer.load_state_dict(momenta)
        for parameter, state in optimizer.state.items():
            check_state(path, state, {"momentum_buffer": parameter})
    except pickle.UnpicklingError:  # whose text tells how to run what is in the file
        raise ValueError(
            f"{path} is no checkpoint of ours, and nothing in it was run: train anew with --overwrite"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}): train anew with --overwrite") from None


def _is_first_process() -> bool:
    """Whether no launcher has started this process as one of the others; Lightning runs the command again in each."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _machines() -> int:
    """Machines that train together, as torchrun tells its processes; ``devices`` are those of each machine."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _monitor_sets(
    config: TrainConfig, info: RunInfo, train_set: ImageSet
) -> tuple[ImageSet, ImageSet] | None:
    """Labelled training and test images for the k-NN monitor, where there are labels of two classes."""
    if not config.knn_every or config.normal_class is not None or train_set.labels is None:
        return None
    labelled = train_set.labelled()
    if labelled.labels is None or len(labelled.labels.unique()) < 2:
        return None
    test = _load_split(config, "test", info.image_size).labelled()
    return labelled.select(evenly_spread(len(labelled), MONITOR_TRAIN)), test.select(
        evenly_spread(len(test), MONITOR_TEST)
    )


def _trainer(
    folder: Path, config: TrainConfig, callbacks: list[lightning.pytorch.Callback], precision: str
) -> lightning.Trainer:
    progress = sys.stderr.isatty()
    if progress:
        callbacks.append(lightning_callbacks.TQDMProgressBar(refresh_rate=PART_EVERY))
    try:
        logger: Any = TensorBoardLogger(folder, name="", version="tensorboard")
    except ModuleNotFoundError:  # neither tensorboard nor tensorboardX is installed
        logger = False
    several = config.devices * _machines() > 1
    plugins: list[Any] = [AtomicCheckpointIO()]
    if several and not torch.cuda.is_available():
        plugins.append(CPUSyncBatchNorm())
    return lightning.Trainer(
        max_epochs=config.epochs,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.devices,
        num_nodes=_machines(),
        # A control need not use all of VJE's networks.
        strategy=("ddp" if config.objective == ELBO else "ddp_find_unused_parameters_true")
        if several
        else "auto",
        # PyTorch has synchronised batch norm for GPUs only.
        sync_batchnorm=several and torch.cuda.is_available(),
        plugins=plugins,
        precision=precision,  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=logger,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=PART_EVERY,
        num_sanity_val_steps=0,
    )
