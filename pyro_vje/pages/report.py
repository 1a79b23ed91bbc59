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
from pyro_vje.pages.pictures import BLUE, GREY, SHOWN, VERMILION, Thumbnails, split_by_label

THUMBNAIL = 192  # longest side of an image on the page, in pixels
MOST_FLAGGED = 200  # flagged images that are shown; the others are counted
LEAST_CALIBRATION = 20  # held-out images below which p-values are too few different ones for a chart

INK = "#000000"
# Colours of the charts, as the page's style sheet has them for a light and for a dark screen.
_COLOURS = {INK: "currentColor", BLUE: "var(--blue)", VERMILION: "var(--vermilion)", GREY: "var(--grey)"}

Floats: TypeAlias = NDArray[np.float64]


def render_report(
    table: pd.DataFrame,
    summary: Mapping[str, Any],
    held_out: Floats | None,
    thumbnails: Thumbnails,
    folder: Path,
    overlays: Thumbnails | None = None,
) -> str:
    """The page, as text that encodes as UTF-8: bytes of file names that are no text show as escapes.

    ``table`` has a row an image: ``path``, ``anomaly_score``, ``p_value``, ``decision`` ("anomaly" or not),
    ``error`` (why it could not be read), and ``is_anomaly`` (missing where it is not known). ``summary`` is that of
    `score`. ``held_out`` are the scores ``(n,)`` of the normal images behind the p-values. ``thumbnails`` gives the
    images at rows of the table, once, for the few that are shown; ``folder`` is where the page will lie, for links to
    the images' files. ``overlays`` gives what is laid over the thumbnails to show where.
    """
    table = table.astype(dict.fromkeys(("anomaly_score", "p_value", "is_anomaly"), float))
    read = table[table["error"].isna()]
    scores, flagged, labels = read["anomaly_score"], read["decision"].eq("anomaly"), read["is_anomaly"]
    unknown = read[scores.isna()].assign(error="its score is not a number")
    held_out = np.asarray([] if held_out is None else held_out, dtype=np.float64)
    environment = Environment(
        loader=PackageLoader("pyro_vje.pages", ""),
        autoescape=True,
        undefined=StrictUndefined,
        lstrip_blocks=True,
        trim_blocks=True,
    )
    environment.filters.update(number=_number, counted=_counted, sha256=_sha256)
    page = environment.get_template("report.html").render(
        summary=summary,
        read=len(read),
        unread=pd.concat([table.drop(read.index), unknown])[["path", "error"]].values.tolist(),
        not_scored=len(unknown),
        equal=np.isfinite(scores).any() and scores.nunique() == 1 < len(scores),
        flagged=int(flagged.sum()),
        labelled=[int(labels.eq(kind).sum()) for kind in (0, 1)] if labels.notna().any() else None,
        found=int((labels.eq(1) & flagged).sum()),
        calibration=len(held_out) if read["p_value"].notna().any() else 0,
        cards=_cards(read, thumbnails, folder, overlays),
        maps=summary.get("maps"),
        charts=_charts(read, held_out),
    )
    return pictures.printable(page)


