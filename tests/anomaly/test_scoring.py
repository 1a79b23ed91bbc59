"""Scores: against the definition, invariances, the CSV and its error rows."""

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KernelDensity

from pyro_vje import VJE, embed, load_run, score
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.data import ImageSet, decode_image, imageset
from pyro_vje.data.splits import load_train_set
from pyro_vje.metrics.conformal import benjamini_hochberg
from pyro_vje.model import encoding
from pyro_vje.model.encoding import Posteriors, encode
from pyro_vje.model.likelihoods import get_family
from pyro_vje.representation.evaluation import load_split
from pyro_vje.runs.folder import (
    CALIBRATION,
    REFERENCE,
    build_model,
    describe_run,
    load_posteriors,
    save_posteriors,
    save_weights,
)


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
    many = Scorer(run.vje, num_particles=2_000, seed=1).parts(encoded.posteriors)
    few = Scorer(run.vje, num_particles=64, seed=0).parts(encoded.posteriors)
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


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory, tiny_config):
    """An untrained encoder of usual width, where kernels differ by the shape of a batch; D is no power of two."""
    folder = tmp_path_factory.mktemp("wide")
    config = dataclasses.replace(
        tiny_config, encoder="resnet-small", embedding_dim=100, hidden_dim=128
    ).resolved()
    train_set, held_out = load_train_set(config)
    info = describe_run(config, train_set)
    vje = build_model(config, info.image_size)
    for name, images in ((CALIBRATION, held_out), (REFERENCE, train_set)):
        save_posteriors(folder / name, encode(vje, images, info.view).posteriors)
    save_weights(folder, vje, info)
    return folder


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def several_passes(monkeypatch):
    """A set as small as the tests' would else be a single pass of the encoder."""
    for module in ("model.encoding", "anomaly.parts"):
        monkeypatch.setattr(f"pyro_vje.{module}.cpu_rows", lambda side: 32)


@pytest.mark.usefixtures("several_passes")
@pytest.mark.parametrize("num_pairs", [0, 1])
def test_scores_are_the_same_bytes_whatever_the_batch(wide_run, image_folder, out, threads, num_pairs):
    kind = "conditional" if num_pairs else "aggregate"
    settings = {"data": image_folder, "score": kind, "num_pairs": num_pairs, "num_particles": 2}
    tables = set()
    for batch_size in (1, 7, 256):
        score(wide_run, **settings, out=out, batch_size=batch_size, draw=False)
        tables.add(out.read_bytes())
    assert len(tables) == 1


@pytest.mark.usefixtures("several_passes")
def test_scores_are_the_same_bits_in_any_order(wide_run, image_folder, threads):
    run = load_run(wide_run)
    scorer = Scorer(run.vje, reference=load_posteriors(run, REFERENCE), num_particles=2)
    names = sorted(image_folder.rglob("*.png"))
    whole = ImageSet(torch.stack([decode_image(str(path), 16) for path in names]), list(map(str, names)))

    def scores(order):
        encoded = encode(run.vje, whole.select(order), run.info.view, batch_size=40)
        return scorer.scores("aggregate", encoded.posteriors), scorer.scores("elbo", encoded.posteriors)

    order = torch.randperm(len(names))
    for straight, mixed in zip(scores(torch.arange(len(names))), scores(order), strict=True):
        assert torch.equal(mixed, straight[order])
    some = order[:5]
    for straight, alone in zip(scores(torch.arange(len(names))), scores(some), strict=True):
        assert torch.equal(alone, straight[some])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_damaged_posteriors_are_refused(bad):
    embeddings, loc, scale = torch.ones(3, 5, 8)
    scale[1, 3] = bad
    vje = VJE(torch.nn.Identity(), 8, embedding_dim=8).eval()
    with pytest.raises(
        ValueError, match="of 1 of 5 images are not finite, or have a scale that is not positive"
    ):
        Scorer(vje).parts(Posteriors(embeddings, loc, scale))
    with pytest.raises(ValueError, match="of 5 of 5 images are not finite"):
        Scorer(vje).parts(Posteriors(embeddings * bad * math.inf, loc, torch.ones(5, 8)))


