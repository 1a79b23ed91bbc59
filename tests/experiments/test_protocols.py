"""Protocols: detectors against definitions, cells resumed, tables, commands."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score
from sklearn.svm import OneClassSVM

from pyro_vje import load_run, score
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.cli import main
from pyro_vje.data import load_dataset
from pyro_vje.data.splits import reference_images
from pyro_vje.experiments import cells, protocols
from pyro_vje.experiments.cells import markdown
from pyro_vje.experiments.protocols import DETECTORS, compare_scores, one_class, ood
from pyro_vje.model import encode

ROTATIONS = {name for name, score in SCORES.items() if score.of == "rotations"}  # of runs that have them


@pytest.fixture(scope="module")
def base(tiny_config):
    return dataclasses.replace(tiny_config, epochs=1, knn_every=0, batch_size=8)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Two of three classes, two seeds; tests must not change it."""
    out = tmp_path_factory.mktemp("protocol") / "out"
    return one_class(base, out, classes=["normal", "stripes"], seeds=[0, 1])


def test_detectors_find_what_lies_elsewhere():
    generator = torch.Generator().manual_seed(0)
    centre = torch.cat([4 * torch.ones(4), torch.zeros(12)])
    train, same, other = torch.randn(3, 200, 16, generator=generator) * 0.5
    vectors = torch.cat([same + centre, other - centre / 4])
    for name, detector in DETECTORS.items():
        scores = detector(train + centre)(vectors)
        assert scores.shape == (400,), name
        assert roc_auc_score(np.arange(400) >= 200, scores) > 0.95, name
        assert detector(train[:3] + centre)(vectors).isfinite().all(), name  # fewer images than neighbours or features


def test_detectors_against_their_definitions():
    rng = np.random.default_rng(1)
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(7, 5))
    found = {name: detector(torch.tensor(train))(torch.tensor(test)) for name, detector in DETECTORS.items()}
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, test)]
    distance = np.sort(1 - unit[1] @ unit[0].T, axis=1)
    np.testing.assert_allclose(found["k-NN 1"], distance[:, 0], atol=1e-12)
    np.testing.assert_allclose(found["k-NN 50"], distance[:, 49], atol=1e-12)
    np.testing.assert_allclose(found["feature norm"], -np.sqrt((test**2).sum(1)))
    svm = OneClassSVM(nu=0.1, gamma="scale").fit(unit[0])
    np.testing.assert_allclose(found["one-class SVM"], -svm.decision_function(unit[1]))


def test_every_score_and_detector_has_a_row_for_each_cell(finished):
    found = {(row["normal"], row["seed"]) for row in finished.rows}
    assert found == {(name, seed) for name in ("normal", "stripes") for seed in (0, 1)}
    own = [row for row in finished.rows if (row["normal"], row["seed"]) == ("stripes", 1)]
    by = {row["score"]: row["on"] for row in own}
    assert {by[name] for name in SCORES.keys() - ROTATIONS} == {"likelihood polar-student-t", "posterior", "embeddings"}
    assert {row["score"] for row in own if row["on"] == "trained features"} == set(DETECTORS)
    for control in ("untrained features", "raw pixels"):
        assert {row["score"] for row in own if row["on"] == control} == {"k-NN 1", "k-NN 50"}
    assert {(row["normal_images"], row["anomalies"]) for row in own} == {(6, 12)}
    table = pd.read_csv(finished.folder / "table.csv")
    np.testing.assert_allclose(table["auroc"], [row["auroc"] for row in finished.rows])
    assert (table["auroc_low"] <= table["auroc_high"]).all()
    assert "standard deviation over seeds" in (finished.folder / "table.md").read_text()
    assert r"\toprule" in (finished.folder / "table.tex").read_text()


def test_the_number_is_the_one_that_scoring_the_cell_gives(finished, tmp_path):
    for name in SCORES.keys() - ROTATIONS:
        alone = score(finished.folder / "cells" / "stripes_seed-1", score=name, out=tmp_path / "scores.csv")
        (row,) = [row for row in finished.rows if (row["normal"], row["seed"], row["score"]) == ("stripes", 1, name)]
        assert alone.auroc == pytest.approx(row["auroc"], abs=1e-12), name


