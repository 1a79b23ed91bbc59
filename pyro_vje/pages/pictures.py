"""Pictures of runs and scores, a PNG each; one that cannot be drawn is a warning that names it (`drawing`).

Matplotlib without pyplot (and so without seaborn): no window, no global state, safe in threads.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from pyro_vje.metrics import RejectionCurve
from pyro_vje.metrics.representation import MIN_POSTERIOR_SNR, MIN_SPREAD
from pyro_vje.runs.files import write_atomic

log = logging.getLogger("pyro_vje")

# Okabe & Ito's palette, told apart with any colour vision.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#9A9A9A"
PALETTE = (BLUE, "#E69F00", "#009E73", VERMILION, "#CC79A7", "#56B4E9", "#4D4D4D")
SHOWN = 12  # images at each end

Group: TypeAlias = tuple[str, str, NDArray[np.bool_]]  # name, colour, members of what is told apart
Thumbnails: TypeAlias = Callable[[Sequence[int]], Sequence[Image.Image]]

_PANELS = (
    ("loss", "Loss (negative ELBO)", "nats an image", None),
    ("log_direction", "Log-likelihood of the direction", "nats an image", None),
    ("log_radius", "Log-likelihood of the radius", "nats an image", None),
    ("kl", "KL to the prior", "nats an image", None),
    ("knn_accuracy", "k-NN accuracy", "share of images", None),
    ("effective_rank", "Effective rank", "directions", None),
    ("spread", "Spread of embeddings", "1 even, 0 collapsed", MIN_SPREAD),
    ("posterior_snr", "Posterior mean against noise", "‖loc‖ / ‖scale‖", MIN_POSTERIOR_SNR),
)


def printable(name: object) -> str:
    """``name`` as text that any font and encoding takes: bytes of file names that are no text become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def drawing(name: object) -> Iterator[None]:
    """Whatever goes wrong inside is a warning that names the picture."""
    try:
        yield
    except Exception as error:
        log.warning("could not draw %s: %s", printable(name), printable(error) or type(error).__name__)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")


@contextmanager
def picture(path: Path, width: float = 6.0, height: float = 4.6) -> Iterator[Figure]:
    """An empty figure of a size in inches, written at the end as a PNG; whatever goes wrong is a warning."""
    with drawing(path):
        yield (figure := new_figure(width, height))
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, stream.getvalue())


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and a quiet grid."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """Legend of names and colours."""
    handles = [Line2D([], [], linestyle="", color=colour, marker="s", label=name) for name, colour in entries]
    axes.legend(handles=handles, frameon=False, fontsize=8)


def sizes(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Names, with the number of images, and colours for a legend."""
    return [(f"{name} ({members.sum():,})", colour) for name, colour, members in groups]


def _range(groups: Sequence[NDArray[Any]]) -> tuple[float, float, bool]:
    """Limits of an axis, and whether they leave out tails: a few extreme scores must not squeeze all others.

    Of each group the middle 90 % are within them, with as much again at both ends; a group of fewer than twenty does
    not count beside larger ones.
    """
    large = [values for values in groups if len(values) >= 20] or groups
    inner = np.array([np.quantile(values, [0.05, 0.95]) for values in large])
    margin = np.ptp(inner)
    whole = np.array([values for group in groups for values in (group.min(), group.max())])
    low, high = max(whole.min(), inner.min() - margin), min(whole.max(), inner.max() + margin)
    if high > low and np.ptp(whole) > 2 * (high - low):
        return float(low), float(high), True
    margin = max(0.5, 1e-3 * abs(whole[0])) if np.ptp(whole) == 0 else 0.0
    return float(whole.min() - margin), float(whole.max() + margin), False


def split_by_label(is_anomaly: pd.Series, shown: Any) -> list[Group]:
    """The images that are ``shown`` by what is told apart: normal (0), anomalies (1), unlabelled (missing); or all."""
    if not is_anomaly.notna().any():
        return [("images", BLUE, np.asarray(shown))]
    kind = is_anomaly.to_numpy()
    named = (("normal", BLUE, kind == 0), ("anomalies", VERMILION, kind == 1), ("unlabelled", GREY, np.isnan(kind)))
    groups = [(name, colour, members & shown) for name, colour, members in named]
    return [group for group in groups if group[2].any()]


