"""`score` and `embed`: what is found of images, and what is written of it.

One table, a row for each image, is what the CSV, the Parquet file, the summary, the pictures and the report tell of.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from pyro_vje import metrics
from pyro_vje.anomaly.calibration import Calibration
from pyro_vje.anomaly.maps import describe_maps, find_masks, map_file, read_levels
from pyro_vje.anomaly.rows import HOW, PARTS, Rows, prepare, score_batches, score_images
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageError, ImageSet
from pyro_vje.data.decode import shown_box
from pyro_vje.metrics.detection import benjamini_hochberg
from pyro_vje.model.encoding import encode
from pyro_vje.pages import pictures
from pyro_vje.pages.report import render_report
from pyro_vje.runs import folder as runs
from pyro_vje.runs.files import check_writable, sha256, write_atomic, write_json

log = logging.getLogger("pyro_vje")

NORMAL_FOLDER = "normal"
"""A class folder of this name holds the normal images; every other class is an anomaly."""
COLUMNS = ("path", "anomaly_score", "p_value", "decision", *PARTS, "label", "error")
MAP_COLUMNS = ("map_peak", "map_p_value")
"""Columns of scoring with maps: the largest value of an image's, and the share of normal images with such a one."""
TEXT = ["path", "decision", "label", "error"]
THRESHOLDS = (0.05, 0.01)
SHOWN = 12
"""Images at each end of the pictures."""


@dataclass(frozen=True)
class ScoreResult:
    """What `score` found and where it wrote it."""

    csv: Path  # a row an image
    summary: Path
    report: Path | None
    scored: int
    failed: int  # which could not be decoded; their rows have an ``error``
    normal: int | None  # of those scored, where there are labels
    anomalies: int | None
    unlabelled: int | None  # which no metric counts
    auroc: float | None  # anomalies as the positive class
    flagged: int | None  # where ``alpha`` or ``fdr`` was given
    passes: int  # of the encoder an image
    settings: ScoreConfig
    maps: Path | None = None  # the folder of the maps
    pixels: dict[str, Any] | None = None  # metrics of the maps against masks


def score(ckpt: str | Path, settings: ScoreConfig | None = None, **overrides: Any) -> ScoreResult:
    """Score images: a CSV with a row for each and a summary, pictures and a report beside it.

    ``ckpt`` is a run folder or weights file; ``overrides`` are fields of `ScoreConfig` that take the place of those in
    ``settings``. ``ValueError``: a setting is out of its range or a name unknown, no image can meet the decision asked
    for, or none can be decoded. ``FileNotFoundError``, ``PermissionError``, ``IsADirectoryError``: run or images are
    missing, or the CSV cannot be written where it is wanted.
    """
    settings = dataclasses.replace(settings or ScoreConfig(), **overrides)
    with runs.deterministic_kernels(settings.deterministic):
        return _score(Path(ckpt), settings)


