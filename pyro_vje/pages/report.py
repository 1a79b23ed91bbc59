"""One self-contained HTML page about scored images, to send to someone who has never seen this package.

NumPy and text in, text out: it knows no model and no run. The page loads nothing and runs no script; what comes from
file names is escaped by the template, ``report.html``.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from pyro_vje.pages.pictures import (
    BLUE,
    GREY,
    MOST_POINTS,
    VERMILION,
    draw_direction_radius,
    draw_scores,
    draw_shares,
    new_figure,
    split_by_label,
    style,
)

THUMBNAIL = 192
"""Longest side of an image on the page, in pixels."""
MOST_ROWS = 100
"""Unreadable images that are listed; the others are counted."""

INK = "#000000"
# Colours of the charts, as the page's style sheet has them for a light and for a dark screen.
_COLOURS = {
    INK: "currentColor",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    GREY: "var(--grey)",
}


@dataclass(frozen=True, eq=False)
class ReportData:
    """What the page tells; arrays are ``(N,)``, one entry for each scored image.

    Attributes
    ----------
    title : str
        Heading of the page.
    score_name, score_meaning : str
        The score, and what it measures in one line.
    made : mapping of str to object
        Rows of "How it was made": run, likelihood, data, date, versions, seed, passes an image, particles.
    paths : sequence of str
        The images' names.
    scores : float array
        Higher for stranger images.
    thumbnails : callable
        Gives the images at the indices it is called with, once, for the few that are shown.
    p_values : float array, optional
        Conformal p-values.
    calibration_scores : (n,) float array, optional
        Scores of the held-out normal images behind them.
    is_anomaly : bool array, optional
        Labels, where known.
    log_direction, log_radius : float arrays, optional
        Parts of the log-likelihood; NaN where the family has none.
    alpha, decisions, decided_by : float, bool array, str, optional
        The level, which images are flagged at it, and how that was decided in a few words.
    failed : sequence of (path, reason)
        Images that could not be read.
    metrics : mapping of str to float or (value, low, high), optional
        Agreement with the labels; each name says which class is the positive one.
    k : int
        Images in each of the two grids.

    Raises
    ------
    ValueError
        If an array is not as long as ``paths``, or ``alpha`` and ``decisions`` do not come together.
    """

    title: str
    score_name: str
    score_meaning: str
    made: Mapping[str, object]
    paths: Sequence[str]
    scores: NDArray[Any]
    thumbnails: Callable[[Sequence[int]], Sequence[Image.Image]]
    p_values: NDArray[Any] | None = None
    calibration_scores: NDArray[Any] | None = None
    is_anomaly: NDArray[Any] | None = None
    log_direction: NDArray[Any] | None = None
    log_radius: NDArray[Any] | None = None
    alpha: float | None = None
    decisions: NDArray[Any] | None = None
    decided_by: str = ""
    failed: Sequence[tuple[str, str]] = ()
    metrics: Mapping[str, float | tuple[float, float, float]] | None = None
    k: int = 12

    def __post_init__(self) -> None:
        for name in ("scores", "p_values", "is_anomaly", "log_direction", "log_radius", "decisions"):
            column = getattr(self, name)
            if column is not None and np.shape(column) != (len(self.paths),):
                raise ValueError(
                    f"{name} has shape {np.shape(column)}, but there are {len(self.paths)} paths"
                )
        if (self.alpha is None) != (self.decisions is None):
            raise ValueError("alpha and decisions come together")


class _Chart(NamedTuple):
    title: str
    caption: str
    legend: list[tuple[str, str]]
    """Names with their colours."""
    svg: Markup


def _chart(
    title: str, caption: str, legend: Sequence[tuple[str, str]], draw: Callable[[Axes], object]
) -> _Chart:
    """A chart as SVG inside the page: its text is text, and its colours are the page's."""
    figure = new_figure(4.4, 2.9)
    axes = figure.subplots()
    draw(axes)
    axes.locator_params(nbins=6)
    axes.tick_params(labelsize=9)
    for points in axes.collections:  # a cloud of thousands of points as pixels
        points.set_rasterized(True)
    stream = io.StringIO()
    name = re.sub(r"\W+", "-", title.lower())
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", dpi=200, transparent=True, metadata=metadata)
    text = stream.getvalue()
    text = text[text.index("<svg") :]  # without the XML prologue
    text = re.sub(r' xmlns(:\w+)?="[^"]*"|<style.*?</style>| font-family: [^;"]*;?', "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # ids are unique on the page
    for colour, variable in _COLOURS.items():
        text = text.replace(colour.lower(), variable)
    return _Chart(title, caption, [(label, _COLOURS[colour]) for label, colour in legend], Markup(text))


def _sizes(groups: Sequence[tuple[str, str, NDArray[np.bool_]]]) -> list[tuple[str, str]]:
    return [(f"{name} ({members.sum():,})", colour) for name, colour, members in groups]


def _score_chart(data: ReportData, scores: NDArray[np.float64]) -> _Chart:
    held_out = np.asarray(
        [] if data.calibration_scores is None else data.calibration_scores, dtype=np.float64
    )
    groups = [("held-out normal images", GREY, held_out[np.isfinite(held_out)])]
    for name, colour, members in split_by_label(data.is_anomaly, np.isfinite(scores)):
        groups.append(("scored images" if name == "images" else f"scored: {name}", colour, scores[members]))
    groups = [group for group in groups if len(group[2])]
    threshold = np.inf if data.decisions is None else np.min(scores, where=data.decisions, initial=np.inf)

    def draw(axes: Axes) -> None:
        draw_scores(axes, [(colour, values) for _, colour, values in groups], "anomaly score")
        if axes.get_xlim()[0] <= threshold <= axes.get_xlim()[1]:
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)

    caption = "Higher is stranger. Bars are shares of each group."
    if np.isfinite(threshold):
        caption += f" Flagged from {_number(threshold)} on (dashed line)."
    return _chart("Scores", caption, [(f"{name} ({len(v):,})", colour) for name, colour, v in groups], draw)