def draw_shares(axes: Axes, values: NDArray[Any], bins: NDArray[Any], colour: str) -> None:
    """Bars of the share of ``values`` in each of ``bins``; what lies outside goes into the outer ones."""
    shares = np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0] / len(values)
    axes.stairs(shares, bins, fill=True, color=colour, alpha=0.35)
    axes.stairs(shares, bins, color=colour, linewidth=1.5)


def draw_scores(axes: Axes, groups: Sequence[tuple[str, NDArray[Any]]]) -> None:
    """Histogram of finite scores of groups (colour, scores), each as shares of its own images."""
    low, high, clipped = _range([values for _, values in groups])
    count = sum(len(values) for _, values in groups)
    bins = np.linspace(low, high, int(np.clip(np.sqrt(count), 8, 50)) + 1)
    for colour, values in groups:
        draw_shares(axes, values, bins, colour)
    style(axes, "", "anomaly score" + ", tails in the outer bars" * clipped, "share of images")


def draw_marks(levels: NDArray[Any], ordinary: float, threshold: float | None) -> Image.Image:
    """A map ``(H, W)`` as what is laid over its image: vermilion, denser where it is stranger, and marks outlined.

    Nothing is drawn up to the level ``ordinary``. The outline of what exceeds ``threshold`` is black within white, so
    that it is seen on any ground, in print without colours, and with any colour vision.
    """
    values = levels.astype(np.float64)
    full = max(ordinary + 1, threshold or values.max()) - ordinary
    strength = ((values - ordinary) / full / 2).clip(0, 1)
    pixels = np.empty((*values.shape, 4), np.uint8)
    pixels[..., :3] = [int(VERMILION[k : k + 2], 16) for k in (1, 3, 5)]
    pixels[..., 3] = np.round(strength * 10) * 16  # few levels make a small file
    if threshold is not None:
        marked = values > threshold
        near = binary_dilation(marked)
        outline, border = near & ~marked, binary_dilation(near) & ~near
        pixels[outline], pixels[border] = (0, 0, 0, 255), (255, 255, 255, 255)
    return Image.fromarray(pixels)


def plot_training(history: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Training curves, one panel for each column of ``metrics.csv`` that has a number."""
    with picture(path) as figure:
        columns = pd.DataFrame(history).apply(pd.to_numeric).astype(float)
        panels = [panel for panel in _PANELS if panel[0] in columns and columns[panel[0]].notna().any()]
        if not panels:
            raise ValueError("no column has a number")
        down, across = -(-len(panels) // 4), min(4, len(panels))
        figure.set_size_inches(3.1 * across, 2.5 * down)
        epochs = columns.get("epoch", columns.index + 1.0)
        for place, (name, title, unit, threshold) in enumerate(panels, start=1):
            axes = figure.add_subplot(down, across, place)
            shown = columns[name].notna()
            marker = "o" if shown.sum() < 30 else ""
            axes.plot(epochs[shown], columns[name][shown], color=BLUE, marker=marker, markersize=3)
            style(axes, title, "epoch", unit)
            axes.set_xlim(min(epochs) - 0.02 * len(epochs), max(epochs) + 0.02 * len(epochs))
            axes.locator_params(axis="x", nbins=5, integer=True)
            if threshold is not None:
                line = axes.axhline(threshold, color=VERMILION, linestyle="--", linewidth=1)
                axes.legend([line], ["unhealthy below"], frameon=False, fontsize=7)
                axes.set_ylim(bottom=0)


def plot_rejection(curves: Mapping[str, RejectionCurve], path: Path) -> None:
    """Recall@1 of the images kept against the rejected share, up to 90 %, a line each; dotted: without rejecting."""
    with picture(path, 6.0, 3.8) as figure:
        axes = figure.subplots()
        for (rejected, accuracy, _), colour in zip(curves.values(), PALETTE, strict=False):
            shown = rejected <= 0.9  # beyond it the accuracy of few images jumps
            axes.plot(100 * rejected[shown], accuracy[shown], color=colour)
            axes.axhline(accuracy[0], color=colour, linestyle=":", linewidth=1)
        _legend(axes, [*zip(curves, PALETTE, strict=False)])
        title = "Rejecting the most uncertain images"
        style(axes, title, "share rejected (%)", "Recall@1 of the test images kept")
