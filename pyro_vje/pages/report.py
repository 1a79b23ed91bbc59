"""One self-contained HTML page about scored images, to send to someone who has never seen this package.

A table and a summary in, text out: it knows no model and no run. The page loads nothing from anywhere; its one script
sorts the images; what comes from file names is escaped by the template, ``report.html``.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_curve

from pyro_vje.pages.pictures import (
    BLUE,
    GREY,
    MOST_POINTS,
    VERMILION,
    Group,
    draw_direction_radius,
    draw_scores,
    draw_shares,
    drawing,
    new_figure,
    printable,
    sizes,
    split_by_label,
    style,
)

THUMBNAIL = 192
"""Longest side of an image on the page, in pixels."""
MOST_FLAGGED = 200
"""Flagged images that are shown; the others are counted."""
MOST_ROWS = 100
"""Unreadable images that are listed; the others are counted."""
SHOWN = 12
"""Strangest images shown where fewer are flagged, and most normal ones."""
LEAST_CALIBRATION = 20
"""Held-out images below which p-values are too few different ones for a chart."""

INK = "#000000"
# Colours of the charts, as the page's style sheet has them for a light and for a dark screen.
_COLOURS = {INK: "currentColor", BLUE: "var(--blue)", VERMILION: "var(--vermilion)", GREY: "var(--grey)"}

Thumbnails = Callable[[Sequence[int]], Sequence[Image.Image]]


def render_report(
    title: str,
    table: pd.DataFrame,
    summary: Mapping[str, Any],
    calibration_scores: NDArray[Any] | None,
    thumbnails: Thumbnails,
    *,
    folder: str | Path | None = None,
) -> str:
    """The page, as text that encodes as UTF-8: bytes of file names that are no text show as escapes.

    Parameters
    ----------
    title : str
        Heading of the page.
    table : DataFrame
        A row an image: ``path``, ``anomaly_score``, ``p_value``, ``decision`` ("anomaly", "normal", or empty),
        ``log_direction``, ``log_radius``, ``label`` (a class or empty), ``error`` (why it could not be read, or
        empty), and where it is known ``is_anomaly`` (missing for unlabelled images).
    summary : mapping
        ``run``, ``data``, ``score`` (the settings, with ``score`` and its ``meaning``), ``decision`` (``rule`` and
        ``level``) or None, ``metrics`` (`detection_metrics`) or None, ``date``, ``versions``.
    calibration_scores : (n,), optional
        Of the held-out normal images behind the p-values.
    thumbnails : callable
        Gives the images at rows of the table, once, for the few that are shown.
    folder : path, optional
        Where the page will lie: links to the images' files are relative to it.
    """
    table = table.reset_index(drop=True)
    read = table[table["error"].isna() | table["error"].eq("")]
    scores = read["anomaly_score"].to_numpy(dtype=np.float64)
    unknown = read[np.isnan(scores)].assign(error="its score is not a number")
    unread = pd.concat([table.drop(read.index), unknown])[["path", "error"]].values.tolist()
    labels = None
    if "is_anomaly" in read and read["is_anomaly"].notna().any():
        labels = np.array([-1 if pd.isna(value) else int(value) for value in read["is_anomaly"]])
    flagged = read["decision"].eq("anomaly").to_numpy()
    held_out = np.asarray([] if calibration_scores is None else calibration_scores, dtype=np.float64)
    decision, settings = summary.get("decision") or {}, summary["score"]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    made = {"run": summary["run"], "data": summary["data"], **settings, "meaning": None}
    made |= {"date": summary["date"], "versions": versions}
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, lstrip_blocks=True, trim_blocks=True
    )
    environment.filters.update(number=_number, counted=_counted, sha256=_sha256)
    template = environment.from_string(files("pyro_vje.pages").joinpath("report.html").read_text("utf-8"))
    page = template.render(
        title=title,
        score=settings,
        # "Benjamini-Hochberg: false-discovery rate at most the level"
        rule=decision.get("rule", "").split(": ")[-1].replace("the level", _number(decision.get("level", 0))),
        level=decision.get("level"),
        read=len(read),
        unread=unread[:MOST_ROWS],
        unread_count=len(unread),
        not_scored=len(unknown),
        equal=np.isfinite(scores).any() and len(np.unique(scores[~np.isnan(scores)])) == 1 < len(scores),
        flagged=int(flagged.sum()),
        anomalies=None if labels is None else int((labels == 1).sum()),
        normal=None if labels is None else int((labels == 0).sum()),
        found=0 if labels is None else int((flagged & (labels == 1)).sum()),
        calibration=len(held_out) if read["p_value"].notna().any() else 0,
        cards=_cards(read, scores, labels, thumbnails, folder),
        charts=_charts(read, scores, labels, held_out),
        metrics=_quoted(summary.get("metrics") or {}),
        made={name.replace("_", " "): value for name, value in made.items() if value is not None},
    )
    return printable(page)


# Images ---------------------------------------------------------------------------------------------------------------


def _cards(
    read: pd.DataFrame,
    scores: NDArray[np.float64],
    labels: NDArray[Any] | None,
    thumbnails: Thumbnails,
    folder: str | Path | None,
) -> dict[str, list[dict[str, Any]]]:
    """All flagged images, or at least the strangest, and the most normal ones; none twice, none without a score."""
    order = np.flatnonzero(~np.isnan(scores))
    order = order[np.argsort(-scores[order], kind="stable")]
    flagged = int(read["decision"].eq("anomaly").sum())
    strange = min(max(flagged, min(SHOWN, (len(order) + 1) // 2)), MOST_FLAGGED)
    shown = [*order[:strange], *order[strange:][-SHOWN:][::-1]]
    images = thumbnails(read.index[shown].tolist()) if shown else []

    def card(position: int, image: Image.Image) -> dict[str, Any]:
        row = read.iloc[position]
        path = PurePath(row["path"])
        return {
            "src": _data_uri(image),
            "pixelated": max(image.size) <= THUMBNAIL // 2,
            "href": _link(row["path"], folder),
            "name": path.name or str(path),
            "folder": str(path.parent) if path.parent != PurePath() else "",
            "score": _number(scores[position]),
            "p": None if pd.isna(row["p_value"]) else _number(row["p_value"], 3),
            "label": None if labels is None else ("unlabelled", "normal", "anomaly")[labels[position] + 1],
            "flagged": row["decision"] == "anomaly",
        }

    cards = [card(position, image) for position, image in zip(shown, images, strict=True)]
    return {"strange": cards[:strange], "normal": cards[strange:]}


def _link(path: str, folder: str | Path | None) -> str | None:
    """Address of an image's file: relative to the page where it can be, ``None`` where there is no such file."""
    if not os.path.isfile(path):
        return None
    absolute = Path(path).absolute()
    if folder is None:
        return absolute.as_uri()
    try:
        relative = Path(os.path.relpath(absolute, Path(folder).absolute()))
    except ValueError:  # on another drive
        return absolute.as_uri()
    return quote(os.fsencode(relative.as_posix()))


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if max(small.size) <= THUMBNAIL // 2 else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