@pytest.mark.parametrize("name", list(SCORES))
def test_every_score_is_finite_and_is_the_column_it_names(trained_run, out, name):
    result = score(trained_run, out=out, score=name, draw=False)
    rows = read(out)
    assert result.settings.score == name
    columns = {
        "conditional": -numbers(rows, "log_likelihood"),
        "elbo": numbers(rows, "kl") - numbers(rows, "log_likelihood"),
        "direction": -numbers(rows, "log_direction"),
        "radius": -numbers(rows, "log_radius"),
        "variance": numbers(rows, "posterior_variance"),
    }
    if name == "aggregate":
        columns[name] = -numbers(rows, "log_aggregate")
    elif name == "typicality":
        run = load_run(trained_run)
        reference = load_posteriors(run, REFERENCE)
        median = Scorer(run.vje).parts(reference).log_likelihood.median().item()
        columns[name] = np.abs(numbers(rows, "log_likelihood") - median)
    else:  # which nobody waited for
        assert {row["log_aggregate"] for row in rows} == {""}
    np.testing.assert_allclose(numbers(rows), columns[name], atol=3e-6)


def test_p_values_come_from_the_held_out_images(trained_run, out, tmp_path):
    run = load_run(trained_run)
    assert run.info.train_images == 46  # of 48: 5 % are held out
    held_out = load_posteriors(run, CALIBRATION)
    assert [tuple(tensor.shape) for tensor in held_out] == [(2, 8)] * 3
    assert [tuple(tensor.shape) for tensor in load_posteriors(run, REFERENCE)] == [(46, 8)] * 3
    calibration = Scorer(run.vje).scores("conditional", held_out).numpy()
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
    with pytest.raises(ValueError, match="does not fit its configuration"):
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
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        score(trained_run, out=tmp_path)
    for level in ("alpha", "fdr"):
        with pytest.raises(ValueError, match=rf"{level} must lie between 0 and 1"):
            score(trained_run, out=out, **{level: 1.0})
    with pytest.raises(ValueError, match=r"alpha .* or fdr .*, not both"):
        score(trained_run, out=out, alpha=0.1, fdr=0.1)
    with pytest.raises(ValueError, match="leave pairs out"):
        score(trained_run, out=out, score="aggregate", num_pairs=2)
    with pytest.raises(ValueError, match="unknown likelihood family 'magic'"):
        score(trained_run, out=out, score_likelihood="magic")
    weights = trained_run / "weights.safetensors"
    with pytest.raises(ValueError, match=r"no p-values, so no decisions"):
        score(weights, out=out, alpha=0.5)
    with pytest.raises(ValueError, match=r"none at hand.*reference\.safetensors"):
        score(weights, out=out, score="aggregate")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        score(trained_run, data=tmp_path / "empty", out=out)
    assert not out.exists()


def test_embed_writes_posteriors(trained_run, image_folder, tmp_path):
    path, written, failed = embed(trained_run, image_folder / "test", tmp_path / "emb.npz")
    assert (written, failed) == (18, 0)
    with np.load(path) as arrays:
        assert arrays["features"].shape == (18, 8)
        for name in ("embeddings", "loc", "scale"):
            assert arrays[name].shape == (18, 8)
            assert arrays[name].dtype == np.float32
        assert (arrays["scale"] > 0).all()
        assert [str(arrays["classes"][i]) for i in arrays["labels"]] == [
            p.split("/")[-2] for p in arrays["paths"]
        ]


