"""The VJE model: encoder, projector and posterior network, and the Pyro ``model``/``guide`` pair over them.

Oji & Fieguth, "Joint Embedding Variational Bayes", arXiv 2602.05639 (TMLR 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn import functional

# A direction normalised in bfloat16 is off the sphere by more than float32 forgives, so the model leaves autocast.
from pyro_vje.distributions._common import at_least_float32
from pyro_vje.likelihoods import (
    LikelihoodFamily,
    LikelihoodSettings,
    get_family,
    resolve_radius,
    resolve_unit_radius,
)

MIN_SCALE = 1e-3
"""Floor of the posterior's standard deviation: the restricted likelihood's mass grows without bound below it."""


class ViewPair(NamedTuple):
    """Both directions of a batch of view pairs, each tensor of shape ``(2, B, D)``.

    Row ``[i]`` holds the posterior given view ``i`` and, as its target, the embedding of the other view with its
    gradient stopped.
    """

    loc: Tensor
    scale: Tensor
    target: Tensor


_shared: ContextVar[dict[tuple[int, int], ViewPair] | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_forward() -> Iterator[None]:
    """Within this context each `VJE` encodes a given batch of views once, however often it is asked.

    A guide and a model both need the embeddings; Pyro runs one after the other. The context ends with the
    evaluation of the ELBO, so that nothing stale outlives an optimiser step.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def stack_views(views: Tensor | Sequence[Tensor]) -> Tensor:
    """Bring two views ``(B, C, H, W)`` each, or a stacked tensor ``(2, B, C, H, W)``, to the stacked form.

    Raises
    ------
    ValueError
        If there are not exactly two views, or their shapes differ.
    """
    if not isinstance(views, Tensor):
        shapes = [tuple(view.shape) for view in views]
        if len(shapes) != 2 or shapes[0] != shapes[1]:
            raise ValueError(f"views must be two tensors of one shape (B, C, H, W), not {shapes}")
        views = torch.stack(tuple(views))
    if views.dim() < 3 or views.shape[0] != 2:
        raise ValueError(f"stacked views must have shape (2, B, C, H, W), not {tuple(views.shape)}")
    return views


class PosteriorNetwork(nn.Module):
    """Amortised diagonal Gaussian posterior q(z | context): one trunk, two linear outputs.

    It stands where SimSiam has its predictor. Shapes: ``(N, D)`` → loc ``(N, D)``, scale ``(N, D)``.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)
        )
        self.loc = nn.Linear(hidden_dim, dim)
        self.raw_scale = nn.Linear(hidden_dim, dim)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Map embeddings to the posterior's loc and scale, both outside any lower precision of autocast."""
        hidden = self.trunk(embeddings)
        scale = functional.softplus(at_least_float32(self.raw_scale(hidden))) + MIN_SCALE
        return at_least_float32(self.loc(hidden)), scale


def projection_mlp(feature_dim: int, hidden_dim: int, embedding_dim: int) -> nn.Sequential:
    """Features to embedding: Linear-BN-ReLU-Linear-BN, the last without affine parameters.

    The closing batch norm puts every embedding feature at unit variance, hence the embedding's radius near √D:
    the unit of the prior z ~ Normal(0, I).
    """
    return nn.Sequential(
        nn.Linear(feature_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, embedding_dim, bias=False),
        nn.BatchNorm1d(embedding_dim, affine=False),
    )


