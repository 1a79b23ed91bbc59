import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.pages import pictures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, for a look at what is on them."""
    saved, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: (saved.append(figure), save(figure, path))[1])
    return saved


def check_png(path, least_width=200, least_height=150):
    """The file is a picture of a size for a README, and something is drawn on it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert least_width <= image.width <= 1800
        assert least_height <= image.height <= 1800
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
        path = pictures.plot_training(history(40), tmp_path / "training.png")
        assert path == tmp_path / "training.png"
        check_png(path, 1000, 400)
        assert len(figures[0].axes) == 8
        # The loss has a point for each epoch, the k-NN accuracy one for each measurement; the gaps are bridged.
        assert [len(axes.lines[0].get_xdata()) for axes in figures[0].axes] == [40] * 4 + [8] * 4
        assert figures[0].axes[4].lines[0].get_xdata().tolist() == list(range(5, 41, 5))

    def test_thresholds_are_drawn(self, tmp_path, figures):
        pictures.plot_training(history(10), tmp_path / "training.png")
        lines = {axes.get_title(loc="left"): axes.lines for axes in figures[0].axes}
        assert lines["Spread of embeddings"][1].get_ydata()[0] == pictures.MIN_SPREAD
        assert lines["Posterior mean against noise"][1].get_ydata()[0] == pictures.MIN_POSTERIOR_SNR
        assert len(lines["k-NN accuracy"]) == 1

    def test_missing_columns_and_values(self, tmp_path, figures):
        columns = {
            "loss": ["3.5", "", "2.5"],
            "kl": [None, float("nan"), 1.0],
            "knn_accuracy": [float("nan")] * 3,
        }
        check_png(pictures.plot_training(columns, tmp_path / "training.png"))
        assert titles(figures[0]) == ["Loss (negative ELBO)", "KL to the prior"]
        assert figures[0].axes[0].lines[0].get_xdata().tolist() == [1, 3]

    def test_five_panels_leave_no_empty_one(self, tmp_path, figures):
        columns = {
            name: values for name, values in history(5).items() if name not in ("kl", "spread", "log_radius")
        }
        pictures.plot_training(columns, tmp_path / "training.png")
        assert len(figures[0].axes) == 5
        assert all(axes.lines for axes in figures[0].axes)

    def test_one_epoch(self, tmp_path):
        check_png(pictures.plot_training({"epoch": [1], "loss": [2.0]}, tmp_path / "training.png"))

    def test_bad_input(self, tmp_path):
        with pytest.raises(ValueError, match="no column with a number"):
            pictures.plot_training({"epoch": [1], "loss": [float("nan")]}, tmp_path / "training.png")
        with pytest.raises(ValueError, match="differ in length"):
            pictures.plot_training({"epoch": [1], "loss": [1.0, 2.0]}, tmp_path / "training.png")
        assert not list(tmp_path.iterdir())


