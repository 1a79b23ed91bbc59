"""From encoded images to what the likelihood says of them: the numbers behind every score."""

from __future__ import annotations

from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vje.anomaly.scores import SCORES, LikelihoodParts
from pyro_vje.data import TwoViews
from pyro_vje.distributions import pairwise_log_prob
from pyro_vje.model.encoding import Posteriors, cpu_rows, in_equal_parts
from pyro_vje.model.likelihoods import get_family
from pyro_vje.model.vje import VJE

_TEMPORARIES = 12
"""Matrices of one number a pair of images that evaluating the likelihood of all pairs holds at once, about."""


_PAIRS = 1 << 22
"""Pairs of images in a chunk: more are no faster."""

_CPU_NUMBERS, _CUDA_NUMBERS = 1 << 17, 1 << 24
"""Numbers in a chunk of latents, images × particles × D."""


def latent_noise(num_particles: int, dim: int, seed: int) -> Tensor:
    """Standard normal noise ``(num_particles, D)``, antithetic in pairs, the same for every image.

    Common noise makes the score of an image independent of the batch it is in and lowers the variance of
    differences between images.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((num_particles + 1) // 2, dim, generator=generator)
    return torch.cat([half, -half])[:num_particles]


class Scorer:
    """Evaluates a model's likelihood at encoded images.

    Parameters
    ----------
    vje : VJE
        The model.
    reference : Posteriors, optional
        Images that were trained on, for the scores that compare with them.
    num_particles : int
        Samples of the latent for each expectation; they cost no pass of the encoder.
    seed : int
        Seed of those samples.
    likelihood : str, optional
        A family to score with, instead of the one that was trained. Which factor trains best and which scores best
        are two questions: a normalised one gives densities that compare across scales.

    Raises
    ------
    ValueError
        If the family is unknown or ``num_particles`` is below 1.
    """

    def __init__(
        self,
        vje: VJE,
        *,
        reference: Posteriors | None = None,
        num_particles: int = 16,
        seed: int = 0,
        likelihood: str | None = None,
    ) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}")
        self.vje = vje
        self.family = vje.family if likelihood is None else get_family(likelihood)
        self.family.check(vje.embedding_dim, vje.settings)
        self.device = next(vje.parameters()).device
        self.reference = None if reference is None else reference.to(self.device)
        self.noise = latent_noise(num_particles, vje.embedding_dim, seed).to(self.device)

    def scores(self, name: str, posteriors: Posteriors) -> Tensor:
        """Score ``name`` of N encoded images, float64 ``(N,)``."""
        return SCORES[name](self.parts(posteriors, with_reference=SCORES[name].needs_reference))

    @torch.no_grad()
    def parts(self, posteriors: Posteriors, *, with_reference: bool = False) -> LikelihoodParts:
        """Evaluate the likelihood of N target embeddings under their contexts' posteriors.

        Parameters
        ----------
        posteriors : Posteriors
            Embeddings of the targets, and loc and scale given their contexts, ``(N, D)`` each.
        with_reference : bool
            Whether also to compare with the reference images.

        Raises
        ------
        ValueError
            If that is asked for and there are none, or a number is not finite or a scale not positive.
        """
        posteriors = posteriors.to(self.device)
        _check(posteriors)
        # Checking every particle takes two thirds as long as its density.
        with pyro.validation_enabled(False):
            joint, direction, radial, kl, variance, aggregate = in_equal_parts(
                lambda *part: self._parts(*part, with_reference=with_reference),
                *posteriors,
                rows=32 * min(8, max(1, 1024 // self.vje.embedding_dim)),
            )
        typical = self.typical if with_reference else float("nan")
        return LikelihoodParts(joint, direction, radial, kl, variance, aggregate, typical)

    def _parts(
        self, embeddings: Tensor, loc: Tensor, scale: Tensor, *, with_reference: bool
    ) -> tuple[Tensor, ...]:
        joint, direction, radial = self._expected_log_likelihood(embeddings, loc, scale)
        kl = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1)
        aggregate = self.log_aggregate(embeddings) if with_reference else torch.full_like(joint, torch.nan)
        return joint, direction, radial, kl.double(), (scale**2).mean(-1).double(), aggregate

    def _expected_log_likelihood(self, embeddings: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Means over the particles of the log-likelihood and of its two factors, float64 ``(3, N)``."""
        # A few images at a time with all their particles, as many numbers as a CPU's cache holds: twice the speed.
        count = (_CUDA_NUMBERS if self.device.type == "cuda" else _CPU_NUMBERS) // self.noise.numel()
        found = []
        for t, m, s in zip(
            *(tensor.split(max(1, count)) for tensor in (embeddings, loc, scale)), strict=True
        ):
            likelihood = self._likelihood(m + s * self.noise[:, None], s)
            if hasattr(likelihood, "log_prob_direction"):
                radius = torch.linalg.vector_norm(t, dim=-1)
                direction, radial = likelihood.log_prob_direction(t), likelihood.log_prob_radius(radius)
                joint = direction + radial - (t.shape[-1] - 1) * radius.log()
            else:
                joint = likelihood.log_prob(t)
                direction = radial = torch.full_like(joint, torch.nan)
            found.append(torch.stack([joint, direction, radial]).double().mean(1))
        return torch.cat(found, 1)

    @torch.no_grad()
    def log_aggregate(self, embeddings: Tensor, *, chunk: int | None = None) -> Tensor:
        """Log-mean over the reference images i of p(t | e_i, v_i) for embeddings t ``(N, D)``, float64 ``(N,)``.

        Matrix products over ``chunk`` reference images at a time: no tensor is larger than chunk × N. By default as
        many as are fast, and on a GPU no more than a quarter of the free memory allows.
        """
        reference = self._checked_reference()
        if chunk is None:
            pairs = _PAIRS  # on a CPU, of any free memory: sums of other chunks differ in their last digits
            if self.device.type == "cuda":
                pairs = min(pairs, torch.cuda.mem_get_info(self.device)[0] // (4 * 8 * _TEMPORARIES))
            chunk = max(1, pairs // max(1, len(embeddings)))
        total = torch.full((len(embeddings),), -torch.inf, dtype=torch.float64, device=self.device)
        for embedding, _, scale in zip(*(tensor.split(chunk) for tensor in reference), strict=True):
            log_prob = pairwise_log_prob(self._likelihood(embedding, scale), embeddings)
            total = torch.logaddexp(total, log_prob.logsumexp(0).double())
        return total - torch.tensor(len(reference.loc), dtype=torch.float64).log()

    @cached_property
    def typical(self) -> float:
        """Median log-likelihood of the reference images."""
        parts = [self.parts(part) for part in self._checked_reference().split(4096)]
        return float(torch.cat([part.log_likelihood for part in parts]).median())

    def _checked_reference(self) -> Posteriors:
        if self.reference is None:
            raise ValueError(
                "this score compares with images that were trained on, and there are none at hand: score with a run "
                "folder that holds reference.safetensors (train --resume writes it into a finished run)"
            )
        return self.reference

    def _likelihood(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return self.vje.likelihood(loc, scale, family=self.family)


def _check(posteriors: Posteriors) -> None:
    """Raise ``ValueError`` unless all is finite and every scale positive; one wait for a device."""
    embeddings, loc, scale = posteriors
    good = embeddings.isfinite().all(-1) & loc.isfinite().all(-1) & ((scale > 0) & scale.isfinite()).all(-1)
    if not good.all():
        raise ValueError(
            f"the posteriors of {int((~good).sum())} of {len(good)} images are not finite, or have a scale that is not "
            "positive: the model's weights or the numbers given to it are damaged"
        )


@torch.no_grad()
def augmented_pairs(
    vje: VJE, views: TwoViews, images: Tensor, *, num_pairs: int, seed: int
) -> list[Posteriors]:
    """Targets and contexts of K augmented pairs of each image, both directions: 2 K passes of the encoder.

    The K augmentations are drawn once and are the same for every image, for the reasons given at `latent_noise`.

    Parameters
    ----------
    views : TwoViews
        The augmentation, as in training.
    images : tensor
        uint8 ``(N, 3, H, W)``.

    Returns
    -------
    list of Posteriors
        2 K of them, each with the embeddings of one view and the posterior given the other.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    found = []
    for _ in range(num_pairs):
        state = generator.get_state()

        def encode(part: Tensor, state: Tensor = state) -> list[Tensor]:
            generator.set_state(state)  # the same augmentation for every part
            pair = vje.encode_views(views(part, generator, same_for_all=True))
            return [tensor[i] for i in (0, 1) for tensor in (pair.target, pair.loc, pair.scale)]

        parts = in_equal_parts(encode, images, rows=cpu_rows(images.shape[-1]))
        found += [Posteriors(*parts[:3]), Posteriors(*parts[3:])]
    return found
