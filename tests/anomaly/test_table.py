"""`score` and `embed`: the table and what is made of it, labels, decisions, interruptions."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, roc_auc_score

from pyro_vje import VJE, embed, load_run, score
from pyro_vje.anomaly.judge import make_scorer
from pyro_vje.anomaly.parts import Scorer
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.anomaly.table import Rows
from pyro_vje.config import ScoreConfig
from pyro_vje.data import decode_image, imageset
from pyro_vje.metrics.detection import benjamini_hochberg
from pyro_vje.model import encoding
from pyro_vje.runs.folder import CALIBRATION, REFERENCE, load_posteriors, read_info

ROTATIONS = {name for name, score in SCORES.items() if score.of == "rotations"}  # of runs that have them


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows, column="anomaly_score"):
    return np.array([float(row[column]) for row in rows])


@pytest.fixture
def out(tmp_path):
    return tmp_path / "scores.csv"


@pytest.fixture
def calibrated_run(trained_run, tmp_path):
    """With 46 calibration images, those trained on, p-values go down to 1/47."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.copy(run / REFERENCE, run / CALIBRATION)
    return run


def test_csv_of_the_runs_own_test_split(trained_run, out):
    result = score(trained_run, out=out)
    rows = read(out)
    assert (result.scored, result.failed, result.passes) == (len(rows), 0, 1) == (18, 0, 1)
    assert list(rows[0]) == [
        *("path", "anomaly_score", "p_value", "decision", "log_likelihood", "log_direction", "log_radius"),
        *("kl", "posterior_variance", "log_aggregate", "label", "error"),
    ]
    assert {row["label"] for row in rows} == {"normal", "stripes", "spots"}
    assert result.settings.score == "aggregate"
    np.testing.assert_allclose(numbers(rows), -numbers(rows, "log_aggregate"))
    # the class folder "normal" says what is an anomaly
    truth = [row["label"] != "normal" for row in rows]
    assert (result.normal, result.anomalies, result.unlabelled) == (6, 12, 0)
    assert result.auroc == pytest.approx(roc_auc_score(truth, numbers(rows)))


def test_the_default_score_is_aggregate_where_it_can_be_and_the_log_says_why(trained_run, out, caplog):
    caplog.set_level("INFO", "pyro_vje")
    for ckpt, chosen, why in (
        (trained_run, "aggregate", "the default"),
        (trained_run / "weights.safetensors", "conditional", "as there are no reference images"),
    ):
        caplog.clear()
        result = score(ckpt, out=out)
        assert result.settings.score == json.loads(result.summary.read_text())["score"]["score"] == chosen
        assert f"score {chosen}, {why}" in caplog.text
        if chosen == "conditional":
            assert {row["log_aggregate"] for row in read(out)} == {""}  # which nobody waited for
    np.testing.assert_allclose(numbers(read(out)), -numbers(read(out), "log_likelihood"))
    caplog.clear()
    score(trained_run, out=out, score="conditional")
    assert "score conditional" not in caplog.text  # who asked for it knows


def test_every_score_goes_the_whole_way(calibrated_run, out):
    run = load_run(calibrated_run)
    held_out = load_posteriors(run, CALIBRATION)
    for name in SCORES.keys() - ROTATIONS:
        result = score(calibrated_run, ScoreConfig(score=name), out=out, alpha=0.2)
        rows = read(out)
        assert result.settings.score == name
        calibration = make_scorer(run, ScoreConfig(score=name)).scores(name, held_out).numpy()
        expected = [(1 + (calibration >= s).sum()) / 47 for s in numbers(rows)]
        # a calibration score may lie between a score and its six digits
        np.testing.assert_allclose(numbers(rows, "p_value"), expected, atol=1.01 / 47, err_msg=name)
        assert np.mean(np.abs(numbers(rows, "p_value") - expected) < 1e-6) > 0.8
        assert json.loads(result.summary.read_text())["score"]["meaning"] == SCORES[name].description
    score(calibrated_run, out=out, score="aggregate", report=True)
    np.testing.assert_allclose(numbers(read(out)), -numbers(read(out), "log_aggregate"))


