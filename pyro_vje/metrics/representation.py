"""How good frozen features ``(N, D)`` are, one row an image: probes by labels, and signs of health without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from pyro_vje.metrics.arrays import Array, as_features, as_labels, as_numpy

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


def check_knn(ks: Sequence[int], temperatures: Sequence[float]) -> None:
    """Raise ``ValueError`` unless there are settings for k-NN and all of them are positive."""
    if not ks or not temperatures:
        raise ValueError("k-NN needs at least one k and one temperature")
    if min(ks) < 1:
        raise ValueError(f"k must be at least 1, got {min(ks)}")
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")


def _pair(train: Array, test: Array) -> tuple[Tensor, Tensor]:
    """Training and test features, in one type on one device."""
    known = as_features(train, "train_features")
    asked = as_features(test, "test_features").to(known)
    if known.shape[1] != asked.shape[1]:
        raise ValueError(f"train features have {known.shape[1]} columns, test features {asked.shape[1]}")
    return known, asked


def _knn_votes(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> Tensor:
    """`knn_predict` for all combinations, ``(ks, temperatures, M)``; the neighbours are found once."""
    train, test = (normalize(features) for features in _pair(train_features, test_features))
    labels = as_labels(train_labels, "train_labels", len(train)).to(train.device)
    check_knn(ks, temperatures)
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

    Takes features ``(N, D)`` and ``(M, D)``, normalised here (a zero vector is equally similar to everything), and
    integer classes ``(N,)``; all N vote where there are fewer than ``k``. Raises ``ValueError`` if shapes disagree,
    features are not finite, labels are negative, or ``k`` or ``temperature`` is not positive.
    """
    return _knn_votes(train_features, train_labels, test_features, [k], [temperature])[0, 0]


