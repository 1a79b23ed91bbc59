"""Evaluation of frozen representations: probes, geometry, uncertainty; trained against untrained against raw pixels."""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyro_vje import metrics
from pyro_vje.config import TrainConfig
from pyro_vje.data import CleanView, ImageSet, TwoViews, derive_seed, warn_if_shared
from pyro_vje.metrics.representation import check_knn
from pyro_vje.model.encoding import Encoded, encode
from pyro_vje.model.vje import VJE
from pyro_vje.pages.pictures import plot_rejection
from pyro_vje.representation.probes import probe_views, sgd_probe
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import PICTURES, build_model, default_device, load_run, load_split

log = logging.getLogger("pyro_vje")

LINEAR = ("logistic", "sgd")
WIDTH = 110  # columns of the printed text

Data = Sequence[Tensor]
"""Features ``(N, F)`` and labels ``(N,)`` of the training images, then those of the test images."""

Found = dict[str, tuple[Any, dict[str, Any]]]
"""What was found by name, and the protocol behind it, empty where it needs none."""


def pixels(images: ImageSet, view: CleanView) -> tuple[Tensor, Tensor]:
    """Flattened normalised pixels ``(N, 3·S·S)`` and the indices ``(N,)`` of the images they belong to."""
    batches = [(indices, view(batch).flatten(1)) for indices, batch in images.batches(1024)]
    return torch.cat([indices for indices, _ in batches]), torch.cat([values for _, values in batches])


def _encode(vje: VJE, images: ImageSet, view: CleanView, batch_size: int) -> Encoded:
    return encode(vje, images, view, batch_size=batch_size, device=next(vje.parameters()).device)


