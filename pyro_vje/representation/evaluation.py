"""Evaluation of frozen representations: probes, geometry, uncertainty; trained against untrained against raw pixels."""

import logging
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pyro_vje import metrics
from pyro_vje.config import EvalConfig, TrainConfig
from pyro_vje.data import CleanView, ImageSet, Recipe, TwoViews, derive_seed, views_for, warn_if_shared
from pyro_vje.metrics.representation import check_knn
from pyro_vje.model.build import build_model
from pyro_vje.model.encoding import Encoded, encode
from pyro_vje.model.vje import VJE
from pyro_vje.pages.pictures import plot_rejection
from pyro_vje.progress import Progress
from pyro_vje.runs.files import write_json
from pyro_vje.runs.folder import PICTURES, default_device, load_run, load_split

log = logging.getLogger("pyro_vje")

# Heading in the table, decimals; a line of protocol each.
_COLUMNS = {
    "knn": ("k-NN", 4), "linear": ("linear", 4), "linear_sgd": ("SGD", 4), "effective_rank": ("rank", 1),
    "alignment": ("align", 4), "uniformity": ("uniform", 3), "recall_at_1": ("R@1", 4), "r_auroc": ("R-AUROC", 4),
}  # fmt: skip

Data: TypeAlias = Sequence[Tensor]  # features (N, F), labels (N,) of training images, then of test images
Found: TypeAlias = dict[str, tuple[Any, dict[str, Any]]]  # what was found by name, and the protocol behind it
Accuracies: TypeAlias = tuple[dict[str, Any], dict[str, Any]]  # by name, and the protocols


def pixels(images: ImageSet, view: CleanView) -> tuple[Tensor, Tensor]:
    """Flattened normalised pixels ``(N, 3·S·S)`` and the indices ``(N,)`` of the images they belong to."""
    batches = [(indices, view(batch).flatten(1)) for indices, batch in images.batches(1024)]
    return torch.cat([indices for indices, _ in batches]), torch.cat([values for _, values in batches])


def probe(vje: VJE, view: CleanView, train_set: ImageSet, test_set: ImageSet) -> Accuracies:
    """Accuracies ``knn`` and ``linear`` (logistic) of an encoder's features on labelled images; their protocols."""
    data = []
    for images in (train_set.labelled(), test_set.labelled()):
        encoded = encode(vje, images, view)
        data += [encoded.features, images.labels_at(encoded.indices)]
    return _split(_knn(data, [200], [0.1]) | _logistic(data))


def _split(found: Found) -> Accuracies:
    protocols = {name: protocol for name, (_, protocol) in found.items() if protocol}
    return {name: value for name, (value, _) in found.items()}, protocols


def _protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("accuracy", "converged")}


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


def probe_views(dataset: str, view: CleanView) -> TwoViews:
    """Random resized crop (torchvision's, 0.08 to 1 of the area) and horizontal flip, normalised as ``view`` is.

    Where the data set's own views never flip, as a digit has one orientation, their crop is taken and nothing flipped.
    """
    own = views_for(dataset, view.image_size)[0].recipe
    scale, flip = ((0.08, 1.0), 0.5) if own.flip else (own.scale, 0.0)
    recipe = Recipe(scale=scale, flip=flip, jitter=0.0, grey=0.0)
    return TwoViews(view.image_size, recipe, view.mean, view.std)


