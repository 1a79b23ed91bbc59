"""The commands as a user types them."""

import csv
import json
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
    assert "1 images scored" in result.stdout
    assert "1 images could not be read" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "cifar1000"], "unknown data set 'cifar1000'"),
        (["train", "--likelihood", "cauchy"], "unknown likelihood family 'cauchy'"),
        (["train", "--dataset", "folder", "--data-dir", "/no/such/place"], "/no/such/place"),
        (["train", "--resume"], "--out RUN"),
        (["train", "--resume", "--out", "x", "--lr", "1"], "leave out --lr"),
        (["eval", "--ckpt", "/no/such/run"], "no such run folder: /no/such/run"),
        (["score", "--ckpt", "/no/such/run"], "no such run folder: /no/such/run"),
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
    with pytest.raises(ValueError, match="cifar1000"):
        run("--debug", "train", "--dataset", "cifar1000")


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


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["ablate"], ["score"], ["embed"]])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\n"
        "from pyro_vje.cli import main\n"
        f"try: main({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'pyro', 'lightning', 'sklearn', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
