"""Protocols: detectors against definitions, cells resumed and run in processes, tables, commands."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from pyro_vje import load_run, score
from pyro_vje.cli import main
from pyro_vje.data import load_dataset
from pyro_vje.data.splits import reference_images
from pyro_vje.experiments import protocols
from pyro_vje.experiments.baselines import DETECTORS
from pyro_vje.experiments.protocols import markdown, one_class, ood


@pytest.fixture(scope="module")
def base(tiny_config):
    return dataclasses.replace(tiny_config, epochs=1, knn_every=0, batch_size=8)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Two of three classes, two seeds; tests must not change it."""
    out = tmp_path_factory.mktemp("protocol") / "out"
    return one_class(base, out, classes=["normal", "stripes"], seeds=[0, 1])


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_find_what_lies_elsewhere(name):
    rng = np.random.default_rng(0)
    centre = np.r_[4 * np.ones(4), np.zeros(12)]
    train, same = rng.normal(size=(2, 200, 16)) * 0.5 + centre
    other = rng.normal(size=(200, 16)) * 0.5 - centre / 4
    scores = DETECTORS[name](train, np.concatenate([same, other]))
    assert scores.shape == (400,)
    assert roc_auc_score(np.arange(400) >= 200, scores) > 0.95
    assert np.isfinite(DETECTORS[name](train[:3], same)).all()  # fewer images than neighbours or features


def test_detectors_against_their_definitions():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(7, 5))
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, test)]
    distance = np.sort(1 - unit[1] @ unit[0].T, axis=1)
    np.testing.assert_allclose(DETECTORS["k-NN 1"](train, test), distance[:, 0], atol=1e-12)
    np.testing.assert_allclose(DETECTORS["k-NN 50"](train, test), distance[:, 49], atol=1e-12)
    np.testing.assert_allclose(DETECTORS["feature norm"](train, test), -np.sqrt((test**2).sum(1)))


def test_every_score_and_detector_has_a_row_for_each_cell(finished):
    cells = {(row["normal"], row["seed"]) for row in finished.rows}
    assert cells == {(name, seed) for name in ("normal", "stripes") for seed in (0, 1)}
    own = [row for row in finished.rows if (row["normal"], row["seed"]) == ("stripes", 1)]
    on_likelihood = {row["score"] for row in own if row["on"] == "likelihood polar-student-t"}
    assert on_likelihood == {
        *("conditional", "elbo", "aggregate", "direction", "radius", "typicality", "variance")
    }
    assert {row["score"] for row in own if row["on"] == "trained features"} == set(DETECTORS)
    for control in ("untrained features", "raw pixels"):
        assert {row["score"] for row in own if row["on"] == control} == {"k-NN 1", "k-NN 50"}
    assert {(row["normal_images"], row["anomalies"]) for row in own} == {(6, 12)}
    with open(finished.folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["auroc"]) for row in rows] == [row["auroc"] for row in finished.rows]


def test_the_number_is_the_one_that_scoring_the_cell_gives(finished, tmp_path):
    for name in ("conditional", "aggregate"):
        alone = score(
            finished.folder / "cells" / "stripes_seed-1", score=name, out=tmp_path / "scores.csv", draw=False
        )
        (row,) = [
            row for row in finished.rows if (row["normal"], row["seed"], row["score"]) == ("stripes", 1, name)
        ]
        assert alone.auroc == row["auroc"]


def test_finished_cells_are_not_run_again_and_others_may_be_added(finished, base, monkeypatch):
    trained = []
    train = protocols.train_cell
    monkeypatch.setattr(
        protocols, "train_cell", lambda config, folder: (trained.append(folder.name), train(config, folder))
    )
    again = one_class(base, finished.folder, classes=["stripes"], seeds=[0, 1])
    assert trained == []
    assert again.rows == finished.rows
    with pytest.raises(FileExistsError, match=r"other settings \(kl_weight\)"):
        one_class(dataclasses.replace(base, kl_weight=0.5), finished.folder)


def test_a_diverged_cell_is_a_line_and_the_others_go_on(base, tmp_path, monkeypatch):
    train = protocols.train_cell

    def failing(config, folder):
        if config.normal_class == "normal":
            raise FloatingPointError("the loss is nan")
        train(config, folder)

    monkeypatch.setattr(protocols, "train_cell", failing)
    result = one_class(base, tmp_path / "out", classes=["normal", "spots"])
    assert {row["normal"] for row in result.rows} == {"spots"}
    assert "normal, seed 0: diverged: the loss is nan" in result.table