def _score(ckpt: Path, settings: ScoreConfig) -> ScoreResult:
    target = _target(settings.out or (ckpt if ckpt.is_dir() else Path()) / "scores.csv")
    run = runs.load_run(ckpt, trust_plugins=settings.trust_plugins, device=runs.default_device())
    images, normal = _images_and_normal_class(run, settings)
    judge = prepare(run, settings)
    _, settings, chosen, scorer, known, maps, _ = judge
    say_level(0 if known is None else len(known.scores), len(images), settings.alpha, settings.fdr)

    weights = run.folder / runs.WEIGHTS if run.folder else ckpt
    how = {name: getattr(settings, name) for name in HOW}
    made = {
        "weights_sha256": sha256(weights),
        "images": images.fingerprint(),
    }
    drawn = target.parent / runs.PICTURES / f"{target.stem}_maps" if maps else None
    masks: dict[int, Path] = {}
    if maps and run.folder:
        made["maps_sha256"] = sha256(run.folder / runs.MAPS)
        judge = judge._replace(folder=drawn)
    if settings.masks is not None:
        masks = find_masks(settings.masks, images, _are_normal(images, normal))
    part, shape = target.with_name(target.name + ".part"), (len(images), 2 + len(PARTS) + bool(maps))
    rows = Rows(part, how | made, shape, resume=settings.resume)
    failed = score_images(images, rows, partial(score_batches, judge))
    table = _table(images, rows, failed, normal)
    scored = table[table.error.isna()]
    if not len(scored):
        raise ValueError("no image could be scored: not one of them could be decoded")
    if scored.anomaly_score.isna().all():
        raise ValueError(f"score {chosen.name!r} does not exist for the likelihood {scorer.family.name!r}")
    decision = None if known is None else _decide(table, len(known.scores), settings)
    counts, found = _against_labels(table)
    dataset = settings.dataset or run.info.config.dataset
    passes = 2 * settings.num_pairs or (4 if run.vje.rotations else 1)
    place = (settings.data_dir or run.info.config.data_dir) if dataset == "folder" else dataset
    how |= {"meaning": chosen.description, "likelihood": scorer.family.name}
    about_maps = None
    if maps and drawn:
        peaks = table.map_peak[scored.index].to_numpy()
        table.loc[scored.index, "map_p_value"] = metrics.conformal_p_values(peaks, maps.peaks)
        about_maps = describe_maps(maps, drawn, settings, images, scored.position.tolist(), peaks, masks)
    summary = {
        "run": str(ckpt),
        "data": str(settings.data or f"{place}, split test"),
        "score": {**how, "forward_passes_an_image": passes},
        "normal_class": normal,
        "counts": {"scored": len(scored), "failed": len(failed), **counts},
        "calibration": describe_calibration(known),
        "decision": decision,
        "metrics": found,
        "maps": about_maps,
        "weights_sha256": made["weights_sha256"],
        "versions": runs.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _write(target, table, parquet=settings.parquet)
    summary_path = write_json(target.with_name(f"{target.stem}_summary.json"), summary)
    if settings.draw:
        _draw(target, table[table.error.isna()], images)
    report = target.with_name(f"{target.stem}_report.html") if settings.report else None
    if report:
        shown = (None if known is None else known.scores), partial(_thumbnails, images, table)
        overlays = partial(_overlays, images, table, about_maps) if about_maps else None
        write_atomic(report, render_report(table, summary, *shown, target.parent, overlays))
    rows.remove()  # only now is everything written
    about: Any = (found or {}).get("auroc"), (decision or {}).get("anomalies"), passes, settings
    about = *about, drawn, (about_maps or {}).get("metrics")
    return ScoreResult(target, summary_path, report, len(scored), len(failed), *counts.values(), *about)


def _target(path: str | Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return check_writable(Path(path))


def _images_and_normal_class(run: runs.LoadedRun, settings: ScoreConfig) -> tuple[ImageSet, str | None]:
    """The images to score, and the name of the class that is normal among them, if anything says so."""
    what: tuple[Any, ...] = ("test", settings.dataset, settings.data_dir)
    how: dict[str, Any] = {"download": settings.download}
    if settings.data is not None:
        what, how = ("all", "folder", settings.data), {"residency": "stream"}
    images = runs.load_split(run, *what, **how)
    classes = images.classes or ()
    if settings.normal_class is not None:
        return images, classes[images.class_index(settings.normal_class)]
    trained = run.info.class_name(run.info.config.normal_class)
    # A run's own normal class means nothing in another data set.
    same = settings.data is not None or settings.dataset in (None, run.info.config.dataset)
    if same and trained in classes:
        return images, trained
    return images, NORMAL_FOLDER if NORMAL_FOLDER in classes else None


# The table ------------------------------------------------------------------------------------------------------------


def _table(
    images: ImageSet, rows: Rows, failed: Sequence[tuple[str, str]], normal: str | None
) -> pd.DataFrame:
    """A row for each image that was scored, in their order, then for each that failed.

    Beside `COLUMNS`, ``is_anomaly`` is 1, 0, or missing where nothing is known; ``position`` that in the set, or -1.
    """
    index, names = (
        sorted(rows.numbers),
        [*(images.classes or ()), None],
    )  # the label -1 is the last of them: none
    labels = [None if images.labels is None else names[images.labels[i]] for i in index]
    good, bad = [None] * len(index), [None] * len(failed)
    text = {
        "path": [*(images.paths[i] for i in index), *(path for path, _ in failed)],
        "error": [*good, *(reason for _, reason in failed)],
        "label": [*labels, *bad],
        "decision": [*good, *bad],
    }
    # Objects, as pandas' own text holds no path whose bytes are not UTF-8.
    table = pd.DataFrame(text, dtype=object).assign(p_value=np.nan, is_anomaly=np.nan)
    table["position"] = [*index, *[-1] * len(failed)]
    if normal is not None:
        table["is_anomaly"] = (table.label != normal).astype(float).where(table.label.notna())
    numbers = [rows.numbers[i] for i in index]
    columns = ["anomaly_score", *PARTS, "as_strange", "map_peak"][: len(numbers[0]) if numbers else -1]
    return table.join(pd.DataFrame(numbers, columns=columns, dtype=float))


def _decide(table: pd.DataFrame, count: int, settings: ScoreConfig) -> dict[str, Any] | None:
    """Fill in p-values and decisions; returns how it was decided and how many are called anomalies."""
    table["p_value"] = (1 + table.as_strange) / (count + 1)
    p_values = table.p_value[table.error.isna()]
    if settings.alpha is not None:
        rule, level, called = "p-value at most the level", settings.alpha, p_values <= settings.alpha
    elif settings.fdr is not None:
        rule, level = "Benjamini-Hochberg: false-discovery rate at most the level", settings.fdr
        called = pd.Series(benjamini_hochberg(p_values.to_numpy(), level), p_values.index)
    else:
        return None
    table.loc[p_values.index, "decision"] = called.map({True: "anomaly", False: "normal"}).astype(object)
    return {"rule": rule, "level": level, "anomalies": int(called.sum())}


def _against_labels(table: pd.DataFrame) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Numbers of normal, anomalous and unlabelled images, if there are labels, and metrics over the first two."""
    known = table.is_anomaly.dropna()
    if not len(known):
        return dict.fromkeys(("normal", "anomalies", "unlabelled")), None
    anomalies, unlabelled = int(known.sum()), int(table.error.isna().sum()) - len(known)
    scores = table.anomaly_score[known.index].to_numpy()
    found = metrics.detection_metrics(scores, known.to_numpy(bool)) if known.nunique() == 2 else None
    return {"normal": len(known) - anomalies, "anomalies": anomalies, "unlabelled": unlabelled}, found


def describe_calibration(known: Calibration | None) -> dict[str, Any] | None:
    """Number of calibration images, and above which score an image's p-value is at most some levels."""
    if known is None:
        return None
    count, ordered = len(known.scores), np.sort(known.scores)[::-1]
    about: dict[str, Any] = {"images": count, "smallest_p_value": 1 / (count + 1), "folds": known.folds}
    if known.folds > 1:  # each fold has a score of its own
        return about
    ranks = {level: int(level * (count + 1) * (1 + 1e-12)) for level in THRESHOLDS}
    thresholds = {f"{level:g}": float(ordered[rank - 1]) if rank else None for level, rank in ranks.items()}
    meaning = "an image whose score is above it has a p-value of at most the level"
    return about | {"thresholds": thresholds, "threshold": meaning}


def say_level(count: int, images: int, alpha: float | None, fdr: float | None) -> None:
    """Say beforehand which decisions so many calibration images carry; ``ValueError`` if no image could meet one."""
    level, name = (fdr, "fdr") if alpha is None else (alpha, "alpha")
    if not count:
        no = "this run has no held-out images to calibrate scores (train --holdout, or pyro-vje calibrate)"
        if level is not None:
            raise ValueError(f"no p-values, so no decisions: {no}")
        log.info("no p-values: %s", no)
        return
    least = 1 / (count + 1)
    log.info("compared with %d normal images, so that no p-value is below %.3g", count, least)
    if level is not None and level < least:
        raise ValueError(
            f"with {count} calibration images no p-value is below {least:.3g}, so nothing could be called an anomaly "
            f"at {name} {level:g}: calibrate with {math.ceil(1 / level) - 1} or more "
            "(train --holdout, or pyro-vje calibrate), or raise the level"
        )
    if fdr is not None and (least_called := math.ceil(images * least / fdr)) > 1:
        log.warning(
            "at fdr %g, among %d images and with %d to compare with, fewer than %d strange ones cannot be called: "
            "raise it, or compare with more (pyro-vje calibrate)",
            *(fdr, images, count, least_called),
        )


# What is written ------------------------------------------------------------------------------------------------------


def _write(path: Path, table: pd.DataFrame, *, parquet: bool) -> None:
    """Write the table with six digits, a text that a spreadsheet would execute with an apostrophe (OWASP); Parquet."""
    table = table[[*COLUMNS, *(name for name in MAP_COLUMNS if name in table)]]
    shown = table.copy()
    for name in TEXT:
        cells = [f"'{x}" if str(x).startswith(tuple("=+-@\t\r")) else x for x in shown[name]]
        shown[name] = pd.Series(cells, dtype=object)
    write_atomic(path, shown.to_csv(index=False, float_format="%.6f", lineterminator="\n"))
    if not parquet:
        return
    content = io.BytesIO()
    paths = [name.encode(errors="surrogateescape").decode(errors="replace") for name in table.path]
    try:
        table.assign(path=paths).to_parquet(content, engine="pyarrow", compression="zstd")
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'pyro-vje[parquet]'") from None
    write_atomic(path.with_suffix(".parquet"), content.getbuffer())


def _image(images: ImageSet, i: int) -> torch.Tensor:
    """Image ``i`` of a set, uint8 ``(3, S, S)``; grey where its file has gone since it was scored."""
    try:
        return images.images[i]
    except ImageError:
        return torch.full((3, images.image_size, images.image_size), 128, dtype=torch.uint8)


def _thumbnails(images: ImageSet, table: pd.DataFrame, rows: Sequence[int]) -> list[Image.Image]:
    found = (_image(images, table.position[row]) for row in rows)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in found]


def _overlays(
    images: ImageSet, table: pd.DataFrame, about: dict[str, Any], rows: Sequence[int]
) -> list[Image.Image]:
    """What is drawn over the thumbnails of rows: their maps, cut and resized as the images are."""
    size, folder = (images.image_size, images.image_size), Path(about["folder"])
    found = []
    for i in table.position[[*rows]]:
        levels = Image.fromarray(read_levels(map_file(folder, images.names[i])).astype(np.float32))
        box = shown_box(*levels.size, getattr(images.images, "fit", "crop"))
        square = levels.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        found.append(
            pictures.draw_marks(np.asarray(square), about["ordinary_level"], about["threshold_level"])
        )
    return found


def _are_normal(images: ImageSet, normal: str | None) -> list[bool]:
    """Which images are normal by their label."""
    if normal is None or images.labels is None:
        return [False] * len(images)
    return (images.labels == images.class_index(normal)).tolist()


def _draw(csv_path: Path, scored: pd.DataFrame, images: ImageSet) -> None:
    """Draw the histogram, the two factors, and the strangest images into a folder beside the CSV."""
    kinds = ("histogram", "direction_radius", "strangest")
    shares, factors, strangest = (csv_path.parent / runs.PICTURES / f"{csv_path.stem}_{x}.png" for x in kinds)
    is_anomaly = scored.is_anomaly.fillna(-1).to_numpy(int) if scored.is_anomaly.notna().any() else None
    pictures.plot_score_histogram(scored.anomaly_score.to_numpy(), is_anomaly, shares)
    if scored.log_direction.notna().any():
        pictures.plot_direction_radius(scored.log_direction, scored.log_radius, is_anomaly, factors)
    ordered = scored.sort_values("anomaly_score", kind="stable")
    ends = pd.concat([ordered.head(SHOWN), ordered.tail(SHOWN)]).drop_duplicates("position")
    shown = torch.stack([_image(images, i) for i in ends.position])
    pictures.plot_strangest(shown, ends.anomaly_score.to_numpy(), strangest, k=SHOWN)


def embed(
    ckpt: str | Path, data: str | Path, out: str | Path, *, batch_size: int = 256, trust_plugins: bool = False
) -> tuple[Path, int, int]:
    """Write features, embeddings and posteriors of a folder of images to an ``.npz`` file.

    Arrays: ``features`` (N, F), ``embeddings``, ``loc``, ``scale`` (N, D) as float32, ``paths`` (N,) as text, and
    ``labels`` (N,), -1 for none, with ``classes`` where the folder has class folders. Returns the file, the number of
    images in it, and the number that could not be decoded. Raises as `score` does.
    """
    target = _target(out)
    run = runs.load_run(ckpt, trust_plugins=trust_plugins, device=runs.default_device())
    images = runs.load_split(run, "all", "folder", data, residency="stream")
    encoded = encode(run.vje, images, run.info.view, batch_size=batch_size)
    arrays = {name: x.numpy() for name, x in encoded._asdict().items() if name != "indices" and x is not None}
    arrays["paths"] = np.array([images.paths[i] for i in encoded.indices.tolist()])
    if images.labels is not None:
        arrays["labels"] = images.labels[encoded.indices].numpy()
        arrays["classes"] = np.array(images.classes or ())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return write_atomic(target, buffer.getvalue()), len(encoded.indices), len(images.failed)
