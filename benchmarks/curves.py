"""``python -m benchmarks.curves``: the pictures of the results' pages, from the results' JSON."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.pages import FOLDER, METHODS, Cell, result
from pyro_vje.pages.pictures import PALETTE, picture, style

IMAGES = FOLDER.parent / "docs" / "images"
COLOURS = dict(zip(METHODS, PALETTE, strict=False))


def curve(axes: Axes, cells: list[Cell], name: str, x: Callable[[list[dict[str, Any]]], list[float]]) -> None:
    """One line a method, the mean over seeds, and a thin one for each seed."""
    for objective, colour in COLOURS.items():
        rows = [cell["metrics"] for cell in cells if cell["config"]["objective"] == objective]
        lines = [
            np.array([(at, row[name]) for at, row in zip(x(run), run, strict=True) if row[name] is not None]).T
            for run in rows
        ]
        lines = [line for line in lines if line.size]
        for line in lines:
            axes.plot(*line, color=colour, linewidth=0.7, alpha=0.5)
        if lines and len({line.shape for line in lines}) == 1:
            axes.plot(*np.mean(lines, axis=0), color=colour, linewidth=1.8, marker="o", markersize=3)


def seconds(run: list[dict[str, Any]]) -> list[float]:
    """Seconds of training at the end of each epoch."""
    return list(accumulate(row["seconds"] for row in run))


def epochs(run: list[dict[str, Any]]) -> list[float]:
    """Numbers of the epochs."""
    return [row["epoch"] for row in run]


PANELS: tuple[tuple[str, str, str, str, Callable[[list[dict[str, Any]]], list[float]]], ...] = (
    ("knn_accuracy", "k-NN accuracy", "epoch", "share of 2,000 images", epochs),
    ("knn_accuracy", "k-NN accuracy", "seconds of training", "share of 2,000 images", seconds),
    ("effective_rank", "Effective rank of features", "epoch", "directions of 256", epochs),
    ("spread", "Spread of embeddings", "epoch", "1 even, 0 collapsed", epochs),
    ("log_direction", "Log-likelihood of the direction", "epoch", "nats an image", epochs),
    ("log_radius", "Log-likelihood of the radius", "epoch", "nats an image", epochs),
    ("kl", "KL to the prior", "epoch", "nats an image", epochs),
    ("posterior_snr", "Posterior mean against noise", "epoch", "‖loc‖ / ‖scale‖", epochs),
)


def main() -> None:
    """Draw ``docs/images/controls.png``."""
    cells = [cell for cell in result("learning_long")["cells"] if cell["status"] == "finished"]
    with picture(IMAGES / "controls.png", 13, 5.4) as figure:
        all_axes = figure.subplots(2, 4).flat
        for axes, (name, title, xlabel, ylabel, x) in zip(all_axes, PANELS, strict=True):
            # SimSiam has no posterior: its network's scale is never trained.
            shown = [c for c in cells if name != "posterior_snr" or not c["config"]["objective"].endswith(":simsiam")]
            curve(axes, shown, name, x)
            style(axes, title, xlabel, ylabel)
        found = {cell["config"]["objective"] for cell in cells}
        handles = [axes.plot([], [], color=COLOURS[n], label=METHODS[n])[0] for n in METHODS if n in found]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


if __name__ == "__main__":
    main()
