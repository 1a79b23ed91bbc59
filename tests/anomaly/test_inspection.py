"""`inspect`: two folders in, the strange images out; with an encoder that is trained on them, and with a frozen one."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pyro_vje import TrainConfig, inspect
from pyro_vje.anomaly import inspection
from pyro_vje.runs.folder import read_info

TINY = {"encoder": "tiny", "weights": "none", "image_size": 16}


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """40 ``good`` images in subfolders, and ``new`` ones; what is trained on them is trained for seconds."""
    rng = np.random.default_rng(1)
    for name, count in (("good/a", 20), ("good/b", 20), ("new", 6)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    few = partial(TrainConfig, epochs=2, folds=2, feature_views=2)
    monkeypatch.setattr(inspection, "TrainConfig", few)
    return tmp_path / "good", tmp_path / "new", tmp_path / "out"


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_few_images_give_p_values_and_no_decision_and_the_model_is_learned_once(photographs, caplog):
    *_, out = photographs
    with caplog.at_level("INFO", "pyro_vje"):
        result = inspect(*photographs, **TINY)
    assert "40 good images are too few to decide at 0.05: p-values only" in caplog.text  # 12 are held out
    assert (result.csv, result.scored, result.flagged) == (out / "scores.csv", 6, None)
    assert result.report.is_file()
    rows = read(result.csv)
    assert {row["decision"] for row in rows} == {""}
    assert all(float(row["p_value"]) >= 1 / 13 - 1e-6 for row in rows)
    weights, before = out / "model" / "weights.safetensors", result.csv.read_bytes()
    written = weights.stat().st_mtime_ns
    with caplog.at_level("INFO", "pyro_vje"):
        again = inspect(*photographs, **TINY, alpha=0.2)
    assert weights.stat().st_mtime_ns == written
    assert "is there already; remove it to learn anew" in caplog.text
    assert again.flagged is not None
    assert [row["anomaly_score"] for row in read(again.csv)] == [row["anomaly_score"] for row in rows]
    assert again.csv.read_bytes() != before
    with pytest.raises(ValueError, match=r"at alpha 0\.05: calibrate with 19 or more"):
        inspect(*photographs, **TINY, alpha=0.05)
    for asked, message in (
        ({"image_size": 24}, "image_size 16, not 24"),
        ({"encoder": "resnet-small"}, "encoder tiny, not resnet-small"),
        ({"fit": "pad"}, "fit crop, not pad"),
    ):
        with pytest.raises(ValueError, match=f"has learned with {message}: remove it"):
            inspect(*photographs, **{**TINY, **asked})
    with pytest.raises(ValueError, match="weights are an encoder's"):
        inspect(*photographs, weights="default")
    next(photographs[0].rglob("*.png")).unlink()
    with pytest.raises(ValueError, match=r"model has learned from other images than those in .*good.*--out"):
        inspect(*photographs, **TINY)


def test_a_frozen_encoder_gives_p_values_from_all_images_and_decides(photographs, caplog):
    timm = pytest.importorskip("timm")
    torch.manual_seed(3)
    good, _, out = photographs
    weights = good.parent / "network.safetensors"
    for path in good.rglob("*.png"):
        Image.open(path).resize((24, 16)).save(path)
    save_file(timm.create_model("test_resnet.r160_in1k").state_dict(), weights)
    with caplog.at_level("INFO", "pyro_vje"):
        result = inspect(*photographs, encoder="timm:test_resnet.r160_in1k", weights=str(weights), image_size=32)
    assert "this will take about" in caplog.text
    assert "not square (such as 24 x 16 pixels): whole, between grey margins of 33%" in caplog.text
    assert read_info(out / "model").fit == "pad"
    about = json.loads(result.summary.read_text())
    assert (about["calibration"]["images"], about["calibration"]["folds"]) == (40, 2)
    assert about["decision"]["level"] == 0.05
    assert about["score"]["score"] == "aggregate"
    flags = [row["decision"] == "anomaly" for row in read(result.csv)]
    assert flags == [float(row["p_value"]) <= 0.05 for row in read(result.csv)]
    assert result.flagged == sum(flags)


def test_new_images_that_are_not_square_are_seen_whole_too(photographs, caplog):
    _, new, out = photographs
    for path in new.iterdir():
        Image.open(path).resize((40, 16)).save(path)
    inspect(*photographs, **TINY)
    assert read_info(out / "model").fit == "pad"
    with caplog.at_level("INFO", "pyro_vje"):
        inspect(*photographs[:2], out.with_name("cut"), **TINY, fit="crop")
    assert "not square (such as 40 x 16 pixels): the central square is kept, 60% is cut off" in caplog.text
    note = new.parent / "notes.txt"
    note.write_text("no image")
    with pytest.raises(ValueError, match=r"not one of 1 images in .*notes\.txt can be read"):
        inspect(photographs[0], note, out, **TINY)


def test_stopped_it_says_that_the_same_call_goes_on(photographs, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pyro_vje.training.run._keep", stop)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from it"):
            inspect(*photographs, **TINY)
    with pytest.raises(ValueError, match="has learned with image_size 16, not 24"):
        inspect(*photographs, **{**TINY, "image_size": 24})
    assert inspect(*photographs, **TINY).scored == 6


def test_a_folder_within_the_other_is_an_error(photographs):
    good, new, out = photographs
    for arguments, message in (
        ((good, good / "a", out), r"NEW \(.*\) lies within GOOD"),
        ((good / "a", good, out), r"GOOD \(.*\) lies within NEW"),
        ((good, good, out), "lies within"),
        ((good, new, new / "out"), r"--out \(.*\) lies within NEW"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*count twice, name another"):
            inspect(*arguments, **TINY)
        assert not out.exists()


def test_the_network_is_chosen_by_what_is_installed(monkeypatch):
    for found, name in (("weights.pth", inspection.PRETRAINED), (None, "resnet-small")):
        monkeypatch.setattr(inspection, "packaged_weights", lambda name, found=found: found)
        monkeypatch.setattr(inspection, "find_spec", lambda name: object())
        encoder, weights, why = inspection.choose_encoder()
        assert (encoder, weights) == (name, "default" if found else "none")
        assert "installed" in why
