"""Scoring images: a row for each in a CSV, p-values and decisions, a summary, pictures, a report.

Images are read, encoded and written batch by batch, so memory does not grow with their number and an interrupted run
can go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.anomaly import outputs
from pyro_vje.anomaly.outputs import PARTS, Scored, describe_calibration, write_csv, write_parquet
from pyro_vje.anomaly.parts import Scorer, augmented_pairs
from pyro_vje.anomaly.rows import Journal
from pyro_vje.anomaly.scores import SCORES
from pyro_vje.data import ImageSet, load_dataset, views_for
from pyro_vje.data.splits import load_train_set
from pyro_vje.metrics.conformal import benjamini_hochberg, conformal_p_values
from pyro_vje.model.encoding import Posteriors, encode, encode_batches, images_at_once
from pyro_vje.representation.evaluation import load_split
from pyro_vje.runs.files import check_writable, write_atomic, write_json
from pyro_vje.runs.folder import (
    CALIBRATION,
    REFERENCE,
    WEIGHTS,
    LoadedRun,
    default_device,
    load_posteriors,
    load_run,
    versions,
)

log = logging.getLogger("pyro_vje")

NORMAL_FOLDER = "normal"
"""A class folder of this name holds the normal images; every other class is an anomaly."""
PROGRESS_EVERY = 30.0  # seconds


@dataclass(frozen=True)
class ScoreSettings:
    """How images are scored.

    Attributes
    ----------
    score : str
        A name in `pyro_vje.anomaly.scores.SCORES`.
    likelihood : str or None
        A likelihood family to score with; by default the one that was trained.
    num_pairs : int
        0 scores an image's own embedding (one pass of the encoder). K > 0 scores K augmented pairs, each view given
        the other (2 K passes), and takes the mean.
    num_particles, seed : int
        Samples of the latent for each expectation, and the seed of every draw.
    """

    score: str = "conditional"
    likelihood: str | None = None
    num_pairs: int = 0
    num_particles: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}: choose one of {', '.join(SCORES)}")
        if self.num_pairs < 0:
            raise ValueError(f"num_pairs must be at least 0, not {self.num_pairs}")
        if self.num_pairs and SCORES[self.score].needs_reference:
            raise ValueError(
                f"the score {self.score!r} compares clean images with the clean reference images: leave pairs out"
            )

    @property
    def passes(self) -> int:
        """Passes of the encoder an image."""
        return 2 * self.num_pairs or 1


@dataclass(frozen=True)
class ScoreResult:
    """What `score` found and where it wrote it.

    Attributes
    ----------
    csv, summary, report : Path
        The table, one row an image; ``*_summary.json``; and ``*_report.html`` if it was asked for.
    scored, failed : int
        Images scored, and images that could not be decoded (rows with an ``error``).
    normal : int or None
        Images labelled normal, where there are labels of normal and anomalous images.
    auroc : float or None
        Area under the ROC curve of the anomaly score, anomalies as the positive class.
    flagged : int or None
        Images decided to be anomalies, where ``alpha`` or ``fdr`` was given.
    settings : ScoreSettings
        How it was done.
    """

    csv: Path
    summary: Path
    report: Path | None
    scored: int
    failed: int
    normal: int | None
    auroc: float | None
    flagged: int | None
    settings: ScoreSettings


def score(
    ckpt: str | Path,
    *,
    data: str | Path | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
    normal_class: str | None = None,
    score: str = "conditional",
    score_likelihood: str | None = None,
    num_pairs: int = 0,
    num_particles: int = 16,
    seed: int = 0,
    alpha: float | None = None,
    fdr: float | None = None,
    batch_size: int = 256,
    download: bool = True,
    out: str | Path | None = None,
    draw: bool = True,
    report: bool = False,
    parquet: bool = False,
    resume: bool = False,
    trust_plugins: bool = False,
) -> ScoreResult:
    """Score images: a CSV with a row for each and a summary, pictures and a report beside it.

    Parameters
    ----------
    ckpt : path
        Run folder or weights file.
    data : path, optional
        A folder of images, all of which are scored.
    dataset, data_dir, download :
        Score the test split of a data set instead; by default the run's own.
    normal_class : str, optional
        The class that counts as normal; by default the class that the run was trained on, or the class folder
        ``normal``.
    score, score_likelihood, num_pairs, num_particles, seed :
        See `ScoreSettings`.
    alpha : float, optional
        Decide: an image is an anomaly if its p-value is at most this. Of normal images, at most this share is
        expected to be called anomalies.
    fdr : float, optional
        Decide by Benjamini-Hochberg instead: of the images called anomalies at most this share is expected to be
        normal.
    batch_size : int
        Images read and encoded at once, on a CPU raised until passes of the encoder are full; the scores there do
        not depend on it.
    out : path, optional
        The CSV; by default ``scores.csv`` in the run folder.
    draw, report, parquet : bool
        Whether to draw pictures into a folder ``pictures`` beside the CSV, to write one self-contained HTML page,
        and to write the table as Parquet too (needs pyarrow).
    resume : bool
        Go on from an interrupted call with the same arguments, whose rows are in ``<out>.part``, if there is one.
    trust_plugins : bool
        See `pyro_vje.runs.folder.load_run`.

    Raises
    ------
    ValueError
        If a name is unknown, a decision is asked for and there are no p-values, or no image can be decoded.
    FileNotFoundError
        If the run or the images are missing.
    PermissionError, IsADirectoryError
        If the CSV cannot be written where it is wanted.
    """
    settings = ScoreSettings(score, score_likelihood, num_pairs, num_particles, seed)
    _check_levels(alpha, fdr)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if data is not None and dataset is not None:
        raise ValueError("give either a folder of images (data) or a data set (dataset), not both")
    if out is None:
        out = Path(ckpt) / "scores.csv" if Path(ckpt).is_dir() else "scores.csv"
    target = check_writable(Path(out))
    device = default_device()
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    if data is not None:
        images = load_dataset("folder", data, "all", image_size=run.info.image_size, residency="stream")
        if normal_class is None and run.info.config.normal_class in (images.classes or ()):
            normal_class = run.info.config.normal_class
    else:
        images = load_split(run, "test", dataset, data_dir, download=download)
        # A run's own normal class means nothing in another data set.
        if dataset is None or dataset == run.info.config.dataset:
            normal_class = normal_class if normal_class is not None else run.info.config.normal_class
    is_anomaly = anomaly_labels(images, normal_class)
    scorer = make_scorer(run, settings)
    calibration = calibration_scores(run, scorer, settings)
    _say_calibration(calibration, alpha, fdr)

    weights = run.folder / WEIGHTS if run.folder else Path(ckpt)
    fingerprint = {
        **dataclasses.asdict(settings),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": hashlib.sha256("\0".join(images.paths).encode(errors="surrogateescape")).hexdigest(),
    }
    journal = Journal(target.with_name(target.name + ".part"), fingerprint, 1 + len(PARTS), resume=resume)
    _score_all(run, scorer, settings, images, journal, batch_size)
    table = journal.read(images)
    if not len(table.positions):
        raise ValueError("no image could be scored: not one of them could be decoded")
    if np.isnan(table.scores).all():
        family = settings.likelihood or run.info.config.likelihood
        raise ValueError(f"the score {score!r} does not exist for the likelihood {family!r}")

    p_values = None if calibration is None else conformal_p_values(table.scores, calibration)
    decisions, rule = None, "p-value at most the level"
    if p_values is not None and alpha is not None:
        decisions = p_values <= alpha
    elif p_values is not None and fdr is not None:
        decisions, rule = (
            benjamini_hochberg(p_values, fdr),
            "Benjamini-Hochberg: false-discovery rate at most the level",
        )
    known = None if is_anomaly is None else is_anomaly[table.positions].numpy()
    both = known is not None and 0 < known.sum() < len(known)
    found = metrics.detection_metrics(table.scores, known) if known is not None and both else None
    flagged = None if decisions is None else int(decisions.sum())
    scored = Scored(images, table, calibration, p_values, decisions, known)
    write_csv(target, scored)
    if parquet:
        write_parquet(target)
    summary = {
        "run": str(ckpt),
        "data": str(data or f"{_set_name(run, dataset, data_dir)}, split test"),
        "score": {
            **dataclasses.asdict(settings),
            "meaning": SCORES[score].description,
            "likelihood": settings.likelihood or run.info.config.likelihood,
            "forward_passes_an_image": settings.passes,
        },
        "counts": {
            "scored": len(table.positions),
            "failed": len(table.failed),
            "normal": None if known is None else int((~known).sum()),
            "anomalies": None if known is None else int(known.sum()),
        },
        "calibration": describe_calibration(calibration),
        "decision": None if flagged is None else {"rule": rule, "level": alpha or fdr, "anomalies": flagged},
        "metrics": found,
        "weights_sha256": fingerprint["weights"],
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    summary_path = write_json(target.with_name(f"{target.stem}_summary.json"), summary)
    if draw:
        outputs.draw(target, scored)
    report_path = None
    if report:
        page = outputs.report(summary, scored, target.parent)
        report_path = write_atomic(target.with_name(f"{target.stem}_report.html"), page)
    journal.remove()  # only now is everything written
    return ScoreResult(
        csv=target,
        summary=summary_path,
        report=report_path,
        scored=len(table.positions),
        failed=len(table.failed),
        normal=summary["counts"]["normal"],
        auroc=found["auroc"] if found else None,
        flagged=flagged,
        settings=settings,
    )


def _set_name(run: LoadedRun, dataset: str | None, data_dir: str | None) -> str:
    name = dataset or run.info.config.dataset
    return str(data_dir or run.info.config.data_dir) if name == "folder" else name


def anomaly_labels(images: ImageSet, normal_class: str | None) -> Tensor | None:
    """Which images ``(N,)`` are anomalies: those outside the normal class; ``None`` where nothing says so.

    Raises
    ------
    ValueError
        If ``normal_class`` is given and there is no such class.
    """
    if normal_class is None:
        if NORMAL_FOLDER not in (images.classes or ()):
            return None
        normal_class = NORMAL_FOLDER
    label = images.class_index(normal_class)
    return None if images.labels is None else images.labels != label


# From images to scores ------------------------------------------------------------------------------------------------


def make_scorer(run: LoadedRun, settings: ScoreSettings) -> Scorer:
    """The scorer of a run, with the reference images if the run has them."""
    return Scorer(
        run.vje,
        reference=load_posteriors(run, REFERENCE),
        num_particles=settings.num_particles,
        seed=settings.seed,
        likelihood=settings.likelihood,
    )


def posteriors_of(
    run: LoadedRun, images: ImageSet, settings: ScoreSettings, batch_size: int = 256
) -> Iterator[tuple[Tensor, list[Posteriors]]]:
    """Indices of the images of each batch, and their contexts and targets: one pair, or ``settings.passes`` pairs."""
    device = next(run.vje.parameters()).device
    if not settings.num_pairs:
        for encoded in encode_batches(run.vje, images, run.info.view, batch_size=batch_size, device=device):
            yield encoded.indices, [encoded.posteriors]
        return
    views, _ = views_for(run.info.config.dataset, run.info.image_size)
    draw = {"num_pairs": settings.num_pairs, "seed": settings.seed}
    for index, batch in images.batches(images_at_once(images, batch_size, device)):
        yield index, augmented_pairs(run.vje, views, batch.to(device), **draw)


def calibration_scores(run: LoadedRun, scorer: Scorer, settings: ScoreSettings) -> NDArray[np.float64] | None:
    """Scores ``(n,)`` of the run's held-out images, made like those of any image; ``None`` where there are none."""
    if not settings.num_pairs:
        stored = load_posteriors(run, CALIBRATION)
        return None if stored is None else scorer.scores(settings.score, stored).cpu().numpy()
    try:
        config = dataclasses.replace(run.info.config, image_size=run.info.image_size, download=False)
        train_set, held_out = load_train_set(config)
    except (FileNotFoundError, ValueError) as error:
        log.warning(
            "augmented pairs are calibrated on the held-out images themselves, not at hand: %s", error
        )
        return None
    if held_out is None or len(train_set) != run.info.train_images:
        log.warning("no p-values: the training images have changed since, and with them what was held out")
        return None
    batches = [
        torch.stack([scorer.scores(settings.score, pair) for pair in pairs]).mean(0)
        for _, pairs in posteriors_of(run, held_out, settings)
    ]
    return torch.cat(batches).cpu().numpy()