def _p_value_chart(data: ReportData, p_values: NDArray[np.float64]) -> _Chart:
    groups = split_by_label(data.is_anomaly, np.isfinite(p_values))
    # P-values are multiples of 1 / (n + 1); without n, as if there were very many.
    steps = 10_000 if data.calibration_scores is None else len(data.calibration_scores) + 1
    bins, shift = (
        np.linspace(0, 1, 21),
        0.5 / steps,
    )  # half a step to the left, none lies on the edge of two bars

    def draw(axes: Axes) -> None:
        for _, colour, members in groups:
            draw_shares(axes, p_values[members] - shift, bins, colour)
        expected, _ = np.histogram((np.arange(steps) + 0.5) / steps, bins)
        axes.stairs(expected / steps, bins, color=INK, linestyle="--", linewidth=1)
        style(axes, "", "p-value", "share of images")

    caption = "Normal images follow the dashed line; a peak at the left is what anomalies look like."
    return _chart("P-values", caption, _sizes(groups), draw)


def _part_chart(data: ReportData, direction: NDArray[Any], radius: NDArray[Any]) -> _Chart:
    return _chart(
        "Direction and radius",
        f"The two parts of the log-likelihood; low is strange. At most {MOST_POINTS:,} images are drawn.",
        _sizes(split_by_label(data.is_anomaly, np.isfinite(direction) & np.isfinite(radius))),
        lambda axes: draw_direction_radius(axes, direction, radius, data.is_anomaly),
    )


