"""Who started this process, and how many of them train together. Imports nothing heavy."""

import os


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _srun() -> bool:
    """Whether SLURM started this process as one of several; one task is like any other process."""
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and not interactive


def launcher() -> str:
    """``torchrun``, ``srun``, ``lightning`` (which runs the command again in each further process), or ``none``."""
    if _torchrun():
        return "torchrun"
    if _srun():
        return "srun"
    return "lightning" if "LOCAL_RANK" in os.environ else "none"


def is_first_process() -> bool:
    """Whether no launcher has started this process as one of the others."""
    rank = {"torchrun": "RANK", "srun": "SLURM_PROCID"}.get(launcher(), "LOCAL_RANK")
    return int(os.environ.get(rank, "0")) == 0


def machines() -> int:
    """Machines that train together; ``devices`` are those of each machine."""
    name = {"torchrun": "GROUP_WORLD_SIZE", "srun": "SLURM_NNODES"}.get(launcher(), "")
    return int(os.environ.get(name, "1"))


def check_launch(devices: int) -> None:
    """Compare what was asked with what runs, before anything is loaded; a ``ValueError`` says how they differ."""
    name = launcher()
    size = os.environ.get({"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}.get(name, "WORLD_SIZE"))
    stale = [rank for rank in ("RANK", "LOCAL_RANK") if rank in os.environ]
    if name in ("lightning", "none") and stale and size is None:
        raise ValueError(
            f"{' and '.join(stale)} is set, but no launcher has started this process: unset it, or use torchrun or srun"
        )
    if name in ("torchrun", "srun") and int(size or 1) != devices * machines():
        raise ValueError(
            f"{name} started {size} processes on {machines()} machines, but --devices {devices} asks for "
            f"{devices * machines()}: say --devices {int(size or 1) // machines()}"
        )
