"""`train`: pretrain a model, whatever interrupts it, and leave a run folder behind."""

import dataclasses
import itertools
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.plugins import environments
from lightning.pytorch.loggers import Logger
from torch import Tensor

from pyro_vje.config import TrainConfig
from pyro_vje.data import ImageSet, splits
from pyro_vje.data.datasets import say_fit
from pyro_vje.data.splits import load_train_set
from pyro_vje.launch import check_launch, is_first_process, launcher, machines
from pyro_vje.model import ELBO, VJE, build_model, encode, encode_features, own_objective, whitened_dim
from pyro_vje.model.build import refuse_unused
from pyro_vje.runs import folder as layout
from pyro_vje.runs.files import LOCK, is_begun, locked, write_json
from pyro_vje.runs.folder import CHECKPOINTS, CONFIG, RunInfo, save_weights
from pyro_vje.runs.stopping import Interrupted, StopRequest, follow_parent, restored_handlers
from pyro_vje.training import checkpoints
from pyro_vje.training.distributed import CPUSyncBatchNorm
from pyro_vje.training.features import cache_features, fit_folds, fit_whitening
from pyro_vje.training.loggers import choose_logger, close_logger, open_logger
from pyro_vje.training.module import PART_EVERY, QUIET, Pretraining, find_optimizer, quiet_lightning
from pyro_vje.training.monitor import EpochReport, level

log = logging.getLogger("pyro_vje")
_TRAINING = threading.Lock()


