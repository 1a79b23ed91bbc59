"""`BatchScorer`, `BatchEmbedder`: the numbers of `score` and `embed`, whatever holds the images; on a cluster too."""

import json
import os
import pickle
import shutil
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyro_vje import BatchEmbedder, BatchScorer, embed, score
from pyro_vje.runs.folder import CALIBRATION, REFERENCE

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory):
    """With 46 calibration images; its encoder is one that another process finds too."""
    run = shutil.copytree(trained_run, tmp_path_factory.mktemp("batches") / "run")
    shutil.copy(run / REFERENCE, run / CALIBRATION)
    with safe_open(run / "weights.safetensors", "pt") as file:
        values = json.loads(file.metadata()["pyro_vje"])
    values["config"]["encoder"] = "tiny:tiny_encoder"
    weights = load_file(run / "weights.safetensors")
    save_file(weights, run / "weights.safetensors", {"pyro_vje": json.dumps(values)})
    return run


@pytest.fixture(scope="module")
def mixed(image_folder, tmp_path_factory):
    """Images of other sizes than the run's, one that is grey, and two that are none."""
    folder = shutil.copytree(image_folder / "test", tmp_path_factory.mktemp("batches") / "mixed")
    for i, path in enumerate(sorted(folder.glob("spots/*"))):
        Image.open(path).resize((20 + i, 30)).save(path)
    Image.open(path).convert("L").save(path)
    (folder / "spots" / "empty.png").touch()
    (folder / "normal" / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def wanted(run, mixed, tmp_path_factory):
    """What `score` finds in one process, in full precision, by path."""
    out = tmp_path_factory.mktemp("batches") / "scores.csv"
    result = score(run, data=mixed, out=out, alpha=0.1, parquet=True, trust_plugins=True)
    assert (result.scored, result.failed) == (18, 2)
    assert 0 < result.flagged < 18
    table = pd.read_parquet(out.with_suffix(".parquet")).set_index("path").sort_index()
    return table.fillna({"error": "", "decision": ""})


def agrees(found, wanted):
    """Row by row, by path, with the table of `score`."""
    order = np.argsort(found["path"])
    assert list(np.asarray(found["path"])[order]) == list(wanted.index)
    for name in wanted.columns.drop("label"):
        column = np.asarray(found[name])[order]
        if name in ("error", "decision"):
            assert list(column) == list(wanted[name])
        else:
            np.testing.assert_allclose(column, wanted[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_batches_of_paths_bytes_and_pixels_have_the_numbers_of_score(run, mixed, wanted):
    scorer = BatchScorer(run, "image", alpha=0.1, trust_plugins=True)
    paths = list(wanted.index)
    batch = {"path": np.array(paths, object), "number": np.arange(20)}
    found = scorer({**batch, "image": np.array(paths, object)})
    agrees(found, wanted)
    assert list(found["number"]) == list(range(20))
    assert list(found["image"]) == paths
    found = pickle.loads(pickle.dumps(scorer))({**batch, "image": [Path(path).read_bytes() for path in paths]})
    agrees(found, wanted)
    assert "image" not in found
    whole = [path for path in paths if not wanted.error[path]]
    pixels = {path: np.asarray(Image.open(path)) for path in whole}
    agrees(scorer({"path": whole, "image": [pixels[path] for path in whole]}), wanted.loc[whole])
    small = [path for path in whole if pixels[path].shape == (16, 16, 3)]
    agrees(scorer({"path": small, "image": np.stack([pixels[path] for path in small])}), wanted.loc[small])


def test_a_batch_in_which_nothing_is_an_image_is_not_lost(run):
    found = BatchScorer(run, trust_plugins=True)({"bytes": [b"", b"text", None, np.zeros((3, 8, 8), np.uint8)]})
    assert all(found["error"])
    assert np.isnan(found["anomaly_score"]).all()
    assert list(found["decision"]) == [""] * 4
    nothing = BatchScorer(run, trust_plugins=True)({"bytes": []})
    assert {name: len(column) for name, column in nothing.items()} == dict.fromkeys(nothing, 0)
    assert nothing.keys() - found.keys() == {"bytes"}  # as if they were paths


def test_embeddings_of_batches_are_those_of_embed(run, mixed, wanted, tmp_path):
    with np.load(embed(run, mixed, tmp_path / "e.npz", trust_plugins=True)[0]) as arrays:
        index = {path: i for i, path in enumerate(arrays["paths"])}
        found = BatchEmbedder(run, "path", trust_plugins=True)({"path": np.array(wanted.index, object)})
        assert [bool(error) for error in found["error"]] == [bool(error) for error in wanted.error]
        for name in ("features", "embeddings", "loc", "scale"):
            assert found[name].dtype == np.float32
            for path, row in zip(found["path"], found[name], strict=True):
                assert (row == arrays[name][index[path]]).all() if path in index else np.isnan(row).all()


def test_settings_that_mean_nothing_in_a_batch_are_refused(run):
    for settings, message in (
        ({"fdr": 0.1}, "fdr: no settings of a batch.*benjamini_hochberg"),
        ({"report": True, "data": "photos"}, "data, report: no settings of a batch, which are score, "),
        ({"alpha": 0.001}, "with 46 calibration images no p-value is below"),
    ):
        with pytest.raises(ValueError, match=message):
            BatchScorer(run, trust_plugins=True, **settings)
    with pytest.raises(ValueError, match="score: no settings of a batch"):
        BatchEmbedder(run, score="knn")
    with pytest.raises(ValueError, match=r"no column 'bytes': name that of the images, one of 'image', 'path'"):
        BatchScorer(run, trust_plugins=True)({"image": [], "path": []})


@pytest.mark.filterwarnings("default")  # Ray's own
def test_on_a_ray_cluster_a_killed_worker_costs_nothing(run, mixed, wanted, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    pytest.importorskip("ray.data")
    died, names = tmp_path / "died", list(wanted.index)
    contents = [Path(name).read_bytes() for name in names]

    class Mortal(BatchScorer):
        """The first worker that has a third batch is killed in it."""

        batches = 0

        def __call__(self, batch):
            self.batches += 1
            if self.batches == 3 and not died.exists():
                died.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return {**super().__call__(batch), "worker": np.full(len(batch["path"]), os.getpid())}

    # Of the workers: where the encoder is, no token in the home folder, and no yielding to other processes.
    path = os.pathsep.join(filter(None, sys.path))
    for name, value in (("PYTHONPATH", path), ("RAY_AUTH_MODE", "disabled"), ("RAY_worker_niceness", "0")):
        monkeypatch.setenv(name, value)
    place = tempfile.mkdtemp(prefix="ray")  # short, as names of sockets must be
    how = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    # Two workers, and a core to read with: they would wait for it for ever.
    ray.init(num_cpus=3, object_store_memory=80 * 2**20, _temp_dir=place, **how)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        images = ray.data.read_binary_files(str(mixed), include_paths=True, override_num_blocks=10)
        settings = {"fn_constructor_args": (run,), "fn_constructor_kwargs": {"alpha": 0.1, "trust_plugins": True}}
        workers = ray.data.ActorPoolStrategy(size=2)
        scores = images.map_batches(Mortal, **settings, compute=workers, batch_size=2)
        scores.write_parquet(tmp_path / "scores")
        # The other sources of the page, as they come.
        pd.DataFrame({"photo": contents}).to_parquet(tmp_path / "photos.parquet")
        with tarfile.open(tmp_path / "shard.tar", "w") as shard:
            for i, name in enumerate(names):
                shard.add(name, f"{i:02d}.png")
        for column, source in (
            ("photo", ray.data.read_parquet(str(tmp_path / "photos.parquet"), override_num_blocks=1)),
            ("png", ray.data.read_webdataset(str(tmp_path / "shard.tar"), decoder=None, override_num_blocks=1)),
        ):
            batch = source.take_batch(len(names))
            agrees({"path": names, **BatchScorer(run, column, **settings["fn_constructor_kwargs"])(batch)}, wanted)
    finally:
        ray.shutdown()
        shutil.rmtree(place, ignore_errors=True)
    found = pd.read_parquet(tmp_path / "scores")
    agrees(found, wanted)
    # Two, and the one in the place of the killed one.
    assert len({*found["worker"], int(died.read_text())}) == 3