def knn_sweep(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> list[dict[str, Any]]:
    """`knn_accuracy` for all combinations, k varying slowest; raises as it does, also if there is none."""
    predicted = _knn_votes(train_features, train_labels, test_features, ks, temperatures)
    labels = as_labels(test_labels, "test_labels", predicted.shape[-1]).to(predicted.device)
    return [
        {
            "accuracy": (classes == labels).double().mean().item(),
            "k": min(k, len(train_features)),
            "temperature": temperature,
            "metric": "cosine",
            "weights": "exp(similarity / temperature)",
            "train_images": len(train_features),
            "test_images": len(labels),
        }
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
) -> dict[str, Any]:
    """``accuracy`` of `knn_predict` with the protocol behind it, the ``k`` that was used first; raises as it does."""
    data = train_features, train_labels, test_features, test_labels
    return knn_sweep(*data, ks=[k], temperatures=[temperature])[0]


def linear_probe(
    train_features: Array,
    train_labels: Array,
    test_features: Array,
    test_labels: Array,
    *,
    l2: float = 0.01,
    max_iter: int = 1000,
) -> dict[str, Any]:
    """``accuracy`` of logistic regression (scikit-learn, L-BFGS) on frozen features, with the protocol behind it.

    Features are standardised by the training images, and W minimises ``mean cross-entropy + l2/2 ‖W‖²``: the penalty
    is per image, so that it means the same for any N. This is not the probe by SGD on augmented images that many
    papers report: name it beside the number. A probe that needs more than ``max_iter`` iterations comes back with
    ``converged`` false, and scikit-learn warns.

    Raises
    ------
    ValueError
        As `knn_predict`; also if the training labels hold one class only, or ``l2`` is not positive.
    """
    train, test = _pair(train_features, test_features)
    labels = as_numpy(as_labels(train_labels, "train_labels", len(train)))
    truth = as_numpy(as_labels(test_labels, "test_labels", len(test)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    if not l2 > 0:
        raise ValueError(f"l2 must be positive, got {l2}")
    scaler = StandardScaler()
    inputs, tests = scaler.fit_transform(as_numpy(train)), scaler.transform(as_numpy(test))
    # scikit-learn penalises ½‖W‖² + C · summed loss.
    probe = LogisticRegression(C=1 / (l2 * len(labels)), max_iter=max_iter).fit(inputs, labels)
    iterations = int(probe.n_iter_.max())
    return {
        "accuracy": float(probe.score(tests, truth)),
        "train_accuracy": float(probe.score(inputs, labels)),
        "classifier": "logistic regression (scikit-learn, L-BFGS)",
        "l2": l2,
        "standardised": True,
        "iterations": iterations,
        "converged": iterations < max_iter,
        "train_images": len(labels),
        "test_images": len(truth),
    }


def effective_rank(features: Array) -> float:
    """Number of directions that ``features`` ``(N, D)`` fill: exp of the entropy of the normalised singular values.

    Between 1 (one direction) and min(N, D); 0 for features that are all zero. Not centred, as in RankMe (Garrido et
    al. 2023). The singular values come from the smaller Gram matrix in float64, so that the cost is one matrix product.
    Raises ``ValueError`` if there are no features or they are not finite.
    """
    matrix = as_features(features, "features")
    if len(matrix) < matrix.shape[1]:
        matrix = matrix.T
    blocks = (block.double() for block in matrix.split(4096))
    gram = sum((block.T @ block for block in blocks), start=torch.zeros(()).to(matrix))
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if singular.sum() == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def embedding_spread(embeddings: Array) -> float:
    """√D times the mean standard deviation of the features of normalised embeddings ``(N, D)``.

    1 for directions spread evenly over the sphere, 0 for a collapsed representation (Chen & He 2021, SimSiam, fig. 2).
    Raises ``ValueError`` if there are fewer than two embeddings or they are not finite.
    """
    directions = normalize(as_features(embeddings, "embeddings", least=2).double())
    return (directions.std(dim=0, correction=0).mean() * directions.shape[1] ** 0.5).item()


def _two(first: Array, second: Array, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    x, y = (as_features(values, name).double() for values, name in zip((first, second), names, strict=True))
    if x.shape != y.shape:
        raise ValueError(f"{names[0]} has shape {tuple(x.shape)}, {names[1]} {tuple(y.shape)}")
    return x, y.to(x)


def alignment(first: Array, second: Array) -> float:
    """Mean of ‖x - y‖² over pairs of normalised embeddings ``(N, D)`` of two views; 0 is perfect.

    Wang & Isola 2020, eq. 3 with α = 2. Raises ``ValueError`` if shapes differ or values are not finite.
    """
    x, y = _two(first, second, ("first", "second"))
    return (normalize(x) - normalize(y)).square().sum(1).mean().item()


def uniformity(embeddings: Array) -> float:
    """Log of the mean of exp(-2‖x - y‖²) over pairs of different images' normalised embeddings ``(N, D)``.

    0 for a collapsed representation, lower for a more uniform one: near -4 for uniform directions in high dimension
    (Wang & Isola 2020, eq. 5, t = 2). Raises ``ValueError`` if there are fewer than two or they are not finite.
    """
    directions = normalize(as_features(embeddings, "embeddings", least=2).double())
    blocks = []
    for start, similarity in _similarities(directions, directions):
        exponents = 4 * (similarity - 1)
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
    mean, noise = _two(loc, scale, ("loc", "scale"))
    if not (noise > 0).all():
        raise ValueError("scale must be positive")
    return (mean.square().mean(0) / noise.square().mean(0)).sqrt().median().item()


def collapse_warning(effective_rank: float, spread: float, snr: float, dim: int) -> str | None:
    """One message for what is unhealthy, with the threshold and the setting to change; ``None`` if nothing is.

    Takes `effective_rank` of features and their number ``dim``, `embedding_spread` and `posterior_snr`.
    """
    least_rank = max(1.5, MIN_RANK_SHARE * dim)
    signs = (
        (spread, MIN_SPREAD, f"the representation may be collapsing: the spread of its normalised embeddings is "
         f"{spread:.2f} (below {MIN_SPREAD}; 1 is even, 0 is collapsed): lower lr, raise warmup_epochs"),
        (effective_rank, least_rank, f"the features fill few directions: their effective rank is {effective_rank:.1f} "
         f"of {dim} (below {least_rank:.1f}): lower lr, or use a larger batch_size"),
        (snr, MIN_POSTERIOR_SNR, f"the posterior is mostly noise, its mean {snr:.2f} times the norm of its noise "
         f"(below {MIN_POSTERIOR_SNR}): lower kl_weight, or raise epochs where it is low already"),
    )  # fmt: skip
    # "not >=" rather than "<", so that NaN is reported as well.
    return "; ".join(message for value, least, message in signs if not value >= least) or None
