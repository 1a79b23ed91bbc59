"""Several processes on the CPU compute what one does, and leave one run folder."""

import csv
import importlib
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from pyro_vje import TrainConfig, train
from pyro_vje.training import run as training

PLUGIN = """
import pathlib
import torch
from torch import nn
from pyro_vje.training import run as training
from pyro_vje.training.distributed import CPUSyncBatchNorm

step = training.Pretraining.training_step

def training_step(self, batch, batch_idx):
    path = pathlib.Path("seen") / f"{self.current_epoch}-{batch_idx}-{self.global_rank}"
    path.write_text(str(batch.flatten(1).long().sum(1).sort().values.tolist()))
    return step(self, batch, batch_idx)

def on_before_optimizer_step(self, optimizer):
    if self.global_step == 0:
        gradients = {name: p.grad.clone() for name, p in self.vje.named_parameters()}
        torch.save(gradients, f"gradients-{self.global_rank}")

def on_train_end(self):
    if self.trainer.world_size > 1:
        torch.save(batch_norms(self.global_rank), f"norms-{self.global_rank}")

for hook in (training_step, on_before_optimizer_step, on_train_end):
    setattr(training.Pretraining, hook.__name__, hook)

def batch_norms(rank=None):
    "Each case's output and gradients, of the whole batch or of one of two processes' share, and the state."
    torch.manual_seed(0)
    images = 5 + 2 * torch.randn(16, 4, 3, 3)
    cases = (
        (nn.BatchNorm2d(4), images.to(memory_format=torch.channels_last)),
        (nn.BatchNorm2d(4), images.bfloat16().to(memory_format=torch.channels_last)),
        (nn.BatchNorm1d(4, affine=False, momentum=None), images.mean((-2, -1))),
    )
    results = []
    for norm, whole in cases:
        target = torch.randn(whole.shape)
        if norm.affine:
            nn.init.normal_(norm.weight)
        share = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
        if rank is not None:
            CPUSyncBatchNorm().apply(norm)
        x = whole[share].clone().requires_grad_()
        for _ in range(2):
            out = norm(x)
        (out * target[share]).sum().backward()
        gradients = [p.grad for p in norm.parameters()]
        results.append((out.detach(), x.grad, gradients, norm.state_dict()))
    return results

def tiny(image_size):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
"""
SETTINGS = {
    "dataset": "folder",
    "encoder": "devices_plugin:tiny",
    "embedding_dim": 8,
    "hidden_dim": 16,
    "num_particles": 2,
    "epochs": 5,
    "batch_size": 16,
    "lr": 0.5,
    "knn_every": 0,
    "precision": "32",
    "image_size": 16,
    "views": 3,
    "local_views": 2,
    "rotations": 0.5,
}


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, image_folder):
    """Folders with the run (10 steps) of one process, this one, and of two that the command starts."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for folder in folders:
        (folder / "seen").mkdir()
        (folder / "devices_plugin.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        for hook in ("training_step", "on_before_optimizer_step", "on_train_end"):  # to be restored
            patch.setattr(training.Pretraining, hook, getattr(training.Pretraining, hook))
        patch.chdir(folders[0])
        train(TrainConfig(**SETTINGS, data_dir=str(image_folder)), "run")
    command = [sys.executable, "-m", "pyro_vje.cli", "train", "--out", "run", "--devices", "2"]
    for name, value in {**SETTINGS, "data_dir": image_folder}.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    result = subprocess.run(command, cwd=folders[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folders


def test_two_processes_share_each_global_batch(one_and_two):
    one, two = one_and_two
    for epoch in range(5):
        for step in range(2):
            whole = json.loads((one / "seen" / f"{epoch}-{step}-0").read_text())
            parts = [json.loads((two / "seen" / f"{epoch}-{step}-{rank}").read_text()) for rank in (0, 1)]
            assert [len(part) for part in parts] == [8, 8]
            assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_two_processes_have_the_gradients_of_one(one_and_two):
    one, two = one_and_two
    whole = torch.load(one / "gradients-0")
    for rank in (0, 1):
        gradients = torch.load(two / f"gradients-{rank}")
        torch.testing.assert_close(gradients, whole, rtol=1e-4, atol=1e-6)


def test_two_processes_leave_the_weights_and_metrics_of_one(one_and_two):
    runs = [folder / "run" for folder in one_and_two]
    one, two = (load_file(run / "weights.safetensors") for run in runs)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    files = [
        sorted(path.relative_to(run) for path in run.rglob("*") if "tensorboard" not in path.parts) for run in runs
    ]
    assert files[0] == files[1]
    one, two = (list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in runs)
    assert [row["epoch"] for row in two] == ["1", "2", "3", "4", "5"]
    timing = {"seconds", "images_per_second"}
    for first, second in zip(one, two, strict=True):
        for name in first.keys() - timing:
            numbers = [float(row[name] or "nan") for row in (first, second)]
            assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, nan_ok=True), name
        assert not math.isnan(float(second["kl"]))


def test_batch_norm_of_two_shares_is_that_of_the_batch(one_and_two, monkeypatch):
    monkeypatch.syspath_prepend(one_and_two[0])
    whole = importlib.import_module("devices_plugin").batch_norms()
    parts = [torch.load(one_and_two[1] / f"norms-{rank}") for rank in (0, 1)]
    for (out, gradient, gradients, state), *shares in zip(whole, *parts, strict=True):
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if out.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        outs, inputs, sums, states = zip(*shares, strict=True)
        torch.testing.assert_close(torch.cat(outs), out, **tolerance)
        torch.testing.assert_close(torch.cat(inputs), gradient, **tolerance)
        torch.testing.assert_close([sum(pair) for pair in zip(*sums, strict=True)], gradients, **tolerance)
        assert outs[0].stride() == out[:8].stride()
        for own in states:
            torch.testing.assert_close(own, state, rtol=1e-5, atol=1e-6)