def sgd_probe(
    features: Callable[[Tensor], Tensor],
    train_set: ImageSet,
    test_features: Tensor,
    test_labels: Tensor,
    views: TwoViews,
    *,
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """``accuracy`` of a linear layer trained by SGD on features of augmented images, with the protocol behind it.

    Learning rate 0.1 · batch / 256 with a cosine schedule to 0, momentum 0.9, no weight decay. Every epoch draws new
    views (`probe_views`) and so takes a forward pass of the encoder over all training images; unlabelled ones are left
    out. ``features`` takes normalised images ``(B, 3, S, S)`` to features ``(B, F)``, frozen and in evaluation mode;
    the clean test images' features ``(M, F)`` are looked at once, after the last epoch. Raises ``ValueError`` for
    settings or labels that make no probe, and ``FloatingPointError`` if the weights do not stay finite.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    train_set = train_set.labelled()
    labels = train_set.labels_at(torch.arange(len(train_set)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    batch_size = min(batch_size, len(train_set))
    lr = 0.1 * batch_size / 256
    generator = torch.Generator().manual_seed(derive_seed("probe", seed))
    view_generator = torch.Generator(device).manual_seed(derive_seed("probe views", seed))
    # The usual start of this probe (MoCo, SimSiam): small weights, no bias.
    weight = torch.empty(int(labels.max()) + 1, test_features.shape[1]).normal_(0, 0.01, generator=generator)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(len(weight), device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    progress = Progress("linear probe by SGD", epochs, "epochs")
    for _ in range(epochs):
        order = torch.randperm(len(train_set), generator=generator)
        # A reordered copy of a set in memory would double it; a streamed one is read ahead.
        parts = order.split(batch_size) if train_set.in_memory else [order]
        batches = ((part[at], x) for part in parts for at, x in train_set.select(part).batches(batch_size))
        for index, images in batches:
            with torch.no_grad():
                inputs = features(views.one(images.to(device), view_generator))
            loss = cross_entropy(linear(inputs, weight, bias), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        progress.add(1)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise FloatingPointError(f"the linear probe by SGD diverged at lr {lr:g}: the features are too large")
    with torch.no_grad():
        predicted = linear(test_features.to(device), weight, bias).argmax(1)
    scale, flip = views.recipe.scale, views.recipe.flip
    augmentation = f"random resized crop of {scale[0]} to {scale[1]} of the area, flip {flip}"
    protocol: dict[str, Any] = {"classifier": "linear layer by SGD", "lr": lr, "momentum": 0.9}
    protocol |= {"weight_decay": 0.0, "schedule": "cosine to 0 by epoch", "epochs": epochs, "epoch": "last"}
    protocol |= {"batch_size": batch_size, "augmentation": augmentation, "seed": seed}
    protocol |= {"train_images": len(labels), "test_images": len(test_labels)}
    return {"accuracy": (predicted == test_labels.to(device)).double().mean().item(), **protocol}


@torch.no_grad()
def _geometry(vje: VJE, images: ImageSet, test: Encoded, views: TwoViews, config: TrainConfig) -> Found:
    """Effective rank, uniformity, and alignment between two views of each image by a model in evaluation mode."""
    generator = torch.Generator(vje.device).manual_seed(derive_seed("alignment", config.seed))
    pairs = (views(batch.to(vje.device), generator).flatten(0, 1) for _, batch in images.batches(256))
    first, second = torch.cat([vje.embed(pair).unflatten(0, (2, -1)).cpu() for pair in pairs], dim=1)
    rank, uniform = metrics.effective_rank(test.features), metrics.uniformity(test.embeddings)
    count, drawn = {"test_images": len(test.features)}, f"as in pretraining on {config.dataset}"
    how = {"of": "normalised embeddings of two views", "alpha": 2.0, "views": drawn, "seed": config.seed}
    return {
        "effective_rank": (rank, {"of": "encoder features, not centred (RankMe)", **count}),
        "alignment": (metrics.alignment(first, second), {**how, **count}),
        "uniformity": (uniform, {"of": "normalised embeddings", "t": 2.0, **count}),
    }


def _uncertainty(data: Data, scale: Tensor) -> tuple[Found, metrics.RejectionCurve]:
    """Whether the mean posterior variance says where retrieval fails: R-AUROC, and accuracy against rejected share."""
    train, labels, test, truth = data
    correct = metrics.knn_predict(train, labels, test, k=1).cpu() == truth
    variance = scale.double().square().mean(1)
    curve = metrics.rejection_curve(correct, variance)
    steps = [step / 100 for step in range(0, 100, 10)]
    accuracy = [float(curve.accuracy[int(len(truth) * step + 1e-9)]) for step in steps]
    rejection = {"rejected": steps, "accuracy": accuracy, "area": curve.area}
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
    return "untrained encoder" if config.weights == "none" else "pretrained encoder, no head"


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

    Weighted k-NN and linear probes; for the encoders also effective rank, alignment, uniformity, and whether posterior
    variance says where retrieval fails (`metrics` defines each). The controls are the model before its training and raw
    pixels. Gives ``rows`` (``None`` where a measure does not apply), their ``protocols``, and what they were measured
    on. Raises ``ValueError`` if the data have no labels, or a setting is unknown or out of range.

    ``ckpt`` is a run folder or weights file, evaluated on its own data set or on ``dataset`` in ``data_dir``. Of some
    ``k`` and temperatures of the k-NN all combinations are reported (``knn_sweep``), the first of each as ``knn``.
    ``linear``: ``"logistic"`` (regression on clean features), ``"sgd"`` (for the encoders, `sgd_probe` of
    ``probe_epochs`` passes in steps of ``batch_size``; ``linear_sgd`` in the result), or both. The JSON goes to
    ``out`` (``eval.json`` in the run folder), a picture beside it. For ``trust_plugins`` see `runs.folder.load_run`.
    """
    ks = [k] if isinstance(k, int) else list(k)
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    probes: list[Any] = [linear] if isinstance(linear, str) else list(linear)
    # Before minutes of encoding.
    check_knn(ks, temperatures)
    EvalConfig(linear=tuple(probes), probe_epochs=probe_epochs)
    device = default_device()
    run = load_run(ckpt, trust_plugins=trust_plugins, device=device)
    config, view = run.info.config, run.info.view
    splits = (load_split(run, split, dataset, data_dir, download=download) for split in ("train", "test"))
    sets = [images.labelled() for images in splits]
    warn_if_shared(*sets)
    curves: dict[str, metrics.RejectionCurve] = {}

    def measure(name: str, vje: VJE | None) -> Found:
        log.info("evaluating %s", name)
        encoded = [] if vje is None else [encode(vje, x, view, batch_size=batch_size) for x in sets]
        of = "embeddings" if config.frozen and vje is run.vje else "features"  # what was trained
        parts = [(x.indices, getattr(x, of)) for x in encoded] or [pixels(images, view) for images in sets]
        data: list[Tensor] = []
        for images, (at, values) in zip(sets, parts, strict=True):
            data += [values, images.labels_at(at)]
        found = _knn(data, ks, temperatures) | (_logistic(data) if "logistic" in probes else {})
        if vje is None:
            return found
        if "sgd" in probes:
            own = probe_views(dataset or config.dataset, view)
            settings: dict[str, Any] = {"epochs": probe_epochs, "batch_size": batch_size, "seed": config.seed}
            result = sgd_probe(vje.features, sets[0], data[2], data[3], own, device=device, **settings)
            found["linear_sgd"] = result["accuracy"], _protocol(result)
        uncertainty, curves[name] = _uncertainty(data, encoded[1].scale)
        return found | _geometry(vje, sets[1], encoded[1], run.info.views, config) | uncertainty

    control = build_model(config, run.info.view_size).to(device).eval()
    if config.frozen:  # what was trained is the head
        control.encoder = run.vje.encoder
    models = {"trained encoder": run.vje, control_name(config): control, "raw pixels": None}
    found = {name: _split(measure(name, vje)) for name, vje in models.items()}
    trained, protocols = found["trained encoder"]
    rows = [{"representation": name, **dict.fromkeys(trained), **row} for name, (row, _) in found.items()]
    last = f"epoch {config.epochs} of {config.epochs} (the last)"
    result = {"dataset": dataset or config.dataset, "train_images": len(sets[0]), "test_images": len(sets[1])}
    result |= {"image_size": run.info.image_size, "weights": last, "seed": config.seed}
    result |= {"rows": rows, "protocols": protocols}
    target = Path(out) if out is not None else (run.folder / "eval.json" if run.folder else None)
    if target is not None:
        write_json(target, result)
        path = target.parent / PICTURES / f"{target.stem}_rejection.png"
        plot_rejection(curves, path)
    return result


def format_table(result: dict[str, Any]) -> str:
    """`evaluate`'s result as text: a row for each representation, tables, then the protocols."""
    rows, protocols = pd.DataFrame(result["rows"]).set_index("representation"), result["protocols"]
    rows.index.name = None
    shown = {name: column for name, column in _COLUMNS.items() if name in protocols}
    numbers = {x: rows[name].map(f"{{:.{n}f}}".format, na_action="ignore") for name, (x, n) in shown.items()}
    images = f"{result['train_images']} training and {result['test_images']} test images"
    lines = [f"{result['dataset']}: {images}, weights of {result['weights']}"]
    lines.append(pd.DataFrame({"dim": rows["dim"], **numbers}).fillna("").to_string())
    if "knn_sweep" in protocols:
        said = "k {k}, T {temperature}".format
        sweeps = {of: {said(**x): x["accuracy"] for x in found} for of, found in rows["knn_sweep"].items()}
        lines += ["", pd.DataFrame(sweeps).to_string(float_format="{:.4f}".format)]
    curves = rows["rejection"].dropna()
    shares = [f"{share:.0%}" for share in curves.iloc[0]["rejected"][::2]]
    kept = [[*curve["accuracy"][::2], curve["area"]] for curve in curves]
    table = pd.DataFrame(kept, curves.index, [*shares, "area"]).rename_axis(columns="R@1, share rejected")
    lines += ["", table.to_string(float_format="{:.3f}".format), ""]
    for name, (heading, _) in {**shown, "rejection": ("rejected", 0)}.items():
        protocol = ", ".join(f"{key} {value}" for key, value in protocols[name].items())
        unfit = rows.index[~rows["linear_converged"].astype(bool)] if name == "linear" else ()
        protocol += f"; NOT CONVERGED for {', '.join(unfit)}" if len(unfit) else ""
        lines += textwrap.wrap(f"{heading + ':':<10}{protocol}", 79, subsequent_indent=" " * 10)
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())
