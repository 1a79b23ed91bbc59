"""Scores: against the definition, invariances, the CSV and its error rows."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from pyro_vje import embed, load_run, score
from pyro_vje.encoding import encode
from pyro_vje.evaluation import load_split
from pyro_vje.runs import load_calibration
from pyro_vje.scoring import SCORES, latent_noise, likelihood_parts


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, column="anomaly_score"):
    return np.array([float(row[column]) for row in rows])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "scores.csv"


def test_parts_are_the_expectation_they_claim_to_be(trained_run):
    run = load_run(trained_run)
    images = load_split(run, "test", None, None)
    encoded = encode(run.vje, images, run.info.view)
    posteriors = (encoded.embeddings, encoded.loc, encoded.scale)
    many = likelihood_parts(run.vje, *posteriors, latent_noise(2_000, run.vje.embedding_dim, 1))
    few = likelihood_parts(run.vje, *posteriors, latent_noise(64, run.vje.embedding_dim, 0))
    with torch.no_grad():
        z = encoded.loc + encoded.scale * torch.randn(2_000, *encoded.loc.shape)
        likelihood = run.vje.likelihood(z, encoded.scale.expand_as(z))
        samples = likelihood.log_prob(encoded.embeddings).double()
    error = samples.std(0) / math.sqrt(2_000)
    assert ((many.log_likelihood - samples.mean(0)).abs() < 6 * error).all()
    assert torch.corrcoef(torch.stack([few.log_likelihood, many.log_likelihood]))[0, 1] > 0.95
    # the likelihood is its two factors and the Jacobian
    jacobian = (run.vje.embedding_dim - 1) * encoded.embeddings.norm(dim=-1).log()
    torch.testing.assert_close(
        many.log_likelihood, many.log_direction + many.log_radius - jacobian.double(), rtol=1e-5, atol=1e-4
    )
    posterior = torch.distributions.Normal(encoded.loc, encoded.scale)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(many.kl.float(), kl, rtol=1e-4, atol=1e-4)


def test_csv_of_the_runs_own_test_split(trained_run, out):
    result = score(trained_run, out=out)
    rows = read(out)
    assert result.scored == len(rows) == 18
    assert result.failed == 0
    assert {row["label"] for row in rows} == {"normal", "stripes", "spots"}
    np.testing.assert_allclose(numbers(rows), -numbers(rows, "log_likelihood"))
    # the class folder "normal" says what is an anomaly
    truth = [row["label"] != "normal" for row in rows]
    assert result.normal == 6
    assert result.auroc == pytest.approx(roc_auc_score(truth, numbers(rows)))
    assert {path.name for path in (out.parent / "pictures").iterdir()} == {
        "scores_histogram.png",
        "scores_direction_radius.png",
        "scores_strangest.png",
    }


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_scores_do_not_depend_on_the_batch_size(trained_run, out, batch_size):
    score(trained_run, out=out, batch_size=5, draw=False)
    reference = numbers(read(out))
    score(trained_run, out=out, batch_size=batch_size, draw=False)
    np.testing.assert_allclose(numbers(read(out)), reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", list(SCORES))
def test_every_score_is_finite_and_is_the_column_it_names(trained_run, out, name):
    result = score(trained_run, out=out, score=name, draw=False)
    rows = read(out)
    assert result.score == name
    expected = {
        "conditional": -numbers(rows, "log_likelihood"),
        "elbo": numbers(rows, "kl") - numbers(rows, "log_likelihood"),
        "direction": -numbers(rows, "log_direction"),
        "radius": -numbers(rows, "log_radius"),
        "variance": numbers(rows, "posterior_variance"),
    }[name]
    np.testing.assert_allclose(numbers(rows), expected, atol=3e-6)


def test_p_values_come_from_the_held_out_images(trained_run, out, tmp_path):
    run = load_run(trained_run)
    assert run.info.train_images == 46  # of 48: 5 % are held out
    held_out = load_calibration(run)
    assert [tuple(tensor.shape) for tensor in held_out] == [(2, 8)] * 3
    noise = latent_noise(16, 8, 0)
    calibration = SCORES["conditional"](likelihood_parts(run.vje, *held_out, noise)).numpy()
    score(trained_run, out=out, draw=False)
    rows = read(out)
    expected = [(1 + (calibration >= s).sum()) / 3 for s in numbers(rows)]
    np.testing.assert_allclose(numbers(rows, "p_value"), expected, atol=1e-6)
    # a weights file alone has no calibration
    score(trained_run / "weights.safetensors", out=tmp_path / "bare.csv", draw=False)
    assert {row["p_value"] for row in read(tmp_path / "bare.csv")} == {""}


def test_damaged_calibration_is_refused(trained_run, out, tmp_path):
    copy = shutil.copytree(trained_run, tmp_path / "copy")
    (copy / "calibration.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"calibration\.safetensors is no readable"):
        score(copy, out=out)
    save_file({"embeddings": torch.zeros(2, 5)}, copy / "calibration.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        score(copy, out=out)


def test_normal_class_chooses_the_positive_class(trained_run, out):
    result = score(trained_run, out=out, normal_class="stripes", draw=False)
    rows = read(out)
    truth = [row["label"] != "stripes" for row in rows]
    assert result.auroc == pytest.approx(roc_auc_score(truth, numbers(rows)))
    with pytest.raises(ValueError, match="no class 'cat'"):
        score(trained_run, out=out, normal_class="cat")


def test_odd_and_damaged_files_of_a_folder(trained_run, tmp_path, out):
    """Grey, RGBA, 16-bit, palette and oblong images are scored; what is no image is an error row."""
    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (20, 31, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels).save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "sixteen.png")
    Image.fromarray(pixels[..., :3]).quantize(16).save(folder / "palette.png")
    Image.fromarray(pixels[..., :3]).save(folder / 'comma, quote" and ü.jpg')
    good = (folder / 'comma, quote" and ü.jpg').read_bytes()
    (folder / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()

    result = score(trained_run, data=folder, out=out)
    rows = {row["path"].rpartition("/")[2]: row for row in read(out)}
    assert result.scored == 5
    assert result.failed == 3
    assert result.auroc is None
    for name in ("truncated.jpg", "text.png", "empty.png"):
        assert rows[name]["error"]
        assert rows[name]["anomaly_score"] == ""
    for name in ("grey.png", "rgba.png", "sixteen.png", "palette.png", 'comma, quote" and ü.jpg'):
        assert math.isfinite(float(rows[name]["anomaly_score"]))
        assert rows[name]["error"] == ""


def test_bad_arguments(trained_run, tmp_path, out):
    with pytest.raises(ValueError, match=r"unknown score 'magic'.*conditional"):
        score(trained_run, out=out, score="magic")
    with pytest.raises(ValueError, match="not both"):
        score(trained_run, out=out, data=tmp_path, dataset="digits")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        score(trained_run, data=tmp_path / "nowhere", out=out)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        score(trained_run, out=tmp_path / "missing" / "scores.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        score(trained_run, data=tmp_path / "empty", out=out)
    assert not out.exists()


def test_embed_writes_posteriors(trained_run, image_folder, tmp_path):
    path, written, failed = embed(trained_run, image_folder / "test", tmp_path / "emb.npz")
    assert (written, failed) == (18, 0)
    with np.load(path) as arrays:
        assert arrays["features"].shape == (18, 16)
        for name in ("embeddings", "loc", "scale"):
            assert arrays[name].shape == (18, 8)
            assert arrays[name].dtype == np.float32
        assert (arrays["scale"] > 0).all()
        assert [str(arrays["classes"][i]) for i in arrays["labels"]] == [
            p.split("/")[-2] for p in arrays["paths"]
        ]
