"""The ablation: the grid, cells that equal lone runs, resuming, rows for cells that fail, and the tables."""

import dataclasses
import json
import math
import shutil
import statistics

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pyro_vje import TrainConfig, ablate, evaluate, train
from pyro_vje.cli import main
from pyro_vje.experiments import cells
from pyro_vje.experiments.ablation import grid, shown
from pyro_vje.experiments.cells import NOT_USED
from pyro_vje.training import run as training
from pyro_vje.training.monitor import EpochReport

PAPER = "polar-student-t"


@pytest.fixture(scope="module", autouse=True)
def _no_pictures_of_cells(trained_run):
    """Half of a tiny cell's time; `trained_run` is asked for first because its pictures are wanted elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochReport, "draw", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def quick(tiny_config):
    """Settings of a cell of a fraction of a second."""
    return dataclasses.replace(tiny_config, epochs=1, knn_every=0, df=5.0, kl_weight=0.1, lr=0.06)


@pytest.fixture(scope="module")
def finished(quick, tmp_path_factory):
    """An ablation of two settings on two seeds; tests must not change it."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    return ablate(quick, {"likelihood": [PAPER, "normal"], "seed": [0, 1]}, out)


@pytest.fixture
def trained(monkeypatch):
    """The names of the cells that are trained while the test runs."""
    names = []

    def counting(config, out, **how):
        names.append(out.name)
        return train(config, out, **how)

    monkeypatch.setattr(cells, "train", counting)
    return names


def rows_of(folder):
    return pd.read_csv(folder / "ablation.csv", dtype=str, keep_default_na=False).to_dict("records")


def named(out, *parts):
    (path,) = [p for p in (out / "cells").iterdir() if p.is_dir() and all(part in p.name for part in parts)]
    return path


def test_grid_is_the_product_with_all_settings_of_the_first_seed_first():
    axes = {"df": [1, 5.0, math.inf, 5, None], "seed": [3, 4], "radius": [None, "student-t"]}
    found = grid(TrainConfig(lr=0.5), axes)
    assert [cell.seed for cell in found] == [3] * 8 + [4] * 8  # 5 and 5.0 are one value
    assert {(cell.df, cell.radius) for cell in found} == {
        (df, radius) for df in (1, 5, math.inf, None) for radius in (None, "student-t")
    }
    assert {cell.lr for cell in found} == {0.5}


def test_a_setting_that_does_nothing_makes_no_second_cell():
    counts = {"normal": 1, "student-t": 2, "polar-normal": 6, PAPER: 12, "polar-student-t-exact": 8}
    counts["math:hypot"] = 12  # of a user's own family nothing is known
    axes = {"df": [1, 5], "unit_radius": ["1", "sqrt-d"], "radius": [None, "student-t"]}
    axes |= {"radius_scale": ["learned", "shared"], "likelihood": list(counts)}
    found = grid(TrainConfig(embedding_dim=8), axes)
    assert {name: sum(cell.likelihood == name for cell in found) for name in counts} == counts
    assert next(cell for cell in found if cell.likelihood == "normal").df is None  # the default


