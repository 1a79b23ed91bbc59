"""Evaluation of frozen representations: k-NN and linear probe, trained against untrained against raw pixels."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.data import CleanView, ImageSet, iter_batches, load_dataset
from pyro_vje.encoding import encode
from pyro_vje.files import write_json
from pyro_vje.model import VJE
from pyro_vje.runs import LoadedRun, build_model, load_run

log = logging.getLogger("pyro_vje")


def load_split(
    run: LoadedRun, split: str, dataset: str | None, data_dir: str | None, *, download: bool = True
) -> ImageSet:
    """Load a split of the run's own data set, or of another one, at the run's image size."""
    config = run.info.config
    own = dataset is None or dataset == config.dataset
    return load_dataset(
        dataset or config.dataset,
        data_dir if data_dir is not None or not own else config.data_dir,
        split,
        image_size=run.info.image_size,
        download=download,
    )


def pixels(images: ImageSet, view: CleanView) -> tuple[Tensor, Tensor]:
    """Flattened normalised pixels ``(N, 3·S·S)`` and the indices ``(N,)`` of the images they belong to."""
    batches = [(indices, view(batch).flatten(1)) for indices, batch in iter_batches(images, 1024)]
    return torch.cat([indices for indices, _ in batches]), torch.cat([values for _, values in batches])


Extract = Callable[[ImageSet], tuple[Tensor, Tensor]]
"""Images to the indices ``(N,)`` of those that could be decoded and their features ``(N, F)``."""


def features_of(vje: VJE, view: CleanView, *, batch_size: int = 256) -> Extract:
    """Extractor of the encoder's output, on the device where the model lies."""
    device = next(vje.parameters()).device

    def extract(images: ImageSet) -> tuple[Tensor, Tensor]:
        encoded = encode(vje, images, view, batch_size=batch_size, device=device)
        return encoded.indices, encoded.features

    return extract


def probe(
    extract: Extract,
    train_set: ImageSet,
    test_set: ImageSet,
    *,
    k: int = 200,
    temperature: float = 0.1,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted k-NN and linear probe of one representation, on labelled images.

    Returns
    -------
    tuple of dict
        What was found (``dim``, accuracies ``knn`` and ``linear``, ``linear_converged``), and the protocols behind
        the accuracies, by the same names.
    """
    train_index, train = extract(train_set)
    test_index, test = extract(test_set)
    data = train, train_set.labels_at(train_index), test, test_set.labels_at(test_index)
    knn = metrics.knn_accuracy(*data, k=k, temperature=temperature)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the linear probe stopped")  # said in the row instead
        linear = metrics.linear_probe(*data, seed=seed)
    row = {
        "dim": train.shape[1],
        "knn": knn["accuracy"],
        "linear": linear["accuracy"],
        "linear_converged": linear["converged"],
    }
    return row, {"knn": _protocol(knn), "linear": _protocol(linear)}


def evaluate(
    ckpt: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    download: bool = True,
    k: int = 200,
    temperature: float = 0.1,
    batch_size: int = 256,
    trust_plugins: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Weighted k-NN and linear probe on the labelled splits, for the last epoch's weights and two controls.

    Parameters
    ----------
    ckpt : path
        Run folder or weights file.
    dataset, data_dir, download :
        What to evaluate on; by default the run's own data set.
    k, temperature :
        Neighbours and temperature of the k-NN (Wu et al. 2018: cosine, weights exp(similarity / T)).
    batch_size : int
        Images in a forward pass.
    trust_plugins : bool
        See `pyro_vje.runs.load_run`.
    out : path, optional
        Where to write the JSON; by default ``eval.json`` in the run folder.

    Returns
    -------
    dict
        ``rows`` (one for each representation, with ``knn`` and ``linear`` accuracy), the ``protocols`` behind the
        numbers, and what they were measured on.

    Raises
    ------
    ValueError
        If the data have no labels.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    config = run.info.config
    train_set = load_split(run, "train", dataset, data_dir, download=download).labelled()
    test_set = load_split(run, "test", dataset, data_dir, download=download).labelled()
    untrained = build_model(config, run.info.image_size).to(device).eval()

    representations: dict[str, Extract] = {
        "trained encoder": features_of(run.vje, run.info.view, batch_size=batch_size),
        "untrained encoder": features_of(untrained, run.info.view, batch_size=batch_size),
        "raw pixels": lambda images: pixels(images, run.info.view),
    }
    rows: list[dict[str, Any]] = []
    protocols: dict[str, Any] = {}
    for name, extract in representations.items():
        log.info("evaluating %s", name)
        # The protocols are the same for every row.
        row, protocols = probe(extract, train_set, test_set, k=k, temperature=temperature, seed=config.seed)
        rows.append({"representation": name, **row})
    result = {
        "dataset": dataset or config.dataset,
        "train_images": len(train_set),
        "test_images": len(test_set),
        "image_size": run.info.image_size,
        "weights": f"epoch {config.epochs} of {config.epochs} (the last)",
        "seed": config.seed,
        "rows": rows,
        "protocols": protocols,
    }
    target = Path(out) if out is not None else (run.folder / "eval.json" if run.folder else None)
    if target is not None:
        write_json(target, result)
    return result


def _protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    own = ("accuracy", "train_accuracy", "iterations", "converged")
    return {name: value for name, value in result.items() if name not in own}


def format_table(result: dict[str, Any]) -> str:
    """`evaluate`'s result as text: a row for each representation, then the protocols."""
    knn, linear = result["protocols"]["knn"], result["protocols"]["linear"]
    lines = [
        f"{result['dataset']}: {result['train_images']} training and {result['test_images']} test images, "
        f"weights of {result['weights']}",
        f"{'representation':<20}{'dim':>6}{'k-NN':>9}{'linear':>9}",
    ]
    for row in result["rows"]:
        note = "" if row["linear_converged"] else "  (linear probe not converged)"
        lines.append(
            f"{row['representation']:<20}{row['dim']:>6}{row['knn']:>9.4f}{row['linear']:>9.4f}{note}"
        )
    lines.append("k-NN:   " + ", ".join(f"{name} {value}" for name, value in knn.items()))
    lines.append("linear: " + ", ".join(f"{name} {value}" for name, value in linear.items()))
    return "\n".join(lines)