def probe(
    vje: VJE, view: CleanView, train_set: ImageSet, test_set: ImageSet
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weighted k-NN and logistic regression on an encoder's features of images; unlabelled ones are left out.

    Gives what was found (``dim``, accuracies ``knn`` and ``linear``, ``linear_converged``), and the protocols behind
    the accuracies, by the same names.
    """
    data = []
    for images in (train_set.labelled(), test_set.labelled()):
        encoded = _encode(vje, images, view, 256)
        data += [encoded.features, images.labels_at(encoded.indices)]
    return _split(_knn(data, [200], [0.1]) | _logistic(data))


def _split(found: Found) -> tuple[dict[str, Any], dict[str, Any]]:
    protocols = {name: protocol for name, (_, protocol) in found.items() if protocol}
    return {name: value for name, (value, _) in found.items()}, protocols


def _protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    own = ("accuracy", "train_accuracy", "iterations", "converged")
    return {name: value for name, value in result.items() if name not in own}


def _knn(data: Data, ks: Sequence[int], temperatures: Sequence[float]) -> Found:
    """k-NN for the first k and temperature, and under ``knn_sweep`` for all combinations where there are several."""
    results = metrics.knn_sweep(*data, ks=ks, temperatures=temperatures)
    protocol = _protocol(results[0])
    found: Found = {"dim": (data[0].shape[1], {}), "knn": (results[0]["accuracy"], protocol)}
    if len(results) > 1:
        sweep = [{name: result[name] for name in ("k", "temperature", "accuracy")} for result in results]
        found["knn_sweep"] = sweep, {**protocol, "k": list(ks), "temperature": list(temperatures)}
    return found


def _logistic(data: Data) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the row instead
        result = metrics.linear_probe(*data)
    return {"linear": (result["accuracy"], _protocol(result)), "linear_converged": (result["converged"], {})}


def _geometry(vje: VJE, images: ImageSet, test: Encoded, views: TwoViews, views_of: str, seed: int) -> Found:
    """Effective rank, uniformity, and alignment between two views of each image by a model in evaluation mode."""
    device = next(vje.parameters()).device
    generator = torch.Generator(device).manual_seed(derive_seed("alignment", seed))
    parts = []
    for _, batch in images.batches(256):
        with torch.no_grad():
            embeddings = vje.embed(views(batch.to(device), generator).flatten(0, 1))
        parts.append(embeddings.unflatten(0, (2, -1)).cpu())
    rank, uniform = metrics.effective_rank(test.features), metrics.uniformity(test.embeddings)
    count, drawn = {"test_images": len(test.features)}, f"as in pretraining on {views_of}"
    pairs = {"of": "normalised embeddings of two views", "alpha": 2.0, "views": drawn, "seed": seed}
    return {
        "effective_rank": (rank, {"of": "encoder features, not centred (RankMe)", **count}),
        "alignment": (metrics.alignment(*torch.cat(parts, dim=1)), {**pairs, **count}),
        "uniformity": (uniform, {"of": "normalised embeddings", "t": 2.0, **count}),
    }


def _uncertainty(data: Data, scale: Tensor) -> tuple[Found, metrics.RejectionCurve]:
    """Whether the mean posterior variance says where retrieval fails: R-AUROC, and accuracy against rejected share."""
    train, labels, test, truth = data
    correct = metrics.knn_predict(train, labels, test, k=1).cpu() == truth
    variance = scale.double().square().mean(1)
    curve = metrics.rejection_curve(correct, variance)
    steps = range(0, 100, 10)
    rejection = {
        "rejected": [step / 100 for step in steps],
        "accuracy": [float(curve.accuracy[len(truth) * step // 100]) for step in steps],
        "area": curve.area,
    }
    # Undefined where retrieval never fails, or always does.
    r_auroc = metrics.r_auroc(correct, variance) if 0 < correct.sum() < len(correct) else None
    retrieval: dict[str, Any] = {"of": "encoder features", "retrieval": "nearest training image"}
    retrieval |= {"metric": "cosine", "train_images": len(labels), "test_images": len(truth)}
    by = {"uncertainty": "mean posterior variance"}
    return {
        "recall_at_1": (correct.double().mean().item(), retrieval),
        "r_auroc": (r_auroc, {**by, "positive": "Recall@1 fails", **retrieval}),
        "rejection": (rejection, {**by, "accuracy": "Recall@1 of the images kept", **retrieval}),
    }, curve


def control_name(config: TrainConfig) -> str:
    """What the same model before its training is called: its encoder may have learned elsewhere."""
    pretrained = getattr(config, "weights", "none") not in (None, "none")
    return "pretrained encoder, no head" if pretrained else "untrained encoder"


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
    posterior's variance says where nearest-neighbour retrieval fails (`metrics` defines each). The controls are the
    model before its training and raw pixels.

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
    check_knn(ks, temperatures)  # before minutes of encoding
    probes = [linear] if isinstance(linear, str) else list(linear)
    if unknown := set(probes) - set(LINEAR):
        raise ValueError(f"unknown linear probe {unknown.pop()!r}; known: {', '.join(LINEAR)}")
    if probe_epochs < 1:
        raise ValueError(f"probe_epochs must be at least 1, got {probe_epochs}")
    device = default_device()
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    config, view = run.info.config, run.info.view
    sets = [
        load_split(run, split, dataset, data_dir, download=download).labelled() for split in ("train", "test")
    ]
    warn_if_shared(*sets)
    views = run.info.views
    curves: dict[str, tuple[Any, Any]] = {}

    def measure(name: str, vje: VJE | None) -> Found:
        log.info("evaluating %s", name)
        of = "embeddings" if config.frozen and vje is run.vje else "features"  # what was trained
        parts = [
            pixels(images, view) if vje is None else _encode(vje, images, view, batch_size) for images in sets
        ]
        data = [
            x
            for images, part in zip(sets, parts, strict=True)
            for x in (getattr(part, of, part[1]), images.labels_at(part[0]))
        ]
        found = _knn(data, ks, temperatures) | (_logistic(data) if "logistic" in probes else {})
        encoded = parts[1]
        if vje is None or not isinstance(encoded, Encoded):
            return found
        if "sgd" in probes:
            own = probe_views(dataset or config.dataset, view)
            settings: dict[str, Any] = {"epochs": probe_epochs, "batch_size": batch_size, "seed": config.seed}
            result = sgd_probe(vje.features, sets[0], data[2], data[3], own, device=device, **settings)
            found["linear_sgd"] = result["accuracy"], _protocol(result)
        found |= _geometry(vje, sets[1], encoded, views, config.dataset, config.seed)
        uncertainty, curve = _uncertainty(data, encoded.scale)
        curves[name] = curve.rejected, curve.accuracy
        return found | uncertainty

    control = build_model(config, run.info.view_size).to(device).eval()
    if config.frozen:  # what was trained is the head
        control.encoder = run.vje.encoder
    models = {"trained encoder": run.vje, control_name(config): control, "raw pixels": None}
    found = {name: _split(measure(name, vje)) for name, vje in models.items()}
    trained, protocols = found["trained encoder"]
    result = {
        "dataset": dataset or config.dataset,
        "train_images": len(sets[0]),
        "test_images": len(sets[1]),
        "image_size": run.info.image_size,
        "weights": f"epoch {config.epochs} of {config.epochs} (the last)",
        "seed": config.seed,
        # Empty cells where a measure does not apply.
        "rows": [
            {"representation": name, **dict.fromkeys(trained), **row} for name, (row, _) in found.items()
        ],
        "protocols": protocols,
    }
    target = Path(out) if out is not None else (run.folder / "eval.json" if run.folder else None)
    if target is not None:
        write_json(target, result)
        path = target.parent / PICTURES / f"{target.stem}_rejection.png"
        plot_rejection(curves, path, ylabel="Recall@1 of the test images kept")
    return result


# Heading in the table, decimals; a line of protocol each.
_COLUMNS = {
    "knn": ("k-NN", 4),
    "linear": ("linear", 4),
    "linear_sgd": ("SGD", 4),
    "effective_rank": ("rank", 1),
    "alignment": ("align", 4),
    "uniformity": ("uniform", 3),
    "recall_at_1": ("R@1", 4),
    "r_auroc": ("R-AUROC", 4),
}


def _text(first: str, columns: Mapping[str, Sequence[str]], index: Sequence[str], width: int) -> list[str]:
    """Lines of a table whose first column is headed ``first``."""
    frame = pd.DataFrame(columns, index=[f"{name:<20}" for name in index]).rename_axis(columns=first)
    text = frame.to_string(col_space={name: 5 if name == "dim" else width for name in columns})
    return ["", *(line.rstrip() for line in text.splitlines())]


def format_table(result: dict[str, Any]) -> str:
    """`evaluate`'s result as text: a row for each representation, tables, then the protocols."""
    rows, protocols = {row["representation"]: row for row in result["rows"]}, result["protocols"]
    columns = {"dim": [str(row["dim"]) for row in rows.values()]}
    for name, (heading, digits) in _COLUMNS.items():
        if name in protocols:
            values = [row[name] for row in rows.values()]
            columns[heading] = ["" if value is None else f"{value:.{digits}f}" for value in values]
    images = f"{result['train_images']} training and {result['test_images']} test images"
    lines = [f"{result['dataset']}: {images}, weights of {result['weights']}"]
    lines += _text("representation", columns, [*rows], 8)[1:]
    if "knn_sweep" in protocols:
        sweeps = {name: [f"{x['accuracy']:.4f}" for x in row["knn_sweep"]] for name, row in rows.items()}
        (settings, *_) = (row["knn_sweep"] for row in rows.values())
        lines += _text(
            "k-NN for each k and T", sweeps, ["k {k}, T {temperature}".format(**s) for s in settings], 8
        )
    curves = {name: row["rejection"] for name, row in rows.items() if row["rejection"] is not None}
    shares = [f"{share:.0%}" for share in next(iter(curves.values()))["rejected"]]
    kept = zip(*([*curve["accuracy"], curve["area"]] for curve in curves.values()), strict=True)
    table = {
        heading: [f"{x:.3f}" for x in column] for heading, column in zip([*shares, "area"], kept, strict=True)
    }
    lines += [*_text("R@1, share rejected", table, [*curves], 6), ""]
    for name, (heading, _) in (*_COLUMNS.items(), ("rejection", ("rejected", 0))):
        if name in protocols:
            protocol = ", ".join(f"{key} {value}" for key, value in protocols[name].items())
            unfit = [of for of, row in rows.items() if name == "linear" and not row["linear_converged"]]
            protocol += f"; NOT CONVERGED for {', '.join(unfit)}" if unfit else ""
            lines += textwrap.wrap(f"{heading + ':':<10}{protocol}", WIDTH, subsequent_indent=" " * 10)
    return "\n".join(lines)