@pytest.mark.parametrize("family", ["polar-student-t", "polar-student-t-exact", "normal", "laplace"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_aggregate_is_the_log_mean_over_the_reference_images(trained_run, family, chunk):
    run = load_run(trained_run)
    reference = load_posteriors(run, REFERENCE)
    test = encode(run.vje, load_split(run, "test", None, None), run.info.view).embeddings
    found = Scorer(run.vje, reference=reference, likelihood=family).log_aggregate(test, chunk=chunk)
    with torch.no_grad():
        each = [
            run.vje.likelihood(loc, scale, family=get_family(family)).log_prob(test)
            for loc, scale in zip(reference.embeddings, reference.scale, strict=True)
        ]
    expected = torch.stack(each).double().logsumexp(0) - math.log(46)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_aggregate_of_equal_gaussian_kernels_is_scikit_learns_kernel_density(trained_run):
    run = load_run(trained_run)
    reference = load_posteriors(run, REFERENCE)
    test = encode(run.vje, load_split(run, "test", None, None), run.info.view).embeddings
    equal = reference._replace(scale=torch.full_like(reference.scale, 0.7))
    found = Scorer(run.vje, reference=equal, likelihood="normal").log_aggregate(test)
    kde = KernelDensity(bandwidth=0.7).fit(reference.embeddings.numpy())
    np.testing.assert_allclose(found, kde.score_samples(test.numpy()), rtol=1e-5)


def test_another_family_for_scoring(trained_run, out):
    score(trained_run, out=out, draw=False)
    trained = numbers(read(out))
    result = score(trained_run, out=out, score_likelihood="normal", draw=False)
    rows = read(out)
    assert result.settings.score_likelihood == "normal"
    assert {row["log_direction"] for row in rows} == {""}  # it has no such factor
    run = load_run(trained_run)
    encoded = encode(run.vje, load_split(run, "test", None, None), run.info.view)
    # E log Normal(e; loc + scale noise, scale) = log Normal(e; loc, scale) - D / 2, up to 16 antithetic draws
    density = torch.distributions.Normal(encoded.loc, encoded.scale).log_prob(encoded.embeddings).sum(-1)
    assert abs((-numbers(rows) - (density.numpy() - 4)).mean()) < 1.5
    assert np.abs(numbers(rows) - trained).max() > 1


def test_pairs_are_a_mean_over_augmentations_common_to_all_images(trained_run, image_folder, out, caplog):
    result = score(trained_run, out=out, num_pairs=2, draw=False)
    assert result.passes == 4
    whole = {row["path"]: row for row in read(out)}
    # calibrated on the held-out images, encoded in the same way
    assert {row["p_value"] for row in whole.values()} <= {"0.333333", "0.666667", "1.000000"}
    # an image's score depends neither on the others nor on the batch
    score(trained_run, data=image_folder / "test" / "spots", out=out, num_pairs=2, batch_size=4, draw=False)
    for row in read(out):
        assert float(row["anomaly_score"]) == pytest.approx(
            float(whole[row["path"]]["anomaly_score"]), abs=2e-4
        )
    one = score(trained_run, out=out, num_pairs=1, draw=False)
    assert one.passes == 2
    different = [
        abs(float(row["anomaly_score"]) - float(whole[row["path"]]["anomaly_score"])) for row in read(out)
    ]
    assert min(different) > 1e-3


def test_decisions(trained_run, image_folder, tmp_path, out):
    """With 46 calibration images (here those trained on, for their number) p-values go down to 1/47."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.copy(run / REFERENCE, run / CALIBRATION)
    result = score(run, out=out, alpha=0.1, draw=False)
    rows = read(out)
    flagged = [row["decision"] == "anomaly" for row in rows]
    assert flagged == [float(row["p_value"]) <= 0.1 for row in rows]
    assert result.flagged == sum(flagged)
    assert {row["decision"] for row in rows} <= {"anomaly", "normal"}
    summary = json.loads(result.summary.read_text())
    assert summary["decision"] == {
        "rule": "p-value at most the level", "level": 0.1, "anomalies": sum(flagged)
    }  # fmt: skip
    for level, threshold in summary["calibration"]["thresholds"].items():
        above = (
            [float(row["anomaly_score"]) > threshold + 1e-6 for row in rows]
            if threshold is not None
            else None
        )
        assert above is None or above == [float(row["p_value"]) <= float(level) for row in rows]
    by_rate = score(run, out=out, fdr=0.2, draw=False)
    p_values = numbers(read(out), "p_value")
    assert by_rate.flagged == benjamini_hochberg(p_values, 0.2).sum()


def test_summary_says_what_was_done_and_found(trained_run, out):
    result = score(trained_run, out=out, normal_class="stripes", draw=False)
    rows = read(out)
    truth = np.array([row["label"] != "stripes" for row in rows])
    summary = json.loads(result.summary.read_text())
    assert summary["counts"] == {"scored": 18, "failed": 0, "normal": 6, "anomalies": 12, "unlabelled": 0}
    assert summary["metrics"]["auroc"] == pytest.approx(roc_auc_score(truth, numbers(rows)))
    assert summary["metrics"]["aupr_normal_positive"] == pytest.approx(
        average_precision_score(~truth, -numbers(rows))
    )
    assert {"fpr_at_95_tpr_anomalies_positive", "aupr_anomalies_positive"} <= summary["metrics"].keys()
    assert summary["score"]["forward_passes_an_image"] == 1
    assert summary["score"]["likelihood"] == "polar-student-t"
    assert summary["calibration"]["images"] == 2
    assert summary["decision"] is None
    assert {"versions", "date", "weights_sha256"} <= summary.keys()


def test_report_is_one_page(trained_run, out):
    result = score(trained_run, out=out, report=True, draw=False)
    page = result.report.read_text()
    assert result.report.name == "scores_report.html"
    assert page.count("data:image/") >= 12  # the strangest and the most normal
    strangest = max(read(out), key=lambda row: float(row["anomaly_score"]))
    folder, _, name = strangest["path"].rpartition("/")
    assert folder in page
    assert name in page


def test_parquet_holds_the_same_table(trained_run, out):
    parquet = pytest.importorskip("pyarrow.parquet")
    score(trained_run, out=out, parquet=True, draw=False)
    table = parquet.read_table(out.with_suffix(".parquet")).to_pydict()
    assert table["path"] == [row["path"] for row in read(out)]
    np.testing.assert_allclose(table["anomaly_score"], numbers(read(out)), atol=5e-7)


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_an_interrupted_call_goes_on_where_it_stopped(
    trained_run, image_folder, tmp_path, out, monkeypatch, cut
):
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 4)
    folder = shutil.copytree(image_folder / "test", tmp_path / "mixed")
    (folder / "spots" / "03.png").write_bytes(b"no image")
    settings = {"data": folder, "batch_size": 4, "draw": False}
    score(trained_run, **settings, out=tmp_path / "whole.csv")
    part = out.with_name("scores.csv.part")
    calls = []
    original = Scorer.parts

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # one is for the calibration images
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Scorer, "parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(trained_run, **settings, out=out)
    assert not out.exists()
    content = part.read_bytes()
    assert content.count(b"\n") == 9  # the settings, and two batches of four
    part.write_bytes(content[: len(content) - cut])  # a kill may leave half a line
    monkeypatch.setattr(Scorer, "parts", original)
    seen = []
    features = VJE.features
    monkeypatch.setattr(
        VJE, "features", lambda self, images: seen.append(len(images)) or features(self, images)
    )
    with pytest.raises(ValueError, match=r"other settings \(score\)"):
        score(trained_run, **settings, out=out, score="elbo", resume=True)
    result = score(trained_run, **settings, out=out, resume=True)
    assert seen == [4, 4, 4]  # of 18 - 8 (+ 1) files, the last pass filled up: nothing twice
    assert (result.scored, result.failed) == (17, 1)
    assert not part.exists()
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_resume_with_nothing_to_go_on_from_begins(trained_run, out):
    score(trained_run, out=out, draw=False)
    whole = out.read_bytes()
    part = out.with_name("scores.csv.part")
    for left in (None, b""):  # killed before the first row, or by a power cut before it was on the disk
        out.unlink()
        if left is not None:
            part.write_bytes(left)
        score(trained_run, out=out, draw=False, resume=True)
        assert out.read_bytes() == whole
    assert not list(out.parent.glob(".*"))


def test_two_processes_do_not_write_one_table(trained_run, out):
    code = (
        "import sys, time, pathlib\n"
        "from pyro_vje.runs.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)\n"
    )
    part = out.with_name("scores.csv.part")
    with subprocess.Popen([sys.executable, "-c", code, part], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match=rf"in use by process {other.pid} on "):
                score(trained_run, out=out)
            assert not out.exists()
        finally:
            other.kill()
    assert score(trained_run, out=out, draw=False).scored == 18


def test_a_folder_is_read_as_it_is_scored(trained_run, image_folder, out, monkeypatch):
    """Decoded images are never all held: at most the batch in work and the next."""
    alive, most = weakref.WeakSet(), []

    def watched(path, size):
        image = decode_image(path, size)
        alive.add(image)
        most.append(len(alive))
        return image

    monkeypatch.setattr(imageset, "decode_image", watched)
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 4)
    score(trained_run, data=image_folder, out=out, batch_size=4, draw=False)
    assert len(most) == 66
    assert max(most) <= 12