def _score_all(
    run: LoadedRun,
    scorer: Scorer,
    settings: ScoreSettings,
    images: ImageSet,
    journal: Journal,
    batch_size: int,
) -> None:
    remaining = [i for i, path in enumerate(images.paths) if path not in journal.done]
    if len(remaining) < len(images):
        log.info("%d of %d images were scored before", len(images) - len(remaining), len(images))
    todo = images.select(remaining)
    entry = SCORES[settings.score]
    said = time.monotonic()
    done = 0
    try:
        for index, pairs in posteriors_of(run, todo, settings, batch_size) if remaining else ():
            parts = [scorer.parts(pair, with_reference=entry.needs_reference) for pair in pairs]
            scores = torch.stack([entry(part) for part in parts]).mean(0)
            means = [torch.stack([getattr(part, name) for part in parts]).mean(0) for name in PARTS]
            columns = torch.stack([scores, *means], dim=1).tolist()
            journal.add((todo.paths[i], values) for i, values in zip(index.tolist(), columns, strict=True))
            done += len(index)
            if time.monotonic() - said > PROGRESS_EVERY:
                said = time.monotonic()
                log.info("%d of %d images scored", done, len(todo))
    except KeyboardInterrupt:
        log.warning("%d of %d images are in %s; --resume goes on", done, len(todo), journal.path)
        raise
    journal.add((path, reason) for path, reason in todo.failed if path not in journal.done)