def test_a_run_without_calibration_gives_no_p_values(trained_run, out, tmp_path):
    assert read_info(trained_run).train_images == 46  # of 48: 5 % are held out
    score(trained_run, out=out)
    assert {row["p_value"] for row in read(out)} <= {"0.333333", "0.666667", "1.000000"}
    score(trained_run / "weights.safetensors", out=out)
    assert {row["p_value"] for row in read(out)} == {""}
    copy = shutil.copytree(trained_run, tmp_path / "copy")
    for write, message in (
        (lambda path: path.write_bytes(b"damaged"), r"calibration\.safetensors is no readable"),
        (lambda path: save_file({"embeddings": torch.zeros(2, 5)}, path), "not written by pyro-vje"),
    ):
        write(copy / CALIBRATION)
        with pytest.raises(ValueError, match=message):
            score(copy, out=out)


def test_a_score_that_is_not_a_number_has_no_p_value_and_no_decision(trained_run, out, tmp_path, monkeypatch, caplog):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def holes(parts):\n"
        "    return torch.where(torch.arange(len(parts.kl)) % 4 == 1, torch.nan, parts.kl)\n"
        "def wide(parts):\n"
        "    return parts.encoded.loc\n"
    )
    monkeypatch.chdir(tmp_path)
    result = score(trained_run, out=out, score="mine:holes", alpha=0.7, trust_plugins=True)
    rows = read(out)
    assert {row["p_value"] == "" for row in rows if row["anomaly_score"] == ""} == {True}
    assert {row["decision"] for row in rows if row["anomaly_score"] == ""} == {""}
    assert result.flagged == sum(row["decision"] == "anomaly" for row in rows)
    assert "images is not a number: they have no p-value" in caplog.text
    assert (result.unlabelled, result.scored - result.normal - result.anomalies) == (
        sum(row["label"] == "" for row in rows),
        sum(row["anomaly_score"] == "" for row in rows),
    )
    with pytest.raises(ValueError, match=r"score 'mine:wide' must be a number an image, \(N,\), not of shape"):
        score(trained_run, out=out, score="mine:wide", trust_plugins=True)


