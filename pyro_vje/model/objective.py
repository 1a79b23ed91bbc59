"""The symmetric ELBO: `pyro.infer.Trace_ELBO` over all pairs of a batch's views, without device syncs."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vje.model.vje import VJE, ViewPairs, Views, stack_views
from pyro_vje.plugins import look_up

Monitor = Callable[[Trace, Trace], None]

ELBO = "elbo"
Objective = Callable[[VJE, Views], Tensor]
"""What may take the ELBO's place: a model and a batch of views, for `VJE.encode_views`, to a loss in nats an image."""


def own_objective(name: str) -> Objective | None:
    """Resolve an objective named as ``module:function``; ``None`` for ``elbo``, the symmetric ELBO."""
    return look_up(name, {ELBO: None}, what="objective", form="(vje, views) -> loss")


class SymmetricELBO(Trace_ELBO):
    """½ [ELBO(view 1 → view 2) + ELBO(view 2 → view 1)], or the mean over all pairs of more views, and over the images.

    A `Trace_ELBO` for a model and guide on views that hold their pairs in plates, as `pyro_vje.VJE` does.
    ``elbo(model, guide)`` is an ``nn.Module`` whose call gives the negative objective in nats an image, differentiable,
    for a torch optimiser; the same object is a ``loss`` for `pyro.infer.SVI`. Guide and model of a `VJE` share one pass
    of the encoder.

    Unlike `Trace_ELBO` it returns one differentiable scalar and reads nothing back from the device, which asks for
    reparameterised guides; and it divides by the number of targets, P B (of a model of your own by V B, the number of
    views): so is a global latent's term. Oji & Fieguth (arXiv 2602.05639), the symmetric objective.

    Parameters
    ----------
    num_particles, **kwargs
        Samples of z for each image and pair; other options of `Trace_ELBO` (``vectorize_particles``, ...).
    kl_weight, analytic_kl
        Weight of log q(z) - log p(z), at least 0, and whether it is taken in closed form instead of by samples. At 1
        this is the ELBO proper; model and guide know of no weight, so that Pyro's other inference means what it says.
    monitor
        Called with each (model trace, guide trace) under ``no_grad``, for logging the parts of the objective.

    Raises ``ValueError`` for a weight that is negative or not finite.
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
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight must be finite and at least 0, not {kl_weight}")
        kwargs.setdefault("max_plate_nesting", 2)
        super().__init__(num_particles=num_particles, **kwargs)
        self.kl_weight, self.analytic_kl, self.monitor = kl_weight, analytic_kl, monitor

    def __call__(self, model: Callable[..., Any], guide: Callable[..., Any]) -> ELBOModule:
        """Bind model and guide in an ``nn.Module`` that owns the parameters behind them, also behind bound methods."""
        # Pyro's annotation asks for modules, its code for callables.
        module = super().__call__(model, guide)  # type: ignore[arg-type]
        for part in (model, guide):
            owner = getattr(part, "__self__", None)
            if isinstance(owner, nn.Module) and owner not in module.children():
                module.add_module(type(owner).__name__.lower(), owner)
        return module

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], views: Views, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Negative symmetric objective, a scalar tensor in nats an image, of Pyro callables on ``views``.

        ``views`` are as in `stack_views`, or `VJE.encode_views` of these; others, and a latent of the guide that is
        not reparameterised, are a ``ValueError``.
        """
        owner = getattr(model, "__self__", None)
        if not isinstance(views, ViewPairs):
            views = owner.encode_views(views) if isinstance(owner, VJE) else torch.cat(stack_views(views))
        found = []
        for model_trace, guide_trace in self._get_traces(model, guide, (views, *args), kwargs):
            _require_rsample(guide_trace)
            found.append(self._terms(model_trace, guide_trace))
            if self.monitor is not None:
                with torch.no_grad():
                    self.monitor(model_trace, guide_trace)
        count = math.prod((views.loc if isinstance(views, ViewPairs) else views).shape[:2])
        # With vectorised particles _get_traces yields one trace whose sums run over all of them.
        return torch.stack(found).sum() / (self.num_particles * count)

    def _terms(self, model_trace: Trace, guide_trace: Trace) -> Tensor:
        """kl_weight · Σ latents (log q - log p, or their KL) - Σ observed log p."""
        exact = {name for name, site in guide_trace.nodes.items() if self.analytic_kl and _is_latent(site)}
        observed = latents = torch.zeros(())
        for name in exact:
            site: Any = guide_trace.nodes[name]
            divergence = kl_divergence(site["fn"], cast(Any, model_trace.nodes[name]["fn"]))
            latents = latents + scale_and_mask(divergence, site["scale"], site["mask"]).sum()
        for trace, sign in ((guide_trace, 1.0), (model_trace, -1.0)):
            trace.compute_log_prob(site_filter=lambda name, site: name not in exact)
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and site["is_observed"]:
                    observed = observed + sign * site["log_prob_sum"]
                elif _is_latent(site) and name not in exact:
                    latents = latents + sign * site["log_prob_sum"]
        return observed + self.kl_weight * latents

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
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


def _require_rsample(guide_trace: Trace) -> None:
    for name, site in guide_trace.nodes.items():
        if _is_latent(site) and not cast(Any, site["fn"]).has_rsample:
            raise ValueError(
                f"the guide's site {name!r} is not reparameterised ({type(site['fn']).__name__} has no rsample): "
                "SymmetricELBO's gradient would be wrong; use pyro.infer.Trace_ELBO"
            )
