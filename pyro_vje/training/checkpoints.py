"""Checkpoints of a training run: when they are written, and how, so that nothing is lost.

Lightning's ModelCheckpoint writes to the system's temporary folder, without syncing; what it saves after an epoch's
last step makes a resumed run skip the epoch's end; and on SIGTERM Lightning sends a collective from the handler.
"""

import io
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from pyro_vje.runs.files import check_form, write_atomic
from pyro_vje.runs.folder import check_state
from pyro_vje.runs.stopping import StopRequest

LAST = "last.ckpt"
CHECKPOINT_SECONDS = 600.0
"""Between checkpoints inside an epoch: about as much of the training as a kill can cost. Epochs end with one too."""
CHECK_EVERY = 5  # steps after which several processes ask each other whether one of them was told to stop


OPTIMISERS: dict[str, tuple[str, ...]] = {"SGD": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq")}
OPTIMISERS["Lars"] = OPTIMISERS["SGD"]
"""What each keeps of a parameter, in its shape."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one before, syncs it, renames it; what goes wrong is kept in ``error``."""

    error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace ``path``; if that fails, the old file stays as it was."""
        content = io.BytesIO()
        torch.save(checkpoint, content)  # into memory first: torch hides what is wrong with a disk
        self.error = None
        try:
            Path(path).parent.mkdir(exist_ok=True)
            write_atomic(Path(path), content.getbuffer())
        except OSError as error:
            self.error = error


class StoppedTraining(Exception):
    """The run was told to stop, and its checkpoint is written. Not a KeyboardInterrupt, at which Lightning exits."""


class Checkpoints(Checkpoint):
    """Writes the checkpoint ``path`` at the end of each epoch, inside it, and when the run is told to ``stop``."""

    def __init__(self, path: Path, stop: StopRequest) -> None:
        self.path, self.stop, self.saved = path, stop, 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Start the clock, and take the signals from Lightning, which has just set handlers of its own."""
        self.saved = time.monotonic()
        self.stop.install()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        """Save if it is time to, or to stop; the epoch's last step is left to `on_train_epoch_end`."""
        batches = trainer.fit_loop.batch_idx + 1
        if batches == trainer.num_training_batches or (trainer.world_size > 1 and batches % CHECK_EVERY):
            return
        due = float(time.monotonic() - self.saved >= CHECKPOINT_SECONDS)
        stop, due = self._agreed(trainer, float(self.stop.signum), due)
        if not (stop or due):
            return
        # A state that has diverged does not take the place of a good one; the end of the epoch says so.
        (diverged,) = self._agreed(trainer, float(not torch.isfinite(pl_module.sums["loss"])))
        if not diverged:
            self._save(trainer)
        self._stop_if(stop)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Save, when all that belongs to the epoch is done; a head's epochs are too short for that."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if pl_module.config.frozen and not self.stop.signum and not last:
            return
        self._save(trainer)
        self._stop_if(*self._agreed(trainer, float(self.stop.signum)))

    def _agreed(self, trainer: lightning.Trainer, *values: float) -> list[float]:
        """The largest of each value over all processes: they save and stop together, or wait for each other forever."""
        if trainer.world_size == 1:
            return list(values)
        mine = torch.tensor(values, device=trainer.strategy.root_device)
        return trainer.strategy.reduce(mine, reduce_op="max").tolist()

    def _save(self, trainer: lightning.Trainer) -> None:
        files = trainer.strategy.checkpoint_io
        trainer.save_checkpoint(self.path)
        self.saved = time.monotonic()
        error = getattr(files, "error", None)
        (failed,) = self._agreed(trainer, float(error is not None))
        if error is not None:
            before = "the checkpoint before is whole" if self.path.is_file() else "there is none before"
            raise type(error)(f"{error}; {before}, and --resume goes on") from error
        if failed:
            raise StoppedTraining  # the first process says why

    def _stop_if(self, signum: float) -> None:
        if signum:
            self.stop.signum = int(signum)
            raise StoppedTraining


def check_checkpoint(path: Path, module: lightning.LightningModule) -> None:
    """Refuse a checkpoint that is damaged, of another model, or no checkpoint; nothing in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not look at the checksums that it writes
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {broken}")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        states = {"optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "loops": dict}
        check_form(saved, {"state_dict": dict, **states, "epoch": int, "global_step": int})
        check_state(path, saved["state_dict"], module.state_dict())
        (states,) = saved["optimizer_states"]
        optimizer: Any = cast(dict[str, Any], module.configure_optimizers())["optimizer"]
        optimizer.load_state_dict(states)
        for parameter, state in optimizer.state.items():
            moments = {name: value for name, value in state.items() if name != "step"}
            check_state(path, moments, dict.fromkeys(OPTIMISERS[type(optimizer).__name__], parameter))
    except pickle.UnpicklingError:  # whose text tells how to run what is in the file
        raise ValueError(
            f"{path} is no checkpoint of ours, and nothing in it was run: train anew with --overwrite"
        ) from None
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}): train anew with --overwrite") from None
