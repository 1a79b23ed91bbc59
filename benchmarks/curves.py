"""``python -m benchmarks.curves``: the pictures of the results' pages, from the results' JSON."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pages import FOLDER, METHODS, result
from pyro_vje.pages.pictures import PALETTE, picture, style

IMAGES = FOLDER.parent / "docs" / "images"
COLOURS = dict(zip(METHODS, PALETTE, strict=False))


Run = list[dict[str, Any]]  # rows of a run's metrics.csv


def curve(axes: Axes, runs: list[Run], name: str, x: Callable[[Run], list[float]], colour: str) -> None:
    """The mean over runs, which are seeds, and a thin line for each."""
    lines = [
        np.array([(at, row[name]) for at, row in zip(x(run), run, strict=True) if row[name] is not None]).T
        for run in runs
    ]
    lines = [line for line in lines if line.size]
    for line in lines:
        axes.plot(*line, color=colour, linewidth=0.7, alpha=0.5)
    if lines and len({line.shape for line in lines}) == 1:
        axes.plot(*np.mean(lines, axis=0), color=colour, linewidth=1.8, marker="o", markersize=3)


def seconds(run: Run) -> list[float]:
    """Seconds of training at the end of each epoch."""
    return list(accumulate(row["seconds"] for row in run))


def epochs(run: Run) -> list[float]:
    """Numbers of the epochs."""
    return [row["epoch"] for row in run]


PANELS: tuple[tuple[str, str, str, str, Callable[[Run], list[float]]], ...] = (
    ("knn_accuracy", "k-NN accuracy", "epoch", "share of 2,000 images", epochs),
    ("knn_accuracy", "k-NN accuracy", "seconds of training", "share of 2,000 images", seconds),
    ("effective_rank", "Effective rank of features", "epoch", "directions of 256", epochs),
    ("spread", "Spread of embeddings", "epoch", "1 even, 0 collapsed", epochs),
    ("log_direction", "Log-likelihood of the direction", "epoch", "nats an image", epochs),
    ("log_radius", "Log-likelihood of the radius", "epoch", "nats an image", epochs),
    ("kl", "KL to the prior", "epoch", "nats an image", epochs),
    ("posterior_snr", "Posterior mean against noise", "epoch", "‖loc‖ / ‖scale‖", epochs),
)


VIEWS = {
    ("elbo", 2, 0): "VJE",
    ("elbo", 4, 0): "VJE, four views",
    ("elbo", 2, 2): "VJE, two small crops more",
    ("benchmarks.controls:simsiam", 2, 0): "SimSiam",
    ("benchmarks.controls:simsiam", 4, 0): "FastSiam: SimSiam, four views",
}
"""Objective, views and small crops, and what they are called."""


def draw_controls() -> None:
    """Draw ``docs/images/controls.png``: training under each objective."""
    cells = [cell for cell in result("learning_long")["cells"] if cell["status"] == "finished"]
    found = {cell["config"]["objective"] for cell in cells}
    with picture(IMAGES / "controls.png", 13, 5.4) as figure:
        all_axes = figure.subplots(2, 4).flat
        for axes, (name, title, xlabel, ylabel, x) in zip(all_axes, PANELS, strict=True):
            for objective, colour in COLOURS.items():
                # SimSiam has no posterior: its network's scale is never trained.
                if name != "posterior_snr" or not objective.endswith(":simsiam"):
                    runs = [cell["metrics"] for cell in cells if cell["config"]["objective"] == objective]
                    curve(axes, runs, name, x, colour)
            style(axes, title, xlabel, ylabel)
        _legend(figure, {METHODS[name]: COLOURS[name] for name in METHODS if name in found})


def draw_views() -> None:
    """Draw ``docs/images/views.png``: k-NN accuracy of two and of more views, by passes of the encoder."""
    cells = [cell for name in ("learning_full", "views_full") for cell in result(name)["cells"]]
    cells = [cell for cell in cells if cell["config"]["batch_size"] == 64]
    with picture(IMAGES / "views.png", 6.2, 4.2) as figure:
        axes = figure.subplots()
        for (objective, views, local), colour in zip(VIEWS, PALETTE, strict=False):
            which = {"objective": objective, "views": views, "local_views": local}
            runs = [cell["metrics"] for cell in cells if which.items() <= cell["config"].items()]
            passes = views + local / 4  # a small crop has a quarter of a view's pixels
            curve(axes, runs, "knn_accuracy", lambda run, passes=passes: [passes * n for n in epochs(run)], colour)  # type: ignore[misc]
        style(axes, "k-NN accuracy", "passes of the encoder an image", "share of 2,000 images")
        _legend(figure, dict(zip(VIEWS.values(), PALETTE, strict=False)), columns=2)


def _legend(figure: Figure, names: dict[str, str], columns: int | None = None) -> None:
    handles = [figure.axes[0].plot([], [], color=colour, label=name)[0] for name, colour in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns or len(handles), frameon=False)


if __name__ == "__main__":
    draw_controls()
    draw_views()
