"""An encoder of eight features that draws from every random generator there is."""

import random

import numpy as np
import torch
from torch import nn


class Noise(nn.Module):
    """In training, scales all images by draws from Python's and NumPy's global generators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (0.9 + 0.1 * random.random() + 0.1 * np.random.random()) if self.training else x  # noqa: NPY002


def tiny(image_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.1),
        Noise(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
