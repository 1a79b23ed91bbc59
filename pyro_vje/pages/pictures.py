"""Pictures of runs and scores: each function writes one PNG and returns its path.

Matplotlib through its object interface, without pyplot (and so without seaborn, which is built on it): no window, no
global state, safe in threads. Tensors on any device and NumPy arrays are accepted alike. A picture never ends the run
that it shows: what cannot be drawn is a warning that names it, and ``None`` comes back (`drawing`).
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from pyro_vje.metrics import auroc
from pyro_vje.metrics.arrays import Array, as_numpy
from pyro_vje.metrics.representation import MIN_POSTERIOR_SNR, MIN_SPREAD
from pyro_vje.runs.files import write_atomic

log = logging.getLogger("pyro_vje")
P = ParamSpec("P")

# Okabe & Ito's palette, told apart with any colour vision; classes beyond its seven take another marker as well.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#9A9A9A"
PALETTE = (BLUE, "#E69F00", "#009E73", VERMILION, "#CC79A7", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "^", "s")
MOST_CLASSES = 20
MOST_POINTS = 5000

Group = tuple[str, str, NDArray[np.bool_]]
"""Name, colour and members of images that are told apart."""

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


# Shared parts ---------------------------------------------------------------------------------------------------------


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


def _picture(plot: Callable[P, Path]) -> Callable[P, Path | None]:
    @wraps(plot)
    def drawn(*args: P.args, **settings: P.kwargs) -> Path | None:
        path: Path | None = None
        with drawing(inspect.signature(plot).bind(*args, **settings).arguments["path"]):
            path = plot(*args, **settings)
        return path

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG, atomically, into a folder that is made if need be."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Class names are folder names, in any script; a missing glyph is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return write_atomic(Path(path), stream.getvalue())


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and a quiet grid."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: Axes, entries: Sequence[tuple[str, str, str]], **settings: Any) -> None:
    """Legend of (name, colour, marker)."""
    handles = [Line2D([], [], linestyle="", marker=marker, color=colour) for _, colour, marker in entries]
    numbers = [str(i) for i in range(len(entries))]
    legend = axes.legend(handles, numbers, frameon=False, fontsize=8, **settings)
    # Names are set afterwards: Matplotlib leaves out labels that begin with "_", and reads "$" as mathematics.
    for text, (name, _, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name if len(name) <= 24 else name[:23] + "…")


def sizes(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Names, with the number of images, and colours for a legend."""
    return [(f"{name} ({members.sum():,})", colour) for name, colour, members in groups]


def _scatter(axes: Axes, points: NDArray[Any], colours: NDArray[Any], markers: NDArray[Any]) -> None:
    size = float(np.clip(6000 / len(points), 5, 30))
    for marker in np.unique(markers):
        x, y = points[markers == marker].T
        colour = list(colours[markers == marker])
        axes.scatter(x, y, s=size, c=colour, marker=str(marker), alpha=0.6, linewidths=0)


def _some(members: NDArray[np.bool_]) -> NDArray[np.int64]:
    """At most `MOST_POINTS` of the members, always the same ones, in an order that hides no class behind another."""
    return np.random.default_rng(0).permutation(np.flatnonzero(members))[:MOST_POINTS]


def _range(*groups: NDArray[Any]) -> tuple[float, float, bool]:
    """Limits of an axis, and whether they leave out tails: a few extreme scores must not squeeze all others.

    Groups count alike, whatever their sizes, except those of fewer than twenty beside larger ones.
    """
    low, high = float(min(map(np.min, groups))), float(max(map(np.max, groups)))
    large = [values for values in groups if len(values) >= 20] or groups
    typical = np.concatenate([np.quantile(values, np.linspace(0, 1, 501)) for values in large])
    inner_low, inner_high = np.quantile(typical, [0.05, 0.95])
    margin = inner_high - inner_low
    clipped_low, clipped_high = max(low, inner_low - margin), min(high, inner_high + margin)
    if clipped_high > clipped_low and high - low > 2 * (clipped_high - clipped_low):
        return float(clipped_low), float(clipped_high), True
    margin = max(0.5, 1e-3 * abs(low)) if high == low else 0.0
    return low - margin, high + margin, False


