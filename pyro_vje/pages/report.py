"""One self-contained HTML page about scored images, to send to someone who has never seen this package.

It loads nothing from anywhere; what comes from file names is escaped by the template, ``report.html``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata
from sklearn.metrics import roc_curve

from pyro_vje.pages import pictures
from pyro_vje.pages.pictures import BLUE, GREY, VERMILION, drawing, printable, split_by_label

THUMBNAIL = 192  # longest side of an image on the page, in pixels
MOST_FLAGGED = 200  # flagged images that are shown; the others are counted
SHOWN = 12  # strangest images shown where fewer are flagged, and most normal ones
LEAST_CALIBRATION = 20  # held-out images below which p-values are too few different ones for a chart

INK = "#000000"
# Colours of the charts, as the page's style sheet has them for a light and for a dark screen.
_COLOURS = {INK: "currentColor", BLUE: "var(--blue)", VERMILION: "var(--vermilion)", GREY: "var(--grey)"}

Floats: TypeAlias = NDArray[np.float64]
Kinds: TypeAlias = NDArray[np.int64] | None  # 0 normal, 1 anomaly, -1 unlabelled
Summary: TypeAlias = Mapping[str, Any]
Thumbnails: TypeAlias = Callable[[Sequence[int]], Sequence[Image.Image]]


def render_report(
    table: pd.DataFrame,
    summary: Summary,
    held_out: Floats | None,
    thumbnails: Thumbnails,
    folder: Path,
    overlays: Thumbnails | None = None,
) -> str:
    """The page, as text that encodes as UTF-8: bytes of file names that are no text show as escapes.

    ``table`` has a row an image: ``path``, ``anomaly_score``, ``p_value``, ``decision`` ("anomaly" or not),
    ``log_direction``, ``log_radius``, ``error`` (why it could not be read), and where it is known ``is_anomaly``.
    ``summary`` is that of `score`. ``held_out`` are the scores ``(n,)`` of the normal images behind the p-values.
    ``thumbnails`` gives the images at rows of the table, once, for the few that are shown; ``folder`` is where the page
    will lie, for links to the images' files. ``overlays`` gives what is laid over the thumbnails to show where.
    """
    read = table[table["error"].isna()]
    scores, flagged = read["anomaly_score"].to_numpy(np.float64), read["decision"].eq("anomaly").to_numpy()
    unknown = read[np.isnan(scores)].assign(error="its score is not a number")
    labels = None
    if "is_anomaly" in read and read["is_anomaly"].notna().any():
        labels = np.array([-1 if pd.isna(value) else int(value) for value in read["is_anomaly"]])
    held_out = np.asarray([] if held_out is None else held_out, dtype=np.float64)
    settings: dict[str, Any] = {"autoescape": True, "lstrip_blocks": True, "trim_blocks": True}
    settings |= {"loader": PackageLoader("pyro_vje.pages", ""), "undefined": StrictUndefined}
    environment = Environment(**settings)
    environment.filters.update(number=_number, counted=_counted, sha256=_sha256)
    page = environment.get_template("report.html").render(
        summary=summary,
        read=len(read),
        unread=pd.concat([table.drop(read.index), unknown])[["path", "error"]].values.tolist(),
        not_scored=len(unknown),
        equal=np.isfinite(scores).any() and len(np.unique(scores[~np.isnan(scores)])) == 1 < len(scores),
        flagged=int(flagged.sum()),
        labelled=None if labels is None else [int((labels == kind).sum()) for kind in (0, 1)],
        found=None if labels is None else int((labels[flagged] == 1).sum()),
        calibration=len(held_out) if read["p_value"].notna().any() else 0,
        cards=_cards(read, scores, labels, thumbnails, folder, overlays),
        maps=summary.get("maps"),
        charts=_charts(read, scores, labels, held_out),
    )
    return printable(page)


def _cards(
    read: pd.DataFrame,
    scores: Floats,
    labels: Kinds,
    thumbnails: Thumbnails,
    folder: Path,
    overlays: Thumbnails | None,
) -> dict[str, list[dict[str, Any]]]:
    """All flagged images, or at least the strangest, and the most normal ones; none twice, none without a score."""
    flagged, p_values = read["decision"].eq("anomaly").to_numpy(), read["p_value"].to_numpy(np.float64)
    # Flagged ones first: with folds, p-values do not follow the scores exactly.
    order = np.lexsort((-scores, ~flagged))[: np.count_nonzero(~np.isnan(scores))]
    strange = min(max(int(flagged.sum()), min(SHOWN, (len(order) + 1) // 2)), MOST_FLAGGED)
    shown = [*order[:strange], *order[strange:][-SHOWN:][::-1]]
    images = thumbnails(read.index[shown].tolist()) if shown else []
    over = overlays(read.index[shown].tolist()) if overlays and shown else [None] * len(shown)
    kinds = ("normal", "anomaly", "unlabelled")
    cards = [
        {
            "src": _data_uri(image),
            "map": mark and _data_uri(mark),
            "map_p": read["map_p_value"].iloc[i] if mark else np.nan,
            "pixelated": max(image.size) <= THUMBNAIL // 2,
            "href": _link(read["path"].iloc[i], folder),
            "path": PurePath(read["path"].iloc[i]),
            "score": scores[i],
            "p": p_values[i],
            "label": None if labels is None else kinds[labels[i]],
            "flagged": flagged[i],
        }
        for i, image, mark in zip(shown, images, over, strict=True)
    ]
    return {"strange": cards[:strange], "normal": cards[strange:]}


def _link(path: str, folder: Path) -> str | None:
    """Address of an image's file: relative to the page where it can be, ``None`` where there is no such file."""
    if not os.path.isfile(path):
        return None
    try:
        return quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
    except ValueError:  # on another drive
        return Path(path).absolute().as_uri()


