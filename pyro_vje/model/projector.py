"""What lies between the encoder's features and the embedding: nothing but a batch norm, unless one asks for more."""

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn
from torch.nn.functional import normalize

PROJECTORS = ("none", "linear", "mlp", "whiten")
DEFAULT_DIM = {"linear": 128, "mlp": 128, "whiten": 256}
"""Embedding dimension behind each projector; without one it is the encoder's width."""


class Whitening(nn.Module):
    """Normalised features, whitened along the leading directions of their shrunk covariance; nothing is learned here.

    For a frozen encoder: `fit` takes mean and Ledoit & Wolf's covariance of f / ‖f‖ over normal images, the embedding
    are the leading principal components at unit variance. ``(N, feature_dim)`` → ``(N, embedding_dim)``.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, feature_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("matrix", torch.eye(feature_dim, embedding_dim))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and covariance of ``features`` ``(N, feature_dim)``."""
        directions = normalize(features.double(), dim=-1).cpu()
        self.mean.copy_(directions.mean(0))
        variances, axes = torch.linalg.eigh(_shrunk_covariance(directions))  # ascending
        kept = self.matrix.shape[1]
        self.matrix.copy_((axes / variances.clamp_min(1e-12).sqrt()).flip(1)[:, :kept])

    def forward(self, features: Tensor) -> Tensor:
        """Whiten features."""
        return (normalize(features, dim=-1) - self.mean) @ self.matrix


def whitened_dim(features: Tensor) -> int:
    """How many directions `Whitening` should keep of ``features`` ``(N, feature_dim)`` of normal images.

    Four times the effective rank (Roy & Vetterli 2007) of their shrunk covariance, at least 256, at most all (ours).
    Images of one kind lie near few directions; those of a broad class have none to spare (benchmarks/pretrained.md).
    """
    directions = normalize(features.double(), dim=-1).cpu()
    share = torch.linalg.eigvalsh(_shrunk_covariance(directions)).clamp_min(0)
    effective_rank = torch.special.entr(share / share.sum()).sum().exp()
    return min(features.shape[-1], max(DEFAULT_DIM["whiten"], round(4 * effective_rank.item())))


def _shrunk_covariance(directions: Tensor) -> Tensor:
    return torch.from_numpy(ledoit_wolf(directions.numpy())[0])


def build_projector(kind: str, feature_dim: int, hidden_dim: int, embedding_dim: int) -> nn.Module:
    """Features ``(N, feature_dim)`` to embeddings ``(N, embedding_dim)`` by name.

    All but ``whiten`` close with a batch norm without parameters: the embedding's radius is near √D, the prior's unit.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}, not {kind!r}")
    if kind == "none" and embedding_dim != feature_dim:
        raise ValueError(
            f"without a projector the embedding is the encoder's {feature_dim} features, not {embedding_dim}: leave "
            "embedding_dim out, or use the projector 'linear' or 'mlp'"
        )
    if kind == "whiten":
        if embedding_dim > feature_dim:
            raise ValueError(f"embedding_dim {embedding_dim} exceeds the encoder's {feature_dim} features")
        return Whitening(feature_dim, embedding_dim)
    closing = nn.BatchNorm1d(embedding_dim, affine=False)
    if kind == "none":
        return nn.Sequential(closing)
    if kind == "linear":
        return nn.Sequential(nn.Linear(feature_dim, embedding_dim, bias=False), closing)
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, embedding_dim, bias=False),
        closing,
    )