# Charts ---------------------------------------------------------------------------------------------------------------


class _Chart(NamedTuple):
    title: str
    caption: str
    legend: list[tuple[str, str]]
    """Names with their colours."""
    svg: Markup


def _chart(
    title: str, caption: str, legend: Sequence[tuple[str, str]], draw: Callable[[Axes], object]
) -> list[_Chart]:
    """A chart as SVG inside the page, its text being text and its colours the page's; none if it cannot be drawn."""
    with drawing(f"the report's chart {title!r}"):
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
        return [_Chart(title, caption, [(label, _COLOURS[colour]) for label, colour in legend], Markup(text))]
    return []


def _charts(
    read: pd.DataFrame,
    scores: NDArray[np.float64],
    labels: NDArray[Any] | None,
    held_out: NDArray[np.float64],
) -> list[_Chart]:
    """Charts of what there are numbers for; the ROC curve where labels are known."""
    charts: list[_Chart] = []
    if np.isfinite(scores).any():
        charts += _score_chart(read, scores, labels, held_out)
    p_values = read["p_value"].to_numpy(dtype=np.float64)
    if len(held_out) >= LEAST_CALIBRATION and np.isfinite(p_values).any():
        groups = split_by_label(labels, np.isfinite(p_values))
        charts += _p_value_chart(p_values, groups, len(held_out) + 1)
    parts = read[["log_direction", "log_radius"]].to_numpy(dtype=np.float64)
    if (finite := np.isfinite(parts).all(axis=1)).any():
        charts += _chart(
            "Direction and radius",
            f"The two parts of the log-likelihood; low is strange. At most {MOST_POINTS:,} images are drawn.",
            sizes(split_by_label(labels, finite)),
            lambda axes: draw_direction_radius(axes, parts[:, 0], parts[:, 1], labels),
        )
    if labels is not None and {0, 1} <= set(labels[known := (labels >= 0) & ~np.isnan(scores)]):
        ranks = np.unique(scores[known], return_inverse=True)[1]  # scores may be infinite, ranks are not
        charts += _roc_chart(ranks, labels[known] == 1)
    return charts


