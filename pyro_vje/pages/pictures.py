"""Pictures of runs and scores: each function writes one PNG and returns its path.

Matplotlib through its object interface, without pyplot: no window, no global state, safe in threads. Tensors on any
device and NumPy arrays are accepted alike.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from pyro_vje.metrics import MIN_POSTERIOR_SNR, MIN_SPREAD, Array, as_numpy, auroc
from pyro_vje.runs.files import write_atomic

# Okabe & Ito's palette, told apart with any colour vision; classes beyond its seven take another marker as well.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#9A9A9A"
PALETTE = (BLUE, "#E69F00", "#009E73", VERMILION, "#CC79A7", "#56B4E9", "#4D4D4D")
MARKERS = ("o", "^", "s")
MOST_CLASSES = 20
MOST_POINTS = 5000

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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG, atomically."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # Class names are folder names, in any script; a missing glyph is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png")
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
    # Names are set afterwards: Matplotlib leaves out labels that begin with "_", and reads "$" as mathematics.
    legend = axes.legend(
        handles, [str(i) for i in range(len(entries))], frameon=False, fontsize=8, **settings
    )
    for text, (name, _, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _scatter(axes: Axes, points: NDArray[Any], colours: NDArray[Any], markers: NDArray[Any]) -> None:
    size = float(np.clip(6000 / len(points), 5, 30))
    for marker in np.unique(markers):
        x, y = points[markers == marker].T
        colour = list(colours[markers == marker])
        axes.scatter(x, y, s=size, c=colour, marker=str(marker), alpha=0.6, linewidths=0)


def _some(count: int, most: int, seed: int = 0) -> NDArray[np.int64]:
    """At most ``most`` of ``count`` indices, always the same ones, in an order that hides no class behind another."""
    return np.random.default_rng(seed).permutation(count)[:most]


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
    if high == low:
        margin = max(0.5, 1e-3 * abs(low))
        return low - margin, high + margin, False
    return low, high, False


def _vectors(*columns: Array, names: str) -> list[NDArray[np.float64]]:
    vectors = [as_numpy(column).astype(np.float64) for column in columns]
    if any(vector.ndim != 1 or len(vector) != len(vectors[0]) for vector in vectors):
        raise ValueError(f"{names} must be vectors of one length, got {[vector.shape for vector in vectors]}")
    return vectors


def split_by_label(
    is_anomaly: Array | None, finite: NDArray[np.bool_]
) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Name, colour and members of what is told apart: normal images and anomalies, or all images.

    Raises ``ValueError`` if the labels are not one for each image.
    """
    if is_anomaly is None:
        return [("images", BLUE, finite)]
    anomalous = as_numpy(is_anomaly).astype(bool)
    if anomalous.shape != finite.shape:
        raise ValueError(f"is_anomaly has shape {anomalous.shape}, the scores {finite.shape}")
    groups = [("normal", BLUE, finite & ~anomalous), ("anomalies", VERMILION, finite & anomalous)]
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
) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Scatter of `plot_direction_radius`; which images it shows, as `split_by_label` has them.

    Raises ``ValueError`` if there is no finite point.
    """
    horizontal, vertical = _vectors(direction, radius, names="direction and radius")
    finite = np.isfinite(horizontal) & np.isfinite(vertical)
    if not finite.any():
        raise ValueError("no image has a finite direction and radius")
    groups = split_by_label(is_anomaly, finite)
    chosen = np.flatnonzero(finite)[_some(int(finite.sum()), MOST_POINTS)]
    colours = np.full(len(finite), BLUE, dtype=object)
    for _, colour, members in groups:
        colours[members] = colour
    labels, shown = [], []
    for part, values in (("direction", horizontal), ("radius", vertical)):
        low, high, clipped = _range(*(values[members] for _, _, members in groups))
        shown.append(np.clip(values[chosen], low, high))
        labels.append(f"log-likelihood of the {part} (nats)" + (", tails at the edge" if clipped else ""))
    _scatter(axes, np.stack(shown, axis=1), colours[chosen], np.full(len(chosen), "o"))
    style(axes, "", *labels)
    return groups


# Pictures -------------------------------------------------------------------------------------------------------------


def plot_training(history: Mapping[str, Sequence[Any]], path: str | Path) -> Path:
    """Training curves: loss, its parts, k-NN accuracy and health, one panel for each column that has a number.

    Parameters
    ----------
    history : mapping of str to sequence
        Columns of ``metrics.csv``; missing columns, NaN, ``None`` and empty text are left out.
    path : path
        The PNG to write.

    Raises
    ------
    ValueError
        If no column has a number, or columns differ in length.
    """
    columns = {
        name: np.array([float("nan") if value in (None, "") else float(value) for value in values])
        for name, values in history.items()
    }
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError(
            f"columns differ in length: { {name: len(values) for name, values in columns.items()} }"
        )
    panels = [panel for panel in _PANELS if np.isfinite(columns.get(panel[0], np.array([]))).any()]
    if not panels:
        raise ValueError(f"no column with a number among {', '.join(name for name, *_ in _PANELS)}")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(3.1 * across, 2.5 * down)
    length = len(next(iter(columns.values())))
    epochs = columns.get("epoch", np.arange(1.0, length + 1))
    limits = epochs[0] - 0.02 * length, epochs[-1] + 0.02 * length
    all_axes = figure.subplots(down, across, squeeze=False).flat
    for axes, (name, title, unit, threshold) in zip(all_axes, panels, strict=False):
        shown = np.isfinite(columns[name])
        marker = "o" if shown.sum() < 30 else ""
        axes.plot(epochs[shown], columns[name][shown], color=BLUE, linewidth=1.6, marker=marker, markersize=3)
        style(axes, title, "epoch", unit)
        axes.set_xlim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if threshold is not None:
            axes.axhline(threshold, color=VERMILION, linestyle="--", linewidth=1)
            axes.text(
                limits[1], threshold, "unhealthy below ", color=VERMILION, fontsize=7, ha="right", va="bottom"
            )
            axes.set_ylim(bottom=0)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    return save(figure, path)


def plot_embedding(
    embeddings: Array, labels: Array | None, classes: Sequence[str] | None, path: str | Path, *, seed: int = 0
) -> Path:
    """First two principal components of normalised embeddings, coloured by class.

    Parameters
    ----------
    embeddings : (N, D)
        At most 5,000 of them are shown, chosen by ``seed``.
    labels : (N,), optional
        Integer classes; negative ones are unlabelled and grey. More than 20 classes are not told apart.
    classes : sequence of str, optional
        Class names.
    path : path
        The PNG to write.

    Raises
    ------
    ValueError
        If shapes disagree or no embedding is finite.
    """
    points = as_numpy(embeddings).astype(np.float64)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(f"embeddings must be a matrix (N, D), got shape {points.shape}")
    groups = np.full(len(points), -1) if labels is None else as_numpy(labels).astype(np.int64)
    if groups.shape != (len(points),):
        raise ValueError(f"labels have shape {groups.shape}, embeddings {points.shape}")
    finite = np.flatnonzero(np.isfinite(points).all(axis=1))
    if not len(finite):
        raise ValueError("no embedding is finite")
    finite = finite[_some(len(finite), MOST_POINTS, seed)]
    points, groups = points[finite], groups[finite]
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
        name = str(classes[label]) if classes is not None and label < len(classes) else f"class {label}"
        entries.append((name if len(name) <= 24 else name[:23] + "…", colour, marker))
    if told_apart and (groups < 0).any():
        entries.append(("unlabelled", GREY, "o"))
    figure = new_figure(6.4, 5.0)
    axes = figure.subplots()
    _scatter(axes, flat, colours, markers)
    if entries:
        _legend(axes, entries, loc="center left", bbox_to_anchor=(1.0, 0.5))
    title = f"Directions of {len(points):,} embeddings"
    if len(present) > MOST_CLASSES:
        title += f" of {len(present)} classes"
    style(
        axes,
        title,
        *(f"principal component {i + 1} ({share:.0%} of variance)" for i, share in enumerate(shares)),
    )
    axes.set_aspect("equal", adjustable="datalim")
    return save(figure, path)


def plot_score_histogram(
    scores: Array,
    is_anomaly: Array | None,
    path: str | Path,
    *,
    xlabel: str = "anomaly score (higher is stranger)",
) -> Path:
    """Histogram of scores ``(N,)``, normal images against anomalies ``(N,)`` where known, with the AUROC.

    Scores that are not finite are left out. Raises ``ValueError`` if none is left or shapes differ.
    """
    (values,) = _vectors(scores, names="scores")
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no score is finite")
    groups = split_by_label(is_anomaly, finite)
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    draw_scores(axes, [(colour, values[members]) for _, colour, members in groups], xlabel)
    if is_anomaly is not None:
        _legend(axes, [(f"{name} ({members.sum():,})", colour, "s") for name, colour, members in groups])
    title = f"Anomaly scores of {finite.sum():,} images"
    if len(groups) == 2:
        title = f"Anomaly scores: AUROC {auroc(values[finite], as_numpy(is_anomaly)[finite]):.3f}"  # type: ignore[arg-type]
    axes.set_title(title, fontsize=11, loc="left")
    return save(figure, path)


def plot_direction_radius(
    direction: Array, radius: Array, is_anomaly: Array | None, path: str | Path
) -> Path:
    """Scatter of the two parts of the log-likelihood, direction ``(N,)`` against radius ``(N,)``, in nats.

    At most 5,000 images; those with a part that is not finite are left out. Raises as `plot_score_histogram`.
    """
    figure = new_figure(6.0, 4.6)
    axes = figure.subplots()
    groups = draw_direction_radius(axes, direction, radius, is_anomaly)
    if is_anomaly is not None:
        _legend(axes, [(f"{name} ({members.sum():,})", colour, "o") for name, colour, members in groups])
    axes.set_title("Where the likelihood comes from", fontsize=11, loc="left")
    return save(figure, path)


def _pixels(images: Array, dimensions: int) -> NDArray[Any]:
    """Images ``(..., C, H, W)``, uint8 or float in [0, 1], as ``(..., H, W, 3)`` for Matplotlib."""
    pixels = as_numpy(images)
    if pixels.ndim != dimensions or pixels.shape[-3] not in (1, 3) or pixels.size == 0:
        raise ValueError(
            f"images must be a non-empty array of {dimensions} dimensions (..., 3, H, W), got {pixels.shape}"
        )
    if pixels.dtype != np.uint8:
        pixels = np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1)
    return np.moveaxis(np.broadcast_to(pixels, (*pixels.shape[:-3], 3, *pixels.shape[-2:])), -3, -1)


def _show(axes: Axes, pixels: NDArray[Any], title: str = "") -> None:
    # Small images keep their pixels; large ones are filtered as they shrink.
    axes.imshow(pixels, interpolation="nearest" if max(pixels.shape) <= 96 else "antialiased")
    axes.set_title(title, fontsize=8, pad=2)
    axes.set_axis_off()


def plot_strangest(images: Array, scores: Array, path: str | Path, k: int = 12) -> Path:
    """Grid of the ``k`` most normal and the ``k`` strangest images with their scores.

    Parameters
    ----------
    images : (N, 3, H, W)
        uint8, or float in [0, 1]; one channel is shown as grey.
    scores : (N,)
        Higher for stranger images; images whose score is not finite are left out. With fewer than 2k images each half
        shows half of them.
    path : path
        The PNG to write.
    k : int
        Images in each half.

    Raises
    ------
    ValueError
        If there is no image, ``k`` is not positive, or shapes disagree.
    """
    pixels = _pixels(images, 4)
    (values,) = _vectors(scores, names="scores")
    if len(values) != len(pixels):
        raise ValueError(f"{len(pixels)} images but {len(values)} scores")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
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
        for axes, i in zip(part.subplots(down, across, squeeze=False).flat, chosen, strict=False):
            _show(axes, pixels[i], f"{values[i]:.4g}")
        for axes in part.axes[len(chosen) :]:
            axes.remove()
    return save(figure, path)


def plot_views(
    views: Array, path: str | Path, *, rows: Sequence[str] = ("image", "view 1", "view 2")
) -> Path:
    """Grid of images and their augmented views: a column for each image, a named row for each view.

    Takes ``views`` ``(V, N, 3, H, W)``, uint8 or float in [0, 1], V being the number of ``rows``; raises
    ``ValueError`` if it is not that.
    """
    pixels = _pixels(views, 5)
    if len(pixels) != len(rows):
        raise ValueError(f"views have {len(pixels)} rows, but {len(rows)} names: {', '.join(rows)}")
    down, across = pixels.shape[:2]
    figure = new_figure(max(2.4, 1.1 * across), 1.1 * down)
    for row, line, name in zip(figure.subplots(down, across, squeeze=False), pixels, rows, strict=True):
        for axes, image in zip(row, line, strict=True):
            _show(axes, image)
        row[0].text(
            -0.08, 0.5, name, transform=row[0].transAxes, rotation=90, va="center", ha="right", fontsize=9
        )
    return save(figure, path)


def plot_rejection(
    curves: Mapping[str, tuple[Array, Array]], path: str | Path, *, ylabel: str = "accuracy of those kept"
) -> Path:
    """Accuracy of the images kept against the rejected share, up to 90 %, a line for each named pair of the two.

    Takes vectors ``(N,)`` of `metrics.rejection_curve`; the dotted lines are the accuracy without rejecting, where a
    curve stays whose uncertainty knows nothing. Raises ``ValueError`` if there is no curve or lengths differ.
    """
    if not curves:
        raise ValueError("no rejection curve to draw")
    figure = new_figure(6.0, 3.8)
    axes = figure.subplots()
    entries = []
    for (name, pair), colour in zip(curves.items(), PALETTE, strict=False):
        rejected, accuracy = _vectors(*pair, names="rejected share and accuracy")
        shown = rejected <= 0.9  # beyond it the accuracy of few images jumps
        axes.plot(100 * rejected[shown], accuracy[shown], color=colour, linewidth=1.6)
        axes.axhline(accuracy[0], color=colour, linestyle=":", linewidth=1)
        entries.append((name, colour, "s"))
    _legend(axes, entries)
    style(axes, "Rejecting the most uncertain images", "share rejected (%)", ylabel)
    return save(figure, path)
