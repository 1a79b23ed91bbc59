"""`score` and `embed`: what is found of images, and what is written of it.

One table, a row for each image, is what the CSV, the Parquet file, the summary and the report tell of.
Its rows are on disk as they come: memory does not grow with them, and an interrupted call can go on.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pyro_vje import metrics
from pyro_vje.anomaly.judge import HOW, MAP_COLUMNS, PARTS, Judge, prepare, say_level
from pyro_vje.anomaly.maps import describe_maps, find_masks, map_file, read_levels
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageError, ImageSet
from pyro_vje.data.datasets import say_fit
from pyro_vje.data.decode import shown_box
from pyro_vje.metrics.detection import benjamini_hochberg
from pyro_vje.model.encoding import encode
from pyro_vje.pages import pictures
from pyro_vje.pages.report import render_report
from pyro_vje.progress import Progress, clear_line
from pyro_vje.runs import folder as runs
from pyro_vje.runs.files import check_writable, locked, parse_json, sha256, write_atomic, write_json

log = logging.getLogger("pyro_vje")

NORMAL_FOLDER = "normal"
"""A class folder of this name holds the normal images; every other class is an anomaly."""
COLUMNS = ("path", "anomaly_score", "p_value", "decision", *PARTS, "label", "error")
TEXT = ("path", "decision", "label", "error")


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
    """Score images: a CSV with a row for each and a summary beside it, and a page if asked for.

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
    settings, calibration = judge.settings, judge.calibration
    say_level(len(calibration.scores) if calibration else 0, len(images), settings.alpha, settings.fdr)
    maps_folder = target.parent / runs.PICTURES / f"{target.stem}_maps" if judge.maps else None
    masks = find_masks(settings.masks, images, _are_normal(images, normal)) if settings.masks else {}

    made = {name: getattr(settings, name) for name in HOW}
    made["weights_sha256"] = sha256(run.folder / runs.WEIGHTS if run.folder else ckpt)
    made["images"] = images.fingerprint()
    if judge.maps and run.folder:
        made["maps_sha256"] = sha256(run.folder / runs.MAPS)
    shape = (len(images), len(judge.columns))
    rows = Rows(target.with_name(f"{target.name}.part"), made, shape, resume=settings.resume)
    failed = score_images(judge, images, rows, maps_folder)
    table = _table(judge, images, rows, failed, normal)
    scored = table[table.error.isna()]
    if not len(scored):
        raise ValueError("no image could be scored: not one of them could be decoded")
    if scored.anomaly_score.isna().all():
        family = judge.scorer.family.name
        raise ValueError(f"score {judge.score.name!r} does not exist for the likelihood {family!r}")

    if lost := int(scored.anomaly_score.isna().sum()):
        log.warning("the score of %d of %d images is not a number: they have no p-value", lost, len(scored))
    maps = None
    if judge.maps and maps_folder:
        positions, peaks = scored.position.tolist(), scored.map_peak.to_numpy()
        maps = describe_maps(judge.maps, maps_folder, settings, images, positions, peaks, masks)
    counts, found = _against_labels(table)
    decision = _decide(table, settings)
    summary = {
        "run": str(ckpt),
        "data": _data(run, settings),
        "score": {
            **{name: made[name] for name in HOW},
            "meaning": judge.score.description,
            "likelihood": judge.scorer.family.name,
            "forward_passes_an_image": judge.passes,
        },
        "normal_class": normal,
        "counts": counts,
        "calibration": calibration.describe() if calibration else None,
        "decision": decision,
        "metrics": found,
        "maps": maps,
        "weights_sha256": made["weights_sha256"],
        "versions": runs.versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    result = ScoreResult(
        csv=target,
        summary=target.with_name(f"{target.stem}_summary.json"),
        report=target.with_name(f"{target.stem}_report.html") if settings.report else None,
        **counts,
        auroc=found["auroc"] if found else None,
        flagged=decision["anomalies"] if decision else None,
        passes=judge.passes,
        settings=settings,
        maps=maps_folder,
        pixels=maps["metrics"] if maps else None,
    )
    _write(target, table, parquet=settings.parquet)
    write_json(result.summary, summary)
    if result.report:
        thumbnails = partial(_thumbnails, images, table)
        overlays = partial(_overlays, images, table, maps) if maps else None
        held_out = calibration.scores if calibration else None
        page = render_report(table, summary, held_out, thumbnails, target.parent, overlays)
        write_atomic(result.report, page)
    rows.remove()  # only now is everything written
    return result


def _target(path: str | Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return check_writable(Path(path))


def _images_and_normal_class(run: runs.LoadedRun, settings: ScoreConfig) -> tuple[ImageSet, str | None]:
    """The images to score, and the name of the class that is normal among them, if anything says so."""
    if settings.data is not None:
        images = runs.load_split(run, "all", "folder", settings.data, residency="stream")
        if run.info.fit == "crop":
            say_fit(images, "crop")
    else:
        where = (settings.dataset, settings.data_dir)
        images = runs.load_split(run, "test", *where, download=settings.download)
    classes = images.classes or ()
    if settings.normal_class is not None:
        return images, images.class_name(settings.normal_class)
    trained = run.info.class_name(run.info.config.normal_class)
    # A run's own normal class means nothing in another data set.
    same = settings.data is not None or settings.dataset in (None, run.info.config.dataset)
    if same and trained in classes:
        return images, trained
    return images, NORMAL_FOLDER if NORMAL_FOLDER in classes else None


def _are_normal(images: ImageSet, normal: str | None) -> list[bool]:
    """Which images are normal by their label."""
    if normal is None or images.labels is None:
        return [False] * len(images)
    return (images.labels == images.class_index(normal)).tolist()


# Rows on disk ---------------------------------------------------------------------------------------------------------


class Rows:
    """Numbers of images on disk while they are scored: a line of JSON each, after one that says how they were ``made``.

    ``shape`` is the number of images and of numbers in a row. Without ``resume`` the file is begun anew.
    """

    def __init__(self, path: Path, made: dict[str, Any], shape: tuple[int, int], *, resume: bool) -> None:
        self.path, self._lock = path, ExitStack()
        self._lock.enter_context(locked(path))
        self.numbers: dict[int, list[float]] = {}
        content = path.read_bytes() if resume and path.is_file() else b""
        *lines, _ = content.split(b"\n")  # a kill may cut off the last
        if lines:
            self._read(lines, made, shape)
        else:
            lines = [json.dumps(made).encode()]
            if resume:
                log.info("there is no %s to resume: from the beginning", path)
        write_atomic(path, b"\n".join([*lines, b""]))

    def _read(self, lines: Sequence[bytes], made: dict[str, Any], shape: tuple[int, int]) -> None:
        try:
            before, *rows = map(parse_json, lines)
            changed = ", ".join(name for name, value in made.items() if before[name] != value)
            self.numbers = {} if changed else dict(rows)
            good = changed or len(self.numbers) == len(rows)
            good = good and all(type(i) is int and 0 <= i < shape[0] for i in self.numbers)
            good = good and all([type(x) for x in row] == [float] * shape[1] for row in self.numbers.values())
        except (ValueError, TypeError, KeyError):
            changed, good = "", False
        if changed or not good:
            wrong = f"was made with other settings ({changed})" if changed else "is damaged"
            raise ValueError(f"{self.path} {wrong}: score again without --resume")

    def add(self, rows: Mapping[int, list[float]]) -> None:
        """Append the numbers of images by their positions."""
        self.numbers |= rows
        with open(self.path, "a", encoding="ascii") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows.items())

    def remove(self) -> None:
        """Remove the file, when all that was made of it is written, and let other processes write it."""
        self.path.unlink()
        self._lock.close()


def score_images(judge: Judge, images: ImageSet, rows: Rows, maps_folder: Path | None) -> list[tuple[str, str]]:
    """Score the images that have no row yet; returns path and reason of each that cannot be decoded."""
    remaining = [i for i in range(len(images)) if i not in rows.numbers]
    if len(remaining) < len(images):
        log.info("%d of %d images were scored before", len(images) - len(remaining), len(images))
    todo = images.select(remaining)
    progress = Progress("scoring", len(todo))
    try:
        for table in judge.rows(todo, maps_folder) if remaining else ():
            numbers = zip(table.index, table.to_numpy().tolist(), strict=True)
            rows.add({remaining[i]: row for i, row in numbers})
            progress.add(len(table))
    except KeyboardInterrupt:
        clear_line()
        log.warning("%d of %d images are in %s; --resume goes on", progress.done, len(todo), rows.path)
        raise
    clear_line()  # images that cannot be read leave it short of its end
    return sorted(todo.failed)


# The table and what it says -------------------------------------------------------------------------------------------


def _table(
    judge: Judge, images: ImageSet, rows: Rows, failed: Sequence[tuple[str, str]], normal: str | None
) -> pd.DataFrame:
    """A row for each image that was scored, in their order, then for each that failed.

    Beside `COLUMNS`, ``is_anomaly`` is 1, 0, or missing where nothing is known; ``position`` that in the set, or -1.
    """
    index = sorted(rows.numbers)
    names = [*(images.classes or ()), None]  # the label -1 is the last of them: none
    labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
    good = [(images.paths[i], None, names[labels[i]], None) for i in index]
    bad = [(path, None, None, reason) for path, reason in failed]
    # Objects, as pandas' own text holds no path whose bytes are not UTF-8.
    table = pd.DataFrame([*good, *bad], columns=TEXT, dtype=object)
    table["position"] = [*index, *[-1] * len(failed)]
    is_anomaly = np.nan if normal is None else (table.label != normal).astype(float)
    table["is_anomaly"] = pd.Series(is_anomaly, table.index).where(table.label.notna())
    numbers = [rows.numbers[i] for i in index]
    return table.join(pd.DataFrame(numbers, columns=judge.columns, dtype=float))


def _decide(table: pd.DataFrame, settings: ScoreConfig) -> dict[str, Any] | None:
    """Fill in decisions, if there is a rule for them: which it is, and how many images are called anomalies."""
    p_values = table.p_value.dropna()
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
    """Numbers of images, also by their labels if there are any; metrics over those known to be normal or anomalies."""
    scored, known = int(table.error.isna().sum()), table.is_anomaly[table.anomaly_score.notna()].dropna()
    counts: dict[str, Any] = {"scored": scored, "failed": len(table) - scored}
    if not len(known):
        return {**counts, "normal": None, "anomalies": None, "unlabelled": None}, None
    anomalies = int(known.sum())
    counts |= {
        "normal": len(known) - anomalies,
        "anomalies": anomalies,
        "unlabelled": int(table.is_anomaly[table.error.isna()].isna().sum()),
    }
    if known.nunique() == 1:
        return counts, None
    return counts, metrics.detection_metrics(table.anomaly_score[known.index].to_numpy(), known.to_numpy(bool))


def _data(run: runs.LoadedRun, settings: ScoreConfig) -> str:
    """What was scored, in words."""
    config = run.info.config
    dataset = settings.dataset or config.dataset
    place = settings.data_dir or config.data_dir if dataset == "folder" else dataset
    return str(settings.data or f"{place}, split test")


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


def _thumbnails(images: ImageSet, table: pd.DataFrame, rows: Sequence[int]) -> list[Image.Image]:
    """The images at rows of the table; grey where a file has gone since it was scored."""
    found = []
    for i in table.position[[*rows]]:
        try:
            found.append(Image.fromarray(images.images[i].permute(1, 2, 0).numpy()))
        except ImageError:
            found.append(Image.new("RGB", (images.image_size, images.image_size), "grey"))
    return found


def _overlays(images: ImageSet, table: pd.DataFrame, about: dict[str, Any], rows: Sequence[int]) -> list[Image.Image]:
    """What is drawn over the thumbnails of rows: their maps, cut and resized as the images are."""
    size, folder = (images.image_size, images.image_size), Path(about["folder"])
    found = []
    for i in table.position[[*rows]]:
        levels = Image.fromarray(read_levels(map_file(folder, images.names[i])).astype(np.float32))
        box = shown_box(*levels.size, getattr(images.images, "fit", "crop"))
        square = np.asarray(levels.transform(size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR))
        found.append(pictures.draw_marks(square, about["ordinary_level"], about["threshold_level"]))
    return found


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