class TestEmbedding:
    def test_classes(self, tmp_path, figures, rng):
        names = [f"class-{i}" for i in range(10)]
        labels = torch.arange(10).repeat(20)
        path = pictures.plot_embedding(torch.randn(200, 8), labels, names, tmp_path / "embedding.png")
        check_png(path, 500, 400)
        assert legend_texts(figures[0]) == names
        assert sum(len(points.get_offsets()) for points in figures[0].axes[0].collections) == 200

    def test_classes_are_told_apart(self, tmp_path, figures):
        pictures.plot_embedding(torch.randn(20, 4), torch.arange(20), None, tmp_path / "embedding.png")
        handles = figures[0].axes[0].get_legend().legend_handles
        assert len({(handle.get_color(), handle.get_marker()) for handle in handles}) == 20

    def test_components_are_those_of_directions(self, tmp_path, figures, rng):
        embeddings = rng.normal(size=(100, 6)) * [5, 3, 1, 1, 1, 1]
        pictures.plot_embedding(
            embeddings * rng.uniform(1, 100, size=(100, 1)), None, None, tmp_path / "e.png"
        )
        directions = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        singular = np.linalg.svd(directions - directions.mean(0), compute_uv=False)
        shown = figures[0].axes[0].collections[0].get_offsets()
        assert np.linalg.norm(shown[:, 0]) == pytest.approx(singular[0])
        assert np.linalg.norm(shown[:, 1]) == pytest.approx(singular[1])
        assert (
            f"({singular[0] ** 2 / (singular**2).sum():.0%} of variance)" in figures[0].axes[0].get_xlabel()
        )

    def test_unlabelled(self, tmp_path, figures):
        check_png(pictures.plot_embedding(torch.randn(50, 8), None, None, tmp_path / "a.png"))
        labels = torch.tensor([-1, 0] * 25)
        check_png(pictures.plot_embedding(torch.randn(50, 8), labels, ["cat"], tmp_path / "b.png"))
        check_png(
            pictures.plot_embedding(torch.randn(50, 8), torch.full((50,), -1), ["cat"], tmp_path / "c.png")
        )
        assert [legend_texts(figure) for figure in figures] == [None, ["cat", "unlabelled"], None]

    def test_many_classes(self, tmp_path, figures):
        pictures.plot_embedding(torch.randn(50, 8), torch.arange(50), None, tmp_path / "embedding.png")
        assert legend_texts(figures[0]) is None
        assert titles(figures[0]) == ["Directions of 50 embeddings of 50 classes"]

    def test_names_of_any_script(self, tmp_path, figures):
        names = ["_hidden", "$x_", "猫", "a" * 60]
        check_png(
            pictures.plot_embedding(torch.randn(8, 4), torch.arange(4).repeat(2), names, tmp_path / "e.png")
        )
        assert legend_texts(figures[0])[:3] == names[:3]
        assert len(legend_texts(figures[0])[3]) == 24

    def test_subsample_is_deterministic(self, tmp_path, figures, rng):
        embeddings = rng.normal(size=(6000, 3))
        for name in "ab":
            pictures.plot_embedding(embeddings, None, None, tmp_path / f"{name}.png")
        assert len(figures[0].axes[0].collections[0].get_offsets()) == pictures.MOST_POINTS
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    @pytest.mark.parametrize("shape", [(1, 8), (2, 8), (5, 1)])
    def test_few(self, tmp_path, shape):
        labels = torch.zeros(shape[0], dtype=torch.long)
        check_png(pictures.plot_embedding(torch.randn(shape), labels, ["cat"], tmp_path / "embedding.png"))

    def test_collapsed_and_nan(self, tmp_path, figures):
        check_png(pictures.plot_embedding(torch.ones(20, 4), None, None, tmp_path / "a.png"))
        embeddings = torch.randn(20, 4)
        embeddings[3] = torch.nan
        check_png(pictures.plot_embedding(embeddings, None, None, tmp_path / "b.png"))
        assert titles(figures[1]) == ["Directions of 19 embeddings"]

    def test_bad_input(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be a matrix \(N, D\)"):
            pictures.plot_embedding(torch.randn(8), None, None, tmp_path / "e.png")
        with pytest.raises(ValueError, match="labels have shape"):
            pictures.plot_embedding(torch.randn(8, 2), torch.arange(7), None, tmp_path / "e.png")
        with pytest.raises(ValueError, match="no embedding is finite"):
            pictures.plot_embedding(torch.full((8, 2), torch.nan), None, None, tmp_path / "e.png")


class TestScores:
    def test_labelled(self, tmp_path, figures):
        scores = torch.tensor([0.0, 1, 2, 3, 2.5, 4])
        labels = torch.tensor([False, False, False, False, True, True])
        check_png(pictures.plot_score_histogram(scores, labels, tmp_path / "scores.png"), 600, 300)
        assert titles(figures[0]) == ["Anomaly scores: AUROC 0.875"]
        assert legend_texts(figures[0]) == ["normal (4)", "anomalies (2)"]

    def test_bars_hold_all_images(self, tmp_path, figures, rng):
        # Two scores are far out: the axis stays with the others, and the outer bars count them.
        scores = np.concatenate([rng.normal(size=500), [1e6, -1e6]])
        pictures.plot_score_histogram(scores, None, tmp_path / "scores.png")
        axes = figures[0].axes[0]
        heights, edges, _ = axes.patches[0].get_data()
        assert heights.sum() == pytest.approx(1)
        assert heights[0] > 0 < heights[-1]
        assert edges[-1] < 10
        assert "tails in the outer bars" in axes.get_xlabel()
        assert legend_texts(figures[0]) is None

    @pytest.mark.parametrize("scores", [[5.0], [5.0, 5.0, 5.0], [1.0, float("nan"), 2.0, float("inf")]])
    def test_few_constant_and_nan(self, tmp_path, figures, scores):
        check_png(pictures.plot_score_histogram(np.array(scores), None, tmp_path / "scores.png"))
        heights = figures[0].axes[0].patches[0].get_data().values
        assert heights.sum() == pytest.approx(1)

    def test_one_class_has_no_auroc(self, tmp_path, figures):
        pictures.plot_score_histogram(
            torch.randn(9), torch.zeros(9, dtype=torch.bool), tmp_path / "scores.png"
        )
        assert titles(figures[0]) == ["Anomaly scores of 9 images"]
        assert legend_texts(figures[0]) == ["normal (9)"]

    def test_direction_radius(self, tmp_path, figures, rng):
        labels = rng.random(300) < 0.2
        direction, radius = rng.normal(size=300), rng.normal(size=300)
        direction[0] = np.nan
        path = pictures.plot_direction_radius(
            direction, torch.from_numpy(radius), labels, tmp_path / "parts.png"
        )
        check_png(path, 500, 400)
        points = figures[0].axes[0].collections[0]
        assert len(points.get_offsets()) == 299
        assert len(np.unique(points.get_facecolors(), axis=0)) == 2
        assert legend_texts(figures[0]) == [
            f"normal ({(~labels[1:]).sum()})",
            f"anomalies ({labels[1:].sum()})",
        ]

    def test_direction_radius_unlabelled(self, tmp_path, figures):
        check_png(
            pictures.plot_direction_radius(torch.zeros(1), torch.zeros(1), None, tmp_path / "parts.png")
        )
        assert legend_texts(figures[0]) is None

    def test_bad_input(self, tmp_path):
        path = tmp_path / "scores.png"
        with pytest.raises(ValueError, match="no score is finite"):
            pictures.plot_score_histogram(torch.tensor([torch.nan]), None, path)
        with pytest.raises(ValueError, match=r"is_anomaly has shape \(2,\), the scores \(3,\)"):
            pictures.plot_score_histogram(torch.zeros(3), torch.zeros(2), path)
        with pytest.raises(ValueError, match="direction and radius must be vectors of one length"):
            pictures.plot_direction_radius(torch.zeros(3), torch.zeros(2), None, path)
        with pytest.raises(ValueError, match="finite direction and radius"):
            pictures.plot_direction_radius(torch.zeros(1), torch.full((1,), torch.nan), None, path)


class TestGrids:
    def shown(self, figure):
        return [axes.get_title() for axes in figure.axes]

    def test_strangest(self, tmp_path, figures, rng):
        images = torch.from_numpy(rng.integers(0, 256, size=(40, 3, 8, 8), dtype=np.uint8))
        scores = torch.from_numpy(rng.permutation(40).astype(np.float32))
        path = pictures.plot_strangest(images, scores, tmp_path / "strangest.png", k=7)
        check_png(path, 600, 400)
        assert self.shown(figures[0]) == [f"{i}" for i in (*range(7), *range(39, 32, -1))]
        strangest = figures[0].axes[7].images[0].get_array()
        assert (strangest == images[scores.argmax()].permute(1, 2, 0).numpy()).all()

    def test_fewer_images_than_asked(self, tmp_path, figures):
        images, scores = torch.rand(5, 3, 8, 8), torch.tensor([3.0, 1, torch.nan, 2, 0])
        check_png(pictures.plot_strangest(images, scores, tmp_path / "strangest.png"))
        assert self.shown(figures[0]) == ["0", "1", "3", "2"]

    def test_one_grey_image(self, tmp_path, figures):
        image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
        check_png(pictures.plot_strangest(image, torch.zeros(1), tmp_path / "strangest.png"))
        assert len(figures[0].axes) == 1

    def test_views(self, tmp_path, figures):
        check_png(pictures.plot_views(torch.rand(3, 6, 3, 16, 16), tmp_path / "views.png"), 600, 300)
        assert len(figures[0].axes) == 18
        assert [figures[0].axes[i].texts[0].get_text() for i in (0, 6, 12)] == ["image", "view 1", "view 2"]

    def test_floats_outside_of_range_are_clipped(self, tmp_path, figures):
        pictures.plot_views(
            torch.tensor([-1.0, 0.5, torch.nan, 2.0]).repeat(1, 1, 3, 4, 1), tmp_path / "v.png", rows=["x"]
        )
        assert figures[0].axes[0].images[0].get_array()[0, :, 0].tolist() == [0, 0.5, 0, 1]

    def test_bad_input(self, tmp_path):
        path, images = tmp_path / "strangest.png", torch.rand(4, 3, 8, 8)
        with pytest.raises(ValueError, match="4 images but 3 scores"):
            pictures.plot_strangest(images, torch.zeros(3), path)
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            pictures.plot_strangest(images, torch.zeros(4), path, k=0)
        with pytest.raises(ValueError, match="no score is finite"):
            pictures.plot_strangest(images, torch.full((4,), torch.nan), path)
        with pytest.raises(ValueError, match="non-empty array of 4 dimensions"):
            pictures.plot_strangest(torch.rand(4, 8, 8, 3), torch.zeros(4), path)
        with pytest.raises(ValueError, match="views have 2 rows, but 3 names"):
            pictures.plot_views(torch.rand(2, 4, 3, 8, 8), path)


def test_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    pictures.plot_training(history(3), tmp_path / "training.png")
    assert dict(matplotlib.rcParams) == before


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        pictures.plot_training(history(3), tmp_path / "missing" / "training.png")
