"""Anomaly scores from the likelihood, one forward pass an image; higher is stranger.

A new score is one function of `LikelihoodParts` and one entry in `SCORES`.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vje import metrics, pictures
from pyro_vje.calibration import conformal_p_values
from pyro_vje.data import ImageSet, load_dataset
from pyro_vje.encoding import encode, encode_batches
from pyro_vje.evaluation import load_split
from pyro_vje.files import write_atomic
from pyro_vje.model import VJE
from pyro_vje.runs import PICTURES, LoadedRun, load_calibration, load_run

log = logging.getLogger("pyro_vje")

NORMAL_FOLDER = "normal"
"""A class folder of this name holds the normal images; every other class is an anomaly."""


class LikelihoodParts(NamedTuple):
    """What scores are made of, each ``(N,)`` in nats an image (variance: squared units of the latent).

    Attributes
    ----------
    log_likelihood
        E_q log p(e | z, scale): the image's own embedding under the latents inferred from it.
    log_direction, log_radius
        Its two factors, apart from the Jacobian: log_likelihood = log_direction + log_radius - (D - 1) log ‖e‖. NaN
        for a family that does not split them.
    kl
        KL(q(z | image) ‖ p(z)), unweighted.
    variance
        Mean posterior variance over features.
    """

    log_likelihood: Tensor
    log_direction: Tensor
    log_radius: Tensor
    kl: Tensor
    variance: Tensor


SCORES: dict[str, Callable[[LikelihoodParts], Tensor]] = {
    "conditional": lambda parts: -parts.log_likelihood,
    "elbo": lambda parts: parts.kl - parts.log_likelihood,
    "direction": lambda parts: -parts.log_direction,
    "radius": lambda parts: -parts.log_radius,
    "variance": lambda parts: parts.variance,
}


def latent_noise(num_particles: int, dim: int, seed: int) -> Tensor:
    """Standard normal noise ``(num_particles, D)``, antithetic in pairs, the same for every image.

    Common noise makes the score of an image independent of the batch it is in and lowers the variance of
    differences between images.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((num_particles + 1) // 2, dim, generator=generator)
    return torch.cat([half, -half])[:num_particles]


@torch.no_grad()
def likelihood_parts(
    vje: VJE, embeddings: Tensor, loc: Tensor, scale: Tensor, noise: Tensor
) -> LikelihoodParts:
    """Evaluate the likelihood of each image's embedding under its own posterior.

    Parameters
    ----------
    vje : VJE
        The model.
    embeddings, loc, scale : tensors
        ``(N, D)`` each: N images and their posteriors.
    noise : tensor
        ``(P, D)`` from `latent_noise`: the particles z = loc + scale · noise.
    """
    radius = torch.linalg.vector_norm(embeddings, dim=-1)
    log_jacobian = (embeddings.shape[-1] - 1) * radius.log()
    sums = torch.zeros(3, len(loc), dtype=torch.float64, device=loc.device)
    for particle in noise.to(loc.device):  # one at a time: memory does not grow with the number of particles
        likelihood = vje.likelihood(loc + scale * particle, scale)
        if hasattr(likelihood, "log_prob_direction"):
            direction, radial = likelihood.log_prob_direction(embeddings), likelihood.log_prob_radius(radius)
            joint = direction + radial - log_jacobian
        else:
            joint = likelihood.log_prob(embeddings)
            direction = radial = torch.full_like(joint, torch.nan)
        sums += torch.stack([joint, direction, radial])
    joint, direction, radial = sums / len(noise)
    kl = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1)
    return LikelihoodParts(joint, direction, radial, kl.double(), (scale**2).mean(-1).double())


COLUMNS = (
    "path",
    "anomaly_score",
    "p_value",
    "log_likelihood",
    "log_direction",
    "log_radius",
    "kl",
    "posterior_variance",
    "label",
    "error",
)


@dataclass(frozen=True)
class ScoreResult:
    """What `score` found and where it wrote it.

    Attributes
    ----------
    csv : Path
        The table, one row an image.
    scored, failed : int
        Images scored, and images that could not be decoded (rows with an ``error``).
    normal : int or None
        Images labelled normal, where there are labels of normal and anomalous images.
    auroc : float or None
        Area under the ROC curve of the anomaly score, anomalies as the positive class.
    score, num_particles, seed
        How the score was made; one forward pass an image.
    """

    csv: Path
    scored: int
    failed: int
    normal: int | None
    auroc: float | None
    score: str
    num_particles: int
    seed: int


