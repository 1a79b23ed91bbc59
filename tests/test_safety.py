"""Files that nobody vouches for: a pickle runs nothing, damage is one line, and so is memory that is too small."""

import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from soak import fuzz

from pyro_vje import VJE, score, train
from pyro_vje.cli import _log_warning, main
from pyro_vje.data import ImageError, decode_image
from pyro_vje.data import decode as image_files
from pyro_vje.runs.folder import SCHEMA_VERSION


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class Payload:
    """Unpickled, it makes a file: what would run is seen to have run."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def payload(tmp_path):
    """A pickle, the same in PyTorch's archive, and the file that unpickling makes."""
    sign = tmp_path / "it-ran"
    raw = pickle.dumps(Payload(sign))
    pickle.loads(raw)
    assert sign.exists()  # the payload works
    sign.unlink()
    torch.save({"state_dict": Payload(sign)}, tmp_path / "archive")
    return raw, (tmp_path / "archive").read_bytes(), sign


@pytest.mark.parametrize("form", [0, 1], ids=["pickle", "archive"])
def test_no_pickle_is_run_by_any_file_that_a_command_takes(trained_run, image_folder, tmp_path, payload, form):
    content, sign = payload[form], payload[2]
    folder, file = tmp_path / "run", tmp_path / "w.safetensors"
    out = tmp_path / "scores.csv"
    file.write_bytes(content)
    assert run("score", "--ckpt", file, "--out", out).exit_code == 2
    images = tmp_path / "images"
    images.mkdir()
    (images / "x.png").write_bytes(content)
    journal = out.with_name("scores.csv.part")
    for name, command in {
        "weights.safetensors": ["eval", "--ckpt", folder],
        "config.json": ["train", "--resume", "--out", folder],
        "calibration.safetensors": ["score", "--ckpt", folder, "--out", out],
        "reference.safetensors": ["score", "--ckpt", folder, "--out", out],
        "checkpoints/last.ckpt": ["train", "--resume", "--out", folder],
        journal: ["score", "--ckpt", folder, "--out", out, "--resume"],
        images / "x.png": ["score", "--ckpt", folder, "--data", images, "--out", out],
    }.items():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained_run, folder)
        (folder / name).write_bytes(content)
        result = run(*command)
        assert result.exit_code == 2, (name, result.output)
        assert result.stderr.splitlines()[-1].startswith("Error: "), name
        assert "weights_only" not in result.stderr  # no advice to run it
        assert not out.exists()
    assert not sign.exists()


