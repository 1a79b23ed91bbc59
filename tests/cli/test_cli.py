"""The commands as a user types them."""

import csv
import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from pyro_vje.cli import main

SMALL = "--encoder tiny --embedding-dim 8 --hidden-dim 16 --batch-size 16 --precision 32 --image-size 16"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_train_eval_score_embed(image_folder, tmp_path):
    out = tmp_path / "run"
    result = run(
        "train",
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
        "--out",
        out,
        "--epochs",
        2,
        *SMALL.split(),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)

    result = run("eval", "--ckpt", out, "--k", 5)
    assert result.exit_code == 0, result.output
    assert "trained encoder" in result.stdout
    assert json.loads((out / "eval.json").read_text())["train_images"] == 48

    result = run("score", "--ckpt", out)
    assert result.exit_code == 0, result.output
    assert "18 images scored by conditional" in result.stdout
    assert "AUROC" in result.stdout
    with open(out / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 18

    result = run("embed", "--ckpt", out, "--data", image_folder / "test", "--out", tmp_path / "emb.npz")
    assert result.exit_code == 0, result.output
    assert "18 images embedded" in result.stdout

    result = run(
        "score",
        "--ckpt",
        out / "weights.safetensors",
        "--data",
        image_folder / "test",
        "--out",
        tmp_path / "s.csv",
    )
    assert result.exit_code == 0, result.output


def test_one_class_run_scores_against_its_own_class(image_folder, tmp_path):
    arguments = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run", "--epochs", 1]
    result = run(
        "train", *arguments, "--normal-class", "stripes", *SMALL.replace("16 --pre", "8 --pre").split()
    )
    assert result.exit_code == 0, result.output
    result = run("score", "--ckpt", tmp_path / "run")
    assert "normal: 6" in result.stdout


def test_damaged_image_gives_a_row_and_exit_code_one(trained_run, image_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.png").write_bytes(next(image_folder.rglob("*.png")).read_bytes())
    (folder / "bad.png").write_text("no image")
    result = run("score", "--ckpt", trained_run, "--data", folder, "--out", tmp_path / "s.csv")
    assert result.exit_code == 1
    assert "1 image scored" in result.stdout
    assert "1 image could not be read" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "cifar1000"], "'cifar1000' is not one of 'digits', 'cifar10'"),
        (["eval", "--ckpt", ".", "--dataset", "cifar1000"], "'cifar1000' is not one of"),
        (["train", "--dataset", "no_such_module:data"], "'no_such_module:data'"),
        (["train", "--likelihood", "cauchy"], "unknown likelihood family 'cauchy'"),
        (["train", "--dataset", "folder", "--data-dir", "/no/such/place"], "/no/such/place"),
        (["train", "--resume"], "--out RUN"),
        (["train", "--resume", "--out", "x", "--overwrite"], "leave one out"),
        (["train", "--lr", "1", "--epochs", "2", "--lr", "2"], "--lr takes one value, and was given 2 times"),
        (["benchmark", "one-class", "--df", "1", "--df", "2", "--out", "x"], "--df takes one value"),
        (["score", "--ckpt", ".", "--alpha", "0.1", "--fdr", "0.1"], "alpha and fdr are two rules"),
        (["ablate", "--dataset", "folder", "--data-dir", "no", "--out", "x"], "/no (--data-dir)"),
        (["train", "--epochs", "0"], "epochs must be at least 1"),
        (["eval", "--ckpt", "/no/such/run"], "'/no/such/run' does not exist"),
        (["score", "--ckpt", "/no/such/run"], "'/no/such/run' does not exist"),
        (["train", "--likelihood", "no_such_module:family"], "no module 'no_such_module'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="epochs"):
        run("--debug", "train", "--epochs", "0")


FACTORIES = """
from torch import nn

class NoSize(nn.Module):
    pass

def nothing(image_size): pass

def number(image_size): return 3

def broken(image_size): raise KeyError("weights")

def misfit(image_size): return nn.Linear(7, 7)
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("NoSize", r"failed when called with the image size 16 \(TypeError: .*must take an image size alone"),
        ("nothing", r"gave a NoneType: it must return an nn\.Module"),
        ("number", r"gave a int: it must return"),
        ("broken", r"failed when called .*KeyError: 'weights'"),
        ("misfit", r"the encoder \(Linear\) fails on images of shape \(2, 3, 16, 16\)"),
    ],
)
def test_unfit_encoder_of_the_users_own_is_named(factory, message, tmp_path, monkeypatch):
    (tmp_path / "unfit_encoders.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    result = run("train", "--encoder", f"unfit_encoders:{factory}")
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert factory == "misfit" or f"'unfit_encoders:{factory}'" in result.stderr


def test_ctrl_c_is_one_line_and_exit_code_130(trained_run, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vje.representation.evaluation.evaluate", interrupted)
    result = run("eval", "--ckpt", trained_run)
    assert (result.exit_code, result.output) == (130, "stopped\n")
    monkeypatch.setattr("pyro_vje.training.run.load_train_set", interrupted)
    result = run("train", "--out", tmp_path / "run")
    assert (result.exit_code, result.output) == (
        130,
        "stopped: nothing was written, the same command begins anew\n",
    )


def test_repeatable_flag_shows_and_takes_its_names():
    for command in ("train", "ablate"):
        assert "[default: shared-variance]" in " ".join(run(command, "-h").stdout.split())
    given = {
        (): (True,),
        ("--separate-variance",): (False,),
        ("--separate-variance", "--shared-variance"): (False, True),
    }
    for arguments, values in given.items():
        context = main.commands["ablate"].make_context("ablate", [*arguments, "--out", "x"])
        assert context.params["shared_variance"] == values


def test_warnings_of_health_wait_for_the_warm_up_and_are_not_repeated(image_folder, tmp_path, monkeypatch):
    ratios = iter([0.1] * 6 + [0.2, 9.0, 0.3, 0.4])  # of epochs 1 to 10: healthy in epoch 8 alone
    monkeypatch.setattr("pyro_vje.metrics.posterior_snr", lambda *_: next(ratios))
    where = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run"]
    how = ["--epochs", 10, "--warmup-epochs", 6, "--knn-every", 1, *SMALL.split()]
    result = run("train", *where, *how)
    assert result.exit_code == 0, result.output
    said = [line.split(":")[0] for line in result.stderr.splitlines() if "mostly noise" in line]
    assert said == ["epoch 7", "epoch 9"]


@pytest.mark.parametrize("given", [[], ["--normal-class", "normal"]])
def test_hint_at_the_one_class_protocol(image_folder, tmp_path, given):
    where = ["--dataset", "folder", "--data-dir", image_folder, "--out", tmp_path / "run"]
    how = [*SMALL.replace("16 --pre", "8 --pre").split(), "--epochs", 1, *given]
    result = run("train", *where, *how)
    assert result.exit_code == 0, result.output
    assert ("training on all 3 classes; --normal-class normal" in result.stderr) == (not given)


def test_likelihood_of_the_users_own_file(image_folder, tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "import pyro.distributions as dist\n"
        "def family(loc, scale, settings):\n"
        "    return dist.Laplace(loc, scale).to_event(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--dataset",
        "folder",
        "--data-dir",
        image_folder,
        "--out",
        "run",
        "--epochs",
        1,
        *SMALL.split(),
    ]
    result = run("train", *arguments, "--likelihood", "mine_for_test:family")
    assert result.exit_code == 0, result.output
    assert run("score", "--ckpt", "run").exit_code == 2  # the run folder alone may not import code
    result = run("score", "--ckpt", "run", "--trust-plugins")
    assert result.exit_code == 0, result.output


def imports_nothing_heavy(command, exit_code):
    code = (
        "import sys\n"
        "from pyro_vje.cli import main\n"
        f"try: main({command!r})\n"
        f"except SystemExit as stop: assert stop.code == {exit_code}\n"
        "heavy = {'torch', 'pyro', 'lightning', 'sklearn', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout + result.stderr or "Error" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--dataset", "nope"],
        ["train", "--dataset", "folder", "--data-dir", "/no/such/place"],
        ["train", "--seed", "-1"],
        ["train", "--resume"],
        ["ablate", "--epochs", "0", "--out", "x"],
        ["eval", "--ckpt", "/no/such/run"],
    ],
)
def test_bad_arguments_are_refused_before_torch_is_loaded(command):
    imports_nothing_heavy(command, 2)


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["ablate"], ["score"], ["embed"]])
def test_help_imports_nothing_heavy(command):
    imports_nothing_heavy([*command, "--help"], 0)


@pytest.mark.parametrize(
    ("level", "rule"),
    [("--alpha", "(p-value ≤ 0.5)"), ("--fdr", "(Benjamini-Hochberg at a false-discovery rate of 0.5)")],
)
def test_decisions_are_counted(trained_run, tmp_path, level, rule):
    result = run("score", "--ckpt", trained_run, level, "0.5", "--no-draw", "--out", tmp_path / "s.csv")
    assert result.exit_code == 0, result.output
    assert re.search(rf"^\d+ of 18 called anomalies {re.escape(rule)}$", result.stdout, re.MULTILINE)