def _label_charts(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> list[_Chart]:
    """ROC and precision-recall curves, where both labels exist."""
    if len(np.unique(labels)) < 2:
        return []
    ranks = np.unique(scores, return_inverse=True)[1]  # scores may be infinite, ranks are not

    def roc(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
        axes.plot(*roc_curve(labels, ranks)[:2], color=VERMILION)
        style(axes, "", "share of normal images flagged", "share of anomalies found")

    def precision_recall(axes: Axes) -> None:
        for colour, positive, order in ((BLUE, ~labels, -ranks), (VERMILION, labels, ranks)):
            precision, recall, _ = precision_recall_curve(positive, order)
            axes.axhline(positive.mean(), color=colour, linestyle="--", linewidth=1)
            axes.plot(recall, precision, color=colour, drawstyle="steps-post")
        axes.set_ylim(0, 1.05)
        style(axes, "", "recall", "precision")

    positives = [("anomalies positive", VERMILION), ("normal images positive", BLUE)]
    dashed = "Each point is a threshold. Dashed: a score that knows nothing."
    return [
        _chart("ROC curve", dashed, positives[:1], roc),
        _chart("Precision and recall", dashed, positives, precision_recall),
    ]


def _number(value: float, digits: int = 4) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}g}".replace("inf", "∞").replace("-", "−")


def _counted(count: int, word: str, plural: str = "") -> str:
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(small.size) <= THUMBNAIL // 2 else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _grids(data: ReportData, scores: NDArray[np.float64]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The strangest and the most normal images, none of them twice; images without a score are in neither."""
    order = np.flatnonzero(~np.isnan(scores))
    order = order[np.argsort(scores[order], kind="stable")]
    strange = order[::-1][: min(data.k, (len(order) + 1) // 2)].tolist()
    normal = order[: min(data.k, len(order) // 2)].tolist()
    images = data.thumbnails([*strange, *normal]) if strange else []

    def card(index: int, image: Image.Image) -> dict[str, Any]:
        path = PurePath(data.paths[index])
        return {
            "src": _data_uri(image),
            "pixelated": max(image.size) <= THUMBNAIL // 2,
            "name": path.name or str(path),
            "folder": str(path.parent) if path.parent != PurePath() else "",
            "score": _number(scores[index]),
            "p": None if data.p_values is None else _number(data.p_values[index], 3),
            "label": None if data.is_anomaly is None else "anomaly" if data.is_anomaly[index] else "normal",
            "flagged": data.decisions is not None and bool(data.decisions[index]),
        }

    cards = [card(index, image) for index, image in zip([*strange, *normal], images, strict=True)]
    halves = [("Strangest images", cards[: len(strange)]), ("Most normal images", cards[len(strange) :])]
    return [half for half in halves if half[1]]


def render_report(data: ReportData) -> str:
    """The page, as text that encodes as UTF-8: bytes of file names that are no text show as escapes."""
    scores = np.asarray(data.scores, dtype=np.float64)
    known = ~np.isnan(scores)
    charts = [_score_chart(data, scores)] if np.isfinite(scores).any() else []
    if data.p_values is not None and np.isfinite(data.p_values).any():
        charts.append(_p_value_chart(data, np.asarray(data.p_values, dtype=np.float64)))
    direction, radius = data.log_direction, data.log_radius
    if direction is not None and radius is not None and (np.isfinite(direction) & np.isfinite(radius)).any():
        charts.append(_part_chart(data, direction, radius))
    unnumbered = [path for path, is_known in zip(data.paths, known, strict=True) if not is_known]
    unreadable = [*data.failed, *((path, "its score is not a number") for path in unnumbered)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters["number"] = _number
    environment.filters["counted"] = _counted
    template = environment.from_string(files("pyro_vje.pages").joinpath("report.html").read_text("utf-8"))
    labels = data.is_anomaly
    page = template.render(
        data=data,
        scored=len(scores),
        no_score=len(unnumbered),
        equal=known.sum() > 1 and len(np.unique(scores[known])) == 1,
        flagged=None if data.decisions is None else int(data.decisions.sum()),
        found=None if data.decisions is None or labels is None else int((data.decisions & labels).sum()),
        anomalies=None if labels is None else int(labels.sum()),
        calibration=0 if data.calibration_scores is None else len(data.calibration_scores),
        charts=charts,
        label_charts=[] if labels is None else _label_charts(scores[known], labels[known]),
        metrics=[(name, np.atleast_1d(value)) for name, value in (data.metrics or {}).items()],
        grids=_grids(data, scores),
        unreadable=unreadable[:MOST_ROWS],
        unlisted=len(unreadable) - MOST_ROWS,
    )
    return page.encode("utf-8", "backslashreplace").decode("utf-8")