def test_images_without_a_label_are_no_anomalies(trained_run, image_folder, tmp_path, out):
    """Five normal, five bad, six loose images: five anomalies, and metrics over ten."""
    folder = tmp_path / "mixed"
    for name, source, count in (("normal", "normal", 5), ("bad", "spots", 5), ("", "stripes", 6)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shutil.copy(image_folder / "train" / source / f"{i:02d}.png", folder / name / f"{i}.png")
    result = score(trained_run, data=folder, out=out, report=True)
    rows = read(out)
    assert (result.scored, result.normal, result.anomalies, result.unlabelled) == (16, 5, 5, 6)
    known = [row for row in rows if row["label"]]
    truth = [row["label"] == "bad" for row in known]
    assert (len(known), result.auroc) == (10, pytest.approx(roc_auc_score(truth, numbers(known))))
    assert json.loads(result.summary.read_text())["counts"]["unlabelled"] == 6


def test_normal_class(trained_run, image_folder, tmp_path, out):
    result = score(trained_run, out=out, normal_class="stripes")
    truth = np.array([row["label"] != "stripes" for row in read(out)])
    assert result.auroc == pytest.approx(roc_auc_score(truth, numbers(read(out))))
    summary = json.loads(result.summary.read_text())
    assert summary["normal_class"] == "stripes"
    assert summary["counts"] == {"scored": 18, "failed": 0, "normal": 6, "anomalies": 12, "unlabelled": 0}
    assert summary["metrics"]["aupr_normal_positive"] == pytest.approx(
        average_precision_score(~truth, -numbers(read(out)))
    )
    assert summary["score"]["likelihood"] == "polar-student-t"
    assert (summary["calibration"]["images"], summary["decision"]) == (2, None)
    assert {"versions", "date", "weights_sha256"} <= summary.keys()
    with pytest.raises(ValueError, match="no class 'cat'"):
        score(trained_run, out=out, normal_class="cat")


def test_a_class_that_was_trained_by_its_index_keeps_its_name(trained_run, image_folder, tmp_path, out):
    run = shutil.copytree(trained_run, tmp_path / "run")
    index = str(read_info(run).classes.index("spots"))
    assert index == "1"
    with safe_open(run / "weights.safetensors", "pt") as file:
        values = json.loads(file.metadata()["pyro_vje"])
    values["config"]["normal_class"] = index  # as runs of before have it
    weights = load_file(run / "weights.safetensors")
    save_file(weights, run / "weights.safetensors", {"pyro_vje": json.dumps(values)})
    other = tmp_path / "other"  # where that index is another class
    for name in ("apple", "berry", "spots"):
        shutil.copytree(image_folder / "test" / "spots", other / name)
    result = score(run, data=other, out=out)
    assert json.loads(result.summary.read_text())["normal_class"] == "spots"
    shutil.rmtree(other / "spots")
    assert score(run, data=other, out=out).normal is None


def test_all_images_of_a_folder_and_none_of_our_own(trained_run, image_folder, tmp_path):
    """Whatever its folders are called; neither a run nor what an earlier call drew is data."""
    folder = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(folder / "test", folder / "val")
    shutil.copy(folder / "test" / "spots" / "00.png", folder)
    out = folder / "new" / "folder" / "s.csv"  # which is made
    assert score(trained_run, data=folder, out=out).scored == 48 + 18 + 18 + 1
    shutil.copytree(trained_run, folder / "runs" / "run")
    score(folder / "runs" / "run")
    first = out.read_bytes()
    assert score(trained_run, data=folder, out=out).scored == 85
    assert out.read_bytes() == first
    assert embed(trained_run, folder, folder / "embedded" / "e.npz")[1:] == (85, 0)


def test_cells_that_a_spreadsheet_would_execute_are_quoted(trained_run, image_folder, tmp_path, monkeypatch):
    for name in ("=1+1", "@SUM(A1)", "-2", "+3", "plain"):
        shutil.copytree(image_folder / "test" / "spots", tmp_path / "d" / name)
    monkeypatch.chdir(tmp_path / "d")
    score(trained_run, data=".", out="s.csv", parquet=True)
    labels = {row["label"] for row in read("s.csv")}
    assert labels == {"'=1+1", "'@SUM(A1)", "'-2", "'+3", "plain"}
    for row in read("s.csv"):
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())
        assert float(row["anomaly_score"])  # numbers, of either sign, are left alone
    parquet = pytest.importorskip("pyarrow.parquet").read_table("s.parquet").to_pydict()
    assert "=1+1" in parquet["label"]
    np.testing.assert_allclose(parquet["anomaly_score"], numbers(read("s.csv")), atol=5.1e-7)


def test_odd_and_damaged_files_of_a_folder(trained_run, tmp_path, out):
    """Grey, RGBA, 16-bit, palette and oblong images are scored; what is no image is an error row."""
    folder = tmp_path / "odd"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 255, (20, 31, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels).save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "sixteen.png")
    Image.fromarray(pixels[..., :3]).quantize(16).save(folder / "palette.png")
    Image.fromarray(pixels[..., :3]).save(folder / 'comma, quote" and ü.jpg')
    good = (folder / 'comma, quote" and ü.jpg').read_bytes()
    (folder / "truncated.jpg").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    with open(bytes(folder / "latin-") + b"\xe9.jpg", "wb") as file:
        file.write(good)

    result = score(trained_run, data=folder, out=out, report=True, parquet=True)
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = {row["path"].rpartition("/")[2]: row for row in csv.DictReader(file)}
    assert (result.scored, result.failed, result.auroc) == (6, 3, None)
    for name in ("truncated.jpg", "text.png", "empty.png"):
        assert rows[name]["error"]
        assert rows[name]["anomaly_score"] == ""
    for name in ("grey.png", "rgba.png", "sixteen.png", "palette.png", 'comma, quote" and ü.jpg', "latin-\udce9.jpg"):
        assert math.isfinite(float(rows[name]["anomaly_score"]))
        assert rows[name]["error"] == ""


