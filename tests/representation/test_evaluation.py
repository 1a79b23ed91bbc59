"""`evaluate`: three representations, each number with its protocol; the probe by SGD."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from pyro_vje import evaluate, load_run, metrics
from pyro_vje.cli import main
from pyro_vje.data import CleanView, ImageSet, Recipe, TwoViews, load_dataset, views_for
from pyro_vje.model.encoding import encode
from pyro_vje.representation.evaluation import (
    _split,
    _uncertainty,
    control_name,
    format_table,
    probe,
    probe_views,
    sgd_probe,
)

MEASURES = ("effective_rank", "alignment", "uniformity", "recall_at_1", "r_auroc", "rejection")


def test_table_of_three_representations(trained_run, tmp_path):
    result = evaluate(trained_run, out=tmp_path / "eval.json", k=5)
    assert [row["representation"] for row in result["rows"]] == ["trained encoder", "untrained encoder", "raw pixels"]
    assert [row["dim"] for row in result["rows"]] == [8, 8, 3 * 16 * 16]
    for row in result["rows"]:
        assert 0 <= row["knn"] <= 1
        assert 0 <= row["linear"] <= 1
        assert "knn_sweep" not in row
        assert "linear_sgd" not in row
    assert result["protocols"]["knn"]["k"] == 5
    assert (result["train_images"], result["test_images"]) == (48, 18)
    assert json.loads((tmp_path / "eval.json").read_text()) == result
    assert (tmp_path / "pictures" / "eval_rejection.png").read_bytes().startswith(b"\x89PNG")
    text = format_table(result)
    assert "raw pixels" in text
    assert "k 5" in text


def test_evaluating_twice_gives_the_same_numbers(trained_run, tmp_path):
    settings = {"linear": "sgd", "probe_epochs": 2}
    state = torch.get_rng_state()
    first = evaluate(trained_run, out=tmp_path / "a.json", **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert evaluate(trained_run, out=tmp_path / "b.json", **settings) == first


def test_command_with_everything(trained_run, tmp_path):
    sweep = ["--k", "30", "--k", "3", "--temperature", "0.5", "--temperature", "0.05"]
    linear = ["--linear", "sgd", "--linear", "logistic", "--probe-epochs", "2", "--batch-size", "16"]
    out = tmp_path / "all.json"
    arguments = ["eval", "--ckpt", str(trained_run), "--out", str(out), *sweep, *linear]
    printed = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    lines = printed.stdout.splitlines()
    assert max(map(len, lines)) <= 84  # with both probes; 80 with one
    result = json.loads(out.read_text())
    separate = evaluate(trained_run, out=tmp_path / "one.json", k=3, temperature=0.05, batch_size=16)
    for row, one in zip(result["rows"], separate["rows"], strict=True):
        settings = [(found["k"], found["temperature"]) for found in row["knn_sweep"]]
        assert settings == [(30, 0.5), (30, 0.05), (3, 0.5), (3, 0.05)]
        assert row["knn"] == row["knn_sweep"][0]["accuracy"]
        assert row["knn_sweep"][3]["accuracy"] == one["knn"]
        assert {name: row[name] for name in ("linear", *MEASURES)} == {
            name: one[name] for name in ("linear", *MEASURES)
        }
    pixels = result["rows"][2]
    assert [pixels[name] for name in ("linear_sgd", *MEASURES)] == [None] * 7
    numbers = {"knn", "knn_sweep", "linear", "linear_sgd", *MEASURES}
    assert result["protocols"].keys() == numbers
    sgd = result["protocols"]["linear_sgd"]
    assert (sgd["epochs"], sgd["epoch"], sgd["batch_size"], sgd["lr"]) == (2, "last", 16, 0.1 * 16 / 256)
    # A column, or a table, and a line of protocol for each number.
    for heading in ("k-NN", "linear", "SGD", "rank", "align", "uniform", "R@1", "R-AUROC"):
        assert heading in lines[1].split()
        assert any(line.startswith(f"{heading}:") for line in lines)
    assert any(line.startswith("k 3, T 0.05") for line in lines)
    assert any(line.startswith("rejected:") for line in lines)


def test_measures_of_the_encoder(trained_run, tmp_path):
    result = evaluate(trained_run, out=tmp_path / "eval.json")
    row = result["rows"][0]
    run = load_run(trained_run)
    sets = [load_dataset("folder", run.info.config.data_dir, split, image_size=16) for split in ("train", "test")]
    train, test = (encode(run.vje, images, run.info.view) for images in sets)
    assert row["effective_rank"] == pytest.approx(metrics.effective_rank(test.features))
    assert row["uniformity"] == pytest.approx(metrics.uniformity(test.embeddings))
    views = views_for("folder", 16)[0]
    draws = [views(sets[1].images, torch.Generator().manual_seed(seed)) for seed in range(20)]
    pairs = torch.cat(draws, dim=1)
    expected = metrics.alignment(*run.vje.embed(pairs.flatten(0, 1)).unflatten(0, (2, -1)))
    assert row["alignment"] == pytest.approx(expected, rel=0.4)
    neighbour = KNeighborsClassifier(1, metric="cosine").fit(train.features, sets[0].labels)
    correct = neighbour.predict(test.features) == sets[1].labels.numpy()
    variance = test.scale.square().mean(1).numpy()
    assert 0 < correct.sum() < 18, "the fixture must have both"
    assert row["recall_at_1"] == correct.mean()
    assert row["r_auroc"] == pytest.approx(roc_auc_score(~correct, variance))
    kept = np.argsort(variance)[: 18 - 5]  # 5.4 images are 30 %
    assert row["rejection"]["rejected"] == pytest.approx(np.arange(0, 1, 0.1))
    assert row["rejection"]["accuracy"][0] == row["recall_at_1"]
    assert row["rejection"]["accuracy"][3] == pytest.approx(correct[kept].mean())


def test_uncertainty_that_knows_and_retrieval_that_never_fails():
    generator = torch.Generator().manual_seed(0)
    train, labels = torch.eye(4), torch.arange(4)
    test = torch.eye(4).repeat(25, 1)
    truth = torch.arange(4).repeat(25)
    wrong = torch.rand(100, generator=generator) < 0.3
    scale = torch.where(wrong, 2.0, 1.0)[:, None] + 0.1 * torch.rand(100, 5, generator=generator)
    mistaken = torch.where(wrong, (truth + 1) % 4, truth)
    row, protocols = _split(_uncertainty((train, labels, test, mistaken), scale)[0])
    assert row["r_auroc"] == 1
    assert row["rejection"]["accuracy"][0] == pytest.approx(1 - wrong.double().mean().item())
    assert row["rejection"]["accuracy"][4] == 1
    assert protocols["r_auroc"]["uncertainty"] == "mean posterior variance"
    row, _ = _split(_uncertainty((train, labels, test, truth), scale)[0])
    assert (row["recall_at_1"], row["r_auroc"]) == (1, None)


def test_settings_are_checked_before_anything_is_read():
    cases = [
        ({"linear": "svm"}, "linear must be one of logistic, sgd, not 'svm'"),
        ({"k": (5, 0)}, "k must be at least 1, got 0"),
        ({"k": ()}, "at least one k"),
        ({"temperature": [0.1, -1.0]}, "temperature must be positive, got -1.0"),
        ({"probe_epochs": 0}, "probe_epochs must be at least 1, not 0"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate("/no/such/run", **settings)


def test_command_refuses():
    refused = {
        "--linear svm": "'svm'",
        "--k 0": "k must be at least 1, got 0",
        "--temperature 0": "temperature must be positive, got 0.0",
        "--probe-epochs 0": "probe_epochs must be at least 1, not 0",
    }
    for arguments, message in refused.items():
        result = CliRunner().invoke(main, ["eval", "--ckpt", ".", *arguments.split()])
        assert result.exit_code == 2
        assert message in result.stderr


def test_unlabelled_images_are_refused(trained_run, image_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for i, source in enumerate(sorted((image_folder / split).rglob("*.png"))):
            (tmp_path / split / f"{i}.png").write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match="no labels"):
        evaluate(trained_run, data_dir=str(tmp_path), out=tmp_path / "eval.json")


def test_unlabelled_images_among_labelled_ones_are_left_out(trained_run):
    run, test = load_run(trained_run), coloured(30, 2, seed=1)
    some = coloured(60, 2)
    some.labels[::3] = -1
    known = some.select(some.labels >= 0)
    view = CleanView(8, run.info.view.mean, run.info.view.std)
    assert probe(run.vje, view, some, test) == probe(run.vje, view, known, test)
    assert probe(run.vje, view, some, test)[1]["linear"]["train_images"] == 40
    assert probed(some, test, epochs=2) == probed(known, test, epochs=2)


def test_the_control_says_where_its_encoder_learned(tiny_config):
    assert control_name(tiny_config) == "untrained encoder"
    assert control_name(SimpleNamespace(weights="none")) == "untrained encoder"
    assert control_name(SimpleNamespace(weights="imagenet")) == "pretrained encoder, no head"


# The probe by SGD -----------------------------------------------------------------------------------------------------

CLEAN = CleanView(8)
VIEWS = probe_views("cifar10", CLEAN)


def coloured(count, noise, seed=0):
    """Images whose class is the channel that is brighter on average."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.full((count, 3, 8, 8), 100.0)
    images[torch.arange(count), labels] += 40
    images += noise * torch.randn(count, 3, 1, 1, generator=generator)
    images += 10 * torch.randn(images.shape, generator=generator)
    return ImageSet(images.clamp(0, 255).byte(), [""] * count, labels, ("red", "green", "blue"))


