"""Metrics of representations, scores and uncertainties: functions of arrays that know no model, data or run.

Features are ``(N, D)``, one row an image; scores are ``(N,)``, higher for stranger images; labels are integers
from 0. Tensors on any device and NumPy arrays are accepted alike.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

Array: TypeAlias = Tensor | NDArray[Any]
Positive: TypeAlias = Literal["anomaly", "normal"]

# Entries of one block of a similarity matrix: 128 MiB in float32, whatever the number of images.
BLOCK_ENTRIES = 2**25

# When a representation counts as unhealthy (`collapse_warning`).
# Features that fill a fiftieth of their dimensions (10 of 512) have lost what tells images apart.
MIN_RANK_SHARE = 0.02
# 0.5 is what is left when three quarters of each embedding's squared length are common to all images, or when all
# variation lies in a quarter of the features; small healthy runs stay above 0.9.
MIN_SPREAD = 0.5
# At 0.7 the noise has twice the power of the mean. In a study on small CIFAR-10 images the runs at KL weight 1, all of
# them less accurate, ended at 0.15 to 0.51, and those at smaller weights at 1 to 4.
MIN_POSTERIOR_SNR = 0.7


class KnnResult(TypedDict):
    """Accuracy of `knn_accuracy` with its protocol; ``k`` is the number of neighbours that was used."""

    accuracy: float
    k: int
    temperature: float
    metric: str
    weights: str
    train_images: int
    test_images: int


class ProbeResult(TypedDict):
    """Accuracy of `linear_probe` with its protocol."""

    accuracy: float
    train_accuracy: float
    classifier: str
    l2: float
    l2_grid: list[float]
    standardised: bool
    iterations: int
    converged: bool
    seed: int
    train_images: int
    test_images: int


class RejectionCurve(NamedTuple):
    """Accuracy ``(N,)`` of the images kept after rejecting the share ``rejected`` ``(N,)``, and its mean ``area``."""

    rejected: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    area: float


# Arguments ------------------------------------------------------------------------------------------------------------


def as_numpy(values: Array) -> NDArray[Any]:
    """``values`` as a NumPy array on the CPU; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def as_vector(values: Array, name: str) -> NDArray[np.float64]:
    """``values`` as a float64 vector; ``ValueError`` if it is not one, is empty or is not finite everywhere."""
    vector = as_numpy(values).astype(np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be a vector (N,), got shape {vector.shape}")
    if vector.size == 0:
        raise ValueError(f"{name} is empty")
    bad = int((~np.isfinite(vector)).sum())
    if bad:
        raise ValueError(
            f"{bad} of the {vector.size} values of {name} are NaN or infinite; leave those images out"
        )
    return vector


def _tensor(values: Array) -> Tensor:
    # PyTorch warns of NumPy arrays that it may not write to, such as memory maps, and takes no negative strides.
    return (
        values
        if isinstance(values, Tensor)
        else torch.from_numpy(np.require(values, requirements=["C", "W"]))
    ).detach()


def _features(values: Array, name: str, least: int = 1) -> Tensor:
    """``values`` as a finite float32 (or float64) matrix, on the device where it lies."""
    features = _tensor(values)
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be a matrix (N, D), got shape {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} rows; at least {least} needed")
    if features.dtype != torch.float64:
        features = features.float()
    if not features.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values; leave those images out")
    return features


def _labels(values: Array, name: str, count: int) -> Tensor:
    labels = _tensor(values)
    if labels.shape != (count,):
        raise ValueError(
            f"{name} must have one label for each of {count} images, got shape {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if labels.min() < 0:
        raise ValueError(
            f"{name} holds {int((labels < 0).sum())} negative labels (unlabelled images); leave them out"
        )
    return labels.long()


def _same_width(train: Tensor, test: Tensor) -> None:
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train features have {train.shape[1]} columns, test features {test.shape[1]}")


def _two_classes(scores: Array, is_anomaly: Array) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    vector = as_vector(scores, "scores")
    labels = as_numpy(is_anomaly)
    if labels.shape != vector.shape:
        raise ValueError(f"is_anomaly has shape {labels.shape}, scores {vector.shape}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("is_anomaly must hold booleans (or 0 and 1), True for anomalies")
    labels = labels.astype(bool)
    if labels.all() or not labels.any():
        raise ValueError(
            f"both classes are needed, but all {labels.size} images are {'anomalies' if labels[0] else 'normal'}"
        )
    return vector, labels


# Accuracy on frozen features ------------------------------------------------------------------------------------------


def _similarities(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of ``rows @ columns.T``, each with the index of its first row."""
    size = max(1, BLOCK_ENTRIES // len(columns))
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size] @ columns.T


def _top_k(similarity: Tensor, k: int) -> Tensor:
    """Columns ``(rows, k)`` of each row's largest entries, largest first; of equal entries the first columns win.

    ``torch.topk`` leaves open which of several equal entries it takes, and takes different ones on different devices.
    """
    values, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, k:] == values[:, k - 1 : k]).nonzero()[:, 0]  # one more entry equals the last one taken
    index = index[:, :k]
    if len(tied):
        rows, smallest = similarity[tied], values[tied, k - 1 : k]
        above, equal = rows > smallest, rows == smallest
        room = k - above.sum(1, keepdim=True)
        index[tied] = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    index = index.sort(dim=1).values
    return index.gather(1, similarity.gather(1, index).argsort(dim=1, descending=True, stable=True))


def knn_predict(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> Tensor:
    """Classes ``(M,)`` by weighted k-nearest-neighbour vote: cosine similarity s, weight exp(s / temperature).

    The protocol of Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance discrimination", §3.4)
    that the self-supervised literature reports. Equal similarities go to the first training image, equal votes to the
    lowest class, so that the result does not depend on the device. The similarity matrix is made in blocks.

    Parameters
    ----------
    train_features, test_features : (N, D), (M, D)
        Features, normalised here; a zero vector is equally similar to everything.
    train_labels : (N,)
        Integer classes.
    k : int
        Neighbours; all N when there are fewer.
    temperature : float
        Smaller: the nearest neighbours count for more.

    Raises
    ------
    ValueError
        If shapes disagree, features are not finite, labels are negative, or ``k`` or ``temperature`` is not positive.
    """
    return _knn_votes(train_features, train_labels, test_features, [k], [temperature])[0, 0]


def check_knn(ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Raise ``ValueError`` unless there are settings for k-NN and all of them are positive."""
    if not ks or not temperatures:
        raise ValueError("k-NN needs at least one k and one temperature")
    if min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")


def _knn_votes(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Tensor:
    """`knn_predict` for all combinations, ``(ks, temperatures, M)``; the neighbours are found once."""
    train = _features(train_features, "train_features")
    test = _features(test_features, "test_features").to(train)
    _same_width(train, test)
    labels = _labels(train_labels, "train_labels", len(train)).to(train.device)
    check_knn(ks, temperatures)
    train, test = normalize(train), normalize(test)
    classes, most = int(labels.max()) + 1, min(max(ks), len(train))
    shape = (len(ks), len(temperatures), len(test))
    predicted = torch.empty(shape, dtype=torch.long, device=train.device)
    for start, similarity in _similarities(test, train):
        nearest = _top_k(similarity, most)
        # Relative to the nearest one, so that a small temperature overflows nothing.
        logits = similarity.gather(1, nearest).double()
        logits -= logits[:, :1].clone()
        for j, temperature in enumerate(temperatures):
            weights = (logits / temperature).exp()
            for i, k in enumerate(ks):
                votes = weights.new_zeros(len(similarity), classes)
                votes.scatter_add_(1, labels[nearest[:, :k]], weights[:, :k])
                predicted[i, j, start : start + len(similarity)] = votes.argmax(1)
    return predicted


def knn_sweep(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> list[KnnResult]:
    """`knn_accuracy` for all combinations, k varying slowest; raises as it does, also if there is none."""
    predicted = _knn_votes(train_features, train_labels, test_features, ks, temperatures)
    labels = _labels(test_labels, "test_labels", predicted.shape[-1]).to(predicted.device)
    return [
        KnnResult(
            accuracy=(classes == labels).double().mean().item(),
            k=min(k, len(train_features)),
            temperature=temperature,
            metric="cosine",
            weights="exp(similarity / temperature)",
            train_images=len(train_features),
            test_images=len(labels),
        )
        for k, by_temperature in zip(ks, predicted, strict=True)
        for temperature, classes in zip(temperatures, by_temperature, strict=True)
    ]


def knn_accuracy(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> KnnResult:
    """Accuracy of `knn_predict` with the protocol behind it; raises as it does."""
    data = train_features, train_labels, test_features, test_labels
    return knn_sweep(*data, ks=[k], temperatures=[temperature])[0]


def linear_probe(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    l2: float | Sequence[float] = 0.01,
    max_iter: int = 1000,
    seed: int = 0,
) -> ProbeResult:
    """Accuracy of logistic regression (scikit-learn, L-BFGS) on frozen features, with the protocol behind it.

    Features are standardised by the training images, and W minimises ``mean cross-entropy + l2/2 ‖W‖²``. This is not
    the probe by SGD on augmented images that many papers report: name it beside the number.

    Parameters
    ----------
    l2 : float or sequence of float
        The penalty, per image so that it means the same for any N. Of several, the most accurate one on a tenth of
        the training images, drawn by ``seed``, is taken and fitted to all of them; the test images choose nothing.
    max_iter : int
        Most iterations; a probe that needs more comes back with ``converged`` false, and warns.

    Raises
    ------
    ValueError
        As `knn_predict`; also if the training labels hold one class only, or ``l2`` is not positive.
    """
    train, test = _features(train_features, "train_features"), _features(test_features, "test_features")
    _same_width(train, test)
    labels = as_numpy(_labels(train_labels, "train_labels", len(train)))
    truth = as_numpy(_labels(test_labels, "test_labels", len(test)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    grid = [l2] if isinstance(l2, int | float) else list(l2)
    if not grid or not all(penalty > 0 for penalty in grid):
        raise ValueError(f"l2 must be positive, got {l2}")
    scaler = StandardScaler()
    inputs, tests = scaler.fit_transform(as_numpy(train)), scaler.transform(as_numpy(test))
    if len(grid) > 1:
        held_out = np.zeros(len(labels), dtype=bool)
        held_out[np.random.default_rng(seed).permutation(len(labels))[: -(-len(labels) // 10)]] = True
        seen = inputs[~held_out], labels[~held_out]
        accuracies = [
            _fit(*seen, penalty, max_iter)[0].score(inputs[held_out], labels[held_out]) for penalty in grid
        ]
        penalty = max(zip(accuracies, grid, strict=True))[1]  # of equally accurate ones the strongest
    else:
        penalty = grid[0]
    probe, converged = _fit(inputs, labels, penalty, max_iter)
    if not converged:
        warnings.warn(
            f"the linear probe stopped unconverged after {probe.n_iter_.max()} iterations: raise max_iter or l2",
            stacklevel=2,
        )
    return ProbeResult(
        accuracy=float(probe.score(tests, truth)),
        train_accuracy=float(probe.score(inputs, labels)),
        classifier="logistic regression (scikit-learn, L-BFGS)",
        l2=penalty,
        l2_grid=grid,
        standardised=True,
        iterations=int(probe.n_iter_.max()),
        converged=converged,
        seed=seed,
        train_images=len(labels),
        test_images=len(truth),
    )


def _fit(
    features: NDArray[Any], labels: NDArray[Any], l2: float, max_iter: int
) -> tuple[LogisticRegression, bool]:
    """The probe, and whether it converged. scikit-learn penalises ½‖W‖² + C · summed loss, hence C = 1 / (l2 · N)."""
    probe = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe.fit(features, labels)
    failures = [warning for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if warning not in failures:
            warnings.warn(warning.message, warning.category, stacklevel=3)
    return probe, not failures


# Anomaly scores -------------------------------------------------------------------------------------------------------


def auroc(scores: Array, is_anomaly: Array) -> float:
    """Area under the ROC curve: the probability that an anomaly scores above a normal image, ties counting half.

    Parameters
    ----------
    scores : (N,)
        Higher for stranger images.
    is_anomaly : (N,)
        True for anomalies.

    Raises
    ------
    ValueError
        If lengths differ, a score is not finite, or one of the two classes is missing.
    """
    vector, labels = _two_classes(scores, is_anomaly)
    return float(roc_auc_score(labels, vector))


def auroc_interval(
    scores: Array, is_anomaly: Array, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `auroc`, resampling normal images and anomalies apart.

    It says how much the number depends on which test images were drawn, not on the training seed. Raises as `auroc`
    does.
    """
    vector, labels = _two_classes(scores, is_anomaly)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    values, level = np.unique(vector, return_inverse=True)
    rng = np.random.default_rng(seed)

    def counts(levels: NDArray[Any], rows: int) -> NDArray[np.float64]:
        """How many images of each resample (row) have each of the distinct scores (column)."""
        drawn = levels[rng.integers(len(levels), size=(rows, len(levels)))]
        drawn += np.arange(rows)[:, None] * len(values)
        flat = np.bincount(drawn.ravel(), minlength=rows * len(values))
        return flat.reshape(rows, len(values)).astype(np.float64)

    areas = []
    block = max(1, 2**21 // len(vector))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        anomalies, normals = counts(level[labels], rows), counts(level[~labels], rows)
        below = normals.cumsum(1) - normals / 2
        areas.append((anomalies * below).sum(1) / (labels.sum() * (~labels).sum()))
    low, high = np.quantile(np.concatenate(areas), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _oriented(
    scores: Array, is_anomaly: Array, positive: Positive
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    vector, labels = _two_classes(scores, is_anomaly)
    if positive not in ("anomaly", "normal"):
        raise ValueError(f"positive must be 'anomaly' or 'normal', got {positive!r}")
    return (vector, labels) if positive == "anomaly" else (-vector, ~labels)


def aupr(scores: Array, is_anomaly: Array, *, positive: Positive) -> float:
    """Area under the precision-recall curve (average precision) with the named class as the positive one.

    Its chance level is the positive class's share of the images. Raises as `auroc` does.
    """
    vector, labels = _oriented(scores, is_anomaly, positive)
    return float(average_precision_score(labels, vector))


def fpr_at_tpr(scores: Array, is_anomaly: Array, *, positive: Positive, tpr: float = 0.95) -> float:
    """Smallest false-positive rate of a threshold that finds at least the share ``tpr`` of the positive class.

    The literature uses both conventions under the name FPR@95: with ``positive="normal"`` (Liang et al. 2018, ODIN) it
    is the share of anomalies accepted when 95% of the normal images are; with ``positive="anomaly"`` (Hendrycks et
    al. 2019) the share of normal images flagged when 95% of the anomalies are. Name it beside the number. Raises as
    `auroc` does.
    """
    vector, labels = _oriented(scores, is_anomaly, positive)
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    false_positive, true_positive, _ = roc_curve(labels, vector, drop_intermediate=False)
    return float(false_positive[true_positive >= tpr].min())


# Health of a representation -------------------------------------------------------------------------------------------


def effective_rank(features: Array) -> float:
    """Number of directions that ``features`` ``(N, D)`` fill: exp of the entropy of the normalised singular values.

    Between 1 (one direction) and min(N, D); 0 for features that are all zero. Not centred, as in RankMe (Garrido et
    al. 2023). The singular values come from the smaller Gram matrix in float64, so that the cost is one matrix product.
    Raises ``ValueError`` if there are no features or they are not finite.
    """
    matrix = _features(features, "features")
    if len(matrix) < matrix.shape[1]:
        matrix = matrix.T
    gram = sum(
        (block.double().T @ block.double() for block in matrix.split(4096)), start=torch.zeros(()).to(matrix)
    )
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if singular.sum() == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def embedding_spread(embeddings: Array) -> float:
    """√D times the mean standard deviation of the features of normalised embeddings ``(N, D)``.

    1 for directions spread evenly over the sphere, 0 for a collapsed representation (Chen & He 2021, SimSiam, fig. 2).
    Raises ``ValueError`` if there are fewer than two embeddings or they are not finite.
    """
    directions = normalize(_features(embeddings, "embeddings", least=2).double())
    return (directions.std(dim=0, correction=0).mean() * directions.shape[1] ** 0.5).item()


def alignment(first: Array, second: Array, *, alpha: float = 2.0) -> float:
    """Mean of ‖x - y‖^alpha over pairs of normalised embeddings ``(N, D)`` of two views; 0 is perfect.

    Wang & Isola 2020, eq. 3. Raises ``ValueError`` if shapes differ or values are not finite.
    """
    x, y = _features(first, "first").double(), _features(second, "second").double()
    if x.shape != y.shape:
        raise ValueError(f"first has shape {tuple(x.shape)}, second {tuple(y.shape)}")
    return (normalize(x) - normalize(y.to(x))).norm(dim=1).pow(alpha).mean().item()


def uniformity(embeddings: Array, *, t: float = 2.0) -> float:
    """Log of the mean of exp(-t‖x - y‖²) over pairs of different images' normalised embeddings ``(N, D)``.

    0 for a collapsed representation, lower for a more uniform one: near -2t for uniform directions in high dimension
    (Wang & Isola 2020, eq. 5). Raises ``ValueError`` if there are fewer than two or they are not finite.
    """
    directions = normalize(_features(embeddings, "embeddings", least=2).double())
    blocks = []
    for start, similarity in _similarities(directions, directions):
        exponents = 2 * t * (similarity - 1)
        rows = torch.arange(len(similarity), device=similarity.device)
        exponents[rows, start + rows] = -torch.inf
        blocks.append(exponents.flatten().logsumexp(0))
    pairs = len(directions) * (len(directions) - 1)
    return (torch.stack(blocks).logsumexp(0) - np.log(pairs)).item()


def posterior_snr(loc: Array, scale: Array) -> float:
    """Median over features of rms(loc) / rms(scale) over the images, both ``(N, D)``: signal against noise.

    Below 1 a sample of z is mostly noise. A few features of any scale do not move it. Raises ``ValueError`` if shapes
    differ, values are not finite, or a scale is not positive.
    """
    mean, noise = _features(loc, "loc").double(), _features(scale, "scale").double()
    if mean.shape != noise.shape:
        raise ValueError(f"loc has shape {tuple(mean.shape)}, scale {tuple(noise.shape)}")
    if not (noise > 0).all():
        raise ValueError("scale must be positive")
    return (mean.square().mean(0) / noise.to(mean).square().mean(0)).sqrt().median().item()


def collapse_warning(effective_rank: float, spread: float, snr: float, dim: int) -> str | None:
    """One message for what is unhealthy, with the threshold and the setting to change; ``None`` if nothing is.

    Takes `effective_rank` of features and their number ``dim``, `embedding_spread` and `posterior_snr`.
    """
    least_rank = max(1.5, MIN_RANK_SHARE * dim)
    found = []
    # "not >=" rather than "<", so that NaN is reported as well.
    if not spread >= MIN_SPREAD:
        found.append(
            f"the representation may be collapsing: the spread of its normalised embeddings is {spread:.2f} (below "
            f"{MIN_SPREAD}; 1 is even, 0 is collapsed): lower lr, raise warmup_epochs, keep the projector's batch norm"
        )
    if not effective_rank >= least_rank:
        found.append(
            f"the features fill few directions: their effective rank is {effective_rank:.1f} of {dim} (below "
            f"{least_rank:.1f}): lower lr, or use a larger batch_size"
        )
    if not snr >= MIN_POSTERIOR_SNR:
        found.append(
            f"the posterior is mostly noise, its mean {snr:.2f} times the norm of its noise "
            f"(below {MIN_POSTERIOR_SNR}): lower kl_weight, or raise epochs where it is low already"
        )
    return "; ".join(found) or None


# Uncertainty ----------------------------------------------------------------------------------------------------------


def _uncertain(correct: Array, uncertainty: Array) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    vector, right = as_vector(uncertainty, "uncertainty"), as_numpy(correct)
    if right.shape != vector.shape or not np.isin(right, (0, 1)).all():
        raise ValueError(f"correct must hold {vector.size} booleans, one for each uncertainty")
    return right.astype(bool), vector


def rejection_curve(correct: Array, uncertainty: Array) -> RejectionCurve:
    """Accuracy of the images that remain as the most uncertain ones are rejected, from none to all but one.

    The area is the mean accuracy over the curve, one minus the AURC of Geifman & El-Yaniv 2017. Images of equal
    uncertainty are rejected in random order, in expectation: constant uncertainty gives a flat curve.

    Takes booleans ``correct`` and numbers ``uncertainty``, both ``(N,)``; raises ``ValueError`` if lengths differ or
    an uncertainty is not finite.
    """
    right, vector = _uncertain(correct, uncertainty)
    _, level = np.unique(vector, return_inverse=True)
    expected = (np.bincount(level, weights=right) / np.bincount(level))[level]
    kept = np.arange(1, vector.size + 1)
    accuracy = (expected[np.argsort(level, kind="stable")].cumsum() / kept)[::-1]
    return RejectionCurve(1 - kept[::-1] / vector.size, accuracy, float(accuracy.mean()))


def r_auroc(correct: Array, uncertainty: Array) -> float:
    """AUROC of ``uncertainty`` ``(N,)`` for retrieval failing; ``correct`` ``(N,)`` says where it does not.

    R-AUROC of Kirchhof et al. 2023 ("URL: a representation learning benchmark for transferable uncertainty
    estimates"), where an image is retrieved correctly if its nearest neighbour is of its class (Recall@1; `knn_predict`
    with k = 1). 0.5 says that the uncertainty knows nothing of where retrieval fails. Raises as `rejection_curve`; also
    if retrieval never fails or always does.
    """
    right, vector = _uncertain(correct, uncertainty)
    if right.all() or not right.any():
        raise ValueError(
            f"retrieval {'never' if right.all() else 'always'} fails, so that R-AUROC does not exist"
        )
    return auroc(vector, ~right)


def detection_metrics(
    scores: Array, is_anomaly: Array, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All that is usually quoted of an anomaly score, with the positive class in each name.

    Parameters
    ----------
    scores : (N,)
        Higher for stranger images.
    is_anomaly : (N,) bool
        The truth; both kinds must occur.
    resamples, seed : int
        Of the bootstrap interval.

    Returns
    -------
    dict
        ``auroc`` (anomalies positive) with its 95 % bootstrap interval ``auroc_95``, ``aupr_anomalies_positive``,
        ``aupr_normal_positive``, ``fpr_at_95_tpr_anomalies_positive`` and ``fpr_at_95_tpr_normal_positive``.

    Raises
    ------
    ValueError
        If one kind is missing, or the scores are not finite.
    """
    low, high = auroc_interval(scores, is_anomaly, resamples=resamples, seed=seed)
    found: dict[str, Any] = {"auroc": auroc(scores, is_anomaly), "auroc_95": [low, high]}
    kinds: tuple[tuple[str, Positive], ...] = (("anomalies", "anomaly"), ("normal", "normal"))
    for name, positive in kinds:
        found[f"aupr_{name}_positive"] = aupr(scores, is_anomaly, positive=positive)
        found[f"fpr_at_95_tpr_{name}_positive"] = fpr_at_tpr(scores, is_anomaly, positive=positive)
    return found