def _score_chart(
    read: pd.DataFrame,
    scores: NDArray[np.float64],
    labels: NDArray[Any] | None,
    held_out: NDArray[np.float64],
) -> list[_Chart]:
    groups = [("held-out normal images", GREY, held_out[np.isfinite(held_out)])]
    for name, colour, members in split_by_label(labels, np.isfinite(scores)):
        groups.append(("scored images" if name == "images" else f"scored: {name}", colour, scores[members]))
    groups = [group for group in groups if len(group[2])]
    threshold = scores[read["decision"].eq("anomaly")].min(initial=np.inf)

    def draw(axes: Axes) -> None:
        draw_scores(axes, [(colour, values) for _, colour, values in groups], "anomaly score")
        if axes.get_xlim()[0] <= threshold <= axes.get_xlim()[1]:
            axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)

    caption = "Higher is stranger. Bars are shares of each group."
    if np.isfinite(threshold):
        caption += f" Flagged from {_number(threshold)} on (dashed line)."
    return _chart("Scores", caption, [(f"{name} ({len(v):,})", colour) for name, colour, v in groups], draw)


def _p_value_chart(p_values: NDArray[np.float64], groups: Sequence[Group], steps: int) -> list[_Chart]:
    # P-values are multiples of 1 / steps: half a step to the left, none lies on the edge of two bars.
    bins, shift = np.linspace(0, 1, 21), 0.5 / steps

    def draw(axes: Axes) -> None:
        for _, colour, members in groups:
            draw_shares(axes, p_values[members] - shift, bins, colour)
        expected, _ = np.histogram((np.arange(steps) + 0.5) / steps, bins)
        axes.stairs(expected / steps, bins, color=INK, linestyle="--", linewidth=1)
        style(axes, "", "p-value", "share of images")

    caption = "Normal images follow the dashed line; a peak at the left is what anomalies look like."
    return _chart("P-values", caption, sizes(groups), draw)


def _roc_chart(ranks: NDArray[Any], labels: NDArray[np.bool_]) -> list[_Chart]:
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
        axes.plot(*roc_curve(labels, ranks)[:2], color=VERMILION)
        style(axes, "", "share of normal images flagged", "share of anomalies found")

    caption = "Each point is a threshold. Dashed: a score that knows nothing."
    return _chart("ROC curve", caption, [("anomalies positive", VERMILION)], draw)


# Text -----------------------------------------------------------------------------------------------------------------


def _quoted(found: Mapping[str, Any]) -> list[tuple[str, list[float]]]:
    """Names of `detection_metrics` as a person reads them, and values with their intervals."""
    named = ((name, re.sub("auroc|aupr|fpr|tpr", lambda m: m[0].upper(), name)) for name in found)
    quoted = ((name, text.replace("_", " ")) for name, text in named if not name.endswith("_95"))
    return [(text, [found[name], *found.get(f"{name}_95", [])]) for name, text in quoted]


def _number(value: float, digits: int = 4) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}g}".replace("inf", "∞").replace("-", "−")


def _counted(count: int, word: str, plural: str = "") -> str:
    return f"{count:,} {word if count == 1 else plural or word + 's'}"


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
