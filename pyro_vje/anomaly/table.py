"""`score` and `embed`: what is found of images, and what is written of it.

One table, a row for each image, is what the CSV, the Parquet file, the summary, the pictures and the report tell of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from pyro_vje import metrics
from pyro_vje.anomaly.rows import HOW, PARTS, Rows, calibration_scores, images_of, make_scorer, score_images
from pyro_vje.anomaly.scores import get_score
from pyro_vje.config import ScoreConfig
from pyro_vje.data import ImageError, ImageSet
from pyro_vje.metrics.conformal import benjamini_hochberg, conformal_p_values
from pyro_vje.model.encoding import encode
from pyro_vje.pages import pictures
from pyro_vje.pages.report import ReportData, render_report
from pyro_vje.representation.evaluation import load_split
from pyro_vje.runs.files import check_writable, write_atomic, write_json
from pyro_vje.runs.folder import (
    PICTURES,
    WEIGHTS,
    LoadedRun,
    default_device,
    deterministic_kernels,
    load_run,
    versions,
)

log = logging.getLogger("pyro_vje")

NORMAL_FOLDER = "normal"
"""A class folder of this name holds the normal images; every other class is an anomaly."""
COLUMNS = ("path", "anomaly_score", "p_value", "decision", *PARTS, "label", "error")
TEXT = ("path", "decision", "label", "error")
THRESHOLDS = (0.05, 0.01)
SHOWN = 12
"""Images at each end of the pictures."""


@dataclass(frozen=True)
class ScoreResult:
    """What `score` found and where it wrote it.

    Attributes
    ----------
    csv, summary, report : Path
        The table, one row an image; ``*_summary.json``; and ``*_report.html`` if it was asked for.
    scored, failed : int
        Images scored, and images that could not be decoded (rows with an ``error``).
    normal, anomalies, unlabelled : int or None
        Of the images scored, those labelled normal, those of other classes, and those without a label, which no metric
        counts; ``None`` where nothing says what is normal.
    auroc : float or None
        Area under the ROC curve of the anomaly score, anomalies as the positive class.
    flagged : int or None
        Images decided to be anomalies, where ``alpha`` or ``fdr`` was given.
    passes : int
        Passes of the encoder an image.
    settings : ScoreConfig
        How it was done.
    """

    csv: Path
    summary: Path
    report: Path | None
    scored: int
    failed: int
    normal: int | None
    anomalies: int | None
    unlabelled: int | None
    auroc: float | None
    flagged: int | None
    passes: int
    settings: ScoreConfig


def score(ckpt: str | Path, settings: ScoreConfig | None = None, **overrides: Any) -> ScoreResult:
    """Score images: a CSV with a row for each and a summary, pictures and a report beside it.

    Parameters
    ----------
    ckpt : path
        Run folder or weights file.
    settings : ScoreConfig, optional
        What to score and how.
    **overrides
        Fields of `ScoreConfig` that take the place of those in ``settings``.

    Raises
    ------
    ValueError
        If a setting is out of its range or a name unknown, a decision is asked for and there are no p-values, or no
        image can be decoded.
    FileNotFoundError
        If the run or the images are missing.
    PermissionError, IsADirectoryError
        If the CSV cannot be written where it is wanted.
    """
    settings = dataclasses.replace(settings or ScoreConfig(), **overrides)
    with deterministic_kernels(settings.deterministic):
        return _score(ckpt, settings)


def _score(ckpt: str | Path, settings: ScoreConfig) -> ScoreResult:
    chosen = get_score(settings.score)
    if settings.num_pairs and chosen.needs_reference:
        raise ValueError(
            f"the score {chosen.name!r} compares clean images with the clean reference images: leave pairs out"
        )
    out = settings.out or (Path(ckpt) / "scores.csv" if Path(ckpt).is_dir() else "scores.csv")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    target = check_writable(Path(out))
    run = load_run(ckpt, trust_plugins=settings.trust_plugins, device=default_device())
    images, normal = _images_and_normal_class(run, settings)
    scorer = make_scorer(run, settings)
    calibration = calibration_scores(run, scorer, settings)
    _say_calibration(calibration, settings)

    weights = run.folder / WEIGHTS if run.folder else Path(ckpt)
    made = {
        **{name: getattr(settings, name) for name in HOW},
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": hashlib.sha256("\0".join(images.paths).encode(errors="surrogateescape")).hexdigest(),
    }
    shape = (len(images), 1 + len(PARTS))
    rows = Rows(target.with_name(target.name + ".part"), made, shape, resume=settings.resume)
    failed = score_images(run, scorer, settings, images, rows)
    if not rows.numbers:
        raise ValueError("no image could be scored: not one of them could be decoded")
    positions = sorted(rows.numbers)
    numbers = np.array([rows.numbers[i] for i in positions])
    if np.isnan(numbers[:, 0]).all():
        raise ValueError(
            f"the score {chosen.name!r} does not exist for the likelihood {scorer.family.name!r}"
        )
    p_values = None if calibration is None else conformal_p_values(numbers[:, 0], calibration)
    decisions, decision = _decide(p_values, settings)
    table = _table(images, positions, numbers, p_values, decisions, failed)

    _write_csv(target, table)
    if settings.parquet:
        _write_parquet(target.with_suffix(".parquet"), table)
    passes = 2 * settings.num_pairs or 1
    counts, found = _against_labels(table, normal)
    summary = {
        "run": str(ckpt),
        "data": str(settings.data or f"{_set_name(run, settings)}, split test"),
        "score": {
            **{name: getattr(settings, name) for name in HOW},
            "meaning": chosen.description,
            "likelihood": scorer.family.name,
            "forward_passes_an_image": passes,
        },
        "normal_class": normal,
        "counts": {"scored": len(positions), "failed": len(failed), **counts},
        "calibration": describe_calibration(calibration),
        "decision": decision,
        "metrics": found,
        "weights_sha256": made["weights"],
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    summary_path = write_json(target.with_name(f"{target.stem}_summary.json"), summary)
    if settings.draw:
        _draw(target, table, images, normal)
    report = None
    if settings.report:
        page = _report(summary, table, images, calibration)
        report = write_atomic(target.with_name(f"{target.stem}_report.html"), page)
    rows.remove()  # only now is everything written
    auroc = found["auroc"] if found else None
    flagged = decision["anomalies"] if decision else None
    return ScoreResult(
        *(target, summary_path, report),
        **summary["counts"],
        auroc=auroc,
        flagged=flagged,
        passes=passes,
        settings=settings,
    )


def _images_and_normal_class(run: LoadedRun, settings: ScoreConfig) -> tuple[ImageSet, str | None]:
    """The images to score, and the name of the class that is normal among them, if anything says so."""
    if settings.data is not None:
        images = images_of(settings.data, run.info.image_size)
    else:
        images = load_split(run, "test", settings.dataset, settings.data_dir, download=settings.download)
    classes = images.classes or ()
    if settings.normal_class is not None:
        return images, classes[images.class_index(settings.normal_class)]
    trained = run.info.config.normal_class
    if trained is not None and trained.isdecimal() and trained not in (run.info.classes or ()):
        trained = (run.info.classes or ())[int(trained)]  # an index means nothing in another set of images
    own = settings.data is None and settings.dataset in (None, run.info.config.dataset)
    if trained is not None and (own or (settings.data is not None and trained in classes)):
        return images, classes[images.class_index(trained)]
    return images, NORMAL_FOLDER if NORMAL_FOLDER in classes else None


def _set_name(run: LoadedRun, settings: ScoreConfig) -> str:
    name = settings.dataset or run.info.config.dataset
    return str(settings.data_dir or run.info.config.data_dir) if name == "folder" else name


# The table ------------------------------------------------------------------------------------------------------------


def _table(
    images: ImageSet,
    positions: list[int],
    numbers: NDArray[np.float64],
    p_values: NDArray[np.float64] | None,
    decisions: NDArray[np.bool_] | None,
    failed: Sequence[tuple[str, str]],
) -> pd.DataFrame:
    """`COLUMNS` of the images scored, their positions in the set as index, then of those that failed, at -1."""
    count = len(positions)
    names = np.array([*(images.classes or ()), None], dtype=object)  # the label -1 is the last of them: none
    columns: dict[str, Any] = dict(zip(("anomaly_score", *PARTS), numbers.T, strict=True))
    columns["path"] = [images.paths[i] for i in positions]
    columns["p_value"] = np.full(count, np.nan) if p_values is None else p_values
    columns["decision"] = [None] * count if decisions is None else np.where(decisions, "anomaly", "normal")
    columns["label"] = [None] * count if images.labels is None else names[images.labels[positions].numpy()]
    columns["error"] = [None] * count
    for name, column in columns.items():
        missing = {"path": [path for path, _ in failed], "error": [reason for _, reason in failed]}
        rest = missing.get(name, [None if name in TEXT else np.nan] * len(failed))
        # Objects, as pandas' own text holds no path whose bytes are not UTF-8.
        columns[name] = np.array([*column, *rest], dtype=object if name in TEXT else float)
    return pd.DataFrame(columns, columns=COLUMNS, index=[*positions, *[-1] * len(failed)])


def _decide(
    p_values: NDArray[np.float64] | None, settings: ScoreConfig
) -> tuple[NDArray[np.bool_] | None, dict[str, Any] | None]:
    """Which images are called anomalies, and by what rule, if that was asked for."""
    level = settings.fdr if settings.alpha is None else settings.alpha
    if p_values is None or level is None:
        return None, None
    if settings.alpha is None:
        rule = "Benjamini-Hochberg: false-discovery rate at most the level"
        decisions = benjamini_hochberg(p_values, level)
    else:
        rule, decisions = "p-value at most the level", p_values <= level
    return decisions, {"rule": rule, "level": level, "anomalies": int(decisions.sum())}


def _labelled(table: pd.DataFrame, normal: str | None) -> tuple[pd.DataFrame, NDArray[np.bool_] | None]:
    """The rows scored that have a label, and which are anomalies; all that were scored where nothing is known."""
    table = table[table.error.isna()]
    if normal is None or table.label.isna().all():
        return table, None
    table = table[table.label.notna()]
    return table, (table.label != normal).to_numpy(bool)


def _against_labels(
    table: pd.DataFrame, normal: str | None
) -> tuple[dict[str, int | None], dict[str, Any] | None]:
    """How many images are normal, anomalies and neither, and the metrics of detection if there are both."""
    known, is_anomaly = _labelled(table, normal)
    if is_anomaly is None:
        return dict.fromkeys(("normal", "anomalies", "unlabelled")), None
    anomalies, unlabelled = int(is_anomaly.sum()), int(table.error.isna().sum()) - len(known)
    counts: dict[str, int | None] = {
        "normal": len(known) - anomalies,
        "anomalies": anomalies,
        "unlabelled": unlabelled,
    }
    if not 0 < anomalies < len(known):
        return counts, None
    return counts, metrics.detection_metrics(known.anomaly_score.to_numpy(), is_anomaly)


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


def _say_calibration(calibration: NDArray[np.float64] | None, settings: ScoreConfig) -> None:
    if calibration is None:
        if settings.alpha is not None or settings.fdr is not None:
            raise ValueError(
                "no p-values, so no decisions: this run has no held-out images to calibrate scores (train --holdout)"
            )
        log.info("no p-values: this run has no held-out images to calibrate them")
        return
    least = 1 / (len(calibration) + 1)
    log.info("p-values against %d held-out images: none is below %.3g", len(calibration), least)
    if settings.alpha is not None and settings.alpha < least:
        log.warning(
            "no image can be called an anomaly at alpha %g: hold out more images (train --holdout)",
            settings.alpha,
        )


# What is written ------------------------------------------------------------------------------------------------------


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write the table with six digits; a text that a spreadsheet would execute gets an apostrophe (OWASP)."""
    shown = table.copy()
    for name in TEXT:
        dangerous = shown[name].str.startswith(("=", "+", "-", "@", "\t", "\r")).fillna(False).astype(bool)
        shown.loc[dangerous, name] = "'" + shown.loc[dangerous, name]
    write_atomic(path, shown.to_csv(index=False, float_format="%.6f", lineterminator="\n"))


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    content = io.BytesIO()
    shown = table.copy()
    shown["path"] = [name.encode(errors="surrogateescape").decode(errors="replace") for name in table.path]
    try:
        shown.to_parquet(content, engine="pyarrow", compression="zstd", index=False)
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'pyro-vje[parquet]'") from None
    write_atomic(path, content.getbuffer())


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