def split_by_label(is_anomaly: Array | None, finite: NDArray[np.bool_]) -> list[Group]:
    """The finite images by what is told apart: normal ones, anomalies, and unlabelled ones (-1); or all of them.

    Raises ``ValueError`` if the labels are not one for each image, or no image is finite.
    """
    if not finite.any():
        raise ValueError("nothing to draw is finite")
    if is_anomaly is None:
        return [("images", BLUE, finite)]
    kind = as_numpy(is_anomaly).astype(np.int64)
    if kind.shape != finite.shape:
        raise ValueError(f"is_anomaly has shape {kind.shape}, the scores {finite.shape}")
    named = (("normal", BLUE, 0), ("anomalies", VERMILION, 1), ("unlabelled", GREY, -1))
    groups = [(name, colour, finite & (kind == value)) for name, colour, value in named]
    return [group for group in groups if group[2].any()]


def draw_shares(axes: Axes, values: NDArray[Any], bins: NDArray[Any], colour: str) -> None:
    """Bars of the share of ``values`` in each of ``bins``; what lies outside goes into the outer ones."""
    counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
    axes.stairs(counts / len(values), bins, fill=True, color=colour, alpha=0.35)
    axes.stairs(counts / len(values), bins, color=colour, linewidth=1.5)


def draw_scores(axes: Axes, groups: Sequence[tuple[str, NDArray[Any]]], xlabel: str) -> None:
    """Histogram of finite scores of groups (colour, scores), each as shares of its own images."""
    low, high, clipped = _range(*(values for _, values in groups))
    count = sum(len(values) for _, values in groups)
    bins = np.linspace(low, high, int(np.clip(np.sqrt(count), 8, 50)) + 1)
    for colour, values in groups:
        draw_shares(axes, values, bins, colour)
    style(axes, "", xlabel + (", tails in the outer bars" if clipped else ""), "share of images")


def draw_direction_radius(
    axes: Axes, direction: Array, radius: Array, is_anomaly: Array | None
) -> list[Group]:
    """Scatter of `plot_direction_radius`; which images it shows, as `split_by_label` has them."""
    parts = np.stack([as_numpy(part).astype(np.float64) for part in (direction, radius)], axis=1)
    finite = np.asarray(np.isfinite(parts).all(axis=1))
    groups = split_by_label(is_anomaly, finite)
    chosen = _some(finite)
    colours = np.full(len(finite), BLUE, dtype=object)
    for _, colour, members in groups:
        colours[members] = colour
    labels = []
    for part, name in zip(parts.T, ("direction", "radius"), strict=True):  # columns, changed in place
        low, high, clipped = _range(*(part[members] for _, _, members in groups))
        np.clip(part, low, high, out=part)
        labels.append(f"log-likelihood of the {name} (nats)" + (", tails at the edge" if clipped else ""))
    _scatter(axes, parts[chosen], colours[chosen], np.full(len(chosen), "o"))
    style(axes, "", *labels)
    return groups


# Pictures -------------------------------------------------------------------------------------------------------------