def mean_colour(images):
    return images.mean(dim=(2, 3))


def probed(train, test, **settings):
    return sgd_probe(mean_colour, train, mean_colour(CLEAN(test.images)), test.labels, VIEWS, **settings)


def test_sgd_probe_separates_what_is_separable():
    train, test = coloured(300, 2), coloured(200, 2, seed=1)
    result = probed(train, test, epochs=30)
    assert result["accuracy"] > 0.97
    assert (result["train_images"], result["test_images"], result["batch_size"]) == (300, 200, 256)
    assert (result["lr"], result["momentum"], result["weight_decay"]) == (0.1, 0.9, 0)
    assert "0.08 to 1.0 of the area, flip 0.5" in result["augmentation"]
    permuted = ImageSet(train.images, train.paths, train.labels.roll(1), train.classes)
    assert probed(permuted, test, epochs=30)["accuracy"] < 0.6


def test_sgd_probe_is_a_function_of_its_seed_and_leaves_the_global_generator_alone():
    train, test = coloured(300, 40), coloured(1000, 40, seed=1)
    state = torch.get_rng_state()
    first = probed(train, test, epochs=2, batch_size=64, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert probed(train, test, epochs=2, batch_size=64, seed=3) == first
    others = {probed(train, test, epochs=2, batch_size=64, seed=seed)["accuracy"] for seed in range(4)}
    assert len(others) > 1
    assert first["lr"] == 0.1 * 64 / 256


def test_sgd_probe_sees_every_image_once_an_epoch_without_gradients():
    train, test = coloured(100, 2), coloured(10, 2)
    batches = []

    def features(images):
        assert not torch.is_grad_enabled()
        batches.append(images)
        return mean_colour(images)

    whole = TwoViews(8, Recipe(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0, grey=0.0))
    sgd_probe(features, train, mean_colour(CLEAN(test.images)), test.labels, whole, epochs=3, batch_size=32)
    assert [len(images) for images in batches] == [32, 32, 32, 4] * 3
    clean = CLEAN(train.images).flatten(1)
    for epoch in range(3):
        seen = torch.cat(batches[4 * epoch : 4 * epoch + 4]).flatten(1)
        nearest = torch.cdist(seen.double(), clean.double()).min(dim=1)
        assert nearest.values.max() < 1e-3
        assert sorted(nearest.indices.tolist()) == list(range(100))


def test_sgd_probe_of_streamed_images(image_folder):
    held, streamed = (
        load_dataset("folder", image_folder, "train", image_size=8, residency=residency)
        for residency in ("memory", "stream")
    )
    assert not streamed.in_memory
    test = load_dataset("folder", image_folder, "test", image_size=8)
    settings = {"epochs": 3, "batch_size": 20}
    assert probed(held, test, **settings) == probed(streamed, test, **settings)


def test_sgd_probe_agrees_with_logistic_regression_on_digits():
    train, test = (load_dataset("digits", split=split) for split in ("train", "test"))
    _, clean = views_for("digits", 16)

    def features(images):
        return torch.nn.functional.avg_pool2d(images[:, :1], 2).flatten(1)

    data = features(clean(train.images)), train.labels, features(clean(test.images)), test.labels
    views = probe_views("digits", clean)
    assert (views.recipe.scale, views.recipe.flip) == ((0.4, 1.0), 0)  # a digit has one orientation
    sgd = sgd_probe(features, train, *data[2:], views, epochs=20)
    assert sgd["accuracy"] == pytest.approx(metrics.linear_probe(*data)["accuracy"], abs=0.08)


def test_sgd_probe_bad_input():
    train, test = coloured(20, 2), coloured(10, 2)
    with pytest.raises(ValueError, match="at least 1, got 0 and 256"):
        probed(train, test, epochs=0)
    with pytest.raises(ValueError, match="no labels"):
        probed(ImageSet(train.images, train.paths), test)
    with pytest.raises(ValueError, match="needs two classes, but all training labels are 0"):
        probed(train.of_class("red"), test)
    with pytest.raises(FloatingPointError, match="diverged at lr"):
        sgd_probe(lambda x: 1e30 * mean_colour(x), train, torch.ones(10, 3), test.labels, VIEWS, epochs=5)
