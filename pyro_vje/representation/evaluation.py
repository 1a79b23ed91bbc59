"""Evaluation of frozen representations: probes, geometry, uncertainty; trained against untrained against raw pixels."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.data import CleanView, ImageSet, TwoViews, derive_seed, load_dataset, views_for, warn_if_shared
from pyro_vje.model.encoding import Encoded, encode
from pyro_vje.model.vje import VJE
from pyro_vje.pages import pictures
from pyro_vje.representation.probes import probe_views, sgd_probe
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import PICTURES, LoadedRun, build_model, default_device, load_run

log = logging.getLogger("pyro_vje")

LINEAR = ("logistic", "sgd")
WIDTH = 110  # columns of the printed text


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
    batches = [(indices, view(batch).flatten(1)) for indices, batch in images.batches(1024)]
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


Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Features ``(N, F)`` and labels ``(N,)`` of the training images, then those of the test images."""

Found = tuple[dict[str, Any], dict[str, Any]]
"""What was found, and the protocol behind each number by the same name."""


def probe(
    extract: Extract,
    train_set: ImageSet,
    test_set: ImageSet,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted k-NN and logistic regression on one representation of labelled images.

    Returns
    -------
    tuple of dict
        What was found (``dim``, accuracies ``knn`` and ``linear``, ``linear_converged``), and the protocols behind
        the accuracies, by the same names.
    """
    train_index, train = extract(train_set)
    test_index, test = extract(test_set)
    data = train, train_set.labels_at(train_index), test, test_set.labels_at(test_index)
    return _merge(_knn(data, [k], [temperature]), _logistic(data))


def _merge(*found: Found) -> Found:
    rows, protocols = zip(*found, strict=True)
    return dict(ChainMap(*reversed(rows))), dict(ChainMap(*reversed(protocols)))


def _protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    own = ("accuracy", "train_accuracy", "iterations", "converged")
    return {name: value for name, value in result.items() if name not in own}


def _knn(data: Data, ks: Sequence[int], temperatures: Sequence[float]) -> Found:
    """k-NN for the first k and temperature, and under ``knn_sweep`` for all combinations where there are several."""
    results = metrics.knn_sweep(*data, ks=ks, temperatures=temperatures)
    row: dict[str, Any] = {"dim": data[0].shape[1], "knn": results[0]["accuracy"]}
    protocols = {"knn": _protocol(results[0])}
    if len(results) > 1:
        names = ("k", "temperature", "accuracy")
        row["knn_sweep"] = [{name: result[name] for name in names} for result in results]
        protocols["knn_sweep"] = {**protocols["knn"], "k": list(ks), "temperature": list(temperatures)}
    return row, protocols


def _logistic(data: Data) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the row instead
        result = metrics.linear_probe(*data)
    row = {"linear": result["accuracy"], "linear_converged": result["converged"]}
    return row, {"linear": _protocol(result)}


def _embed_views(
    vje: VJE, images: ImageSet, views: TwoViews, *, batch_size: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Embeddings ``(N, D)`` of two augmented views of each image, on the CPU, by a model in evaluation mode."""
    device = next(vje.parameters()).device
    generator = torch.Generator(device).manual_seed(derive_seed("alignment", seed))
    parts = []
    for _, batch in images.batches(batch_size):
        with torch.no_grad():
            embeddings = vje.embed(views(batch.to(device), generator).flatten(0, 1))
        parts.append(embeddings.unflatten(0, (2, -1)).cpu())
    first, second = torch.cat(parts, dim=1)
    return first, second


def _geometry(test: Encoded, augmented: tuple[Tensor, Tensor], protocol: dict[str, Any]) -> Found:
    """Effective rank, alignment and uniformity; ``protocol`` says what the augmented views are."""
    images = {"test_images": len(test.features)}
    row = {
        "effective_rank": metrics.effective_rank(test.features),
        "alignment": metrics.alignment(*augmented),
        "uniformity": metrics.uniformity(test.embeddings),
    }
    protocols: dict[str, dict[str, Any]] = {
        "effective_rank": {"of": "encoder features, not centred (RankMe)", **images},
        "alignment": {"of": "normalised embeddings of two views", "alpha": 2.0, **protocol, **images},
        "uniformity": {"of": "normalised embeddings", "t": 2.0, **images},
    }
    return row, protocols


def _uncertainty(data: Data, scale: Tensor) -> tuple[Found, metrics.RejectionCurve]:
    """Whether the mean posterior variance says where retrieval fails: R-AUROC, and accuracy against rejected share."""
    train, labels, test, truth = data
    correct = metrics.knn_predict(train, labels, test, k=1).cpu() == truth
    variance = scale.double().square().mean(1)
    curve = metrics.rejection_curve(correct, variance)
    steps = range(0, 100, 10)
    row = {
        "recall_at_1": correct.double().mean().item(),
        # Undefined where retrieval never fails, or always does.
        "r_auroc": metrics.r_auroc(correct, variance) if 0 < correct.sum() < len(correct) else None,
        "rejection": {
            "rejected": [step / 100 for step in steps],
            "accuracy": [float(curve.accuracy[len(truth) * step // 100]) for step in steps],
            "area": curve.area,
        },
    }
    retrieval: dict[str, Any] = {
        "of": "encoder features",
        "retrieval": "nearest training image",
        "metric": "cosine",
    }
    retrieval |= {"train_images": len(labels), "test_images": len(truth)}
    uncertain = {"uncertainty": "mean posterior variance"}
    protocols = {
        "recall_at_1": retrieval,
        "r_auroc": {**uncertain, "positive": "Recall@1 fails", **retrieval},
        "rejection": {**uncertain, "accuracy": "Recall@1 of the images kept", **retrieval},
    }
    return (row, protocols), curve


def evaluate(
    ckpt: str | Path,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    download: bool = True,
    k: int | Sequence[int] = 200,
    temperature: float | Sequence[float] = 0.1,
    linear: str | Sequence[str] = "logistic",
    probe_epochs: int = 90,
    batch_size: int = 256,
    trust_plugins: bool = False,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Probes and measures of the representation on the labelled splits: last epoch's weights and two controls.

    Weighted k-NN and linear probes; for the encoders also effective rank, alignment, uniformity, and whether the
    posterior's variance says where nearest-neighbour retrieval fails (`metrics` defines each).

    Parameters
    ----------
    ckpt : path
        Run folder or weights file.
    dataset, data_dir, download :
        What to evaluate on; by default the run's own data set.
    k, temperature :
        Neighbours and temperature of the k-NN (Wu et al. 2018: cosine, weights exp(similarity / T)). Of several, all
        combinations are reported (``knn_sweep``), and the first of each is ``knn``.
    linear : str or sequence of str
        ``"logistic"``: logistic regression on clean features, ``linear`` in the result. ``"sgd"``: the published
        protocol on augmented images, ``linear_sgd``, for the encoders (`pyro_vje.representation.probes.sgd_probe`).
    probe_epochs : int
        Epochs of ``"sgd"``; each is a forward pass of both encoders over all training images.
    batch_size : int
        Images in a forward pass, and in a step of ``"sgd"``.
    trust_plugins : bool
        See `pyro_vje.runs.folder.load_run`.
    out : path, optional
        Where to write the JSON, with a picture in a folder ``pictures`` beside it; by default ``eval.json`` in the
        run folder.

    Returns
    -------
    dict
        ``rows`` (one for each representation; ``None`` where a measure does not apply), the ``protocols`` behind the
        numbers, and what they were measured on.

    Raises
    ------
    ValueError
        If the data have no labels, or a setting is unknown or out of range.
    """
    ks = [k] if isinstance(k, int) else list(k)
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    metrics.check_knn(ks, temperatures)  # before minutes of encoding
    probes = [linear] if isinstance(linear, str) else list(linear)
    for name in probes:
        if name not in LINEAR:
            raise ValueError(f"unknown linear probe {name!r}; known: {', '.join(LINEAR)}")
    if probe_epochs < 1:
        raise ValueError(f"probe_epochs must be at least 1, got {probe_epochs}")
    device = default_device()
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    config, view = run.info.config, run.info.view
    train_set = load_split(run, "train", dataset, data_dir, download=download).labelled()
    test_set = load_split(run, "test", dataset, data_dir, download=download).labelled()
    warn_if_shared(train_set, test_set)
    untrained = build_model(config, run.info.image_size).to(device).eval()
    recipe = views_for(config.dataset, run.info.image_size)[0].recipe
    views = TwoViews(run.info.image_size, recipe, view.mean, view.std)
    views_protocol = {"views": f"as in pretraining on {config.dataset}", "seed": config.seed}

    def measure(vje: VJE | None) -> tuple[Found, metrics.RejectionCurve | None]:
        encoded = None
        if vje is None:
            (train_index, train), (test_index, test) = pixels(train_set, view), pixels(test_set, view)
        else:
            train_index, train = features_of(vje, view, batch_size=batch_size)(train_set)
            encoded = encode(vje, test_set, view, batch_size=batch_size, device=device)
            test_index, test = encoded.indices, encoded.features
        data = train, train_set.labels_at(train_index), test, test_set.labels_at(test_index)
        found = [_knn(data, ks, temperatures)]
        if "logistic" in probes:
            found.append(_logistic(data))
        if vje is None or encoded is None:
            return _merge(*found), None
        if "sgd" in probes:
            own = probe_views(dataset or config.dataset, view)
            settings: dict[str, Any] = {"epochs": probe_epochs, "batch_size": batch_size, "seed": config.seed}
            result = sgd_probe(vje.features, train_set, test, data[3], own, device=device, **settings)
            found.append(({"linear_sgd": result["accuracy"]}, {"linear_sgd": _protocol(result)}))
        augmented = _embed_views(vje, test_set, views, batch_size=batch_size, seed=config.seed)
        uncertainty, curve = _uncertainty(data, encoded.scale)
        return _merge(*found, _geometry(encoded, augmented, views_protocol), uncertainty), curve

    rows: list[dict[str, Any]] = []
    protocols: dict[str, Any] = {}
    curves: dict[str, tuple[Any, Any]] = {}
    for name, vje in {"trained encoder": run.vje, "untrained encoder": untrained, "raw pixels": None}.items():
        log.info("evaluating %s", name)
        (row, found), curve = measure(vje)
        protocols = {**found, **protocols}  # the same for every row that has them
        rows.append({"representation": name, **row})
        if curve is not None:
            curves[name] = curve.rejected, curve.accuracy
    rows = [dict.fromkeys(rows[0]) | row for row in rows]  # empty cells where a measure does not apply
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
        (target.parent / PICTURES).mkdir(exist_ok=True)
        path = target.parent / PICTURES / f"{target.stem}_rejection.png"
        pictures.plot_rejection(curves, path, ylabel="Recall@1 of the test images kept")
    return result


# Name in the result, heading, format; a line of protocol each.
_COLUMNS = (
    ("knn", "k-NN", ".4f"),
    ("linear", "linear", ".4f"),
    ("linear_sgd", "SGD", ".4f"),
    ("effective_rank", "rank", ".1f"),
    ("alignment", "align", ".4f"),
    ("uniformity", "uniform", ".3f"),
    ("recall_at_1", "R@1", ".4f"),
    ("r_auroc", "R-AUROC", ".4f"),
)


def format_table(result: dict[str, Any]) -> str:
    """`evaluate`'s result as text: a row for each representation, tables, then the protocols."""
    rows, protocols = result["rows"], result["protocols"]
    columns = [column for column in _COLUMNS if column[0] in protocols]
    lines = [
        f"{result['dataset']}: {result['train_images']} training and {result['test_images']} test images, "
        f"weights of {result['weights']}",
        f"{'representation':<20}{'dim':>6}" + "".join(f"{heading:>9}" for _, heading, _ in columns),
    ]
    for row in rows:
        cells = ("" if row[name] is None else format(row[name], form) for name, _, form in columns)
        line = f"{row['representation']:<20}{row['dim']:>6}" + "".join(f"{cell:>9}" for cell in cells)
        lines.append(line.rstrip())
    if "knn_sweep" in protocols:
        lines += [
            "",
            f"{'k-NN for each k and T':<26}" + "".join(f"{row['representation']:>20}" for row in rows),
        ]
        for i, setting in enumerate(rows[0]["knn_sweep"]):
            accuracies = "".join(f"{row['knn_sweep'][i]['accuracy']:>20.4f}" for row in rows)
            lines.append(f"{'k {k}, T {temperature}'.format(**setting):<26}{accuracies}")
    uncertain = [row for row in rows if row["rejection"] is not None]
    rejected = [f"{share:.0%}" for share in uncertain[0]["rejection"]["rejected"]]
    lines += [
        "",
        f"{'R@1, share rejected':<20}" + "".join(f"{share:>8}" for share in rejected) + f"{'area':>8}",
    ]
    for row in uncertain:
        numbers = (*row["rejection"]["accuracy"], row["rejection"]["area"])
        lines.append(f"{row['representation']:<20}" + "".join(f"{number:>8.4f}" for number in numbers))
    lines.append("")
    for name, heading in (*(column[:2] for column in columns), ("rejection", "rejected")):
        protocol = ", ".join(f"{key} {value}" for key, value in protocols[name].items())
        if name == "linear":
            unfit = [row["representation"] for row in rows if not row["linear_converged"]]
            protocol += f"; NOT CONVERGED for {', '.join(unfit)}" if unfit else ""
        lines += textwrap.wrap(f"{heading + ':':<10}{protocol}", WIDTH, subsequent_indent=" " * 10)
    return "\n".join(lines)