def test_bad_arguments(trained_run, tmp_path, out):
    weights, empty = trained_run / "weights.safetensors", tmp_path / "empty"
    empty.mkdir()
    for settings, error, message in (
        ({"score": "magic"}, ValueError, r"unknown score 'magic'.*conditional"),
        ({"data": tmp_path / "nowhere"}, FileNotFoundError, "nowhere"),
        ({"data": empty}, ValueError, "empty"),
        ({"out": tmp_path}, IsADirectoryError, "it is a folder"),
        ({"score_likelihood": "magic"}, ValueError, "unknown likelihood family 'magic'"),
        ({"score": "direction", "score_likelihood": "normal"}, ValueError, "'direction' does not exist for"),
        ({"ckpt": weights, "alpha": 0.5}, ValueError, "no p-values, so no decisions"),
        ({"ckpt": weights, "score": "aggregate"}, ValueError, r"none at hand.*reference\.safetensors"),
    ):
        with pytest.raises(error, match=message):
            score(**{"ckpt": trained_run, "out": out, **settings})
        assert not out.exists()


def test_embed_writes_posteriors(trained_run, image_folder, tmp_path):
    path, written, failed = embed(trained_run, image_folder / "test", tmp_path / "emb.npz")
    assert (written, failed) == (18, 0)
    with np.load(path) as arrays:
        for name in ("features", "embeddings", "loc", "scale"):
            assert arrays[name].shape == (18, 8)
            assert arrays[name].dtype == np.float32
        assert (arrays["scale"] > 0).all()
        assert [str(arrays["classes"][i]) for i in arrays["labels"]] == [p.split("/")[-2] for p in arrays["paths"]]


def test_another_family_for_scoring(trained_run, out):
    run = load_run(trained_run)
    result = score(trained_run, out=out, score="conditional", score_likelihood="normal")
    rows = read(out)
    assert result.settings.score_likelihood == "normal"
    assert {row["log_direction"] for row in rows} == {""}  # it has no such factor
    embedded, *_ = embed(trained_run, run.info.config.data_dir + "/test", out.with_name("e.npz"))
    arrays = np.load(embedded)
    # E log Normal(e; loc + scale noise, scale) = log Normal(e; loc, scale) - D / 2, up to 16 antithetic draws
    posterior = torch.distributions.Normal(*(torch.from_numpy(arrays[name]) for name in ("loc", "scale")))
    density = posterior.log_prob(torch.from_numpy(arrays["embeddings"])).sum(-1).numpy()
    assert abs((-numbers(rows) - (density - 4)).mean()) < 1.5


def test_decisions(calibrated_run, out):
    result = score(calibrated_run, out=out, alpha=0.1)
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
        if threshold is not None:
            above = [float(row["anomaly_score"]) > threshold + 1e-6 for row in rows]
            assert above == [float(row["p_value"]) <= float(level) for row in rows]
    by_rate = score(calibrated_run, out=out, fdr=0.2)
    assert by_rate.flagged == benjamini_hochberg(numbers(read(out), "p_value"), 0.2).sum()


def test_report_is_one_page(trained_run, out):
    result = score(trained_run, out=out, report=True)
    page = result.report.read_text()
    assert result.report.name == "scores_report.html"
    assert page.count("data:image/") >= 12  # the strangest and the most normal
    strangest = max(read(out), key=lambda row: float(row["anomaly_score"]))
    assert strangest["path"].rpartition("/")[2] in page