def train(config: TrainConfig, out: str | Path | None = None, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Pretrain a model and leave a run folder behind, whose path is returned.

    ``config`` may leave settings to the data set; ``out`` is the folder, by default ``runs/<dataset>-<number>``, and
    ``overwrite`` replaces the run that it holds. ``resume`` goes on from the last checkpoint in it, or from the
    beginning where there is none yet: the run ends as if it had never been interrupted. ``config`` must then be the one
    stored there, but for more ``epochs``, which extend the run (its learning rate follows the longer schedule from
    there on), and for what changes no number.

    Raises ``FileExistsError`` if ``out`` already holds a run, or anything else, and neither flag was given;
    ``ValueError`` or ``FileNotFoundError`` if a setting or the data are unusable, or not those of the run that is
    resumed; ``BlockingIOError`` if another process is at work on ``out``; ``OSError`` if a checkpoint cannot be
    written, and `TrainingDiverged` if the loss stops being finite: the last checkpoint stays; `Interrupted` on SIGINT,
    and on SIGTERM during the epochs: the step is finished and a checkpoint written; ``MemoryError`` if the device's
    memory does not hold a step; ``RuntimeError`` if another thread is training: Pyro has one global stack of handlers.
    """
    check_launch(config.devices)
    folder = _choose_folder(config, out, resume=resume, overwrite=overwrite)
    if not _TRAINING.acquire(blocking=False):
        raise RuntimeError("another thread is training, and Pyro knows no threads: use processes")
    try:
        with ExitStack() as stack, restored_handlers(), layout.deterministic_kernels(config.deterministic):
            if not is_first_process():
                if launcher() == "lightning":
                    follow_parent()
            elif (folder / CONFIG).is_file():
                stack.enter_context(locked(folder))
            return _train(config, folder, stack, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as stop:
        how = f"--resume --out {folder} goes on"
        if not (folder / CONFIG).is_file():
            how = "nothing was written, the same command begins anew"
        raise Interrupted.after(stop, f"stopped: {how}") from None
    finally:
        _TRAINING.release()


def _train(config: TrainConfig, folder: Path, stack: ExitStack, *, resume: bool, overwrite: bool) -> Path:
    before = layout.read_info(folder) if resume else None
    config = _to_resume(config, before, folder) if before else config.resolved()
    size, interpolation = layout.decoded_as(config)
    train_set, held_out = load_train_set(config, size, interpolation)
    if before is not None and before.fingerprint not in (None, train_set.fingerprint()):
        raise ValueError(
            f"{folder} was trained on other images ({before.train_images}, now {len(train_set)}): the held-out images "
            "would no longer be those that calibrate it; restore the data, or train anew with --overwrite"
        )
    say_fit(train_set, config.fit or "crop")
    config = config.fitted(len(train_set), config.devices * machines())
    if config.normal_class is not None:  # its index would be another class elsewhere
        config = dataclasses.replace(config, normal_class=train_set.class_name(config.normal_class))
    info = layout.describe_run(config, train_set)
    if before is None:
        refuse_unused(config)
    vje = build_model(config, info.view_size, weights=config.weights)
    if config.compile:
        vje.encoder.compile()
    vje.family.check(vje.embedding_dim, vje.settings)
    choose_logger(config.logger)
    own_objective(config.objective)  # an unusable one is known before anything is written
    find_optimizer(config)
    precision = choose_precision(config.precision)
    processes, steps = config.devices * machines(), len(train_set) // (config.batch_size or 1)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    where = f"{processes} × {where}" if processes > 1 else where
    what = f"{config.encoder} on {len(train_set)} images of {info.view_size}×{info.view_size} pixels"
    log.log(level(config), f"{what}: {config.epochs} epochs of {steps} steps, on {where} ({precision})")
    log.debug(f"likelihood {config.likelihood}; batches of {config.batch_size}")
    checkpoint = folder / CHECKPOINTS / checkpoints.LAST
    knn_sets = splits.monitor_sets(config, info.image_size, train_set, info.interpolation)
    if resume and checkpoint.is_file():
        checkpoints.check_checkpoint(checkpoint, Pretraining(vje, config, train_set))
    elif resume:
        log.info("%s holds no checkpoint yet: from the beginning", folder)
    # Only now, with data and model at hand, is anything on disk touched.
    if is_first_process():
        if not (folder / CONFIG).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
            if not resume:  # another process may have been faster
                _refuse_existing(folder, overwrite=overwrite)
        if overwrite:
            _empty(folder)
        write_json(folder / CONFIG, info.to_dict())
        write_json(folder / layout.HELD_OUT, [] if held_out is None else held_out.names)
    with quiet_lightning():
        logger = open_logger(folder, config)
    features = None
    if config.frozen:
        device = layout.default_device()
        vje.to(device)
        lower = precision == "bf16-mixed"
        features, train_set = cache_features(vje, train_set, info, folder / layout.CACHE, device, bf16=lower)
        if config.projector == "whiten" and config.embedding_dim is None:
            config = dataclasses.replace(config, embedding_dim=whitened_dim(features[:, 0]))
            info = dataclasses.replace(info, config=config)
            write_json(folder / CONFIG, info.to_dict())
            vje = build_model(config, info.view_size, vje.feature_dim, weights=config.weights)
            vje.to(device)
        fit_whitening(vje, features[:, 0])
    report = EpochReport(folder, train_set, knn_sets, info.view, features)
    views = info.views if features is None else None
    module = Pretraining(vje, config, train_set if features is None else features, views)
    _fit(module, folder, report, precision, logger, resume=resume)
    if is_first_process():
        _keep(folder, vje, info, train_set, held_out, features)
        report.draw()
    return folder


def _keep(
    folder: Path, vje: VJE, info: RunInfo, images: ImageSet, held_out: ImageSet | None, features: Tensor | None
) -> None:
    """Write what a finished run is scored with: calibration, reference images, and last the weights."""
    if held_out is not None:
        calibration = encode(vje, held_out, info.view, turns=True)
        layout.save_posteriors(folder / layout.CALIBRATION, calibration)
    if features is None:
        shown = splits.reference_images(images, info.config.seed)
        reference = encode(vje, shown, info.view)
    else:
        kept = splits.evenly_spread(len(features), splits.REFERENCE_IMAGES)
        reference = encode_features(vje, features[kept, 0])
        if held_out is None and info.config.folds:
            layout.save_folds(folder / layout.FOLDS, *fit_folds(info.config, features), features[:, 0])
        shutil.rmtree(folder / layout.CACHE)
    layout.save_posteriors(folder / layout.REFERENCE, reference)
    save_weights(folder, vje, info)


def _fit(
    module: Pretraining, folder: Path, report: EpochReport, precision: str, logger: Logger | None, *, resume: bool
) -> None:
    """Run the epochs, from the last checkpoint if there is one to resume."""
    checkpoint = folder / CHECKPOINTS / checkpoints.LAST
    stop = StopRequest()
    with quiet_lightning():
        callbacks = [report, checkpoints.Checkpoints(checkpoint, stop)]
        trainer = _trainer(module.config, callbacks, precision, logger)
        begun = resume and checkpoint.is_file()
        try:
            trainer.fit(module, ckpt_path=checkpoint if begun else None, weights_only=True)
        except checkpoints.StoppedTraining:
            # The others end quietly: their launcher would take another end for a failure, and kill the first.
            if not is_first_process():
                sys.exit(0)
        except SystemExit:  # how Lightning ends when it is interrupted
            stop.signum = stop.signum or signal.SIGINT
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise MemoryError(
                    f"batch_size {module.batch_size} does not fit in the memory of {module.device}: lower it "
                    "(--batch-size), or image_size"
                ) from None
            if begun and not module.begun and not isinstance(error, ValueError | OSError):
                # a whole archive, but not what Lightning looks for in it
                raise ValueError(
                    f"{folder} cannot be gone on with ({type(error).__name__}: {error}): train anew with --overwrite"
                ) from error
            raise
        finally:
            close_logger(logger)
    if stop.signum:
        raise Interrupted("stopped", stop.signum)


def choose_precision(setting: str) -> Literal["32-true", "bf16-mixed"]:
    """Lightning's name of a precision setting; ``auto`` is bfloat16 autocast where the hardware multiplies in it."""
    bf16 = setting == "bf16"
    if setting == "auto" and torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif setting == "auto":
        flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        bf16 = any(getattr(torch.cpu, name, lambda: False)() for name in flags)
    return "bf16-mixed" if bf16 else "32-true"


def _choose_folder(config: TrainConfig, out: str | Path | None, *, resume: bool, overwrite: bool) -> Path:
    """The run folder, after checking that it may be written or resumed."""
    if out is None and resume:
        raise ValueError("resuming needs the run folder to go on with: name it (--out RUN)")
    numbered = (Path("runs") / f"{config.dataset}-{number}" for number in itertools.count(1))
    folder = next(path for path in numbered if not path.exists()) if out is None else Path(out)
    if not resume and is_first_process():  # when the others come, this one may have begun to fill the folder
        _refuse_existing(folder, overwrite=overwrite)
    return folder


def _refuse_existing(folder: Path, *, overwrite: bool) -> None:
    if not is_begun(folder):
        return
    if not (folder / CONFIG).is_file():
        raise FileExistsError(f"{folder} exists and is no run folder: name another with --out")
    # A run that was stopped before its first checkpoint has nothing to lose.
    begun = (folder / layout.WEIGHTS).exists() or (folder / CHECKPOINTS / checkpoints.LAST).exists()
    if begun and not overwrite:
        how = "--resume goes on with it, --overwrite replaces it"
        raise FileExistsError(f"{folder} already holds a run: {how}")


def _empty(folder: Path) -> None:
    """Remove a run, but for the lock that is held, and for what makes it a run folder if this is interrupted."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, CONFIG):
            path.unlink()


FREE = ("download", "workers", "residency", "devices", "data_dir", "epochs", "logger")
"""Settings that may be others when a run goes on: they change no number (the data have a fingerprint) or extend it."""


def refuse_changes(folder: Path, before: RunInfo, said: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a setting that is said, as in JSON, is another than the run's, and not in `FREE`."""
    fixed = before.config.to_dict()
    for name, value in said.items():
        value = before.class_name(value) if name == "normal_class" else value
        if name not in FREE and value != fixed[name]:
            raise ValueError(
                f"{folder} was trained with {name} {fixed[name]}, not {value}: leave it out to go on, or train anew "
                "with --overwrite or another --out"
            )


def _to_resume(config: TrainConfig, before: RunInfo, folder: Path) -> TrainConfig:
    """The settings to go on with: those stored, with what may be new of ``config``; its defaults are not said."""
    default, given, fixed = TrainConfig().to_dict(), config.to_dict(), before.config.to_dict()
    given["normal_class"] = before.class_name(config.normal_class)
    said = {name: value for name, value in given.items() if value not in (default[name], fixed[name])}
    refuse_changes(folder, before, said)
    if said.get("epochs", fixed["epochs"]) < fixed["epochs"]:
        raise ValueError(
            f"{folder} is a run of {fixed['epochs']} epochs, not {given['epochs']}: it can only become longer"
        )
    return dataclasses.replace(before.config, **said)


def _trainer(
    config: TrainConfig, callbacks: list[lightning.pytorch.Callback], precision: str, logger: Logger | None
) -> lightning.Trainer:
    several, cuda = config.devices * machines() > 1, torch.cuda.is_available()
    plugins: list[Any] = [checkpoints.AtomicCheckpointIO(), _environment()]
    if several and not cuda:  # PyTorch has synchronised batch norm for GPUs only
        plugins.append(CPUSyncBatchNorm())
    # A control need not use all of VJE's networks.
    ddp = "ddp" if config.objective == ELBO else "ddp_find_unused_parameters_true"
    return lightning.Trainer(
        max_epochs=config.epochs,
        accelerator="gpu" if cuda else "cpu",
        devices=config.devices,
        num_nodes=machines(),
        strategy=ddp if several else "auto",
        sync_batchnorm=several and cuda,
        plugins=plugins,
        precision=precision,  # type: ignore[arg-type]
        callbacks=callbacks,
        logger=logger or False,
        log_every_n_steps=PART_EVERY,
        gradient_clip_val=config.clip_norm,
        **QUIET,
    )


def _environment() -> environments.ClusterEnvironment:
    """Lightning's view of who started the processes, held to ours: it takes one task of SLURM for a launcher."""
    kinds: dict[str, Any] = {
        "torchrun": environments.TorchElasticEnvironment,
        "srun": partial(environments.SLURMEnvironment, auto_requeue=False),
    }
    return kinds.get(launcher(), environments.LightningEnvironment)()
