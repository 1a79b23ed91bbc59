"""Runs that are told to stop, lose their disk, or find another process at work: nothing is lost, and it is said."""

import contextlib
import csv
import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pyro_vje import TrainConfig, train
from pyro_vje.cli import main
from pyro_vje.runs import files
from pyro_vje.runs.files import is_begun, locked, write_atomic
from pyro_vje.runs.stopping import Interrupted, StopRequest, restored_handlers
from pyro_vje.training import checkpoints
from pyro_vje.training import run as training
from pyro_vje.training.monitor import TrainingDiverged

TIMING = {"seconds", "images_per_second"}
STEPS = 5


@pytest.fixture(scope="module")
def config(tiny_config):
    """Two epochs of five steps."""
    return dataclasses.replace(tiny_config, batch_size=8, epochs=2)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """What an uninterrupted run leaves."""
    return train(config, tmp_path_factory.mktemp("whole") / "run")


def assert_same(folder, whole):
    names = ("weights.safetensors", "calibration.safetensors", "reference.safetensors", "config.json")
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    rows = []
    for run in (folder, whole):
        with open(run / "metrics.csv", newline="") as file:
            rows.append([{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)])
    assert rows[0] == rows[1]
    assert not list(folder.rglob(".*"))
    assert (folder / "pictures" / "training.png").is_file()


def at_step(monkeypatch, step, do):
    """Do something in the middle of a step."""
    original = training.Pretraining.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            do()
        return original(self, batch, batch_idx)

    monkeypatch.setattr(training.Pretraining, "training_step", training_step)


def steps_in(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["global_step"]


# Told to stop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(
    config, whole, image_folder, tmp_path, monkeypatch, signum, code
):
    folder = tmp_path / "run"
    arguments = ["--dataset", "folder", "--data-dir", str(image_folder), "--out", str(folder)]
    names = ("encoder", "embedding_dim", "hidden_dim", "epochs", "batch_size", "knn_every", "precision", "logger")
    for name in names:
        arguments += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 2, lambda: os.kill(os.getpid(), signum))
        result = CliRunner().invoke(main, ["train", *arguments, "--image-size", "16"])
    assert result.exit_code == code
    assert result.stderr.splitlines()[-1] == f"stopped: --resume --out {folder} goes on"
    assert steps_in(folder) == STEPS + 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    result = CliRunner().invoke(main, ["train", "--resume", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert_same(folder, whole)


def test_before_there_is_anything_to_resume_it_says_so(config, tmp_path, monkeypatch):
    def stop(*_):
        raise Interrupted("", signal.SIGTERM)

    monkeypatch.setattr(training, "load_train_set", stop)
    with pytest.raises(Interrupted, match="nothing was written") as caught:
        train(config, tmp_path / "run")
    assert caught.value.signum == signal.SIGTERM
    assert not (tmp_path / "run").exists()


def test_a_second_signal_does_not_wait():
    stop = StopRequest()
    with restored_handlers():
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


SLOW = """
import time
from torch import nn

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x.mean((-2, -1))

def tiny(image_size):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Slow())
"""


def heed_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stopped_when(condition, command, image_folder, tmp_path, *, group=False):
    """SIGTERM a command of many slow epochs once a condition holds: what it said, and its children by then."""
    (tmp_path / "slow_plugin.py").write_text(SLOW)
    settings = {"dataset": "folder", "data-dir": image_folder, "encoder": "slow_plugin:tiny", "out": "run"}
    settings |= {"embedding-dim": 8, "hidden-dim": 16, "image-size": 16, "batch-size": 4, "epochs": 200}
    command = [sys.executable, "-m", "pyro_vje.cli", *command, "--precision", "32"]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    text = (tmp_path / "log").read_text
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(command, cwd=tmp_path, stderr=log, start_new_session=True, preexec_fn=heed_ctrl_c) as process,
    ):
        try:
            patience = time.monotonic() + 300
            while not condition():
                assert process.poll() is None, text()
                assert time.monotonic() < patience, text()
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if group:  # as a terminal does
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.terminate()
            assert process.wait(120) == 128 + (signal.SIGINT if group else signal.SIGTERM), text()
        finally:
            process.kill()
    assert "Traceback" not in text(), text()
    patience = time.monotonic() + 60  # the others take their time to leave
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < patience
        time.sleep(0.05)
    return text().splitlines(), children


def test_two_processes_stop_together(image_folder, tmp_path):
    """SIGTERM reaches the first alone; both finish the step that they agree on, and no process stays behind."""
    written = (tmp_path / "run" / "checkpoints" / "last.ckpt").exists
    lines, children = stopped_when(written, ["train", "--devices", "2"], image_folder, tmp_path)
    assert [line for line in lines if line.startswith("stopped")] == ["stopped: --resume --out run goes on"]
    assert 0 < steps_in(tmp_path / "run") < 200 * 11
    assert children


# Killed ---------------------------------------------------------------------------------------------------------------


class PowerCut(Exception):
    pass


def cut(*_, **__):
    raise PowerCut


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [
        (checkpoints.Checkpoints, "on_train_start", "config.json"),  # before the first checkpoint
        (checkpoints.Checkpoints, "on_train_epoch_end", "metrics.csv"),  # its row is there, its checkpoint is not
        (training, "save_weights", "reference.safetensors"),
        (training.EpochReport, "draw", "weights.safetensors"),
    ],
)
def test_resume_goes_on_from_any_moment(config, whole, tmp_path, monkeypatch, owner, name, left):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(PowerCut):
            train(config, folder)
    assert (folder / left).exists()
    train(TrainConfig(), folder, resume=True)
    assert_same(folder, whole)