def test_a_class_of_few_images_gets_a_batch_that_fits_or_a_line(base, image_folder, tmp_path):
    few = shutil.copytree(image_folder, tmp_path / "few")
    for path in sorted((few / "train" / "spots").iterdir())[1:]:
        path.unlink()
    config = dataclasses.replace(base, data_dir=str(few), batch_size=None)
    result = one_class(config, tmp_path / "out", classes=["stripes", "spots"])
    assert load_run(result.folder / "cells" / "stripes_seed-0").info.config.batch_size == 15
    assert {row["normal"] for row in result.rows} == {"stripes"}
    assert "spots, seed 0: failed: training needs at least two images" in result.table
    again = one_class(config, tmp_path / "out", classes=["stripes"])
    assert again.rows == result.rows


def test_table_is_the_mean_over_seeds_and_classes():
    def row(score, normal, seed, auroc):
        return {
            "score": score,
            "on": "x",
            "normal": normal,
            "seed": seed,
            "auroc": auroc,
            "auroc_95": [auroc - 0.06, auroc + 0.06],
        }

    cells = [("cat", 0, 0.5), ("cat", 1, 0.6), ("dog", 0, 0.9), ("dog", 1, 0.7)]
    rows = [row("a", *cell) for cell in cells] + [row("b", normal, seed, 0.65) for normal, seed, _ in cells]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| score | on | cat | dog | mean | 95 % |"
    assert lines[2] == "| a | x | 0.550 | **0.800** | **0.675** | ± 0.030 |"  # 0.06 / √4
    assert lines[3] == "| b | x | **0.650** | 0.650 | 0.650 | ± 0.030 |"


def test_ood_tells_a_data_set_from_others(trained_run, image_folder, tmp_path):
    noise = {"spots": ("folder", str(image_folder / "test" / "spots"))}
    result = ood(trained_run, noise, tmp_path / "out", likelihoods=["normal"])
    (found,) = [row for row in result.rows if row["score"] == "k-NN 50" and row["on"] == "raw pixels"]
    assert (found["normal_images"], found["anomalies"]) == (18, 6)
    assert found["normal"] == "against spots"
    assert {"likelihood normal", "likelihood polar-student-t"} <= {row["on"] for row in result.rows}
    stored = json.loads((result.folder / "table.json").read_text())
    assert stored["cells"][0]["scores"] == [
        {name: value for name, value in row.items() if name not in ("normal", "seed")} for row in result.rows
    ]


def test_reference_images_are_the_training_images_or_a_sample(image_folder, monkeypatch):
    images = load_dataset("folder", image_folder, "train", image_size=8)
    assert reference_images(images, 0) is images
    monkeypatch.setattr("pyro_vje.data.splits.REFERENCE_IMAGES", 10)
    some = reference_images(images, 0)
    assert len(set(some.paths)) == 10
    assert some.paths == reference_images(images, 0).paths
    assert some.paths != reference_images(images, 1).paths


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classes": ["cat"]}, ValueError, "no class 'cat'"),
        ({"jobs": 0}, ValueError, "jobs and the number of seeds must be at least 1"),
        ({"seeds": []}, ValueError, "jobs and the number of seeds must be at least 1"),
    ],
)
def test_bad_arguments(base, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        one_class(base, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_images_without_labels_are_refused(base, image_folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (image_folder / "train" / "spots").iterdir():
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"no labels|no image in the split"):
        one_class(dataclasses.replace(base, data_dir=str(flat)), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="holds no such results"):
        one_class(base, tmp_path / "other")


def test_commands(image_folder, trained_run, tmp_path):
    """``--jobs 2`` trains in processes of its own, which know nothing of these tests' small encoder."""
    out = tmp_path / "out"
    arguments = [
        *(
            "--dataset",
            "folder",
            "--data-dir",
            image_folder,
            "--image-size",
            "8",
            "--encoder",
            "resnet-small",
        ),
        *("--epochs", "1", "--batch-size", "8", "--embedding-dim", "8", "--normal-class", "spots"),
        *("--jobs", "2", "--out", out),
    ]
    found = CliRunner().invoke(main, ["benchmark", "one-class", *map(str, arguments)])
    assert found.exit_code == 0, found.output
    assert "| k-NN 50 | raw pixels |" in found.output
    assert load_run(out / "cells" / "spots_seed-0").info.config.normal_class == "spots"
    arguments = [
        "--ckpt",
        trained_run,
        "--outside",
        image_folder / "test" / "spots",
        "--out",
        tmp_path / "ood",
    ]
    found = CliRunner().invoke(main, ["benchmark", "ood", *map(str, arguments)])
    assert found.exit_code == 0, found.output
    assert "against spots" in found.output


def test_sets_outside_of_one_name_are_refused(trained_run, tmp_path):
    arguments = ["benchmark", "ood", "--ckpt", str(trained_run), "--outside", "a/test", "--outside", "b/test"]
    found = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert found.exit_code == 2
    assert "two sets have one name in the table, a/test, b/test" in found.stderr