def _draw(csv_path: Path, table: pd.DataFrame, images: ImageSet, normal: str | None) -> None:
    """Draw the histogram, the two factors, and the strangest images into a folder beside the CSV."""
    folder, name = csv_path.parent / PICTURES, csv_path.stem
    folder.mkdir(exist_ok=True)
    known, is_anomaly = _labelled(table, normal)
    pictures.plot_score_histogram(
        known.anomaly_score.to_numpy(), is_anomaly, folder / f"{name}_histogram.png"
    )
    if known.log_direction.notna().any():
        factors = known.log_direction.to_numpy(), known.log_radius.to_numpy()
        pictures.plot_direction_radius(*factors, is_anomaly, folder / f"{name}_direction_radius.png")
    scored = table[table.error.isna()]
    ends = scored.iloc[_ends(scored.anomaly_score.to_numpy())]
    shown = torch.stack([_image(images, i) for i in ends.index])
    pictures.plot_strangest(shown, ends.anomaly_score.to_numpy(), folder / f"{name}_strangest.png", k=SHOWN)


def _report(
    summary: dict[str, Any], table: pd.DataFrame, images: ImageSet, calibration: NDArray[np.float64] | None
) -> str:
    """The HTML page that tells a colleague what is in the summary and the table."""
    scored = table[table.error.isna()]

    def thumbnails(rows: Sequence[int]) -> list[Image.Image]:
        found = (_image(images, int(scored.index[row])) for row in rows)
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in found]

    decision, found = summary["decision"] or {}, summary["metrics"]
    quoted: dict[str, Any] | None = None
    if found:
        quoted = {"AUROC, anomalies positive": (found["auroc"], *found["auroc_95"])}
        for kind in ("anomalies", "normal"):
            quoted[f"AUPR, {kind} positive"] = found[f"aupr_{kind}_positive"]
            quoted[f"FPR at 95 % TPR, {kind} positive"] = found[f"fpr_at_95_tpr_{kind}_positive"]
    _, is_anomaly = _labelled(table, summary["normal_class"])
    return render_report(
        ReportData(
            title=f"Anomaly scores: {summary['data']}",
            score_name=summary["score"]["score"],
            score_meaning=summary["score"]["meaning"],
            made={
                "run": summary["run"],
                "data": summary["data"],
                **{
                    name.replace("_", " "): value
                    for name, value in summary["score"].items()
                    if name != "meaning"
                },
                "date": summary["date"],
                "versions": ", ".join(f"{name} {number}" for name, number in summary["versions"].items()),
            },
            paths=scored.path.tolist(),
            scores=scored.anomaly_score.to_numpy(),
            thumbnails=thumbnails,
            p_values=None if calibration is None else scored.p_value.to_numpy(),
            calibration_scores=calibration,
            is_anomaly=is_anomaly if not summary["counts"]["unlabelled"] else None,
            log_direction=scored.log_direction.to_numpy(),
            log_radius=scored.log_radius.to_numpy(),
            alpha=decision.get("level"),
            decisions=(scored.decision == "anomaly").to_numpy() if decision else None,
            decided_by=decision.get("rule", ""),
            failed=list(table.loc[table.error.notna(), ["path", "error"]].itertuples(index=False, name=None)),
            metrics=quoted,
            k=SHOWN,
        )
    )