def test_killed_commands_end_as_if_they_had_not_been(tmp_path):
    """The short form of ``make soak``: a process that is killed with SIGKILL and called again, bit by bit."""
    command = [sys.executable, "-m", "tests.soak", "kills", "--quick", "--out", str(tmp_path / "soak.json")]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    figures = json.loads((tmp_path / "soak.json").read_text())["kills"]
    assert sum(figures["train"]["landed_in"].values()) == figures["train"]["kills"] >= 3
    assert figures["score --resume"]["identical"] == ["s.csv"]


def test_a_state_that_has_diverged_replaces_no_good_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingDiverged):
        train(dataclasses.replace(config, lr=1e18, warmup_epochs=0), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] < STEPS
    assert torch.isfinite(state["sums"][1]).all()


@pytest.mark.parametrize(
    "changes", [{"residency": "stream", "workers": 0}, {"residency": "stream", "workers": 2}, {"deterministic": True}]
)
def test_the_same_bits_however_images_are_read(config, whole, tmp_path, monkeypatch, changes):
    during = []
    at_step(monkeypatch, 0, lambda: during.append(torch.are_deterministic_algorithms_enabled()))
    folder = train(dataclasses.replace(config, **changes), tmp_path / "run")
    first, second = (load_file(run / "weights.safetensors") for run in (folder, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert during == [changes.get("deterministic", False)]
    assert not torch.are_deterministic_algorithms_enabled()


# No disk --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; tests that need one are skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def spoilt(config, folder, monkeypatch, harm):
    """A run whose disk is spoilt in the second epoch, after a checkpoint inside it."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 2, harm)
        with pytest.raises(OSError, match="the checkpoint before is whole") as caught:
            train(config, folder)
    assert steps_in(folder) == STEPS + 2
    assert not list(folder.rglob(".*.tmp"))
    return str(caught.value)


def test_a_full_disk_leaves_the_checkpoint_before(config, whole, small_disk, monkeypatch):
    filler = small_disk / "filler"

    def fill():
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    said = spoilt(config, small_disk / "run", monkeypatch, fill)
    assert said.startswith(f"cannot write {small_disk / 'run/checkpoints/last.ckpt'}: No space left on device; ")
    filler.unlink()
    train(TrainConfig(), small_disk / "run", resume=True)
    assert_same(small_disk / "run", whole)


def test_a_folder_that_becomes_read_only_leaves_the_checkpoint_before(config, whole, small_disk, monkeypatch):
    assert config.logger == "csv"  # a log that stays open keeps a file system from being made read-only
    folder = small_disk / "run"

    def mount(how):
        place = ["mount", "--bind", "-o", how, str(folder / "checkpoints"), str(folder / "checkpoints")]
        subprocess.run(place, check=True)
        subprocess.run([*place[:1], "-o", f"remount,bind,{how}", place[-1]], check=True)

    try:
        said = spoilt(config, folder, monkeypatch, lambda: mount("ro"))
    finally:
        subprocess.run(["umount", str(folder / "checkpoints")], check=False)
    assert "last.ckpt: Read-only file system; " in said
    train(TrainConfig(), folder, resume=True)
    assert_same(folder, whole)


def test_a_disk_that_fails_to_sync_leaves_the_checkpoint_before(config, whole, tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        said = spoilt(config, tmp_path / "run", monkeypatch, lambda: patch.setattr(files.os, "fsync", fail))
    assert "last.ckpt: Input/output error; " in said
    train(TrainConfig(), tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


# Two processes --------------------------------------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
from pyro_vje.runs.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # like a loader's worker, which may outlive the run for some seconds
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(whole, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    (folder / ".last.ckpt.abc.tmp").write_bytes(b"left by a kill")
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        try:
            for options in ({"resume": True}, {"overwrite": True}, {}):
                with pytest.raises(BlockingIOError, match=rf"in use by process {first.pid} on .*--out"):
                    train(TrainConfig(), folder, **options)
            first.kill()
            first.wait()
            with locked(folder):
                assert (folder / ".lock").read_text().startswith(f"{os.getpid()} on ")
        finally:
            first.kill()
            for pid in map(int, children):
                os.kill(pid, signal.SIGKILL)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]


def test_a_folder_on_which_only_a_kill_was_at_work_is_not_begun(tmp_path):
    assert not is_begun(tmp_path / "missing")
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.a1.tmp").touch()
    (tmp_path / ".tmpQ3xYz1").touch()  # of safetensors
    assert not is_begun(tmp_path)
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    kept = tmp_path / ".tmp-notes", tmp_path / ".mytmp"
    for path in kept:  # of somebody's own
        path.touch()
    with locked(tmp_path):
        assert all(path.exists() for path in kept)
    for path in kept:
        assert is_begun(tmp_path)
        path.unlink()
    (tmp_path / "thesis.txt").touch()
    assert is_begun(tmp_path)
    assert is_begun(tmp_path / "thesis.txt")


def test_what_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "file.csv"
    with pytest.raises(FileNotFoundError, match=f"^cannot write {path}: No such file or directory$"):
        write_atomic(path, "text")


def test_no_checkpoint_yet_is_said(config, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    with caplog.at_level(logging.INFO, logger="pyro_vje"):
        train(TrainConfig(), folder, resume=True)
    assert f"{folder} holds no checkpoint yet: from the beginning" in caplog.messages
    assert_same(folder, whole)