def test_unusable_axes_and_settings_are_refused_before_anything_is_written(quick, tmp_path):
    for axes, changes, message in (
        ({"colour": [1]}, {}, "colour cannot be varied: choose axes among .*likelihood"),
        ({"dataset": ["digits", "cifar10"]}, {}, "dataset cannot be varied"),
        ({"df": []}, {}, "axis df must be a sequence of values"),
        ({"likelihood": "normal"}, {}, "axis likelihood must be a sequence of values"),
        ({"kl_weight": [math.inf]}, {}, "kl_weight must be at least 0 and finite"),
        ({"df": [5, math.nan]}, {}, "df must be positive"),
        ({"df": [1, 5], "likelihood": ["normal"]}, {}, "df does nothing in any of these cells"),
        ({"df": [1, 5], "likelihood": ["cauchy"]}, {}, "unknown likelihood family 'cauchy'"),
        ({"seed": ["zero"]}, {}, "seed"),
        ({"df": [1, 5]}, {"encoder": "resnet19"}, "unknown encoder 'resnet19'"),
        ({"df": [1, 5]}, {"batch_size": 64}, "batch_size 64 is larger than the data"),
        ({"df": [1, 5]}, {"devices": 2}, "one device, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ablate(dataclasses.replace(quick, **changes), axes, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_cell_equals_the_same_settings_run_alone(finished, quick, tmp_path):
    config = dataclasses.replace(quick, likelihood="normal", df=None, seed=1)
    alone = load_file(train(config, tmp_path / "run") / "weights.safetensors")
    folder = named(finished.folder, "normal", "seed-1")
    cell = load_file(folder / "weights.safetensors")
    assert all(torch.equal(alone[name], cell[name]) for name in alone)
    (own,) = [cell for cell in finished.cells if cell.name == folder.name]
    rows = evaluate(folder, out=tmp_path / "eval.json")["rows"]
    assert (rows[0]["knn"], rows[0]["linear"]) == (own.measures["knn"], own.measures["linear"])


def test_tables(finished):
    rows = rows_of(finished.folder)
    assert [(row["likelihood"], row["seed"]) for row in rows] == [
        (likelihood, seed) for likelihood in ("normal", PAPER) for seed in "01"
    ]
    for row in rows:
        assert (row["status"], row["shared_variance"], row["auroc"], row["error"]) == ("finished", "true", "", "")
        assert row["df"] == (NOT_USED if row["likelihood"] == "normal" else "5")
        assert 0 <= float(row["knn"]) <= 1
        assert 0 <= float(row["linear"]) <= 1
        assert 1 <= float(row["effective_rank"]) <= 16
        assert float(row["posterior_snr"]) > 0
        assert math.isfinite(float(row["loss"]))
        assert float(row["seconds"]) > 0

    lines = finished.table.splitlines()
    assert lines[0].split()[:3] == ["likelihood", "seeds", "k-NN"]  # what does not vary is no column
    markdown, latex = ((finished.folder / f"ablation.{kind}").read_text() for kind in ("md", "tex"))
    for line, pair in zip(lines[2:4], (rows[:2], rows[2:]), strict=True):
        knn = [float(row["knn"]) for row in pair]
        assert line.startswith(pair[0]["likelihood"])
        entry = f"{statistics.mean(knn):.3f} ± {statistics.stdev(knn):.3f}"
        assert entry in line
        assert f"| {entry} |" in markdown
        assert "& " + entry.replace("±", r"$\pm$") + " &" in latex
    text = " ".join(finished.table.split())
    for what in ("mean ± standard deviation", "temperature 0.1", "kl_weight 0.1", "df 5"):
        assert what in text
    assert (finished.folder / "ablation.png").read_bytes().startswith(b"\x89PNG")

    summary = json.loads((finished.folder / "ablation.json").read_text())
    assert summary["settings"]["epochs"] == 1
    assert "likelihood" not in summary["settings"]
    assert summary["axes"][-1] == "seed"
    assert len(summary["cells"]) == 4
    assert summary["protocols"]["knn"]["temperature"] == 0.1
    assert {"date", "versions"} <= summary.keys()


def test_what_is_not_set_is_named_and_what_does_nothing_is_marked():
    config = TrainConfig(radius=None, embedding_dim=None)
    names = ("df", "embedding_dim", "radius", "radius_scale", "analytic_kl", "normal_class")
    found = {name: shown(config, name) for name in names}
    assert found == {
        "df": "D - 2",
        "embedding_dim": "by default",
        "radius": "none",
        "radius_scale": NOT_USED,
        "analytic_kl": "false",
        "normal_class": "none",
    }


def test_finished_cells_are_not_run_again_and_values_may_be_added(finished, quick, trained, tmp_path):
    out = shutil.copytree(finished.folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*")}
    again = ablate(quick, {"likelihood": [PAPER, "normal"], "seed": [1]}, out)
    assert trained == []
    assert again.cells == finished.cells  # all of them, not only those asked for
    grown = ablate(quick, {"likelihood": ["normal", PAPER], "df": [5, 7], "seed": [0]}, out)
    assert [("df-7" in name, "seed-0" in name) for name in trained] == [(True, True)]
    assert len(grown.cells) == 5
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_before_there_was_a_setting_goes_on(finished, quick, trained, tmp_path):
    out = shutil.copytree(finished.folder, tmp_path / "out")
    summary = json.loads((out / "ablation.json").read_text())
    del summary["settings"]["encoder_lr_scale"]
    (out / "ablation.json").write_text(json.dumps(summary))
    assert ablate(quick, {"likelihood": [PAPER, "normal"], "seed": [0, 1]}, out).cells == finished.cells
    assert trained == []


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tiny_config, trained_run, tmp_path, monkeypatch):
    original = training.Pretraining.training_step
    epochs = []

    def stop_in_epoch_two(self, batch, batch_idx):
        epochs.append(self.current_epoch)
        if self.current_epoch == 1 and len(epochs) < 10:
            raise RuntimeError("power cut")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(training.Pretraining, "training_step", stop_in_epoch_two)
    with pytest.raises(RuntimeError, match="power cut"):
        ablate(tiny_config, {"seed": [0]}, tmp_path / "out")
    assert list((tmp_path / "out" / "cells").glob("*.json")) == []
    assert rows_of(tmp_path / "out") == []
    epochs[:] = [9] * 10
    ablate(tiny_config, {"seed": [0]}, tmp_path / "out")
    assert set(epochs[10:]) == {1, 2}
    whole = load_file(trained_run / "weights.safetensors")
    resumed = load_file(named(tmp_path / "out") / "weights.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_cell_without_checkpoint_starts_anew_and_a_trained_one_is_only_measured(finished, quick, tmp_path, trained):
    out = shutil.copytree(finished.folder, tmp_path / "out")
    begun, measured = named(out, "normal", "seed-0"), named(out, "normal", "seed-1")
    for cell in (begun, measured):
        cell.with_name(cell.name + ".json").unlink()
    before = (begun / "weights.safetensors").read_bytes()
    (begun / "weights.safetensors").unlink()
    (begun / "checkpoints" / "last.ckpt").unlink()
    assert len(ablate(quick, {"likelihood": ["normal"], "seed": [0, 1]}, out).cells) == 4
    assert trained == [begun.name]
    assert (begun / "weights.safetensors").read_bytes() == before


def test_a_cell_that_diverges_or_cannot_run_is_a_row_and_the_grid_goes_on(quick, tmp_path, trained):
    out = tmp_path / "out"
    base = dataclasses.replace(quick, epochs=2, warmup_epochs=0.0)
    axes = {"lr": [1e18, 0.06], "batch_size": [64, 16]}
    result = ablate(base, axes, out)
    rows = {(row["lr"], row["batch_size"]): row for row in rows_of(out)}
    assert rows["1e+18", "16"]["status"] == "diverged"
    assert "the loss became" in rows["1e+18", "16"]["error"]
    assert rows["1e+18", "16"]["knn"] == ""
    assert rows["0.06", "64"]["status"] == rows["1e+18", "64"]["status"] == "failed"
    assert "batch_size 64 is larger than the data" in rows["0.06", "64"]["error"]
    assert rows["0.06", "16"]["status"] == "finished"
    lines = result.table.splitlines()
    assert sum(line.endswith("1 diverged") for line in lines) == 1
    assert sum(line.endswith("1 failed") for line in lines) == 2
    assert (out / "ablation.png").is_file()
    trained.clear()
    ablate(base, axes, out)
    assert len(trained) == 2  # a diverged cell is done, a failed one tried again


def test_another_ablation_or_anything_else_in_the_folder_is_left_alone(finished, quick, tmp_path, trained):
    axes = {"likelihood": ["laplace"]}
    before = (finished.folder / "ablation.json").read_bytes()
    for changes, message in (
        ({"epochs": 2}, "holds results with epochs 1, not 2"),
        ({"lr": 0.5}, "holds results with lr 0.06, not 0.5.*--out"),
    ):
        with pytest.raises(FileExistsError, match=message):
            ablate(dataclasses.replace(quick, **changes), axes, finished.folder)
    with pytest.raises(FileExistsError, match=r"with lr 0\.06, not varied"):
        ablate(quick, {"lr": [0.06, 0.1]}, finished.folder)
    assert (finished.folder / "ablation.json").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds no ablation\.json"):
        ablate(quick, axes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert trained == []


def test_one_class_cells_have_an_auroc(quick, tmp_path):
    base = dataclasses.replace(quick, batch_size=8, normal_class="stripes")
    (cell,) = ablate(base, {"df": [5]}, tmp_path / "out").cells
    assert 0 <= cell.measures["auroc"] <= 1
    assert "knn" in cell.measures  # on the labelled splits, as for any frozen encoder
    assert "score" in cell.protocols["auroc"]


def test_images_without_labels_have_no_accuracy(quick, image_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i, source in enumerate(sorted((image_folder / split).rglob("*.png"))):
            (tmp_path / "images" / split / f"{i}.png").write_bytes(source.read_bytes())
    base = dataclasses.replace(quick, data_dir=str(tmp_path / "images"))
    result = ablate(base, {"df": [5]}, tmp_path / "out")
    assert set(result.cells[0].measures) == {"loss", "effective_rank", "posterior_snr", "seconds"}
    assert "k-NN" not in result.table


def test_command(image_folder, tmp_path):
    settings = "--encoder tiny --hidden-dim 16 --batch-size 16 --precision 32 --image-size 16"
    axes = "--radius none --radius student-t --shared-variance --separate-variance --unit-radius 1"
    arguments = [
        "ablate", "--dataset", "folder", "--data-dir", str(image_folder), "--out", str(tmp_path / "out"),
        "--epochs", "1", *settings.split(), *axes.split(),
    ]  # fmt: skip
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("radius ")
    assert result.stdout.endswith(f"4 cells: {tmp_path / 'out'}\n")
    rows = rows_of(tmp_path / "out")
    assert {(row["df"], row["unit_radius"], row["radius"], row["shared_variance"]) for row in rows} == {
        ("D - 2", "1", radius, shared) for radius in ("none", "student-t") for shared in ("true", "false")
    }
    result = CliRunner().invoke(main, [*arguments, "--lr", "0.1", "--lr", "0.2"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "with lr 0.2, not varied" in result.stderr
