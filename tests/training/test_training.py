"""Training: the run folder it leaves, resuming, and what stops it."""

import csv
import dataclasses
import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pyro_vje import TrainConfig, load_run, train
from pyro_vje.data import load_dataset
from pyro_vje.data.splits import load_train_set
from pyro_vje.runs.folder import read_info
from pyro_vje.training import run as training
from pyro_vje.training.monitor import COLUMNS, TrainingDiverged
from pyro_vje.training.run import choose_precision


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_is_complete(trained_run, tiny_config):
    names = {path.relative_to(trained_run).as_posix() for path in trained_run.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "weights.safetensors",
        "calibration.safetensors",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "pictures/training.png",
    } <= names
    config = json.loads((trained_run / "config.json").read_text())
    assert config["config"]["epochs"] == 3
    assert config["classes"] == ["normal", "spots", "stripes"]
    assert config["train_images"] == 46  # 5 % of 48 are held out
    rows = read_metrics(trained_run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert all(math.isfinite(float(row[name])) for name in COLUMNS)
        # the parts and the Jacobian make up the likelihood; loss = kl_weight · kl - log_likelihood up to noise
        assert 0 <= float(row["knn_accuracy"]) <= 1
        assert 1 <= float(row["effective_rank"]) <= 8


def test_training_improves_the_objective(tiny_config, tmp_path):
    folder = train(dataclasses.replace(tiny_config, epochs=30, lr=0.3), tmp_path / "run")
    losses = [float(row["loss"]) for row in read_metrics(folder)]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5


def test_same_seed_same_weights_and_another_seed_others(trained_run, tiny_config, tmp_path):
    again = load_file(train(tiny_config, tmp_path / "again") / "weights.safetensors")
    first = load_file(trained_run / "weights.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = load_file(train(dataclasses.replace(tiny_config, seed=1), tmp_path / "other") / "weights.safetensors")
    assert not torch.equal(first["posterior_network.loc.weight"], other["posterior_network.loc.weight"])


def test_resumed_run_equals_an_uninterrupted_one(trained_run, tiny_config, tmp_path, monkeypatch):
    """Stop in the middle of epoch 2, resume: the weights and metrics of three epochs in one go."""
    folder = tmp_path / "run"
    original = training.Pretraining.training_step

    def stop_in_epoch_two(self, batch, batch_idx):
        if self.current_epoch == 1 and batch_idx == 1:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(training.Pretraining, "training_step", stop_in_epoch_two)
    with pytest.raises(RuntimeError, match="power cut"):
        train(tiny_config, folder)
    assert not (folder / "weights.safetensors").exists()
    with pytest.raises(FileNotFoundError, match="--resume goes on"):
        load_run(folder)
    monkeypatch.setattr(training.Pretraining, "training_step", original)
    train(TrainConfig(), folder, resume=True)  # the stored settings count, not these

    whole, resumed = (load_file(path / "weights.safetensors") for path in (trained_run, folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    timing = {"seconds", "images_per_second"}
    for one, other in zip(read_metrics(trained_run), read_metrics(folder), strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}


def test_a_run_is_never_overwritten_silently(trained_run, tiny_config, tmp_path):
    before = (trained_run / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds a run.*--overwrite"):
        train(tiny_config, trained_run)
    assert (trained_run / "weights.safetensors").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="no run folder"):
            train(tiny_config, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_overwrite_replaces_only_when_the_data_are_there(tiny_config, tmp_path):
    config = dataclasses.replace(tiny_config, epochs=1)
    folder = train(config, tmp_path / "run")
    before = (folder / "weights.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError):
        train(dataclasses.replace(config, data_dir=str(tmp_path / "missing")), folder, overwrite=True)
    assert (folder / "weights.safetensors").read_bytes() == before
    train(dataclasses.replace(config, seed=5), folder, overwrite=True)
    assert (folder / "weights.safetensors").read_bytes() != before


def test_unfit_family_is_found_before_an_old_run_is_replaced(tiny_config, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_config, epochs=1)
    folder = train(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfit_family.py").write_text(
        "import pyro.distributions as dist\n"
        "def nothing(loc, scale, settings): return None\n"
        "def forgotten(loc, scale, settings): return dist.Normal(loc, scale)\n"
    )
    for name, message in (("nothing", "gave NoneType"), ("forgotten", r"is a \.to_event\(1\) missing")):
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, likelihood=f"unfit_family:{name}"), folder, overwrite=True)
    assert (folder / "weights.safetensors").exists()


def test_resuming_on_other_images_or_a_damaged_checkpoint_is_refused(tiny_config, image_folder, tmp_path):
    images = shutil.copytree(image_folder, tmp_path / "images")
    config = dataclasses.replace(tiny_config, epochs=1, data_dir=str(images))
    folder = train(config, tmp_path / "run")
    extra = images / "train" / "spots" / "new.png"
    shutil.copy(next(images.rglob("*.png")), extra)
    with pytest.raises(ValueError, match=r"was trained on other images \(46, now 47\)"):
        train(config, folder, resume=True)
    extra.unlink()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged"):
        train(config, folder, resume=True)


def test_a_run_stopped_in_its_first_epoch_starts_anew(tiny_config, tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_config, epochs=1)

    def power_cut(*arguments):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(training.Pretraining, "training_step", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config, tmp_path / "run")
    assert (train(config, tmp_path / "run") / "weights.safetensors").exists()


def test_batch_larger_than_the_data(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="batch_size 64 is larger than the data, 46 images"):
        train(dataclasses.replace(tiny_config, batch_size=64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_never_trained_on(tiny_config):
    config = dataclasses.replace(tiny_config, holdout=0.25).resolved()
    kept, held_out = load_train_set(config)
    everything = load_dataset("folder", config.data_dir, "pretrain")
    assert (len(kept), len(held_out)) == (36, 12)
    assert sorted(kept.paths + held_out.paths) == sorted(everything.paths)
    assert load_train_set(dataclasses.replace(config, holdout=0.0))[1] is None
    other = load_train_set(dataclasses.replace(config, seed=1))[1]
    assert other.paths != held_out.paths


def test_one_class_run_sees_one_class_only(tiny_config, tmp_path, monkeypatch):
    seen = []
    original = training.Pretraining.training_step
    monkeypatch.setattr(
        training.Pretraining,
        "training_step",
        lambda self, batch, batch_idx: seen.append(len(self.train_set)) or original(self, batch, batch_idx),
    )
    one = dataclasses.replace(tiny_config, normal_class="0", batch_size=8, epochs=1, knn_every=0)
    folder = train(one, tmp_path / "run")
    assert set(seen) == {15}
    assert json.loads((folder / "config.json").read_text())["config"]["normal_class"] == "normal"
    train(one, folder, resume=True)  # the index of the name that is stored
    with pytest.raises(ValueError, match="was trained with normal_class normal, not spots"):
        train(dataclasses.replace(one, normal_class="1"), folder, resume=True)
    assert json.loads((folder / "config.json").read_text())["train_images"] == 15
    assert read_metrics(folder)[0]["knn_accuracy"] == ""


def test_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"the loss became .* in epoch .*lower lr \(now 1e\+18\)"):
        train(dataclasses.replace(tiny_config, lr=1e18, warmup_epochs=0), tmp_path / "run")


def test_collapse_is_warned_of(tiny_config, tmp_path, caplog):
    """With every image the same, embeddings cannot spread: the message names what is low and what to change."""
    folder = tmp_path / "images"
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (folder / split / kind).mkdir(parents=True)
            for i in range(20):
                source = next((p for p in folder.rglob("*.png")), None)
                if source is None:
                    from PIL import Image

                    Image.new("RGB", (16, 16), (90, 120, 40)).save(folder / split / kind / f"{i}.png")
                else:
                    (folder / split / kind / f"{i}.png").write_bytes(source.read_bytes())
    with caplog.at_level(logging.WARNING, logger="pyro_vje"):
        train(dataclasses.replace(tiny_config, data_dir=str(folder), epochs=1), tmp_path / "run")
    assert any("collaps" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"devices": 3}, "batch_size 16 cannot be shared equally by 3 processes"),
        ({"df": 0.0}, "df must be positive"),
        ({"df": math.nan}, "df must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"unit_radius": "2"}, "unit_radius must be one of 1, sqrt-d"),
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"dataset": "cifar1000"}, "unknown data set 'cifar1000'.*cifar100"),
        ({"encoder": "resnet19"}, "unknown encoder 'resnet19'.*resnet18"),
        ({"likelihood": "cauchy"}, "unknown likelihood family 'cauchy'.*polar-student-t"),
        ({"normal_class": "cat"}, "no class 'cat'.*stripes"),
    ],
)
def test_settings_out_of_range_are_named_before_anything_is_written(tiny_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(tiny_config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_config_round_trips_through_json():
    config = TrainConfig(df=math.inf, radius=None, normal_class="cat").resolved()
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown settings colour"):
        TrainConfig.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="setting epochs must be"):
        TrainConfig.from_dict({"epochs": True})


def test_precision_setting():
    assert choose_precision("32") == "32-true"
    assert choose_precision("bf16") == "bf16-mixed"
    assert choose_precision("auto") in ("32-true", "bf16-mixed")


def test_default_batch_fits_few_images(tiny_config, tmp_path):
    folder = train(dataclasses.replace(tiny_config, batch_size=None, epochs=1), tmp_path / "run")
    assert read_info(folder).config.batch_size == 16
    assert train(TrainConfig(), folder, resume=True) == folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likelihood": "normal", "df": 5.0}, "df 5.0 does nothing for the likelihood normal"),
        ({"likelihood": "polar-student-t-exact", "radius": None}, "radius None does nothing for the likelihood polar"),
        (
            {"radius": None, "radius_scale": "shared"},
            "does nothing for the likelihood polar-student-t without a radius",
        ),
    ],
)
def test_a_setting_that_its_likelihood_does_not_use_is_refused(tiny_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(tiny_config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