# Embeddings -----------------------------------------------------------------------------------------------------------


def embed(
    ckpt: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    batch_size: int = 256,
    trust_plugins: bool = False,
) -> tuple[Path, int, int]:
    """Write features, embeddings and posteriors of a folder of images to an ``.npz`` file.

    Arrays: ``features`` (N, F), ``embeddings``, ``loc``, ``scale`` (N, D) as float32, ``paths`` (N,) as text, and
    ``labels`` (N,), -1 for none, with ``classes`` where the folder has class folders.

    Returns
    -------
    tuple
        The file, the number of images in it, and the number that could not be decoded.

    Raises
    ------
    ValueError, FileNotFoundError
        As for `score`.
    """
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    target = check_writable(Path(out))
    device = default_device()
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    images = images_of(data, run.info.image_size)
    encoded = encode(run.vje, images, run.info.view, batch_size=batch_size, device=device)
    arrays = {name: getattr(encoded, name).numpy() for name in ("features", "embeddings", "loc", "scale")}
    arrays["paths"] = np.array([images.paths[i] for i in encoded.indices.tolist()])
    if images.labels is not None:
        arrays["labels"] = images.labels[encoded.indices].numpy()
        arrays["classes"] = np.array(images.classes or ())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return write_atomic(target, buffer.getvalue()), len(encoded.indices), len(images.failed)
