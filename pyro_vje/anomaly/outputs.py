"""What scoring leaves behind: the table, its summary in numbers, pictures, one page to send to a colleague."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from pyro_vje.anomaly.rows import Table
from pyro_vje.anomaly.scores import LikelihoodParts
from pyro_vje.data import ImageError, ImageSet
from pyro_vje.pages import pictures
from pyro_vje.pages.report import render_report
from pyro_vje.runs.files import write_atomic
from pyro_vje.runs.folder import PICTURES

PARTS = tuple(field.name for field in dataclasses.fields(LikelihoodParts) if field.name != "typical")
COLUMNS = (
    "path",
    "anomaly_score",
    "p_value",
    "decision",
    *("posterior_variance" if name == "variance" else name for name in PARTS),
    "label",
    "error",
)
THRESHOLDS = (0.05, 0.01)
SHOWN = 12
"""Images at each end of the pictures."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Images and what was found of those that could be read, arrays ``(N,)``; ``None`` for what is not known.

    Attributes
    ----------
    images : ImageSet
        All that were to be scored.
    table : Table
        Scores and parts.
    calibration : (n,) array or None
        Scores of the held-out images.
    p_values, decisions, is_anomaly : arrays or None
        Conformal p-values, which images are called anomalies, and which are.
    """

    images: ImageSet
    table: Table
    calibration: NDArray[np.float64] | None
    p_values: NDArray[np.float64] | None
    decisions: NDArray[np.bool_] | None
    is_anomaly: NDArray[np.bool_] | None


def describe_calibration(calibration: NDArray[np.float64] | None) -> dict[str, Any] | None:
    """Number of calibration images, and above which score an image's p-value is at most some levels."""
    if calibration is None:
        return None
    count = len(calibration)
    ordered = np.sort(calibration)[::-1]
    ranks = {level: int(level * (count + 1) * (1 + 1e-12)) for level in THRESHOLDS}
    return {
        "images": count,
        "smallest_p_value": 1 / (count + 1),
        "thresholds": {
            f"{level:g}": float(ordered[rank - 1]) if rank else None for level, rank in ranks.items()
        },
        "threshold": "an image whose score is above it has a p-value of at most the level",
    }


def write_csv(path: Path, scored: Scored) -> Path:
    """Write a row for each image in their order, then the unreadable ones with their reasons."""
    images, table = scored.images, scored.table
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row, i in enumerate(table.positions.tolist()):
        numbers = [
            table.scores[row],
            np.nan if scored.p_values is None else scored.p_values[row],
            *table.parts[row],
        ]
        cells = ["" if value != value else f"{value:.6f}" for value in numbers]
        decision = "" if scored.decisions is None else ("anomaly" if scored.decisions[row] else "normal")
        label = ""
        if images.labels is not None and images.classes and images.labels[i] >= 0:
            label = images.classes[int(images.labels[i])]
        writer.writerow([images.paths[i], *cells[:2], decision, *cells[2:], label, ""])
    for name, reason in table.failed:
        writer.writerow([name, *[""] * (len(COLUMNS) - 2), reason])
    return write_atomic(path, text.getvalue())


def write_parquet(path: Path) -> None:
    """Write the table of a CSV as Parquet beside it.

    Raises
    ------
    ValueError
        If pyarrow is not installed.
    """
    try:
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet as arrow_parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'pyro-vje[parquet]'") from None
    options = arrow_csv.ParseOptions(newlines_in_values=True)
    content = io.BytesIO()
    arrow_parquet.write_table(arrow_csv.read_csv(path, parse_options=options), content, compression="zstd")
    write_atomic(path.with_suffix(".parquet"), content.getbuffer())


def _ends(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Rows of the most normal and the strangest images."""
    order = np.argsort(scores, kind="stable")
    k = min(SHOWN, (len(order) + 1) // 2)
    return np.unique(np.concatenate([order[:k], order[len(order) - k :]]))


def _image(images: ImageSet, i: int) -> torch.Tensor:
    """Image ``i`` of a set, uint8 ``(3, S, S)``; grey where its file has gone since it was scored."""
    try:
        return images.images[i]
    except ImageError:
        return torch.full((3, images.image_size, images.image_size), 128, dtype=torch.uint8)


def draw(csv_path: Path, scored: Scored) -> None:
    """Draw the histogram, the two factors, and the strangest images into a folder beside the CSV."""
    table = scored.table
    folder = csv_path.parent / PICTURES
    folder.mkdir(exist_ok=True)
    name = csv_path.stem
    pictures.plot_score_histogram(table.scores, scored.is_anomaly, folder / f"{name}_histogram.png")
    direction, radius = table.parts[:, 1], table.parts[:, 2]
    if not np.isnan(direction).all():
        pictures.plot_direction_radius(
            direction, radius, scored.is_anomaly, folder / f"{name}_direction_radius.png"
        )
    ends = _ends(table.scores)
    shown = torch.stack([_image(scored.images, int(table.positions[row])) for row in ends])
    pictures.plot_strangest(shown, table.scores[ends], folder / f"{name}_strangest.png", k=SHOWN)


def report(summary: dict[str, Any], scored: Scored, folder: Path) -> str:
    """The HTML page, to lie in ``folder``, that tells a colleague what is in the summary and the table."""
    images, table = scored.images, scored.table

    def thumbnails(rows: Sequence[int]) -> list[Image.Image]:
        found = (_image(images, int(table.positions[row])) for row in rows)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in found]

    names = ("", "") if scored.decisions is None else ("normal", "anomaly")
    decided = np.zeros(len(table.scores), int) if scored.decisions is None else scored.decisions.astype(int)
    rows = pd.DataFrame(
        {
            # As objects: pandas' own strings hold no bytes that are no text.
            "path": pd.Series([images.paths[i] for i in table.positions.tolist()], dtype=object),
            "anomaly_score": table.scores,
            "p_value": np.nan if scored.p_values is None else scored.p_values,
            "decision": [names[value] for value in decided],
            "log_direction": table.parts[:, 1],
            "log_radius": table.parts[:, 2],
            "is_anomaly": scored.is_anomaly,
            "error": "",
        }
    )
    failed = pd.DataFrame(table.failed, columns=["path", "error"], dtype=object)
    rows = pd.concat([rows, failed]) if len(failed) else rows
    title = f"Anomaly scores: {summary['data']}"
    return render_report(title, rows, summary, scored.calibration, thumbnails, folder=folder)
