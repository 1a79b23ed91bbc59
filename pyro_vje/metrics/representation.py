"""How good frozen features ``(N, D)`` are, one row an image: probes by labels, and signs of health without them.

All raise ``ValueError`` if shapes disagree, values are not finite, labels are negative, or a setting is not positive.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

from pyro_vje.metrics.arrays import Array, as_features, as_labels, as_numpy

BLOCK_ENTRIES = 2**25  # of a similarity matrix: 128 MiB in float32, whatever the number of images
L2, MAX_ITER = 0.01, 1000  # of the linear probe

# When a representation counts as unhealthy. A fiftieth of the dimensions (10 of 512) has lost what tells images apart.
# A spread of 0.5 is left when three quarters of each embedding's squared length are common to all images, or all
# variation lies in a quarter of the features; small healthy runs stay above 0.9. At 0.7 the noise has twice the power
# of the mean: small CIFAR-10 runs at KL weight 1, all less accurate, ended at 0.15 to 0.51, others at 1 to 4.
MIN_RANK_SHARE, MIN_SPREAD, MIN_POSTERIOR_SNR = 0.02, 0.5, 0.7


def _similarities(rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of ``rows @ columns.T``."""
    return (block @ columns.T for block in rows.split(max(1, BLOCK_ENTRIES // len(columns))))


def _top_k(similarity: Tensor, k: int) -> Tensor:
    """Columns ``(rows, k)`` of the largest entries, largest first; of equal ones the first, unlike ``topk``."""
    values, index = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    tied = (values[:, k:] == values[:, k - 1 : k]).nonzero()[:, 0]  # one more entry equals the last one taken
    index = index[:, :k]
    index[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
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


def _pair(axis: int, **named: Array) -> tuple[Tensor, Tensor]:
    """Two matrices, in one type on one device, whose shapes agree from ``axis`` on."""
    x, y = (as_features(values, name) for name, values in named.items())
    if x.shape[axis:] != y.shape[axis:]:
        raise ValueError(", ".join(f"{name} has shape {tuple(z.shape)}" for name, z in named.items()))
    return x, y.to(x)


def _knn_votes(data: Sequence[Array], ks: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """`knn_predict` for all combinations, ``(ks, temperatures, M)``; the neighbours are found once."""
    train, test = map(normalize, _pair(1, train_features=data[0], test_features=data[2]))
    labels = as_labels(data[1], "train_labels", len(train)).to(train.device)
    check_knn(ks, temperatures)
    classes, most = int(labels.max()) + 1, min(max(ks), len(train))
    predicted = []
    for similarity in _similarities(test, train):
        nearest = _top_k(similarity, most)
        # Relative to the nearest one, so that a small temperature overflows nothing.
        logits = similarity.gather(1, nearest).double()
        weights = ((logits - logits[:, :1]) / logits.new_tensor(temperatures)[:, None, None]).exp()
        voters, none = labels[nearest].expand_as(weights), weights.new_zeros(*weights.shape[:2], classes)
        votes = [none.scatter_add(2, voters[..., :k], weights[..., :k]).argmax(2) for k in ks]
        predicted.append(torch.stack(votes))
    return torch.cat(predicted, dim=2)


def knn_predict(
    train_features: Array, train_labels: Array, test_features: Array, k: int = 200, temperature: float = 0.1
) -> Tensor:
    """Classes ``(M,)`` by weighted k-nearest-neighbour vote: cosine similarity s, weight exp(s / temperature).

    The protocol of Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance discrimination", §3.4).
    Features ``(N, D)`` and ``(M, D)`` are normalised here (a zero vector is equally similar to everything); all N with
    their classes ``(N,)`` vote where there are fewer than ``k``. Equal similarities go to the first training image,
    equal votes to the lowest class: the result does not depend on the device.
    """
    return _knn_votes((train_features, train_labels, test_features), [k], [temperature])[0, 0]


def knn_sweep(*data: Array, ks: Sequence[int], temperatures: Sequence[float]) -> list[dict[str, Any]]:
    """``accuracy`` of `knn_predict` for all combinations, k varying slowest, each with the protocol behind it.

    Takes features ``(N, D)`` and labels ``(N,)`` of training images, then those of test images, ``(M, D)``, ``(M,)``.
    """
    predicted = _knn_votes(data, ks, temperatures)
    truth = as_labels(data[3], "test_labels", predicted.shape[-1]).to(predicted.device)
    accuracy = (predicted == truth).double().mean(2).tolist()
    protocol: dict[str, Any] = {"metric": "cosine", "weights": "exp(similarity / temperature)"}
    protocol |= {"train_images": len(data[0]), "test_images": len(truth)}
    return [
        {"accuracy": accuracy[i][j], "k": min(k, len(data[0])), "temperature": temperature, **protocol}
        for i, k in enumerate(ks)
        for j, temperature in enumerate(temperatures)
    ]


def linear_probe(
    train_features: Array, train_labels: Array, test_features: Array, test_labels: Array
) -> dict[str, Any]:
    """``accuracy`` of logistic regression (scikit-learn, L-BFGS) on frozen features, with the protocol behind it.

    Features are standardised by the training images, and W minimises ``mean cross-entropy + 0.005 ‖W‖²``: the penalty
    is per image, so that it means the same for any N. This is not the probe by SGD on augmented images that many
    papers report: name it beside the number. ``converged`` is false after 1,000 iterations, and scikit-learn warns.
    """
    train, test = map(as_numpy, _pair(1, train_features=train_features, test_features=test_features))
    labels = as_numpy(as_labels(train_labels, "train_labels", len(train)))
    truth = as_numpy(as_labels(test_labels, "test_labels", len(test)))
    if (labels == labels[0]).all():
        raise ValueError(f"a linear probe needs two classes, but all training labels are {labels[0]}")
    # scikit-learn penalises ½‖W‖² + C · summed loss.
    classifier = LogisticRegression(C=1 / (L2 * len(labels)), max_iter=MAX_ITER)
    accuracy = make_pipeline(StandardScaler(), classifier).fit(train, labels).score(test, truth)
    found = {"accuracy": float(accuracy), "converged": bool(classifier.n_iter_.max() < MAX_ITER)}
    protocol = {"classifier": "logistic regression (scikit-learn, L-BFGS)", "l2": L2, "standardised": True}
    return {**found, **protocol, "train_images": len(labels), "test_images": len(truth)}


def effective_rank(features: Array) -> float:
    """Number of directions that ``features`` ``(N, D)`` fill: exp of the entropy of the normalised singular values.

    From 1 to min(N, D); 0 for features that are all zero. Not centred, as in RankMe (Garrido et al. 2023).
    """
    matrix = as_features(features, "features").double()
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if singular.sum() == 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def embedding_spread(embeddings: Array) -> float:
    """√D times the mean standard deviation of the features of normalised embeddings ``(N, D)``.

    1 for directions spread evenly over the sphere, 0 for a collapsed representation (Chen & He 2021, SimSiam, fig. 2).
    """
    directions = normalize(as_features(embeddings, "embeddings", least=2).double())
    return (directions.std(dim=0, correction=0).mean() * directions.shape[1] ** 0.5).item()


def alignment(first: Array, second: Array) -> float:
    """Mean ‖x - y‖² of two views' normalised embeddings ``(N, D)``; 0 is best (Wang & Isola 2020, eq. 3, α = 2)."""
    x, y = (normalize(part.double()) for part in _pair(0, first=first, second=second))
    return (x - y).square().sum(1).mean().item()


def uniformity(embeddings: Array) -> float:
    """Log of the mean of exp(-2‖x - y‖²) over pairs of different images' normalised embeddings ``(N, D)``.

    0 for a collapsed representation, lower for a more uniform one: near -4 for uniform directions in high dimension
    (Wang & Isola 2020, eq. 5, t = 2).
    """
    x = normalize(as_features(embeddings, "embeddings", least=2).double())
    total = sum((4 * (similarity - 1)).exp().sum().item() for similarity in _similarities(x, x))
    return math.log((total - len(x)) / (len(x) * (len(x) - 1)))  # an image with itself adds 1


def posterior_snr(loc: Array, scale: Array) -> float:
    """Median over features of rms(loc) / rms(scale) over the images, both ``(N, D)``: signal against noise.

    Below 1 a sample of z is mostly noise. A few features of any scale do not move it.
    """
    mean, noise = (part.double() for part in _pair(0, loc=loc, scale=scale))
    if not (noise > 0).all():
        raise ValueError("scale must be positive")
    return (mean.square().mean(0) / noise.square().mean(0)).sqrt().median().item()


def unhealthy(effective_rank: float, spread: float, posterior_snr: float, dim: int) -> dict[str, str]:
    """Of these signs those that are unhealthy, each with what to change; ``dim`` is the number of features."""
    least_rank = max(1.5, MIN_RANK_SHARE * dim)
    found = {}
    # "not >=" rather than "<", so that NaN is reported as well.
    if not effective_rank >= least_rank:
        found["effective_rank"] = (
            f"few of the features tell images apart (effective rank {effective_rank:.1f} of {dim}, healthy from "
            f"{least_rank:.1f}): lower lr, or use a larger batch_size"
        )
    if not spread >= MIN_SPREAD:
        found["spread"] = (
            f"all images come to look the same to the model, which may be collapsing (spread {spread:.2f}, healthy "
            f"from {MIN_SPREAD}): lower lr, raise warmup_epochs"
        )
    if not posterior_snr >= MIN_POSTERIOR_SNR:
        found["posterior_snr"] = (
            "what the model says of an image is still mostly noise (signal by noise "
            f"{posterior_snr:.2f}, healthy from {MIN_POSTERIOR_SNR}): train longer (epochs), or make it cheaper to "
            "say more (a lower kl_weight)"
        )
    return found
