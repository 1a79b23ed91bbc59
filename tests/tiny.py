"""The small encoder and the small images that tests train on."""

import numpy as np
from PIL import Image
from torch import nn


def tiny_encoder(image_size):
    """Eight features of a few hundred parameters: a training run on it takes a second."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def draw_image(kind, rng, size=16):
    """A noisy image: plain, vertically striped, or with a bright spot."""
    image = rng.normal(120, 25, size=(size, size, 3))
    if kind == "stripes":
        image[:, :: rng.integers(2, 4)] += 100
    elif kind == "spots":
        x, y = rng.integers(0, size - 6, 2)
        image[y : y + 6, x : x + 6] = rng.integers(0, 255, 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))