def test_a_checkpoint_of_another_model_is_refused(trained_run, tiny_config, tmp_path):
    folder = shutil.copytree(trained_run, tmp_path / "run")
    path = folder / "checkpoints" / "last.ckpt"
    whole = torch.load(path, weights_only=True)
    for change, message in (
        (lambda c: c["state_dict"].popitem(), "missing or too many"),
        (lambda c: next(iter(c["state_dict"].values())).fill_(torch.nan), "non-finite"),
        (lambda c: c["optimizer_states"][0]["state"][0].update(momentum_buffer=torch.zeros(3)), "momentum_buffer is"),
        (lambda c: c.pop("loops"), "loops is missing"),
        (lambda c: c["loops"].update(fit_loop=3), "cannot be gone on with"),
    ):
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            train(tiny_config, folder, resume=True)
        torch.save(whole, path)
    content = bytearray(path.read_bytes())
    content[content.index(whole["state_dict"]["elbo.vje.encoder.3.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not see the wrong bit
    with pytest.raises(ValueError, match="wrong checksum"):
        train(tiny_config, folder, resume=True)


def test_damaged_files_of_every_kind():
    fuzz.run(quick=True)


def test_the_fuzzer_sees_what_it_is_there_for(tmp_path, monkeypatch):
    """A traceback, a hang and a part taken for the whole are each a failure."""
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)

    def broken(before, after):
        kind = len(after) % 3
        fuzz.whole(kind != 0, "a part was taken")
        if kind == 1:
            raise KeyError("x")
        while True:
            pass

    target = fuzz.Target(1, [bytes(30)], tmp_path / "x", (fuzz.truncate,), broken)
    with fuzz.quiet():
        failures = {fuzz.run_case({"x": target}, 0, i)[2].split(": ")[1] for i in range(12)}
    assert failures == {"NotWhole", "KeyError", "took more than 0.2 s"}


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("DefaultCPUAllocator: no")])
def test_training_without_memory_names_the_batch_size(tiny_config, tmp_path, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(VJE, "posterior", fails)
    with pytest.raises(MemoryError, match=r"batch_size 16 does not fit .*--batch-size"):
        train(tiny_config, tmp_path / "run")


# What is found in folders ---------------------------------------------------------------------------------------------


def test_every_odd_entry_of_a_folder_has_its_stated_result(trained_run, image_folder, tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    good = next(image_folder.rglob("*.png")).read_bytes()
    names = ["new\nline.png", 'quo"te.png', "com,ma.png", b"latin\xe9.png".decode("utf-8", "surrogateescape")]
    for name in names:
        (folder / name).write_bytes(good)
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "nowhere.png").symlink_to(folder / "gone")
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    out = tmp_path / "s.csv"
    result = run("score", "--ckpt", trained_run, "--data", folder, "--out", out, "--report", "--parquet")
    assert result.exit_code == 1, result.output
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = {row["path"][len(str(folder)) + 1 :]: row for row in csv.DictReader(file)}
    assert rows.keys() == {*names, "self.png", "nowhere.png", "empty.png", "pipe.png"}
    assert len({rows[name]["anomaly_score"] for name in names}) == 1
    for name, reason in {
        "self.png": "Too many levels of symbolic links",
        "nowhere.png": "No such file or directory",
        "empty.png": "empty file",
        "pipe.png": "not a regular file",
    }.items():
        assert (rows[name]["anomaly_score"], rows[name]["error"]) == ("", reason)
    assert b"latin\xe9.png" in out.read_bytes()
    assert (tmp_path / "s.parquet").stat().st_size
    result = run("embed", "--ckpt", trained_run, "--data", folder, "--out", tmp_path / "e.npz")
    assert result.exit_code == 1
    with np.load(tmp_path / "e.npz") as arrays:
        assert {path[len(str(folder)) + 1 :] for path in arrays["paths"]} == set(names)


def test_what_cannot_be_read_is_a_row(trained_run, image_folder, tmp_path, monkeypatch):
    """As root every file can be read, so the system's answer is played."""
    folder = shutil.copytree(image_folder / "test", tmp_path / "in")
    locked, secret = folder / "spots", folder / "normal" / "00.png"
    scandir, opened = os.scandir, Image.open

    def refusing(function):
        def call(path, *arguments, **options):
            if str(path) in (str(locked), str(secret)):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *arguments, **options)

        return call

    monkeypatch.setattr(os, "scandir", refusing(scandir))
    monkeypatch.setattr(Image, "open", refusing(opened))
    result = score(trained_run, data=folder, out=tmp_path / "s.csv")
    assert (result.scored, result.failed) == (11, 2)
    last = (tmp_path / "s.csv").read_text().splitlines()[-2:]
    assert [line.split(",")[0] for line in last] == [str(secret), str(locked)]
    assert all(line.endswith(",Permission denied") for line in last)


def test_a_file_that_vanishes_midway(trained_run, image_folder, tmp_path, monkeypatch):
    """Before it is read it is a row with the error; after, it has its score and is grey in the pictures."""
    folder = shutil.copytree(image_folder / "test", tmp_path / "in")
    victim = folder / "stripes" / "05.png"  # the last of the list
    features = VJE.features
    monkeypatch.setattr(VJE, "features", lambda self, x: victim.unlink(missing_ok=True) or features(self, x))
    monkeypatch.setattr("pyro_vje.model.encoding.images_at_once", lambda images, batch_size, device: batch_size)
    arguments = {"data": folder, "batch_size": 2, "report": True}
    result = score(trained_run, out=tmp_path / "a.csv", **arguments)
    assert (result.scored, result.failed) == (17, 1)
    assert "No such file or directory" in (tmp_path / "a.csv").read_text()
    monkeypatch.undo()
    monkeypatch.setattr("pyro_vje.anomaly.table._write", lambda *_, **__: shutil.rmtree(folder))
    result = score(trained_run, out=tmp_path / "b.csv", **arguments)
    assert result.scored == 17
    assert "data:image" in (tmp_path / "b_report.html").read_text()  # grey in place of what has gone