@_picture
def plot_training(history: Mapping[str, Sequence[Any]], path: str | Path) -> Path:
    """Training curves: loss, its parts, k-NN accuracy and health, one panel for each column that has a number.

    Takes the columns of ``metrics.csv``, all of one length; missing columns, NaN, ``None`` and empty text are left out.
    """
    columns = pd.DataFrame(history).apply(pd.to_numeric).astype(float)
    panels = [panel for panel in _PANELS if panel[0] in columns and columns[panel[0]].notna().any()]
    if not panels:
        raise ValueError("no column has a number")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(3.1 * across, 2.5 * down)
    epochs = columns.get("epoch", columns.index + 1.0)
    limits = min(epochs) - 0.02 * len(epochs), max(epochs) + 0.02 * len(epochs)
    for place, (name, title, unit, threshold) in enumerate(panels, start=1):
        axes = figure.add_subplot(down, across, place)
        shown = columns[name].notna()
        marker = "o" if shown.sum() < 30 else ""
        axes.plot(epochs[shown], columns[name][shown], color=BLUE, linewidth=1.6, marker=marker, markersize=3)
        style(axes, title, "epoch", unit)
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if threshold is not None:
            axes.axhline(threshold, color=VERMILION, linestyle="--", linewidth=1)
            note = axes.text(limits[1], threshold, "unhealthy below ", ha="right", va="bottom")
            note.set(color=VERMILION, fontsize=7)
            axes.set_ylim(bottom=0)
    return save(figure, path)


