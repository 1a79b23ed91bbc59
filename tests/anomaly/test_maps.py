"""Maps: from a folder of images to what is written of them."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from pyro_vje import TrainConfig, config, learn_maps, load_run, score, train
from pyro_vje.anomaly import judge as judge_module
from pyro_vje.anomaly import maps as module
from pyro_vje.anomaly.maps import Maps, coreset, load_maps, read_levels, with_neighbours
from pyro_vje.config import ScoreConfig
from pyro_vje.runs.folder import save_weights

SIZE = (48, 32)  # of the images: the central 32 × 32 are seen
SPOT = (20, 8, 28, 16)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """60 normal images, and a folder of normal ones and ones with a spot, with masks."""
    root, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    for name, count in (("good", 60), ("new/good", 12), ("new/spot", 8)):
        for i in range(count):
            image = Image.fromarray(rng.normal(120, 20, (SIZE[1], SIZE[0], 3)).clip(0, 255).astype(np.uint8))
            place, mask = root / name / f"{i:02d}.png", Image.new("L", SIZE)
            if name == "new/spot":
                image.paste((250, 20, 20), SPOT)
                mask.paste(255, SPOT)
                (root / "masks/spot").mkdir(parents=True, exist_ok=True)
                mask.save(root / "masks/spot" / f"{i:02d}_mask.png")
            place.parent.mkdir(parents=True, exist_ok=True)
            image.save(place)
    return root


@pytest.fixture(scope="module")
def mapped_run(photographs, tmp_path_factory):
    how = {"encoder": "tiny", "image_size": 32, "embedding_dim": 8, "hidden_dim": 16, "epochs": 1}
    how |= {"dataset": "images", "data_dir": str(photographs / "good"), "holdout": 0.4, "normal_class": None}
    run = train(TrainConfig(**how, precision="32", batch_size=8), tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HEAD_STEPS", 40)
        assert learn_maps(run) == run / "maps.safetensors"
    return run


def test_neighbours_lie_within_the_image():
    places = torch.arange(2 * 16).view(2, 4, 4, 1).float()
    views = with_neighbours(places, 16, torch.Generator().manual_seed(0))[..., 0].long()
    assert views.shape == (32, 5)
    assert sorted(views[:, 0].tolist()) == list(range(32))  # every place once
    steps = (views[:, 1:] // 4 - views[:, :1] // 4).abs() + (views[:, 1:] % 4 - views[:, :1] % 4).abs()
    assert (steps == 1).all()


def test_each_place_of_a_coreset_is_the_farthest_from_those_before():
    places = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    chosen = coreset(places, 12).tolist()
    assert len(set(chosen)) == 12
    for count in range(1, 12):
        nearest = torch.cdist(places, places[chosen[:count]]).amin(1)
        assert chosen[count] == nearest.argmax()
    assert coreset(places, 60).tolist() == coreset(places, 90).tolist() == list(range(60))


def test_from_images_to_maps_masks_and_the_page(mapped_run, photographs, tmp_path):
    how = {"data": photographs / "new", "out": tmp_path / "scores.csv", "normal_class": "good", "alpha": 0.1}
    how |= {"score": "places", "maps": True, "maps_npz": True, "masks": photographs / "masks"}
    result = score(mapped_run, **how, report=True)
    about = json.loads(result.summary.read_text())["maps"]
    rows = {row["path"]: row for row in read(result.csv)}
    assert (result.auroc, about["calibration_images"]) == (1.0, 24)
    levels, truth = [], []
    for path, row in rows.items():
        found = read_levels(result.maps / f"{path.removeprefix(str(photographs / 'new/'))}.png"[1:])
        assert found.shape == SIZE[::-1]
        assert not found[:, :7].any()  # left of what is seen
        assert not found[:, 41:].any()
        mask = np.zeros(SIZE[::-1], bool)
        if "spot" in path:
            mask[SPOT[1] : SPOT[3], SPOT[0] : SPOT[2]] = True
            row_of, column = np.unravel_index(found.argmax(), found.shape)
            assert 6 <= row_of <= 18
            assert 18 <= column <= 30
        peak = float(row["map_peak"])
        assert (peak > about["threshold"]) == (float(row["map_p_value"]) <= 0.1)
        assert found.max() == pytest.approx((peak - load_maps(load_run(mapped_run)).floor) * 100, abs=2)
        levels.append(found)
        truth.append(mask)
    levels, truth = np.array(levels), np.array(truth)
    assert result.pixels["pixel_auroc"] == pytest.approx(roc_auc_score(truth.ravel(), levels.ravel()))
    assert (result.pixels["regions"], result.pixels["pictures"]) == (8, 20)
    marked = sum(float(row["map_peak"]) > about["threshold"] for row in rows.values())
    assert about["marked_images"] == marked >= 8
    with np.load(tmp_path / "pictures" / "scores_maps.npz") as archive:
        assert sorted(archive.files) == sorted(path.removeprefix(f"{photographs / 'new'}/") for path in rows)
        first = archive["spot/00.png"]
    kept = read_levels(result.maps / "spot/00.png.png")
    np.testing.assert_allclose(first, kept / 100 + load_maps(load_run(mapped_run)).floor, atol=1e-3)
    page = result.report.read_text()
    assert page.count('class="map"') == 20
    assert "show where" in page
    assert "at most 10 % of cases, by 24 normal images" in page


def test_a_stopped_call_goes_on_to_the_same_files(mapped_run, photographs, tmp_path, monkeypatch):
    how = {"data": photographs / "new", "maps": True}
    whole = score(mapped_run, out=tmp_path / "whole/scores.csv", **how)
    true_rows, calls = judge_module.Judge.rows, []

    def stopping(*arguments):
        for batch in true_rows(*arguments):
            calls.append(batch)
            yield batch
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "images_at_once", lambda *_: 8)
    monkeypatch.setattr(judge_module.Judge, "rows", stopping)
    again = {"out": tmp_path / "again/scores.csv", **how}
    with pytest.raises(KeyboardInterrupt):
        score(mapped_run, **again)
    result = score(mapped_run, **again, resume=True)
    assert sum(map(len, calls)) == 20
    assert result.csv.read_bytes() == whole.csv.read_bytes()
    for path in whole.maps.rglob("*.png"):
        assert (result.maps / path.relative_to(whole.maps)).read_bytes() == path.read_bytes()


def test_marks_are_seen_in_a_stated_share_of_normal_images():
    maps = object.__new__(Maps)
    rng, marked = np.random.default_rng(0), 0
    for _ in range(2000):
        peaks = rng.normal(size=40)
        maps.peaks = peaks[:39]
        marked += peaks[39] > maps.threshold(0.1)
    assert abs(marked / 2000 - 0.1) < 0.02
    assert maps.threshold(0.02) is None  # of 39 no rank says so little
    assert maps.threshold(1 / 40) == maps.peaks.max()


def test_what_cannot_be_mapped(mapped_run, photographs, tmp_path):
    bare = shutil.copytree(mapped_run, tmp_path / "bare")
    (bare / "maps.safetensors").unlink()
    how = {"data": photographs / "new", "out": tmp_path / "scores.csv", "maps": True}
    with pytest.raises(ValueError, match=r"learned no maps: pyro-vje maps --ckpt RUN"):
        score(bare, **how)
    with pytest.raises(ValueError, match="has no module nowhere"):
        learn_maps(bare, places=["nowhere"])
    with pytest.raises(ValueError, match="'places' is of an image's map"):
        score(mapped_run, **{**how, "maps": False}, score="places")
    with pytest.raises(ValueError, match="masks are compared with maps"):
        ScoreConfig(masks=photographs)
    with pytest.raises(ValueError, match="a weights file alone"):
        learn_maps(mapped_run / "weights.safetensors")
    tensors = load_file(mapped_run / "maps.safetensors")
    header = safe_open(mapped_run / "maps.safetensors", "pt").metadata()
    del tensors["kind"]
    save_file(tensors, bare / "maps.safetensors", header)
    with pytest.raises(ValueError, match="lacks kind: pyro-vje maps learns them again"):
        score(bare, **how)
    other = shutil.copytree(mapped_run, tmp_path / "other")
    run = load_run(other)
    with torch.no_grad():
        next(run.vje.encoder.parameters()).mul_(2)
    save_weights(other, run.vje, run.info)
    with pytest.raises(ValueError, match="other weights than those of the run"):
        score(other, **how)


def test_masks_that_do_not_fit(mapped_run, photographs, tmp_path):
    how = {"data": photographs / "new", "out": tmp_path / "scores.csv", "maps": True, "normal_class": "good"}
    masks = shutil.copytree(photographs / "masks", tmp_path / "masks")
    Image.new("L", SIZE, 60).save(masks / "spot/00_mask.png")
    with pytest.raises(ValueError, match="has values up to 60: a mask is black"):
        score(mapped_run, **how, masks=masks)
    Image.new("L", (32, 32)).save(masks / "spot/00_mask.png")
    with pytest.raises(ValueError, match=r"00_mask\.png has 32 x 32 pixels, its image .* 48 x 32"):
        score(mapped_run, **how, masks=masks)
    (masks / "spot/00_mask.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask in .*among them spot/00\.png"):
        score(mapped_run, **how, masks=masks)
    with pytest.raises(ValueError, match="13 images have no mask"):  # no label says which are normal
        score(mapped_run, **{**how, "normal_class": None}, masks=masks)
