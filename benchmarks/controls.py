"""Controls: other objectives on VJE's own networks, data, views and schedule.

``pyro-vje train --objective benchmarks.controls:simsiam``; ``ablate`` and ``benchmark one-class`` have the option too.
Both losses are in nats an image, so that a learning rate means what it means for the ELBO.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pyro_vje import VJE
from pyro_vje.model.likelihoods import get_family


def simsiam(vje: VJE, views: Tensor) -> Tensor:
    """SimSiam (Chen & He 2021, arXiv 2011.10566): the posterior's loc is the predictor, its scale is not used.

    D (1 - cos) is, up to a constant, the negative log-density of a unit Gaussian on the sphere of radius √D: that is,
    the negative cosine similarity in nats. The paper has a projector of three layers: ``--projector mlp`` has two.
    """
    loc, _, target = vje.encode_views(views)
    return vje.embedding_dim * (1 - functional.cosine_similarity(loc, target, dim=-1)).mean()


def vi_simsiam(vje: VJE, views: Tensor) -> Tensor:
    """VI-SimSiam, the probabilistic control, after Nakamura et al. (arXiv 2203.11437): a power-spherical predictor.

    The network's direction and concentration 2D / mean(scale²) make a power-spherical density for the direction of the
    other view's stopped embedding; the loss is its negative log, without a prior or a sampled latent. Score such a run
    with ``--score-likelihood power-spherical``.
    """
    loc, scale, target = vje.encode_views(views)
    likelihood = get_family("power-spherical")(loc, scale, vje.settings)
    return -likelihood.log_prob_direction(target).mean()  # type: ignore[attr-defined]
