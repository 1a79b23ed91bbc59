"""Who started this process, by what launchers leave in the environment."""

import pytest

from pyro_vje.launch import check_launch, is_first_process, launcher, machines

NAMES = [
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_NNODES",
    "SLURM_JOB_NAME",
]


@pytest.mark.parametrize(
    ("environment", "name", "first", "devices", "error"),
    [
        ({}, "none", True, 2, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "none", True, 2, None),  # one task starts its own
        ({"SLURM_NTASKS": "2"}, "none", True, 1, None),  # in a batch script, without srun
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "srun", False, 2, None),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun", True, 1, "srun started 2 processes"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, "none", True, 2, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_NNODES": "2"}, "srun", False, 2, None),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}, "torchrun", False, 2, None),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}, "torchrun", True, 4, "--devices 2"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, "lightning", False, 2, None),
        ({"RANK": "3"}, "none", True, 1, "RANK is set, but no launcher"),
        ({"LOCAL_RANK": "1"}, "lightning", False, 1, "LOCAL_RANK is set, but no launcher"),
    ],
)
def test_what_was_asked_is_compared_with_what_runs(monkeypatch, environment, name, first, devices, error):
    for variable in NAMES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert (launcher(), is_first_process()) == (name, first)
    assert machines() == int(environment.get("SLURM_NNODES", "1"))
    if error is None:
        check_launch(devices)
    else:
        with pytest.raises(ValueError, match=error):
            check_launch(devices)