def test_finished_cells_are_not_run_again_and_others_may_be_added(finished, base, monkeypatch, tmp_path):
    trained = []
    train = cells.train
    monkeypatch.setattr(
        cells, "train", lambda config, folder, **how: (trained.append(folder.name), train(config, folder, **how))
    )
    out = shutil.copytree(finished.folder, tmp_path / "out")
    again = one_class(base, out, classes=["stripes"], seeds=[0, 1])
    assert (trained, again.rows) == ([], finished.rows)
    (out / "cells" / "stripes_seed-1.json").unlink()  # training stands, scores are made anew
    again = one_class(base, out, classes=["stripes"], seeds=[1])
    assert (trained, again.rows) == ([], finished.rows)
    assert {row["normal"] for row in one_class(base, out, classes=["spots"]).rows} == {"normal", "stripes", "spots"}
    assert trained == ["spots_seed-0"]
    with pytest.raises(FileExistsError, match=r"with kl_weight 0.03, not 0.5"):
        one_class(dataclasses.replace(base, kl_weight=0.5), out)


def test_a_cell_that_diverges_or_has_too_few_images_is_a_line(base, image_folder, tmp_path):
    few = shutil.copytree(image_folder, tmp_path / "few")
    for path in sorted((few / "train" / "spots").iterdir())[1:]:
        path.unlink()
    config = dataclasses.replace(base, data_dir=str(few), batch_size=None)
    result = one_class(config, tmp_path / "out", classes=["stripes", "spots"])
    assert load_run(result.folder / "cells" / "stripes_seed-0").info.config.batch_size == 15
    assert {row["normal"] for row in result.rows} == {"stripes"}
    assert "spots_seed-0: failed: training needs at least two images" in result.table
    assert one_class(config, tmp_path / "out", classes=["stripes"]).rows == result.rows
    config = dataclasses.replace(base, lr=1e18, warmup_epochs=0.0)
    result = one_class(config, tmp_path / "other", classes=["normal"])
    assert result.rows == []
    assert "normal_seed-0: diverged: " in result.table


def test_table_is_the_mean_over_seeds_and_classes():
    cells = [("cat", 0, 0.5), ("cat", 1, 0.6), ("dog", 0, 0.9), ("dog", 1, 0.7)]
    values = [("a", *cell) for cell in cells] + [("b", normal, seed, 0.65) for normal, seed, _ in cells]
    rows = [
        {"score": score, "on": "x", "normal": normal, "seed": seed, "auroc": auroc}
        | {"auroc_95": [auroc - 0.06, auroc + 0.06]}
        for score, normal, seed, auroc in values
    ]
    table = compare_scores(rows)
    assert list(table) == ["score", "on", "cat", "dog", "mean", "95 %"]
    # Over the seeds the means are 0.70 and 0.65; of four intervals of ± 0.06 the mean has 0.06 / √4.
    assert list(table.loc[0]) == ["a", "x", "0.550", "**0.800**", "**0.675 ± 0.035**", "± 0.030"]
    assert list(table.loc[1]) == ["b", "x", "**0.650**", "0.650", "0.650 ± 0.000", "± 0.030"]
    assert "| **0.800** | **0.675 ± 0.035** |" in markdown(table)


def test_inspection_images_are_one_class(base, image_folder, tmp_path):
    """Normal images in ``train/good`` and ``test/good``, defective ones in ``test/`` alone."""
    for source, target in (("train/normal", "train/good"), ("test/normal", "test/good"), ("test/spots", "test/crack")):
        shutil.copytree(image_folder / source, tmp_path / "screw" / target)
    config = dataclasses.replace(base, data_dir=str(tmp_path / "screw"))
    for classes in ([], ["good"]):
        result = one_class(config, tmp_path / "out", classes=classes)
        assert {(row["normal"], row["normal_images"], row["anomalies"]) for row in result.rows} == {("good", 6, 6)}
    with pytest.raises(ValueError, match="no image of class 'crack'"):
        one_class(config, tmp_path / "out", classes=["crack"])


