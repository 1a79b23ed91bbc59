"""Several processes on the CPU: one run folder, one set of weights, every image of a global batch seen once."""

import csv
import json
import subprocess
import sys

ENCODER = """
import os, pathlib
from torch import nn
from pyro_vje import training

original = training.Pretraining.training_step

def noted(self, batch, batch_idx):
    path = pathlib.Path("seen") / f"{self.current_epoch}-{batch_idx}-{self.global_rank}"
    path.write_text(str(batch.flatten(1).long().sum(1).sort().values.tolist()))
    return original(self, batch, batch_idx)

training.Pretraining.training_step = noted

def tiny(image_size):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def train(tmp_path, image_folder, name, devices):
    (tmp_path / name / "seen").mkdir(parents=True)
    (tmp_path / name / "encoder_for_test.py").write_text(ENCODER)
    command = [
        sys.executable,
        "-m",
        "pyro_vje.cli",
        "train",
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
    ]
    command += [
        "--encoder",
        "encoder_for_test:tiny",
        "--embedding-dim",
        "8",
        "--hidden-dim",
        "16",
        "--epochs",
        "2",
        "--batch-size",
        "16",
    ]
    command += f"--precision 32 --image-size 16 --out run --devices {devices}".split()
    result = subprocess.run(
        [str(part) for part in command], cwd=tmp_path / name, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return tmp_path / name


def test_two_processes_share_each_global_batch_and_leave_one_run(tmp_path, image_folder):
    one, two = (train(tmp_path, image_folder, name, n) for name, n in (("one", 1), ("two", 2)))
    for epoch in range(2):
        for step in range(2):
            whole = json.loads((one / "seen" / f"{epoch}-{step}-0").read_text())
            parts = [json.loads((two / "seen" / f"{epoch}-{step}-{rank}").read_text()) for rank in (0, 1)]
            assert [len(part) for part in parts] == [8, 8]
            assert sorted(parts[0] + parts[1]) == sorted(whole)
    with open(two / "run" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert (two / "run" / "weights.safetensors").is_file()