# Decisions ------------------------------------------------------------------------------------------------------------


def _check_levels(alpha: float | None, fdr: float | None) -> None:
    if alpha is not None and fdr is not None:
        raise ValueError("give either alpha (for each image) or fdr (over all images), not both")
    for name, level in (("alpha", alpha), ("fdr", fdr)):
        if level is not None and not 0 < level < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {level}")


def _say_calibration(calibration: NDArray[np.float64] | None, alpha: float | None, fdr: float | None) -> None:
    if calibration is None:
        if alpha is not None or fdr is not None:
            raise ValueError(
                "no p-values, so no decisions: this run has no held-out images to calibrate scores (train --holdout)"
            )
        log.info("no p-values: this run has no held-out images to calibrate them")
        return
    least = 1 / (len(calibration) + 1)
    log.info("p-values against %d held-out images: none is below %.3g", len(calibration), least)
    if alpha is not None and alpha < least:
        log.warning(
            "no image can be called an anomaly at alpha %g: hold out more images (train --holdout)", alpha
        )


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
    ``labels`` (N,) with ``classes`` where the folder has class folders.

    Returns
    -------
    tuple
        The file, the number of images in it, and the number that could not be decoded.

    Raises
    ------
    ValueError, FileNotFoundError
        As for `score`.
    """
    target = check_writable(Path(out))
    device = default_device()
    run: LoadedRun = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    images = load_dataset("folder", data, "all", image_size=run.info.image_size)
    encoded = encode(run.vje, images, run.info.view, batch_size=batch_size, device=device)
    arrays = {name: getattr(encoded, name).numpy() for name in ("features", "embeddings", "loc", "scale")}
    arrays["paths"] = np.array([images.paths[i] for i in encoded.indices.tolist()])
    if images.labels is not None:
        arrays["labels"] = images.labels[encoded.indices].numpy()
        arrays["classes"] = np.array(images.classes or ())
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return write_atomic(target, buffer.getvalue()), len(encoded.indices), len(images.failed)