def test_scores_are_the_same_bytes_whatever_the_batch(wide_run, image_folder, out, monkeypatch):
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 32)  # the set would else be a single pass
    settings = ScoreConfig(data=image_folder, score="aggregate", num_particles=2)
    tables = set()
    for batch_size in (1, 7, 256):
        score(wide_run, settings, out=out, batch_size=batch_size)
        tables.add(out.read_bytes())
    assert len(tables) == 1


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_an_interrupted_call_goes_on_where_it_stopped(trained_run, image_folder, tmp_path, out, monkeypatch, cut):
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 4)
    folder = shutil.copytree(image_folder / "test", tmp_path / "mixed")
    (folder / "spots" / "03.png").write_bytes(b"no image")
    settings = ScoreConfig(data=folder, batch_size=4)
    score(trained_run, settings, out=tmp_path / "whole.csv")
    part = out.with_name("scores.csv.part")
    calls = []
    original = Scorer.parts

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 4:  # one is for the calibration images
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Scorer, "parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(trained_run, settings, out=out)
    assert not out.exists()
    content = part.read_bytes()
    assert content.count(b"\n") == 9  # the settings, and two batches of four
    part.write_bytes(content[: len(content) - cut])  # a kill may leave half a line
    monkeypatch.setattr(Scorer, "parts", original)
    seen = []
    features = VJE.features
    monkeypatch.setattr(VJE, "features", lambda self, images: seen.append(len(images)) or features(self, images))
    for other, changed in (({"score": "elbo"}, "score"), ({"data": folder / "normal"}, "images")):
        with pytest.raises(ValueError, match=rf"other settings \({changed}\)"):
            score(trained_run, dataclasses.replace(settings, **other), out=out, resume=True)
    result = score(trained_run, settings, out=out, resume=True)
    assert seen == [4, 4, 4]  # of 18 - 8 (+ 1) files, the last pass filled up: nothing twice
    assert (result.scored, result.failed) == (17, 1)
    assert not part.exists()
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_damaged_rows_are_refused(tmp_path):
    path = tmp_path / "x.part"
    Rows(path, {"score": "a"}, (9, 2), resume=False).add({3: [1.0, math.nan], 0: [2.0, 3.0]})
    good = path.read_bytes()
    assert Rows(path, {"score": "a"}, (9, 2), resume=True).numbers[0] == [2.0, 3.0]
    for line in (
        b"[9, [1.0, 2.0]]",
        b"[0, [1.0, 2.0]]",
        b"[1, [1.0]]",
        b"[1, [1, 2.0]]",
        b"{}",
        b"[true, 1]",
        b"[1, 5]",
        b"\xff",
    ):
        path.write_bytes(good + line + b"\n")
        with pytest.raises(ValueError, match=r"x\.part is damaged: score again without --resume"):
            Rows(path, {"score": "a"}, (9, 2), resume=True)


def test_resume_with_nothing_to_go_on_from_begins(trained_run, out):
    score(trained_run, out=out)
    whole = out.read_bytes()
    part = out.with_name("scores.csv.part")
    for left in (None, b""):  # killed before the first row, or by a power cut before it was on the disk
        out.unlink()
        if left is not None:
            part.write_bytes(left)
        score(trained_run, out=out, resume=True)
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
            with pytest.raises(BlockingIOError, match="in use by"):
                score(trained_run, out=out)
            assert not out.exists()
        finally:
            other.kill()
    assert score(trained_run, out=out).scored == 18


def test_a_folder_is_read_as_it_is_scored(trained_run, image_folder, out, monkeypatch):
    """Decoded images are never all held: at most the batch in work and the next."""
    alive, most = weakref.WeakSet(), []

    def watched(path, size, *more):
        image = decode_image(path, size, *more)
        alive.add(image)
        most.append(len(alive))
        return image

    monkeypatch.setattr(imageset, "decode_image", watched)
    monkeypatch.setattr(encoding, "cpu_rows", lambda side: 4)
    score(trained_run, data=image_folder, out=out, batch_size=4)
    assert len(most) == 66
    assert max(most) <= 12
