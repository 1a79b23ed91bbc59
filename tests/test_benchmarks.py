"""The benchmarks: that the harness measures what it says, and the command writes what it measured."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

# benchmarks/ is no installed package: it is run from the repository's root.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import collect, harness, pages, rivals, score_parts, speed
from benchmarks.__main__ import main
from benchmarks.harness import BENCHMARKS, Growth, Row, Settings, compare, table, versus
from pyro_vje import VJE, SymmetricELBO
from pyro_vje.data import views_for
from pyro_vje.model.encoding import encode
from pyro_vje.runs.folder import load_run, load_split

QUICK = Settings(quick=True, threads=1, precision="32-true")


class Tasks:
    """A clock that only tasks advance, and a record of which ran."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def task(self, name, *seconds):
        left = list(seconds)

        def work():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def test_sides_take_turns_and_the_warm_up_is_not_counted():
    tasks = Tasks()
    ours, rival = tasks.task("a", 100.0, 1.0, 2.0, 3.0), tasks.task("b", 50.0, 4.0)
    assert compare(ours, rival, 3, clock=tasks.clock) == ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert "".join(tasks.calls) == "ab" + "ab" * 3


def test_short_tasks_are_called_often_within_one_timing():
    tasks = Tasks()
    ours, rival = tasks.task("a", 0.5), tasks.task("b", 2.0)
    assert compare(ours, rival, 2, warmup=2, min_seconds=1.0, clock=tasks.clock) == ([0.5] * 2, [2.0] * 2)
    assert "".join(tasks.calls) == "abab" + "aabb" * 2


def test_task_that_returns_a_float_has_timed_itself():
    tasks = Tasks()
    timed = compare(lambda: 7.0, tasks.task("b", 2.0), 2, clock=tasks.clock)
    assert timed == ([7.0, 7.0], [2.0, 2.0])


def test_nothing_to_measure_is_refused():
    for repetitions, warmup in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            compare(int, int, repetitions, warmup=warmup)


def test_row_holds_medians_of_paired_ratios(monkeypatch):
    # The machine slows down in the second repetition: both sides do, and no ratio shows it.
    monkeypatch.setattr(harness, "compare", lambda *_, **__: ([1.0, 30.0, 2.0], [2.0, 60.0, 2.0]))
    row = versus(QUICK, "this", "that", int, int, wanted=0.6, images=4)
    assert (row.ours_seconds, row.rival_seconds) == (2.0, 2.0)
    assert (row.ratio, row.ratio_min, row.ratio_max) == (0.5, 0.5, 1.0)
    row.benchmark = "some"
    lines = table([row, Row("x", "kornia", note="kornia is not installed", benchmark="views")]).splitlines()
    assert lines[0].split()[:3] == ["benchmark", "what", "rival"]
    assert "0.500 [0.500, 1.000]" in lines[1]
    assert lines[2] == "views: x against kornia: kornia is not installed"


def test_growth_fits_the_exponent():
    assert Growth("cost", "n", "s", [(n, 3.0 * n**2) for n in (1, 10, 100)]).slope == pytest.approx(2)


def test_plain_objective_is_the_same_mathematics():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 12))
    vje = VJE(encoder, 12, hidden_dim=16, df=3.0)
    views = torch.randn(2, 5, 3, 4, 4)
    parameters = list(vje.parameters())
    losses = []
    for objective in (
        SymmetricELBO(kl_weight=0.3)(vje.model, vje.guide),
        lambda views: rivals.plain_objective(vje, views, kl_weight=0.3),
    ):
        torch.manual_seed(1)
        losses.append(objective(views))
    torch.testing.assert_close(losses[0], losses[1])
    for ours, plain in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rival", ["torchvision", "kornia", "lightly"])
def test_rival_views_have_the_shape_and_range_of_ours(rival):
    pytest.importorskip(rival)
    two_views, _ = views_for("stl10", 24)
    images = speed.random_images(64, 24).images
    ours = two_views(images, torch.Generator().manual_seed(0))
    if rival == "kornia":
        batch = rivals.kornia_views(two_views)(images)
    else:
        transform = getattr(rivals, f"{rival}_views")(two_views)
        (batch,) = rivals.LoaderViews(images, 64, transform, Settings(True, 0, "32-true"))
    assert batch.shape == ours.shape
    assert batch.dtype == ours.dtype
    assert not torch.equal(batch[0], batch[1])
    assert batch.mean().item() == pytest.approx(ours.mean().item(), abs=0.1)
    assert batch.std().item() == pytest.approx(ours.std().item(), rel=0.2)


