"""Encoders: image batch to feature vector, by name or from the user's own code."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from pyro_vje.model.pretrained import LIBRARIES, library_model, load_state, read_state
from pyro_vje.plugins import look_up, users_code

SMALL_IMAGE = 64
"""Images up to this many pixels get the CIFAR stem: the ImageNet one would shrink them fourfold at once."""


def torchvision_resnet(name: str, image_size: int) -> nn.Module:
    """A torchvision ResNet without classifier; small images get a 3×3 stem of stride 1 (He et al. 2016, §4.2)."""
    network = getattr(models, name)(weights=None)
    network.fc = nn.Identity()
    if image_size <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


class SmallResNet(nn.Module):
    """A ResNet of one basic block a stage, sized for training on a CPU (1.2 million parameters).

    ``widths`` are the channels of each stage, of which every one after the first halves the resolution; the 3×3 stem
    has stride ``stem_stride``. Shapes: ``(N, 3, S, S)`` → ``(N, widths[-1])``.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256), stem_stride: int = 1) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, widths[0], 3, stride=stem_stride, padding=1, bias=False)
        self.stem = nn.Sequential(convolution, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True))
        stages: list[nn.Module] = []
        for inputs, width in zip((widths[0], *widths), widths, strict=False):
            stride, shortcut = (2 if stages else 1), None
            if stages:
                kernel = nn.Conv2d(inputs, width, 1, stride=stride, bias=False)
                shortcut = nn.Sequential(kernel, nn.BatchNorm2d(width))
            stages.append(BasicBlock(inputs, width, stride, shortcut))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, 3, S, S)`` to pooled features ``(N, widths[-1])``."""
        return self.stages(self.stem(images)).mean(dim=(-2, -1))


ENCODERS: dict[str, Callable[[int], nn.Module]] = {
    # a stem of stride 2 from 32 pixels up: a quarter of the cost on a CPU
    "resnet-small": lambda image_size: SmallResNet(stem_stride=2 if image_size >= 32 else 1),
    **{name: partial(torchvision_resnet, name) for name in ("resnet18", "resnet34", "resnet50")},
}


def build_encoder(name: str, image_size: int, weights: str = "none") -> nn.Module:
    """Build an encoder by name: built in, ``timm:NAME``, ``torchvision:NAME``, or your own ``module:factory``.

    A factory of your own takes ``image_size``, the side of the square images in pixels, and returns an ``nn.Module``
    from images ``(N, 3, S, S)`` to features ``(N, F)``. ``weights`` are ``"none"``: freshly initialised; ``"default"``:
    the library's pretrained ones; or the path of a file: safetensors, or a state dict, which is read without running
    what is in it. Raises ``ValueError`` if the name is unknown, the factory fails or does not give an ``nn.Module``, or
    the weights cannot be had or do not fit.
    """
    if name.partition(":")[0] in LIBRARIES:
        return library_model(name, weights)
    if weights == "default":
        how = "name timm:... or torchvision:..., or a file"
        raise ValueError(f"encoder {name!r} has no pretrained weights: {how}")
    form = "from an image size to an nn.Module"
    factory = look_up(name, ENCODERS, what="encoder", form=form, group="pyro_vje.encoders")
    with users_code(f"encoder {name!r}, which must be a function {form}, failed when called with {image_size}"):
        encoder = factory(image_size)
    if not isinstance(encoder, nn.Module):
        raise ValueError(
            f"encoder {name!r} gave a {type(encoder).__name__}: it must return an nn.Module, from images "
            "(N, 3, S, S) to features (N, F)"
        )
    if weights != "none":
        load_state(encoder, read_state(Path(weights)), Path(weights))
    return encoder


@torch.no_grad()
def feature_dim(encoder: nn.Module, image_size: int) -> int:
    """Width F of the features ``(N, F)`` that ``encoder`` gives for ``(N, 3, S, S)`` images; ``ValueError`` if not."""
    was_training = encoder.training
    parameter = next(encoder.parameters(), None)
    images = torch.zeros(2, 3, image_size, image_size, device=None if parameter is None else parameter.device)
    with users_code(f"the encoder ({type(encoder).__name__}) fails on images of shape {tuple(images.shape)}"):
        features = encoder.eval()(images)
    encoder.train(was_training)
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"the encoder must map images (N, 3, {image_size}, {image_size}) to features (N, F), but gave {shape} "
            "for N = 2: pool and flatten its output"
        )
    return features.shape[1]
