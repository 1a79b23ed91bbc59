"""Recipes: what a file may say, that options go over it, and that those of large data sets run on small ones."""

import csv
import json

import pytest
from click.testing import CliRunner
from on_disk import write_imagenet, write_stl10

from pyro_vje import TrainConfig, load_recipe
from pyro_vje.cli import main
from pyro_vje.config import RECIPES
from pyro_vje.runs.folder import read_info

TINY = """
dataset = "folder"
encoder = "tiny"
embedding_dim = 8
hidden_dim = 16
epochs = 2
batch_size = 16
precision = "32"
image_size = 16
radius = "none"
shared_variance = false
"""


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name):
    config = TrainConfig(**load_recipe(name)).resolved()
    data = "cifar10" if name == "one-class" else name.removesuffix("-cpu")
    assert (config.dataset, config.epochs is None) == (data, False)
    text = RECIPES[name].read_text()
    for said in (f"--recipe {name}", "ublished", "Expected time:", "Known of its result:"):
        assert said in text


def check_run(out, **settings):
    config = read_info(out).config
    assert {name: getattr(config, name) for name in settings} == settings
    evaluation = json.loads((out / "eval.json").read_text())
    assert all(row["knn"] is not None for row in evaluation["rows"])
    with open(out / "scores.csv", newline="") as file:
        return evaluation, list(csv.DictReader(file))


def train_eval_score(name, data, out, *options):
    where = ["--data-dir", data, "--no-download"]
    small = ["--encoder", "tiny", "--hidden-dim", 16, "--epochs", 1, *options]
    for command in (
        ["train", "--recipe", name, *where, "--out", out, *small],
        ["eval", "--ckpt", out, "--no-download", "--k", 3],
        ["score", "--ckpt", out, "--no-download"],
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output


def test_stl10_from_recipe_to_scores(tmp_path, monkeypatch):
    write_stl10(tmp_path / "data", monkeypatch, train=12, test=6, unlabelled=12)
    train_eval_score("stl10", tmp_path / "data", tmp_path / "run", "--batch-size", 8)
    settings = {"dataset": "stl10", "encoder": "tiny", "epochs": 1, "batch_size": 8, "weight_decay": 5e-4}
    evaluation, rows = check_run(tmp_path / "run", **settings)
    assert read_info(tmp_path / "run").train_images == 23  # with the unlabelled ones, one held out
    assert (evaluation["train_images"], evaluation["test_images"], evaluation["image_size"]) == (12, 6, 96)
    assert [row["label"] for row in rows] == [f"class{i}" for i in range(6)]
    assert {float(row["p_value"]) for row in rows} <= {0.5, 1.0}


def test_imagenet_from_recipe_to_scores(tmp_path):
    write_imagenet(tmp_path / "data", train=5, val=2)
    small = ("--image-size", 72, "--batch-size", 4, "--devices", 1, "--workers", 1)
    train_eval_score("imagenet", tmp_path / "data", tmp_path / "run", *small)
    settings = {"residency": "stream", "weight_decay": 1e-4, "devices": 1, "embedding_dim": None}
    evaluation, rows = check_run(tmp_path / "run", **settings)
    assert (evaluation["train_images"], evaluation["rows"][0]["dim"]) == (10, 8)
    assert [row["label"] for row in rows] == ["n01440764"] * 2 + ["n01443537"] * 2


def test_options_go_over_a_recipe_of_ones_own(tiny, image_folder, tmp_path):
    out = tmp_path / "run"
    over = ("--data-dir", image_folder, "--epochs", 1, "--shared-variance", "--out", out)
    result = run("train", "--recipe", tiny, *over)
    assert result.exit_code == 0, result.output
    config = read_info(out).config
    assert (config.epochs, config.embedding_dim, config.radius, config.shared_variance) == (1, 8, None, True)


def test_ablate_varies_what_a_recipe_fixes(tiny, image_folder, tmp_path):
    tiny.write_text(TINY + 'likelihood = "normal"\nseed = 3\n')
    where = ("--data-dir", image_folder, "--epochs", 1, "--out", tmp_path / "out")
    command = ["ablate", "--recipe", tiny, *where]
    assert run(*command).exit_code == 0
    assert run(*command, "--seed", 4).exit_code == 0
    cells = json.loads((tmp_path / "out" / "ablation.json").read_text())["cells"]
    found = [(cell["config"]["likelihood"], cell["config"]["seed"]) for cell in cells]
    assert found == [("normal", 3), ("normal", 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3\nlrate = 1.0", "unknown settings epoch, lrate (of a newer version?); known: dataset, "),
        ("epochs = 1.5", "setting epochs must be int"),
        ("epochs = [1, 2]", "setting epochs must be int"),
        ("epochs = ", "is no TOML"),
        ("epochs = 0", "epochs must be at least 1"),
        ('precision = "16"', "precision must be one of auto, 32, bf16, not '16'"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    result = run("train", "--recipe", path, "--out", tmp_path / "run")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_none_lists_what_there_is(tmp_path):
    result = run("train", "--recipe", "cifar")
    assert result.exit_code == 2
    assert f"no recipe 'cifar': choose one of {', '.join(RECIPES)}, or the path" in result.stderr
    result = run("benchmark", "one-class", "--recipe", "imagenet", "--out", tmp_path / "out")
    assert "the recipe imagenet sets devices, for which one-class has no option" in result.stderr