def score(
    ckpt: str | Path,
    *,
    data: str | Path | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
    normal_class: str | None = None,
    score: str = "conditional",
    num_particles: int = 16,
    seed: int = 0,
    batch_size: int = 256,
    download: bool = True,
    out: str | Path | None = None,
    draw: bool = True,
    trust_plugins: bool = False,
) -> ScoreResult:
    """Score images: a CSV with a row for each, and pictures beside it.

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
    score : str
        A name in `SCORES`.
    num_particles : int
        Samples of the latent an image; they cost no further pass of the encoder.
    seed : int
        Seed of those samples.
    batch_size : int
        Images in a forward pass; the scores do not depend on it.
    out : path, optional
        The CSV; by default ``scores.csv`` in the run folder.
    draw : bool
        Whether to draw pictures into a folder ``pictures`` beside the CSV.
    trust_plugins : bool
        See `pyro_vje.runs.load_run`.

    Raises
    ------
    ValueError
        If a name is unknown, or no image can be decoded.
    FileNotFoundError
        If the run or the images are missing.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose one of {', '.join(SCORES)}")
    if num_particles < 1 or batch_size < 1:
        raise ValueError(
            f"num_particles and batch_size must be at least 1, not {num_particles} and {batch_size}"
        )
    if data is not None and dataset is not None:
        raise ValueError("give either a folder of images (data) or a data set (dataset), not both")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    if data is not None:
        images = load_dataset("folder", data, "all", image_size=run.info.image_size)
        if normal_class is None and run.info.config.normal_class in (images.classes or ()):
            normal_class = run.info.config.normal_class
    else:
        images = load_split(run, "test", dataset, data_dir, download=download)
        # A run's own normal class means nothing in another data set.
        if dataset is None or dataset == run.info.config.dataset:
            normal_class = normal_class if normal_class is not None else run.info.config.normal_class
    is_anomaly = anomaly_labels(images, normal_class)
    if out is None:
        out = run.folder / "scores.csv" if run.folder else Path("scores.csv")
    target = Path(out)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")

    noise = latent_noise(num_particles, run.vje.embedding_dim, seed)
    indices, batches = [], []
    for encoded in encode_batches(run.vje, images, run.info.view, batch_size=batch_size, device=device):
        indices.append(encoded.indices)
        found = likelihood_parts(run.vje, encoded.embeddings, encoded.loc, encoded.scale, noise)
        batches.append(LikelihoodParts(*(part.cpu() for part in found)))
    if not batches:
        raise ValueError("no image could be scored: not one of them could be decoded")
    index = torch.cat(indices)
    parts = LikelihoodParts(*(torch.cat(column) for column in zip(*batches, strict=True)))
    scores = SCORES[score](parts)
    if torch.isnan(scores).all():
        raise ValueError(
            f"the score {score!r} does not exist for the likelihood {run.info.config.likelihood!r}"
        )
    p_values = _p_values(run, score, scores, noise)
    _write_csv(target, images, index, scores, p_values, parts)
    known = None if is_anomaly is None else is_anomaly[index]
    if draw:
        _draw(target, images, index, scores, parts, known)
    auroc = None if known is None or len(known.unique()) < 2 else metrics.auroc(scores.numpy(), known.numpy())
    return ScoreResult(
        csv=target,
        scored=len(index),
        failed=len(images.failed),
        normal=None if known is None else int((~known).sum()),
        auroc=auroc,
        score=score,
        num_particles=num_particles,
        seed=seed,
    )


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


def _p_values(run: LoadedRun, score: str, scores: Tensor, noise: Tensor) -> Tensor:
    """Conformal p-values from the run's held-out images, scored with the same noise; NaN where there are none."""
    held_out = load_calibration(run)
    if held_out is None:
        log.info("no p-values: this run has no held-out images to calibrate them")
        return torch.full_like(scores, torch.nan)
    log.info(
        "p-values against %d held-out images: none is below %.3g",
        len(held_out[0]),
        1 / (len(held_out[0]) + 1),
    )
    calibration = SCORES[score](likelihood_parts(run.vje.cpu(), *held_out, noise))
    return torch.from_numpy(conformal_p_values(scores, calibration))


def _write_csv(
    path: Path, images: ImageSet, index: Tensor, scores: Tensor, p_values: Tensor, parts: LikelihoodParts
) -> None:
    rows: list[dict[str, Any]] = []
    columns = torch.stack(
        [
            scores,
            p_values,
            parts.log_likelihood,
            parts.log_direction,
            parts.log_radius,
            parts.kl,
            parts.variance,
        ],
        dim=1,
    )
    for i, values in zip(index.tolist(), columns.tolist(), strict=True):
        label = ""
        if images.labels is not None and images.classes and images.labels[i] >= 0:
            label = images.classes[int(images.labels[i])]
        numbers = ["" if value != value else f"{value:.6f}" for value in values]
        rows.append(dict(zip(COLUMNS, [images.paths[i], *numbers, label, ""], strict=True)))
    rows += [{"path": failed, "error": reason} for failed, reason in images.failed]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: row["path"]))
    write_atomic(path, text.getvalue())


def _draw(
    csv_path: Path,
    images: ImageSet,
    index: Tensor,
    scores: Tensor,
    parts: LikelihoodParts,
    is_anomaly: Tensor | None,
) -> None:
    folder = csv_path.parent / PICTURES
    folder.mkdir(exist_ok=True)
    name = csv_path.stem
    pictures.plot_score_histogram(scores, is_anomaly, folder / f"{name}_histogram.png")
    if not torch.isnan(parts.log_direction).all():
        pictures.plot_direction_radius(
            parts.log_direction, parts.log_radius, is_anomaly, folder / f"{name}_direction_radius.png"
        )
    order = scores.argsort()
    k = min(12, len(order) // 2)
    if k:
        ends = torch.cat([order[:k], order[-k:]])
        shown = images.select(index[ends])
        tensors = [shown.images[i] for i in range(len(shown))]
        pictures.plot_strangest(torch.stack(tensors), scores[ends], folder / f"{name}_strangest.png", k=k)


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
    target = Path(out)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