@_picture
def plot_embedding(
    embeddings: Array, labels: Array | None, classes: Sequence[str] | None, path: str | Path
) -> Path:
    """First two principal components of normalised embeddings ``(N, D)``, coloured by class.

    At most 5,000 of them. Labels ``(N,)`` are integers, negative ones unlabelled and grey; more than 20 classes are not
    told apart.
    """
    points = as_numpy(embeddings).astype(np.float64)
    finite = np.asarray(np.isfinite(points).all(axis=1))
    if not finite.any():
        raise ValueError("no embedding is finite")
    groups = np.full(len(points), -1) if labels is None else as_numpy(labels).astype(np.int64)
    chosen = _some(finite)
    points, groups = points[chosen], groups[chosen]
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    flat, shares = np.zeros((len(points), 2)), np.zeros(2)
    components = min(2, *points.shape)
    if points.var() > 0 and len(points) > 1:
        pca = PCA(components, svd_solver="full").fit(points)
        flat[:, :components], shares[:components] = pca.transform(points), pca.explained_variance_ratio_
    present = np.unique(groups[groups >= 0])
    told_apart = 0 < len(present) <= MOST_CLASSES
    colours = np.full(len(points), GREY if told_apart else BLUE, dtype=object)
    markers = np.full(len(points), "o")
    entries = []
    for position, label in enumerate(present if told_apart else []):
        colour, marker = PALETTE[position % len(PALETTE)], MARKERS[position // len(PALETTE)]
        colours[groups == label], markers[groups == label] = colour, marker
        named = classes is not None and label < len(classes)
        entries.append((printable(classes[label]) if named else f"class {label}", colour, marker))  # type: ignore[index]
    if told_apart and (groups < 0).any():
        entries.append(("unlabelled", GREY, "o"))
    figure = new_figure(6.4, 5.0)
    axes = figure.subplots()
    _scatter(axes, flat, colours, markers)
    if entries:
        _legend(axes, entries, loc="center left", bbox_to_anchor=(1.0, 0.5))
    many = f" of {len(present)} classes" if len(present) > MOST_CLASSES else ""
    first, second = (
        f"principal component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)
    )
    style(axes, f"Directions of {len(points):,} embeddings{many}", first, second)
    axes.set_aspect("equal", adjustable="datalim")
    return save(figure, path)


@_picture
def plot_score_histogram(scores: Array, is_anomaly: Array | None, path: str | Path) -> Path:
    """Histogram of scores ``(N,)``, normal images against anomalies ``(N,)`` where known, with the AUROC.

    Scores that are not finite are left out, and unlabelled images (-1) of the AUROC.
    """
    values = as_numpy(scores).astype(np.float64)
    finite = np.isfinite(values)
    groups = split_by_label(is_anomaly, finite)
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    xlabel = "anomaly score (higher is stranger)"
    draw_scores(axes, [(colour, values[members]) for _, colour, members in groups], xlabel)
    if is_anomaly is not None:
        _legend(axes, [(*entry, "s") for entry in sizes(groups)])
    title = f"Anomaly scores of {finite.sum():,} images"
    members = {name: group for name, _, group in groups}
    if {"normal", "anomalies"} <= members.keys():
        known = members["normal"] | members["anomalies"]
        title = f"Anomaly scores: AUROC {auroc(values[known], members['anomalies'][known]):.3f}"
    axes.set_title(title, fontsize=11, loc="left")
    return save(figure, path)


@_picture
def plot_direction_radius(
    direction: Array, radius: Array, is_anomaly: Array | None, path: str | Path
) -> Path:
    """Scatter of the two parts of the log-likelihood, direction ``(N,)`` against radius ``(N,)``, in nats.

    At most 5,000 images; those with a part that is not finite are left out.
    """
    figure = new_figure(6.0, 4.6)
    axes = figure.subplots()
    groups = draw_direction_radius(axes, direction, radius, is_anomaly)
    if is_anomaly is not None:
        _legend(axes, [(*entry, "o") for entry in sizes(groups)])
    axes.set_title("Where the likelihood comes from", fontsize=11, loc="left")
    return save(figure, path)


@_picture
def plot_strangest(images: Array, scores: Array, path: str | Path, k: int = 12) -> Path:
    """Grid of the ``k`` most normal and the ``k`` strangest images with their scores ``(N,)``.

    Images are ``(N, 3, H, W)``, uint8 or float in [0, 1]; one channel is shown as grey. Images whose score is not
    finite are left out; with fewer than 2k images each half shows half of them.
    """
    pixels = as_numpy(images)
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1)
    pixels = np.moveaxis(np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:])), 1, -1)
    values = as_numpy(scores).astype(np.float64)
    order = np.flatnonzero(np.isfinite(values))
    order = order[np.argsort(values[order], kind="stable")]
    if not len(order):
        raise ValueError("no score is finite")
    low, high = order[: min(k, (len(order) + 1) // 2)], order[::-1][: min(k, len(order) // 2)]
    halves = [half for half in (("Most normal", BLUE, low), ("Strangest", VERMILION, high)) if len(half[2])]
    across = min(6, len(low))
    down = -(-len(low) // across)
    figure = new_figure(max(2.4, 1.15 * across), len(halves) * (1.3 * down + 0.35))
    parts: NDArray[Any] = figure.subfigures(len(halves), 1, squeeze=False)
    part: SubFigure
    for part, (title, colour, chosen) in zip(parts[:, 0], halves, strict=True):
        part.suptitle(title, fontsize=11, color=colour, fontweight="bold")
        for place, i in enumerate(chosen, start=1):
            axes = part.add_subplot(down, across, place)
            # Small images keep their pixels; large ones are filtered as they shrink.
            smoothing = "nearest" if max(pixels[i].shape) <= 96 else "antialiased"
            axes.imshow(pixels[i], interpolation=smoothing)
            axes.set_title(f"{values[i]:.4g}", fontsize=8, pad=2)
            axes.set_axis_off()
    return save(figure, path)


@_picture
def plot_rejection(curves: Mapping[str, tuple[Array, Array]], path: str | Path, *, ylabel: str) -> Path:
    """Accuracy of the images kept against the rejected share, up to 90 %, a line for each named pair of the two.

    Takes vectors ``(N,)`` of `metrics.rejection_curve`; the dotted lines are the accuracy without rejecting, where a
    curve stays whose uncertainty knows nothing.
    """
    figure = new_figure(6.0, 3.8)
    axes = figure.subplots()
    for (rejected, accuracy), colour in zip(curves.values(), PALETTE, strict=False):
        share, kept = as_numpy(rejected), as_numpy(accuracy)
        shown = share <= 0.9  # beyond it the accuracy of few images jumps
        axes.plot(100 * share[shown], kept[shown], color=colour, linewidth=1.6)
        axes.axhline(kept[0], color=colour, linestyle=":", linewidth=1)
    _legend(axes, [(name, colour, "s") for name, colour in zip(curves, PALETTE, strict=False)])
    style(axes, "Rejecting the most uncertain images", "share rejected (%)", ylabel)
    return save(figure, path)