def test_a_runs_own_test_images_are_no_other_data_set(trained_run, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vje.data.ImageSet.fingerprint", lambda images: "the same")
    with pytest.raises(ValueError, match="are the run's own test images"):
        ood(trained_run, {"spots": ("folder", str(image_folder / "test" / "spots"))}, tmp_path / "out")


def test_ood_tells_a_data_set_from_others(trained_run, image_folder, tmp_path):
    places = {name: ("folder", str(image_folder / "test" / name)) for name in ("spots", "stripes")}
    first = ood(trained_run, {"spots": places["spots"]}, tmp_path / "out", likelihoods=["normal"])
    (found,) = [row for row in first.rows if row["score"] == "k-NN 50" and row["on"] == "raw pixels"]
    assert (found["normal_images"], found["anomalies"]) == (18, 6)
    assert found["normal"] == "against spots"
    assert {"likelihood normal", "likelihood polar-student-t"} <= {row["on"] for row in first.rows}
    both = ood(trained_run, places, tmp_path / "out", likelihoods=["normal"])
    assert both.rows[: len(first.rows)] == first.rows
    assert len(both.rows) == 2 * len(first.rows)
    stored = json.loads((both.folder / "table.json").read_text())
    assert [row for cell in stored["cells"] for row in cell["scores"]] == both.rows


def test_reference_images_are_the_training_images_or_a_sample(image_folder, monkeypatch):
    images = load_dataset("folder", image_folder, "train", image_size=8)
    assert reference_images(images, 0) is images
    monkeypatch.setattr("pyro_vje.data.splits.REFERENCE_IMAGES", 10)
    some = reference_images(images, 0)
    assert len(set(some.paths)) == 10
    assert some.paths == reference_images(images, 0).paths
    assert some.paths != reference_images(images, 1).paths


def test_bad_arguments_and_images_without_labels_are_refused(base, image_folder, tmp_path):
    for changes, message in (({"classes": ["cat"]}, "no class 'cat'"), ({"seeds": []}, "seeds must name")):
        with pytest.raises(ValueError, match=message):
            one_class(base, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()
    flat = shutil.copytree(image_folder / "train" / "spots", tmp_path / "flat")
    with pytest.raises(ValueError, match=r"no labels|no image in the split"):
        one_class(dataclasses.replace(base, data_dir=str(flat)), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds no table\.json"):
        one_class(base, tmp_path / "other")


def test_commands(image_folder, trained_run, tmp_path):
    settings = "--image-size 16 --encoder tiny --hidden-dim 16 --epochs 1 --batch-size 8 --normal-class spots"
    arguments = ["one-class", "--dataset", "folder", "--data-dir", image_folder, *settings.split()]
    found = CliRunner().invoke(main, ["benchmark", *map(str, arguments), "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "\nk-NN 50 " in found.stdout
    assert "standard deviation over seeds" in " ".join(found.stdout.split())
    assert load_run(tmp_path / "out" / "cells" / "spots_seed-0").info.config.normal_class == "spots"
    ood = ["ood", "--ckpt", trained_run, "--out", tmp_path / "ood"]
    outside = ["--outside", image_folder / "test" / "spots"]
    found = CliRunner().invoke(main, ["benchmark", *map(str, ood + outside)])
    assert found.exit_code == 0, found.output
    assert "against spots" in found.output
    found = CliRunner().invoke(main, ["benchmark", *map(str, ood), "--outside", "a/test", "--outside", "b/test"])
    assert found.exit_code == 2
    assert "two sets have one name in the table, a/test, b/test" in found.stderr


def test_a_frozen_encoder_sees_the_test_images_once(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        protocols,
        "encode",
        lambda vje, images, *rest, **how: seen.append(len(images)) or encode(vje, images, *rest, **how),
    )
    frozen = dataclasses.replace(base, encoder_lr_scale=0.0, feature_views=2, folds=0, weights="none")
    found = one_class(frozen, tmp_path / "out", classes=["normal", "stripes"])
    assert seen.count(18) == 3  # twice for the untrained control, whose weights may be others
    for normal in ("normal", "stripes"):
        how = {"score": "aggregate", "out": tmp_path / "scores.csv"}
        alone = score(found.folder / "cells" / f"{normal}_seed-0", **how)
        (row,) = [row for row in found.rows if (row["normal"], row["score"]) == (normal, "aggregate")]
        assert alone.auroc == pytest.approx(row["auroc"], abs=1e-12)
