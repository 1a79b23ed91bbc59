"""The symmetric ELBO: `pyro.infer.Trace_ELBO` over both directions of a view pair, without device syncs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vje.model.vje import VJE, ViewPair, stack_views
from pyro_vje.plugins import look_up

Monitor = Callable[[Trace, Trace], None]

ELBO = "elbo"
Objective = Callable[[VJE, Tensor], Tensor]
"""What may take the ELBO's place: a model and stacked views ``(2, B, 3, S, S)`` to a loss in nats an image."""


def own_objective(name: str) -> Objective | None:
    """Resolve an objective named as ``module:function``; ``None`` for ``elbo``, the symmetric ELBO.

    Raises
    ------
    ValueError
        If there is no such module or function.
    """
    found: Any = look_up(name, {ELBO: None}, what="objective")
    if found is not None and not callable(found):
        raise ValueError(f"objective {name!r} must be a function (vje, views) -> loss, not {found!r}")
    return found


class SymmetricELBO(Trace_ELBO):
    """½ [ELBO(view 1 → view 2) + ELBO(view 2 → view 1)], averaged over the images of the batch.

    A drop-in `Trace_ELBO` for a model and guide that take ``views`` and hold both directions in plates, as
    `pyro_vje.VJE` does. ``elbo(model, guide)`` is an ``nn.Module`` whose call gives the negative objective in nats
    an image, differentiable, for a torch optimiser; the same object is a ``loss`` for `pyro.infer.SVI`.

    Unlike `Trace_ELBO` it returns one differentiable scalar and reads nothing back from the device, which asks for
    reparameterised guides. Oji & Fieguth (arXiv 2602.05639), the symmetric objective.

    Parameters
    ----------
    num_particles : int
        Samples of z for each image and direction.
    kl_weight : float
        Weight of log q(z) - log p(z), at least 0; 1 gives the ELBO proper.
    analytic_kl : bool
        Take the KL divergence of each latent in closed form, where there is one, instead of by its samples.
    monitor : callable, optional
        Called with each (model trace, guide trace) under ``no_grad``, for logging the parts of the objective.
    **kwargs
        Passed on to `Trace_ELBO` (``vectorize_particles``, ``max_plate_nesting``, ...).
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl_weight: float = 1.0,
        analytic_kl: bool = False,
        monitor: Monitor | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 <= kl_weight < float("inf"):
            raise ValueError(f"kl_weight must be finite and at least 0, not {kl_weight}")
        kwargs.setdefault("max_plate_nesting", 2)
        super().__init__(num_particles=num_particles, **kwargs)
        self.kl_weight, self.analytic_kl = kl_weight, analytic_kl
        self.monitor = monitor

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ELBOModule:
        """Bind model and guide in an ``nn.Module`` that owns the parameters behind them.

        Bound methods such as ``vje.model`` hide their module from ``parameters()``, so it is registered by hand.
        """
        # Pyro's annotation asks for modules, its code for callables.
        module = super().__call__(model, guide)  # type: ignore[arg-type]
        for part in (model, guide):
            owner = getattr(part, "__self__", None)
            if isinstance(owner, nn.Module) and owner not in module.children():
                module.add_module(type(owner).__name__.lower(), owner)
        return module

    def differentiable_loss(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        views: Tensor | Sequence[Tensor] | ViewPair,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Negative symmetric ELBO, a scalar tensor in nats an image.

        Parameters
        ----------
        model, guide : callable
            Pyro callables on ``views``.
        views : tensor or pair of tensors
            ``(2, B, C, H, W)``, or two tensors ``(B, C, H, W)``.

        Raises
        ------
        ValueError
            If ``views`` is not a pair of views, or a latent of the guide is not reparameterised.
        """
        owner = getattr(model, "__self__", None)
        if isinstance(owner, VJE) and not isinstance(views, ViewPair):
            views = owner.encode_views(views)  # once for guide and model
        total: Tensor | float = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, (views, *args), kwargs):
            _require_rsample(guide_trace)
            total = total + self._loss(model_trace, guide_trace)
            if self.monitor is not None:
                with torch.no_grad():
                    self.monitor(model_trace, guide_trace)
        # With vectorised particles _get_traces yields one trace whose sums run over all of them.
        shape = views.loc.shape if isinstance(views, ViewPair) else stack_views(views).shape
        images = shape[0] * shape[1]
        return torch.as_tensor(total) / (self.num_particles * images)

    def _loss(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """kl_weight · Σ over latents (log q - log p, or KL) - Σ over observations log p."""
        latents = [name for name, site in guide_trace.nodes.items() if _is_latent(site)]
        exact = [name for name in latents if self.analytic_kl and name in model_trace.nodes]
        divergence: Tensor | float = sum(_kl(model_trace.nodes[n], guide_trace.nodes[n]) for n in exact)
        guide_trace.compute_log_prob(site_filter=lambda name, site: name not in exact)
        model_trace.compute_log_prob(site_filter=lambda name, site: name not in exact)
        loss: Tensor | float = 0.0
        for trace, sign in ((guide_trace, 1.0), (model_trace, -1.0)):
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and name not in exact:
                    if site["is_observed"]:
                        loss = loss + sign * site["log_prob_sum"]
                    else:
                        divergence = divergence + sign * site["log_prob_sum"]
        return torch.as_tensor(loss + self.kl_weight * divergence)

    def loss_and_grads(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """Loss as a float, with gradients accumulated on the parameters: what `pyro.infer.SVI` calls."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    @torch.no_grad()
    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Loss as a float, without gradients."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()


def _is_latent(site: Any) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _kl(model_site: Any, guide_site: Any) -> Tensor:
    return scale_and_mask(
        kl_divergence(guide_site["fn"], model_site["fn"]), guide_site["scale"], guide_site["mask"]
    ).sum()


def _require_rsample(guide_trace: Trace) -> None:
    for name, site in guide_trace.nodes.items():
        if _is_latent(site) and not site["fn"].has_rsample:
            raise ValueError(
                f"the guide's site {name!r} is not reparameterised ({type(site['fn']).__name__} has no rsample): "
                "SymmetricELBO's gradient would be wrong; use pyro.infer.Trace_ELBO"
            )
