"""`train`: pretrain a model, whatever interrupts it, and leave a run folder behind."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import TensorBoardLogger

from pyro_vje.config import TrainConfig, is_first_process, machines
from pyro_vje.data.splits import load_train_set, monitor_sets, reference_images
from pyro_vje.model.encoding import encode
from pyro_vje.model.objective import ELBO
from pyro_vje.runs.files import LOCK, is_begun, locked, write_json
from pyro_vje.runs.folder import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG,
    REFERENCE,
    WEIGHTS,
    RunInfo,
    build_model,
    describe_run,
    deterministic_kernels,
    read_info,
    save_posteriors,
    save_weights,
)
from pyro_vje.runs.stopping import (
    Interrupted,
    StopRequest,
    follow_parent,
    raise_interrupted,
    restored_handlers,
)
from pyro_vje.training.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    Checkpoints,
    StoppedTraining,
    check_checkpoint,
)
from pyro_vje.training.distributed import CPUSyncBatchNorm
from pyro_vje.training.module import PART_EVERY, Pretraining
from pyro_vje.training.monitor import EpochReport

log = logging.getLogger("pyro_vje")


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
    MemoryError
        If the device's memory does not hold a step of ``batch_size`` images.
    """
    unset = config.batch_size is None
    config, folder = _choose_folder(config, out, resume=resume, overwrite=overwrite)
    with ExitStack() as stack, restored_handlers(), deterministic_kernels(config.deterministic):
        try:
            if not is_first_process():
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
        config = config.fitted(len(train_set), config.devices * machines())
    else:
        train_set, held_out = load_train_set(config)
    info = describe_run(config, train_set)
    vje = build_model(config, info.image_size)
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
    report = EpochReport(folder, train_set, monitor_sets(config, info.image_size, train_set), info.view)
    vje.family.check(vje.embedding_dim, vje.settings)
    checkpoint = folder / CHECKPOINTS / LAST
    if resume:
        _check_resumable(folder, info, module, checkpoint)
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
    stop = StopRequest()
    with _quiet_lightning():
        trainer = _trainer(folder, config, [report, Checkpoints(checkpoint, stop)], precision)
        begun = resume and checkpoint.is_file()
        try:
            trainer.fit(module, ckpt_path=checkpoint if begun else None, weights_only=True)
        except StoppedTraining:
            # The others end quietly: their launcher would take another end for a failure, and kill the first.
            if not is_first_process():
                sys.exit(0)
        except SystemExit:  # how Lightning ends when it is interrupted
            stop.signum = stop.signum or signal.SIGINT
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise MemoryError(
                    f"batch_size {config.batch_size} does not fit in the memory of {module.device}: lower it "
                    "(--batch-size), or image_size"
                ) from None
            restoring = begun and not module.begun and not isinstance(error, ValueError | OSError)
            if restoring:  # a whole archive, but not what Lightning looks for in it
                raise ValueError(
                    f"{folder} cannot be gone on with ({type(error).__name__}: {error}): train anew with --overwrite"
                ) from error
            raise
    if stop.signum:
        raise_interrupted(stop.signum, None)
    if trainer.is_global_zero:
        device = next(vje.parameters()).device
        kept = {CALIBRATION: held_out, REFERENCE: reference_images(train_set, config.seed)}
        for name, images in kept.items():
            if images is not None:
                save_posteriors(folder / name, encode(vje, images, info.view, device=device).posteriors)
        save_weights(folder, vje, info)
        report.draw(vje, info.classes)
    return folder


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
    if is_first_process():  # when the others come, this one may have begun to fill the folder
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
    check_checkpoint(checkpoint, module)


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
    several = config.devices * machines() > 1
    plugins: list[Any] = [AtomicCheckpointIO()]
    if several and not torch.cuda.is_available():
        plugins.append(CPUSyncBatchNorm())
    return lightning.Trainer(
        max_epochs=config.epochs,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=config.devices,
        num_nodes=machines(),
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