def test_pixel_limit_holds_without_warnings_as_errors(monkeypatch):
    """Pillow only warns at its limit; here nothing is decoded above it."""
    stream = io.BytesIO()
    Image.new("1", (100, 11)).save(stream, "PNG")
    decode_image(stream.getvalue(), 8)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match="decompression bomb: 100 x 11 pixels, limit 1000"):
            decode_image(stream.getvalue(), 8)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            KeyError("lost"),
            70,
            r"a bug in pyro-vje, please report it: KeyError: 'lost' \(pyro-vje --debug .* traceback\)",
        ),
        (RuntimeError("two\nlines"), 70, "a bug in pyro-vje, please report it: RuntimeError: two lines .*"),
        (PermissionError(13, "Permission denied", b"a\xff.json"), 2, ".*: Permission denied"),
        (MemoryError(), 4, "out of memory: lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 4, "CUDA out of memory.: lower --batch-size"),
        (FloatingPointError("the loss became nan"), 3, "the loss became nan"),
    ],
)
def test_any_error_is_one_line_with_its_code(trained_run, monkeypatch, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", fail)
    result = run("eval", "--ckpt", trained_run)
    assert result.exit_code == code
    assert re.fullmatch(f"Error: {line}\n", result.stderr)
    assert f"{code} " in main.help
    result = run("--debug", "eval", "--ckpt", trained_run)
    assert result.exception is error


PROGRAM = """
import sys, warnings
from pyro_vje.cli import main
from pyro_vje.model import encoders
sys.path.insert(0, {tests!r})
from tiny import tiny_encoder
encoders.ENCODERS["tiny"] = tiny_encoder
small = {small!r}
for command in (
    ["train", *small, "--batch-size", "16", "--epochs", "1", "--out", "run"],
    ["train", "--resume", "--out", "run"],
    ["eval", "--ckpt", "run"],
    ["score", "--ckpt", "run", "--report", "--parquet"],
    ["embed", "--ckpt", "run", "--data", {images!r}, "--out", "e.npz"],
    ["ablate", *small, "--batch-size", "16", "--epochs", "1", "--likelihood", "normal", "--out", "grid"],
    ["benchmark", "one-class", *small, "--batch-size", "8", "--epochs", "1", "--normal-class", "spots", "--out", "one"],
):
    main(["--log-level", "warning", *command], standalone_mode=False)
"""


def test_commands_print_no_librarys_warnings(image_folder, tmp_path):
    """In a process of its own, whose warnings are shown as they are to users, nothing but our own lines appears."""
    settings = {"encoder": "tiny", "embedding-dim": 8, "hidden-dim": 16, "precision": 32, "image-size": 16}
    settings |= {"dataset": "folder", "data-dir": image_folder}
    small = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    code = PROGRAM.format(tests=str(Path(__file__).parent), small=small, images=str(image_folder))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    ours = ("epoch 1: ", "diverged: ", "no image can be called")
    assert [line for line in result.stderr.splitlines() if not line.startswith(ours)] == []
    assert json.loads((tmp_path / "run" / "config.json").read_text())["schema_version"] == SCHEMA_VERSION


def test_librarys_warnings_are_shown_at_debug_level(trained_run, monkeypatch):
    def warn(*_, **__):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = _log_warning  # pytest has put its own there
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        raise ValueError("done")

    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", warn)
    assert run("eval", "--ckpt", trained_run).stderr == "Error: done\n"
    assert "DeprecationWarning: old\n" in run("--log-level", "debug", "eval", "--ckpt", trained_run).stderr
