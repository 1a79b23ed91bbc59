import logging

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyro_vje.pages import pictures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were made, for a look at what is on them."""
    made, new_figure = [], pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *size: made.append(new_figure(*size)) or made[-1])
    return made


def draw(plot, *arguments, path, least=(200, 150), **settings):
    """The file is a picture of a size for a README, and something is drawn on it."""
    path.unlink(missing_ok=True)
    getattr(pictures, f"plot_{plot}")(*arguments, path=path, **settings)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert least[0] <= 3 * image.width <= 1800
        assert least[1] <= 3 * image.height <= 1800
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend_texts(figure):
    legend = figure.axes[0].get_legend()
    return None if legend is None else [text.get_text() for text in legend.get_texts()]


def history(epochs):
    number = np.arange(1, epochs + 1)
    seldom = np.where(number % 5 == 0, number / epochs, np.nan)
    every = dict.fromkeys(("loss", "log_direction", "log_radius", "kl"), 1.0 / number)
    some = dict.fromkeys(("knn_accuracy", "effective_rank", "spread", "posterior_snr"), seldom)
    return {"epoch": number, "lr": number, "seconds": number, **every, **some}


class TestTraining:
    def test_all_panels(self, tmp_path, figures):
        draw("training", history(40), path=tmp_path / "training.png", least=(1000, 400))
        assert len(figures[0].axes) == 8
        # The loss has a point for each epoch, the k-NN accuracy one for each measurement; the gaps are bridged.
        assert [len(axes.lines[0].get_xdata()) for axes in figures[0].axes] == [40] * 4 + [8] * 4
        assert figures[0].axes[4].lines[0].get_xdata().tolist() == list(range(5, 41, 5))
        lines = {axes.get_title(loc="left"): axes.lines for axes in figures[0].axes}
        assert lines["Spread of embeddings"][1].get_ydata()[0] == pictures.MIN_SPREAD
        assert lines["Posterior mean against noise"][1].get_ydata()[0] == pictures.MIN_POSTERIOR_SNR
        assert len(lines["k-NN accuracy"]) == 1

    def test_missing_columns_and_values(self, tmp_path, figures):
        columns = {"loss": ["3.5", "", "2.5"], "kl": [None, float("nan"), 1.0], "knn_accuracy": [float("nan")] * 3}
        draw("training", columns, path=tmp_path / "training.png")
        assert titles(figures[0]) == ["Loss (negative ELBO)", "KL to the prior"]
        assert figures[0].axes[0].lines[0].get_xdata().tolist() == [1, 3]
        draw("training", {"epoch": [1], "loss": [2.0]}, path=tmp_path / "one.png")

    def test_five_panels_leave_no_empty_one(self, tmp_path, figures):
        columns = history(5)
        for name in ("kl", "spread", "log_radius"):
            del columns[name]
        pictures.plot_training(columns, tmp_path / "training.png")
        assert len(figures[0].axes) == 5
        assert all(axes.lines for axes in figures[0].axes)


class TestScores:
    def bars(self, *groups):
        axes = pictures.new_figure(4, 3).subplots()
        pictures.draw_scores(axes, [(pictures.BLUE, np.array(scores)) for scores in groups])
        return axes, [patch.get_data() for patch in axes.patches if patch.get_fill()]

    def test_bars_hold_all_images(self, rng):
        # Two scores are far out: the axis stays with the others, and the outer bars count them.
        axes, (found, few) = self.bars([*rng.normal(size=500), 1e6, -1e6], [1.0, 2.0])
        assert [found.values.sum(), few.values.sum()] == pytest.approx([1, 1])
        assert found.values[0] > 0 < found.values[-1]
        assert found.edges[-1] < 10
        assert "tails in the outer bars" in axes.get_xlabel()

    def test_few_and_constant(self):
        for scores in ([5.0], [5.0, 5.0, 5.0], [0.0] * 4, [1e20] * 2):
            _, (found,) = self.bars(scores)
            assert found.values.sum() == pytest.approx(1)

    def test_groups_by_label(self):
        some = pd.Series([0, 0, 1, np.nan, 1])
        groups = pictures.split_by_label(some, np.array([True, True, True, True, False]))
        shown = [(name, members.tolist()) for name, _, members in groups]
        assert shown == [
            ("normal", [True, True, False, False, False]),
            ("anomalies", [False, False, True, False, False]),
            ("unlabelled", [False, False, False, True, False]),
        ]
        assert pictures.sizes(groups)[0] == ("normal (2)", pictures.BLUE)
        assert len(pictures.split_by_label(pd.Series([np.nan] * 5), some.notna())) == 1

    def test_rejection(self, tmp_path, figures):
        curve = np.arange(10) / 10, np.linspace(0.5, 1, 10), 0.75
        draw("rejection", {"a": curve, "b": curve}, path=tmp_path / "r.png")
        assert legend_texts(figures[0]) == ["a", "b"]


def test_what_cannot_be_drawn_is_a_warning_that_names_the_picture(tmp_path, caplog, monkeypatch):
    nan = torch.full((3,), torch.nan)
    names = "training.png", "rejection.png"
    paths = [tmp_path / "pictures" / name for name in names]
    with caplog.at_level(logging.WARNING, "pyro_vje"):
        pictures.plot_training({"epoch": [1], "loss": [float("nan")]}, paths[0])
        pictures.plot_rejection({"a": (nan.numpy(), nan.numpy()[:2], 0.0)}, paths[1])
        monkeypatch.setattr(pictures, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        pictures.plot_training(history(3), tmp_path / "bytes\udcff.png")
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3
    for path, message in zip([*paths, r"bytes\udcff.png"], warned, strict=True):
        assert str(path) in message
        message.encode()
    assert "disk full" in warned[2]
    assert not list(tmp_path.rglob("*.png"))


def test_no_global_state_and_a_missing_folder_is_made(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures.plot_training(history(3), tmp_path / "missing" / "training.png")
    assert (tmp_path / "missing" / "training.png").is_file()
    assert dict(matplotlib.rcParams) == before


def test_marks_are_outlined_in_black_within_white():
    levels = np.full((12, 12), 10)
    levels[4:8, 4:8] = 90
    drawn = np.asarray(pictures.draw_marks(levels, ordinary=20, threshold=50))
    assert drawn.shape == (12, 12, 4)
    assert not drawn[0, :, 3].any()  # ordinary places show the image alone
    assert drawn[5, 5, 3] > 100  # a strange one is coloured
    assert drawn[3, 5].tolist() == [0, 0, 0, 255]
    assert drawn[2, 5].tolist() == [255, 255, 255, 255]
    without = np.asarray(pictures.draw_marks(levels, ordinary=20, threshold=None))
    assert (without[..., :3] == without[0, 0, :3]).all()  # no outline where there is no limit
    assert without[5, 5, 3] > without[0, 0, 3] == 0
