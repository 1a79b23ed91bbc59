"""From settings to a model: what `TrainConfig` says of encoder, projector, posterior network and likelihood."""

from typing import Any

import torch
from torch import nn

from pyro_vje.config import TrainConfig, fields_of
from pyro_vje.model.encoders import build_encoder, feature_dim
from pyro_vje.model.likelihoods import FAMILIES, SETTINGS
from pyro_vje.model.vje import VJE


def build_model(config: TrainConfig, image_size: int, features: int | None = None, *, weights: str = "none") -> VJE:
    """A freshly initialised model for views of ``image_size`` pixels; the same configuration gives the same weights.

    ``features``, the encoder's width, is measured if not known; ``weights`` are as in `pyro_vje.model.build_encoder`.
    """
    if config.encoder is None:
        raise ValueError("the configuration names no encoder: use TrainConfig.resolved()")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(config.encoder, image_size, weights)
        # The encoder's convolutions are fastest with channels last on every device we measured.
        encoder.to(memory_format=torch.channels_last)
        vje = _model(config, encoder, features or feature_dim(encoder, image_size))
    if config.encoder_lr_scale == 0:
        vje.freeze_encoder()
    return vje


def build_head(config: TrainConfig, features: int) -> VJE:
    """The model of a run without its encoder: its images are features ``(N, features)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _model(config, nn.Identity(), features)


def _model(config: TrainConfig, encoder: nn.Module, features: int) -> VJE:
    names = ("embedding_dim", "hidden_dim", "likelihood", "df", "unit_radius", "radius", "radius_scale")
    settings: dict[str, Any] = {
        name: getattr(config, name) for name in (*names, "shared_variance", "targets", "rotations")
    }
    projector = "none" if config.projector == "auto" else config.projector
    return VJE(encoder, features, projector=projector, **settings)


def unused(config: TrainConfig) -> set[str]:
    """The settings that do nothing in a run, by its likelihood; of a user's own family nothing is known."""
    family = FAMILIES.get(config.likelihood)
    names = set(SETTINGS).difference(family.uses) if family else set()
    return names | ({"radius_scale"} if config.radius is None else set())


def refuse_unused(config: TrainConfig) -> None:
    """Raise ``ValueError`` if a setting was changed that does nothing for the likelihood, or beside another."""
    for name in sorted(unused(config)):
        if (value := getattr(config, name)) != fields_of(TrainConfig)[name].default:
            rest = " without a radius" if name == "radius_scale" and config.radius is None else ""
            raise ValueError(f"{name} {value} does nothing for the likelihood {config.likelihood}{rest}: leave it out")