def _data_uri(image: Image.Image) -> str:
    """An image as an address; one that is partly transparent as a PNG of few colours."""
    clear = image.mode == "RGBA"
    small, stream = image.convert("RGBA" if clear else "RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.NEAREST if clear else Image.Resampling.BICUBIC)
    small = small.quantize(32, Image.Quantize.FASTOCTREE) if clear else small
    kind = "png" if clear or max(small.size) <= THUMBNAIL // 2 else "jpeg"
    small.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _charts(read: pd.DataFrame, scores: Floats, labels: Kinds, held_out: Floats) -> list[dict[str, Any]]:
    """Charts of what there are numbers for; the ROC curve where labels are known."""
    charts: list[dict[str, Any]] = []
    p_values = read["p_value"].to_numpy(np.float64)
    parts = read[["log_direction", "log_radius"]].to_numpy(np.float64)
    flagged = read["decision"].eq("anomaly")
    threshold = scores[flagged].min(initial=np.inf)
    if (scores[~flagged] >= threshold).any():  # with folds no score is a limit
        threshold = np.inf
    steps = len(held_out) + 1

    def draw_scores(axes: Axes) -> None:
        pictures.draw_scores(axes, shown, "anomaly score")
        if axes.get_xlim()[0] <= threshold <= axes.get_xlim()[1]:
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)

    def draw_p_values(axes: Axes) -> None:
        # P-values are multiples of 1 / steps: half a step to the left, none lies on the edge of two bars.
        bins = np.linspace(0, 1, 21)
        for _, colour, members in groups:
            pictures.draw_shares(axes, p_values[members] - 0.5 / steps, bins, colour)
        expected = np.histogram((np.arange(steps) + 0.5) / steps, bins)[0] / steps
        axes.stairs(expected, bins, color=INK, linestyle="--", linewidth=1)
        pictures.style(axes, "", "p-value", "share of images")

    def draw_parts(axes: Axes) -> None:
        pictures.draw_direction_radius(axes, parts[:, 0], parts[:, 1], labels)

    def draw_roc(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
        axes.plot(*roc_curve(*known)[:2], color=VERMILION)
        pictures.style(axes, "", "share of normal images flagged", "share of anomalies found")

    if np.isfinite(scores).any():
        groups = split_by_label(labels, np.isfinite(scores))
        shown = [(colour, scores[members]) for _, colour, members in groups]
        legend = pictures.sizes(groups)
        if len(held := held_out[np.isfinite(held_out)]):
            shown.insert(0, (INK, held))
            legend.insert(0, (f"held-out normal images ({len(held):,})", INK))
        caption = "Higher is stranger. Bars are shares of each group."
        if np.isfinite(threshold):
            caption += f" Flagged from {_number(threshold)} on (dashed line)."
        charts += _chart("Scores", caption, legend, draw_scores)
    if steps > LEAST_CALIBRATION and np.isfinite(p_values).any():
        groups = split_by_label(labels, np.isfinite(p_values))
        caption = "Normal images follow the dashed line; a peak at the left is what anomalies look like."
        charts += _chart("P-values", caption, pictures.sizes(groups), draw_p_values)
    if (finite := np.isfinite(parts).all(axis=1)).any():
        caption = "The two parts of the log-likelihood; low is strange. At most 5,000 images are drawn."
        legend = pictures.sizes(split_by_label(labels, finite))
        charts += _chart("Direction and radius", caption, legend, draw_parts)
    if labels is not None and {0, 1} <= set(labels[told := (labels >= 0) & ~np.isnan(scores)]):
        known = labels[told], rankdata(scores[told])  # scores may be infinite, ranks are not
        caption = "Each point is a threshold. Dashed: a score that knows nothing."
        charts += _chart("ROC curve", caption, [("anomalies positive", VERMILION)], draw_roc)
    return charts


def _chart(
    title: str, caption: str, legend: Sequence[tuple[str, str]], draw: Callable[[Axes], object]
) -> list[dict[str, Any]]:
    """A chart as SVG inside the page, its text being text and its colours the page's; none if it cannot be drawn."""
    with drawing(f"the report's chart {title!r}"):
        figure = pictures.new_figure(4.4, 2.9)
        axes = figure.subplots()
        draw(axes)
        axes.locator_params(nbins=6)
        axes.tick_params(labelsize=9)
        for points in axes.collections:  # a cloud of thousands of points as pixels
            points.set_rasterized(True)
        stream, name = io.StringIO(), re.sub(r"\W+", "-", title.lower())
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(stream, format="svg", dpi=200, transparent=True, metadata=metadata)
        text = "<svg" + stream.getvalue().split("<svg", 1)[1]  # without the XML prologue
        text = re.sub(r' xmlns(:\w+)?="[^"]*"|<style.*?</style>| font-family: [^;"]*;?', "", text)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)  # ids are unique on the page
        for colour, variable in _COLOURS.items():
            text = text.replace(colour.lower(), variable)
        named = [(label, _COLOURS[colour]) for label, colour in legend]
        return [{"title": title, "caption": caption, "legend": named, "svg": Markup(text)}]
    return []


def _number(value: float, digits: int = 4) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}g}".replace("inf", "∞").replace("-", "−")


def _counted(count: int, word: str, plural: str = "") -> str:
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