def _cards(
    read: pd.DataFrame, thumbnails: Thumbnails, folder: Path, overlays: Thumbnails | None
) -> dict[str, list[dict[str, Any]]]:
    """All flagged images, or at least the strangest, and the most normal ones; none twice, none without a score."""
    # Flagged ones first: with folds, p-values do not follow the scores exactly.
    ranked = read.assign(flagged=read["decision"].eq("anomaly")).dropna(subset="anomaly_score")
    ranked = ranked.sort_values(["flagged", "anomaly_score"], ascending=False, kind="stable")
    strange = min(max(int(ranked["flagged"].sum()), min(SHOWN, (len(ranked) + 1) // 2)), MOST_FLAGGED)
    shown = pd.concat([ranked[:strange], ranked[strange:][-SHOWN:][::-1]])
    rows = shown.index.tolist()
    marks = overlays(rows) if overlays else [None] * len(rows)
    labelled = read["is_anomaly"].notna().any()
    cards = [
        {
            "src": _data_uri(image),
            "map": mark and _data_uri(mark),
            "map_p": row.map_p_value if mark else np.nan,
            "pixelated": max(image.size) <= THUMBNAIL // 2,
            "href": _link(row.path, folder),
            "path": PurePath(row.path),
            "score": row.anomaly_score,
            "p": row.p_value,
            "label": {0: "normal", 1: "anomaly"}.get(row.is_anomaly, "unlabelled") if labelled else None,
            "flagged": row.flagged,
        }
        for row, image, mark in zip(shown.itertuples(), thumbnails(rows), marks, strict=True)
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


def _charts(read: pd.DataFrame, held_out: Floats) -> list[dict[str, Any]]:
    """Charts of what there are numbers for; the ROC curve where labels are known."""
    charts: list[dict[str, Any]] = []
    scores, p_values, labels = (read["anomaly_score"].to_numpy(), read["p_value"].to_numpy(), read["is_anomaly"])
    if np.isfinite(scores).any():
        groups = split_by_label(labels, np.isfinite(scores))
        shown, legend = [(colour, scores[members]) for _, colour, members in groups], pictures.sizes(groups)
        if len(held := held_out[np.isfinite(held_out)]):
            shown.insert(0, (INK, held))
            legend.insert(0, (f"held-out normal images ({len(held):,})", INK))
        caption = "Higher is stranger. Bars are shares of each group."
        flagged = read["decision"].eq("anomaly")
        threshold = scores[flagged].min(initial=np.inf)
        if has_limit := np.isfinite(threshold) and not (scores[~flagged] >= threshold).any():  # with folds none is one
            caption += f" Flagged from {_number(threshold)} on (dashed line)."

        def draw_scores(axes: Axes) -> None:
            pictures.draw_scores(axes, shown)
            if has_limit and axes.get_xlim()[0] <= threshold <= axes.get_xlim()[1]:
                axes.axvline(threshold, color=INK, linestyle="--", linewidth=1)

        charts += _chart("Scores", caption, legend, draw_scores)
    if len(held_out) + 1 > LEAST_CALIBRATION and np.isfinite(p_values).any():
        groups, steps = split_by_label(labels, np.isfinite(p_values)), len(held_out) + 1

        def draw_p_values(axes: Axes) -> None:
            # P-values are multiples of 1 / steps: half a step to the left, none lies on the edge of two bars.
            bins = np.linspace(0, 1, 21)
            for _, colour, members in groups:
                pictures.draw_shares(axes, p_values[members] - 0.5 / steps, bins, colour)
            expected = np.histogram((np.arange(steps) + 0.5) / steps, bins)[0] / steps
            axes.stairs(expected, bins, color=INK, linestyle="--", linewidth=1)
            pictures.style(axes, "", "p-value", "share of images")

        caption = "Normal images follow the dashed line; a peak at the left is what anomalies look like."
        charts += _chart("P-values", caption, pictures.sizes(groups), draw_p_values)
    known = read[labels.notna() & ~np.isnan(scores)]
    if known["is_anomaly"].nunique() == 2:
        ranks = rankdata(known["anomaly_score"])  # scores may be infinite, ranks are not
        curve = roc_curve(known["is_anomaly"], ranks)

        def draw_roc(axes: Axes) -> None:
            axes.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
            axes.plot(*curve[:2], color=VERMILION)
            pictures.style(axes, "", "share of normal images flagged", "share of anomalies found")

        caption = "Each point is a threshold. Dashed: a score that knows nothing."
        charts += _chart("ROC curve", caption, [("anomalies positive", VERMILION)], draw_roc)
    return charts


def _chart(
    title: str, caption: str, legend: Sequence[tuple[str, str]], draw: Callable[[Axes], object]
) -> list[dict[str, Any]]:
    """A chart as SVG inside the page, its text being text and its colours the page's; none if it cannot be drawn."""
    with pictures.drawing(f"the report's chart {title!r}"):
        figure = pictures.new_figure(4.4, 2.9)
        axes = figure.subplots()
        draw(axes)
        axes.locator_params(nbins=6)
        axes.tick_params(labelsize=9)
        stream, name = io.StringIO(), re.sub(r"\W+", "-", title.lower())
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
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
