"""The VJE model: encoder, projector and posterior network, and the Pyro ``model``/``guide`` pair over them.

Oji & Fieguth, "Joint Embedding Variational Bayes", arXiv 2602.05639 (TMLR 2026).
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple, Self, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.nn import functional

# A direction normalised in bfloat16 is off the sphere by more than float32 forgives, so the model leaves autocast.
from pyro_vje.distributions.numerics import at_least_float32
from pyro_vje.distributions.polar import Radius
from pyro_vje.model.likelihoods import LikelihoodFamily, LikelihoodSettings, get_family
from pyro_vje.model.projector import DEFAULT_DIM, build_projector

MIN_SCALE = 1e-3
"""Floor of the posterior's standard deviation: the restricted likelihood's mass grows without bound below it."""


class ViewPairs(NamedTuple):
    """The P pairs (context view, target view) of each of B images, tensors of shape ``(P, B, D)``.

    Posterior given the context, and the target's embedding with its gradient stopped. Of V full views each is a context
    for every other, of L local ones for all full ones: P = V (V - 1) + L V pairs; of two views both directions.
    """

    loc: Tensor
    scale: Tensor
    target: Tensor


def stack_views(views: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Views in stacks of one shape, each encoded in one pass: full views ``(V, B, C, H, W)``, then any local ones.

    ``views`` are a tensor of V full views, or a sequence of views ``(B, C, H, W)``, of which those of the first one's
    shape are the full ones and come first. Raises ``ValueError`` unless there are two full views, all of B images.
    """
    stacks = [views] if isinstance(views, Tensor) else []
    for _, alike in () if isinstance(views, Tensor) else groupby(views, lambda view: tuple(view.shape)):
        stacks.append(torch.stack(tuple(alike)))
    shapes = [tuple(stack.shape) for stack in stacks]
    if not shapes or any(len(shape) < 3 or shape[1] != shapes[0][1] for shape in shapes) or shapes[0][0] < 2:
        must = "views must be two or more of one shape (B, C, H, W), then smaller ones"
        raise ValueError(f"{must}, not {shapes}")
    return stacks


Views = Tensor | Sequence[Tensor] | ViewPairs


class PosteriorNetwork(nn.Module):
    """Amortised diagonal Gaussian posterior q(z | context): one trunk, two linear outputs.

    It stands where SimSiam has its predictor. Shapes: ``(N, D)`` → loc ``(N, D)``, scale ``(N, D)``.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden = nn.Linear(dim, hidden_dim, bias=False)
        self.trunk = nn.Sequential(hidden, nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True))
        self.loc, self.raw_scale = nn.Linear(hidden_dim, dim), nn.Linear(hidden_dim, dim)

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Map embeddings to the posterior's loc and scale, both outside any lower precision of autocast."""
        hidden = self.trunk(embeddings)
        scale = functional.softplus(at_least_float32(self.raw_scale(hidden))) + MIN_SCALE
        return at_least_float32(self.loc(hidden)), scale