def test_simsiam_loss_is_a_mean_cosine_and_trains():
    pytest.importorskip("lightly")
    model = rivals.SimSiam(nn.Flatten(), 48)
    loss = model(torch.randn(2, 6, 3, 4, 4))
    assert -1 <= loss.item() <= 1
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["views", "simsiam"])
def test_rival_that_is_not_installed_is_said(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "installed", lambda module: False)
    main(["--quick", "--only", name, "--out", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert rows
    assert all(row["ratio"] is None and row["ours_seconds"] is None for row in rows)
    assert "lightly is not installed: pip install lightly" in capsys.readouterr().out


def test_peak_memory_is_printed_in_mebibytes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-c", "elbo", "8", "True", "1", "32-true"])
    exec(speed.PEAK, {})
    assert 1 < float(capsys.readouterr().out) < 1e6


def test_epoch_is_timed_through_the_trainer():
    train_set = speed.random_images(32)
    seconds = speed.vje_epoch("resnet-small", train_set, 16, QUICK)()
    assert isinstance(seconds, float)
    assert seconds > 0


def test_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "new" / "speed.json"
    main(["--quick", "--only", "elbo", "growth", "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["command"].startswith("python -m benchmarks --quick")
    assert {"date", "commit", "hardware", "versions", "threads", "precision"} <= set(written)
    assert [row["benchmark"] for row in written["rows"]] == ["elbo"] * 3
    for row in written["rows"]:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["rival"] == "plain torch"
        assert row["command"].startswith("python -m benchmarks --only elbo")
        assert (row["precision"], row["threads"]) == ("32-true", written["threads"])
    assert all(len(growth["points"]) == 2 for growth in written["growth"])
    assert [growth["precision"] for growth in written["growth"]] == [written["precision"], *["32-true"] * 4]
    printed = capsys.readouterr().out
    assert printed.count("symmetric ELBO alone") == 3
    assert "slope" in printed


def test_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "sped"])
    message = capsys.readouterr().err
    assert "'sped'" in message
    assert all(name in message for name in BENCHMARKS)


def test_tables_are_those_of_the_results():
    """What ``python -m benchmarks.pages`` would write is what the pages say."""
    for page in pages.PAGES:
        text = page.read_text()
        assert text == pages.render(page), page
        assert text.count("<!-- end -->") == len(pages.MARK.findall(text)) >= 1, page


def test_terms_of_the_score_add_up(trained_run, image_folder):
    run = load_run(trained_run)
    images = load_split(run, "test", None, None)
    terms = score_parts.terms(run, images)
    total = terms["direction"] + terms["radius"] + terms["volume element"]
    np.testing.assert_allclose(terms["conditional"], total, atol=1e-6)
    radius = encode(run.vje, images, run.info.view).embeddings.norm(dim=1).double()
    np.testing.assert_allclose(terms["volume element"], (run.vje.embedding_dim - 1) * radius.log(), atol=1e-3)
    found = score_parts.row(run, str(image_folder / "test" / "spots"))
    assert all(0 <= term["auroc"] <= 1 for term in found["terms"].values())


def test_results_come_into_a_page_when_they_are_there(tmp_path, monkeypatch):
    marks = """settings new rows=objective columns=seed where="lr > 0"|scores new_scores classes=no|ratios new_speed"""
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {mark} -->\nold\n<!-- end -->\n" for mark in marks.split("|")) + "<!-- note -->\n")
    results = pages.FOLDER / "results"
    monkeypatch.setattr(pages, "FOLDER", tmp_path)
    assert "old" not in pages.render(page)
    (tmp_path / "results").mkdir()
    for name, source in (("new", "controls"), ("new_scores", "one_class_elbo"), ("new_speed", "speed")):
        shutil.copy(results / f"{source}.json", tmp_path / "results" / f"{name}.json")
    text = pages.render(page)
    assert "old" not in text
    assert "k-NN, seed 0" in text
    assert "| conditional " in text
    assert "lightly's SimSiam" in text
    assert text.endswith("<!-- note -->\n")


def test_collecting_asks_for_a_finished_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        collect.main([str(tmp_path), "--command", "x", "--data", "y", "--out", str(tmp_path / "out.json")])
    assert "finished command" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