class VJE(nn.Module):
    """Variational Joint Embedding: a latent-variable model of one view's embedding given the other view.

    For a context view c and a target view t, with e = projector(encoder(·)) in R^D::

        posterior    q(z | c) = Normal(loc(e_c), scale(e_c))     diagonal, from the posterior network
        prior        p(z)     = Normal(0, I_D)                    its KL divergence weighted by ``kl_weight``
        likelihood   p(stop_gradient(e_t) | z, scale(e_c))        a family of `pyro_vje.likelihoods`

    The likelihood shares the posterior's per-feature scale. `model` and `guide` are Pyro callables on a batch of
    view pairs, in which each view serves as context for the other: plates ``direction`` (2) and ``image`` (B).

    Parameters
    ----------
    encoder : nn.Module
        Maps normalised images ``(N, 3, H, W)`` to features ``(N, feature_dim)``.
    feature_dim : int
        Width of the encoder's output (`pyro_vje.encoders.feature_dim` measures it).
    embedding_dim : int
        D, the dimension of the embedding and of the latent.
    hidden_dim : int
        Width of the hidden layer of the projector and of the posterior network.
    projector : nn.Module or None
        Features to embedding; by default `projection_mlp`. ``nn.Identity()`` makes the features the embedding.
    likelihood : str
        A family by name or ``module:function``.
    df : float, optional
        Degrees of freedom of the heavy-tailed families. By default D - 2, at which the restricted Student-t is a
        spherical Cauchy up to its mass; small values (5 at D = 128) trained to lower accuracy and rank.
    unit_radius : str
        ``"sqrt-d"`` measures directions on the sphere of radius √D, in the unit of the latent; ``"1"`` on the unit
        sphere.
    radius : str or None
        Radial factor of the polar families; ``None`` drops it.
    kl_weight : float
        Weight of the KL divergence, at least 0; 1 gives the ELBO proper.
    shared_variance : bool
        If false, the likelihood has one learned scale per feature instead of the posterior's (an ablation).

    Raises
    ------
    ValueError
        If a setting is out of its range or the family is unknown.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        *,
        embedding_dim: int = 128,
        hidden_dim: int = 512,
        projector: nn.Module | None = None,
        likelihood: str = "polar-student-t",
        df: float | None = None,
        unit_radius: str = "sqrt-d",
        radius: str | None = "student-t",
        kl_weight: float = 0.03,
        shared_variance: bool = True,
    ) -> None:
        super().__init__()
        if embedding_dim < 2:
            raise ValueError(
                f"embedding_dim must be at least 2 for a direction to exist, not {embedding_dim}"
            )
        if df is None:
            df = float(max(1, embedding_dim - 2))
        if not df > 0:
            raise ValueError(f"df must be positive (inf for the Gaussian limit), not {df}")
        if not 0 <= kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be finite and at least 0, not {kl_weight}")
        self.encoder = encoder
        self.projector = projector or projection_mlp(feature_dim, hidden_dim, embedding_dim)
        self.posterior_network = PosteriorNetwork(embedding_dim, hidden_dim)
        self.feature_dim = feature_dim
        self.embedding_dim = embedding_dim
        self.kl_weight = kl_weight
        self.family = get_family(likelihood)
        self.settings = LikelihoodSettings(
            df, resolve_unit_radius(unit_radius, embedding_dim), resolve_radius(radius)
        )
        self.likelihood_raw_scale = None if shared_variance else nn.Parameter(torch.zeros(embedding_dim))

    def features(self, images: Tensor) -> Tensor:
        """Encoder features ``(N, feature_dim)`` of normalised images, on which probes are trained."""
        return at_least_float32(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings e ``(N, D)`` of normalised images ``(N, 3, H, W)``."""
        return self.project(self.encoder(images))

    def project(self, features: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of encoder features ``(N, feature_dim)``."""
        return at_least_float32(self.projector(features))

    def posterior(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale ``(N, D)`` of q(z | context) for context embeddings ``(N, D)``."""
        return self.posterior_network(embeddings)

    def likelihood(
        self, z: Tensor, scale: Tensor, family: LikelihoodFamily | None = None
    ) -> dist.TorchDistribution:
        """p(target | z, scale), a distribution over R^D for latents ``(..., D)`` and posterior scales.

        ``family`` takes the place of the model's own, with the same settings.
        """
        if self.likelihood_raw_scale is not None:
            scale = (functional.softplus(self.likelihood_raw_scale) + MIN_SCALE).expand_as(scale)
        return (family or self.family)(z, scale, self.settings)

    def encode_views(self, views: Tensor | Sequence[Tensor]) -> ViewPair:
        """Posterior and stopped target of both directions, from one pass over the 2·B images."""
        cache = _shared.get()
        key = (id(self), id(views))
        if cache is not None and key in cache:
            return cache[key]
        stacked = stack_views(views)
        batch = stacked.shape[1]
        embeddings = self.embed(stacked.flatten(0, 1))
        loc, scale = self.posterior(embeddings)
        shape = (2, batch, self.embedding_dim)
        pair = ViewPair(loc.view(shape), scale.view(shape), embeddings.detach().view(shape).flip(0))
        if cache is not None:
            cache[key] = pair
        return pair

    def model(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Pyro model of both targets given latents; ``views`` as in `stack_views`."""
        self._register_for_svi()
        pair = self.encode_views(views)
        with self._plates(pair):
            with self._weighted_kl():
                z = pyro.sample("z", dist.Normal(torch.zeros_like(pair.loc), 1.0).to_event(1))
            return pyro.sample("target", self.likelihood(z, pair.scale), obs=pair.target)

    def guide(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Pyro guide: the amortised posterior of each direction's latent given its context view."""
        self._register_for_svi()
        pair = self.encode_views(views)
        with self._plates(pair), self._weighted_kl():
            return pyro.sample("z", dist.Normal(pair.loc, pair.scale).to_event(1))

    @contextmanager
    def _plates(self, pair: ViewPair) -> Iterator[None]:
        with pyro.plate("direction", 2, dim=-2), pyro.plate("image", pair.loc.shape[1], dim=-1):
            yield

    def _weighted_kl(self) -> poutine.messenger.Messenger:
        # Scaling z's site in both model and guide weighs log q(z) - log p(z); Pyro's scale must be positive.
        if self.kl_weight == 0:
            return poutine.mask(mask=False)
        return poutine.scale(scale=self.kl_weight)

    def _register_for_svi(self) -> None:
        # pyro.infer.SVI finds parameters by tracing param statements; elsewhere they would only cost time, and
        # pyro.module would silently tie two models of one process through the global store.
        if not any(
            isinstance(h, poutine.trace_messenger.TraceMessenger) and h.param_only for h in _PYRO_STACK
        ):
            return
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            full_name = f"vje$$${name}"
            if full_name in store and store[full_name] is not parameter:
                raise ValueError(
                    "another VJE's parameters are in Pyro's parameter store: call pyro.clear_param_store() before "
                    "training this one with SVI"
                )
        pyro.module("vje", self)