class VJE(nn.Module):
    """Variational Joint Embedding: a latent-variable model of one view's embedding given the other view.

    For a context view c and a target view t, with e = projector(encoder(·)) in R^D::

        posterior    q(z | c) = Normal(loc(e_c), scale(e_c))     diagonal, from the posterior network
        prior        p(z)     = Normal(0, I_D)
        likelihood   p(stop_gradient(e_t) | z, scale(e_c))        a family of `pyro_vje.model.likelihoods`

    The likelihood shares the posterior's per-feature scale. `model` and `guide` are Pyro callables on the views of a
    batch, in which each view serves as context for every other: plates ``direction`` (P pairs) and ``image`` (B).

    Parameters
    ----------
    encoder, feature_dim
        Maps normalised images ``(N, 3, H, W)`` to features ``(N, feature_dim)`` (`build_encoder`, `feature_dim`).
    embedding_dim
        D, of the embedding and the latent: by default the encoder's width without a projector, else `DEFAULT_DIM`.
    hidden_dim
        Width of the hidden layer of the posterior network, and of the projector ``"mlp"``.
    projector
        Features to embedding: ``"none"``, a batch norm without parameters; ``"linear"`` or ``"mlp"`` before it;
        ``"whiten"``, for a frozen encoder; or a module of your own from ``(N, feature_dim)`` to ``(N, embedding_dim)``.
    likelihood
        A family by name or ``module:function``.
    df
        Degrees of freedom of the heavy-tailed families. By default D - 2, at which the restricted Student-t is a
        spherical Cauchy up to its mass; small values (5 at D = 128) trained to lower accuracy and rank.
    unit_radius
        ``"sqrt-d"`` measures directions on the sphere of radius √D, in the unit of the latent; ``"1"`` on the unit one.
    radius, radius_scale
        Radial factor of the polar families, ``None`` to drop it, and its scale: ``"learned"``, one number; or
        ``"shared"``, borrowed from the posterior's, to which training sacrifices a few features (an ablation).
    shared_variance
        If false, the likelihood has one learned scale per feature instead of the posterior's (an ablation).
    rotations
        Above 0, an image's quarter turns are a further target: a categorical site ``rotation`` given z, of this weight
        times D (Hendrycks et al., arXiv 1906.12340; as images of their own: Sohn et al., arXiv 2011.02578).
    targets
        With more than two views: ``"each"`` other view is a target by itself, or the ``"mean"`` of their embeddings is
        one, as in FastSiam (Pototzky et al., GCPR 2022); then P = V + L.
    name
        Under which `pyro.infer.SVI` finds the parameters in Pyro's store; two models in one program need two.

    Raises ``ValueError`` if a setting is out of its range or the family is unknown.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        *,
        embedding_dim: int | None = None,
        hidden_dim: int = 512,
        projector: str | nn.Module = "none",
        likelihood: str = "polar-student-t",
        df: float | None = None,
        unit_radius: str = "sqrt-d",
        radius: str | None = "student-t",
        radius_scale: str = "learned",
        shared_variance: bool = True,
        rotations: float = 0.0,
        targets: str = "each",
        name: str = "vje",
    ) -> None:
        super().__init__()
        if embedding_dim is None:
            known = DEFAULT_DIM if isinstance(projector, str) else {}
            embedding_dim = known.get(projector, feature_dim)  # type: ignore[arg-type]
            embedding_dim = min(embedding_dim, feature_dim) if projector == "whiten" else embedding_dim
        df = float(max(1, embedding_dim - 2)) if df is None else df
        if embedding_dim < 2:
            least = "at least 2, for directions to exist"
            raise ValueError(f"embedding_dim must be {least}, not {embedding_dim}")
        if not df > 0:
            raise ValueError(f"df must be positive (inf for the Gaussian limit), not {df}")
        units = {"1": 1.0, "sqrt-d": math.sqrt(embedding_dim)}  # √D is the typical norm of z ~ Normal(0, I)
        for setting, value, choices in (
            ("unit_radius", unit_radius, tuple(units)),
            ("radius", radius, (*get_args(Radius), None)),
            ("radius_scale", radius_scale, ("learned", "shared")),
            ("targets", targets, ("each", "mean")),
        ):
            if value not in choices:
                raise ValueError(f"{setting} must be one of {', '.join(map(str, choices))}, not {value!r}")
        self.name, self.targets = name, targets
        self.encoder, self.frozen = encoder, False
        if isinstance(projector, str):
            projector = build_projector(projector, feature_dim, hidden_dim, embedding_dim)
        self.projector = projector
        self.posterior_network = PosteriorNetwork(embedding_dim, hidden_dim)
        self.feature_dim, self.embedding_dim = feature_dim, embedding_dim
        self.family = get_family(likelihood)
        self.settings = LikelihoodSettings(df, units[unit_radius], cast(Any, radius))
        self.rotations = rotations
        self.rotation_network = nn.Linear(embedding_dim, 4) if rotations else None
        self.likelihood_raw_scale = None if shared_variance else nn.Parameter(torch.zeros(embedding_dim))
        learned = radius_scale == "learned" and _uses_radius_scale(self.family, self.settings, embedding_dim)
        self.raw_radius_scale = nn.Parameter(torch.tensor(0.5413)) if learned else None  # softplus gives 1

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    def freeze_encoder(self) -> None:
        """Keep everything of the encoder as it is from now on, the statistics of its batch norms included."""
        self.frozen = True
        self.encoder.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for a frozen encoder."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """Encoder features ``(N, feature_dim)`` of normalised images, on which probes are trained."""
        return at_least_float32(self.encoder(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings e ``(N, D)`` of normalised images ``(N, 3, H, W)``."""
        return self.project(self.encoder(images))

    def project(self, features: Tensor) -> Tensor:
        """Embeddings ``(N, D)`` of encoder features ``(N, feature_dim)``; ``ValueError`` for another width."""
        if features.shape[-1] != self.feature_dim:
            raise ValueError(f"the encoder gives {features.shape[-1]} features, but feature_dim is {self.feature_dim}")
        return at_least_float32(self.projector(features))

    def posterior(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Loc and scale ``(N, D)`` of q(z | context) for context embeddings ``(N, D)``."""
        return self.posterior_network(embeddings)

    def likelihood(self, z: Tensor, scale: Tensor, family: LikelihoodFamily | None = None) -> dist.TorchDistribution:
        """p(target | z, scale) over R^D for latents and posterior scales ``(..., D)``; another ``family`` if given."""
        if self.likelihood_raw_scale is not None:
            scale = (functional.softplus(self.likelihood_raw_scale) + MIN_SCALE).expand_as(scale)
        settings = self.settings
        if self.raw_radius_scale is not None:
            radius_scale = functional.softplus(self.raw_radius_scale) + MIN_SCALE
            settings = dataclasses.replace(settings, radius_scale=radius_scale)
        return (family or self.family)(z, scale, settings)

    def log_rotation(self, locs: Sequence[Tensor]) -> Tensor:
        """Mean log-probability ``(N,)`` of the turn of images turned by 0, 1, 2, 3 quarters, of loc ``(N, D)`` each.

        Of the latent's posterior the mean is taken, without noise. ``ValueError`` if the model has no rotations.
        """
        if self.rotation_network is None:
            raise ValueError("this model was trained without rotations (--rotations)")
        found = [self.rotation_network(loc).log_softmax(-1) for loc in locs]
        return torch.stack([log_prob[:, turn] for turn, log_prob in enumerate(found)]).mean(0)

    def encode_views(self, views: Views, targets: Tensor | None = None) -> ViewPairs:
        """Posteriors and stopped targets of all pairs of views, from one pass over every view.

        ``targets`` ``(V, B, D)``, of another network, take the place of the full views' own embeddings.
        """
        if isinstance(views, ViewPairs):
            return views
        stacks = stack_views(views)
        images = stacks[0].shape[1]
        features = [self.features(stack.flatten(0, 1)).unflatten(0, (-1, images)) for stack in stacks]
        return self.pair(torch.cat(features), len(stacks[0]), targets)

    def _pairing(self, views: int, full: int) -> list[tuple[int, list[int]]]:
        """The context of each pair and its target, of which it may be the mean: of V + L views, V of them full."""
        others = [(context, [t for t in range(full) if t != context]) for context in range(views)]
        return others if self.targets == "mean" else [(c, [t]) for c, targets in others for t in targets]

    def pair(self, features: Tensor, full: int | None = None, targets: Tensor | None = None) -> ViewPairs:
        """`encode_views` from features of all views, ``(V + L, B, feature_dim)``: the first ``full`` are targets."""
        embeddings = self.project(features.flatten(0, 1))
        loc, scale = self.posterior(embeddings)
        loc, scale, embeddings = (x.unflatten(0, (len(features), -1)) for x in (loc, scale, embeddings))
        contexts, others = zip(*self._pairing(len(features), full or len(features)), strict=True)
        loc, scale = (torch.stack([x[context] for context in contexts]) for x in (loc, scale))
        targets = (embeddings if targets is None else targets).detach()
        return ViewPairs(loc, scale, torch.stack([targets[ts].mean(0) for ts in others]))

    def model(self, views: Views, turns: Tensor | None = None) -> Tensor:
        """Pyro model of all targets ``(P, B, D)``; ``views`` as in `stack_views`, or as of `encode_views`.

        ``turns`` ``(B,)`` are the quarter turns, 0 to 3, by which the images lie, for a model with ``rotations``.
        Replayed against a trace of `guide` on the same views, as Pyro's objectives do, it encodes nothing itself.
        """
        self._register_for_svi()
        if isinstance(views, ViewPairs):
            origin = torch.zeros_like(views.loc)
        else:
            full, *local = stack_views(views)
            pairs = len(self._pairing(len(full) + sum(map(len, local)), len(full)))
            origin = at_least_float32(full.new_zeros(pairs, full.shape[1], self.embedding_dim))
        with pyro.plate("direction", len(origin), dim=-2), pyro.plate("image", origin.shape[1], dim=-1):
            with poutine.trace() as sampled:
                z = pyro.sample("z", dist.Normal(origin, 1.0).to_event(1))
            site: Any = next(iter(sampled.trace.nodes.values()))  # replay brings the guide's `infer` along
            given, encoded = site["infer"].get("encoded", (None, None))
            _, scale, target = encoded if given is views else self.encode_views(views)
            if self.rotation_network is not None and turns is not None:
                with poutine.scale(scale=self.rotations * self.embedding_dim):
                    pyro.sample("rotation", dist.Categorical(logits=self.rotation_network(z)), obs=turns)
            return pyro.sample("target", self.likelihood(z, scale), obs=target)

    def guide(self, views: Views, turns: Tensor | None = None) -> Tensor:
        """Pyro guide: the amortised posterior of each pair's latent given its context view; ``views`` as above."""
        self._register_for_svi()
        pairs = self.encode_views(views)
        with pyro.plate("direction", len(pairs.loc), dim=-2), pyro.plate("image", pairs.loc.shape[1], dim=-1):
            found: Any = {"encoded": (views, pairs)}  # for `model`
            return pyro.sample("z", dist.Normal(pairs.loc, pairs.scale).to_event(1), infer=found)

    def _register_for_svi(self) -> None:
        # pyro.infer.SVI finds parameters by tracing param statements; elsewhere they would only cost time, and tie two
        # models of one process through the global store.
        tracers = (h for h in _PYRO_STACK if isinstance(h, poutine.trace_messenger.TraceMessenger))
        if not any(tracer.param_only for tracer in tracers):
            return
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            full_name = f"{self.name}$$${name}"
            if full_name in store and store[full_name] is not parameter:
                raise ValueError(
                    f"another model's parameters are in Pyro's parameter store under the name {self.name!r}: give this "
                    "one another (VJE(..., name=...)), or call pyro.clear_param_store() before training it"
                )
        pyro.module(self.name, self)


def _uses_radius_scale(family: LikelihoodFamily, settings: LikelihoodSettings, dim: int) -> bool:
    """Whether the density depends on `LikelihoodSettings.radius_scale`; a parameter without gradient stops DDP."""
    # What is wrong with a family `check` says. On the CPU, also where a model is built without memory.
    with contextlib.suppress(Exception), torch.enable_grad(), torch.device("cpu"):
        scale = torch.ones((), requires_grad=True)
        ones, settings = torch.ones(1, dim), dataclasses.replace(settings, radius_scale=scale)
        return bool(family(ones, ones, settings).log_prob(ones).requires_grad)
    return False
