"""Each batched operation against torchvision's function for one image, on the same parameters."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from pyro_vje.data.views import operations as pixels

B = 12
FLAGS = torch.arange(B) % 2 == 0


@pytest.fixture
def images() -> torch.Tensor:
    images = torch.rand((B, 3, 21, 24), generator=torch.Generator().manual_seed(0))
    images[0] = 0.5  # grey, black, white, and pure colours, where a hue is undefined or on an edge
    images[1] = torch.tensor([0.0, 1.0])[torch.randint(2, (3, 21, 24), generator=torch.Generator())]
    return images


def uniform(low: float, high: float) -> torch.Tensor:
    return torch.empty(B).uniform_(low, high, generator=torch.Generator().manual_seed(1))


def one_by_one(function, images, *parameters):
    return torch.stack([function(*row) for row in zip(images, *parameters, strict=True)])


@pytest.mark.parametrize("size", [7, 16, 24, 40])
def test_crop_resize_is_resized_crop(images, size):
    """Boxes that are shrunk, kept and enlarged; the smallest is one pixel."""
    generator = torch.Generator().manual_seed(2)
    height = torch.randint(1, 22, (B,), generator=generator)
    width = torch.randint(1, 25, (B,), generator=generator)
    height[0], width[0], height[1], width[1] = 1, 1, 21, 24
    top = (torch.rand(B, generator=generator) * (22 - height)).long()
    left = (torch.rand(B, generator=generator) * (25 - width)).long()

    def crop(image, t, n, h, w, flip):
        box = reference.resized_crop(image, int(t), int(n), int(h), int(w), [size, size], antialias=True)
        return reference.horizontal_flip(box) if flip else box

    expected = one_by_one(crop, images, top, left, height, width, FLAGS)
    boxes = [x.float() for x in (top, left, height, width)]
    torch.testing.assert_close(pixels.crop_resize(images, *boxes, FLAGS, size), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (pixels.brightness_, reference.adjust_brightness, 0.0, 1.8),
        (pixels.contrast_, reference.adjust_contrast, 0.0, 1.8),
        (pixels.saturation_, reference.adjust_saturation, 0.0, 1.8),
        (pixels.hue_, reference.adjust_hue, -0.5, 0.5),
    ],
)
def test_colours_are_torchvisions(images, ours, theirs, low, high):
    factors = uniform(low, high)
    expected = one_by_one(lambda image, factor: theirs(image, float(factor)), images, factors)
    torch.testing.assert_close(ours(images.clone(), factors), expected, atol=2e-6, rtol=0)


def test_hue_is_torchvisions_on_every_saturated_colour():
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 9)] * 3).T.reshape(1, 3, 27, 27).contiguous()
    for shift in (-0.5, -0.3, -0.1, -0.01, 0.0, 0.05, 0.1, 0.2, 0.5):
        ours = pixels.hue_(grid.clone(), torch.tensor([shift]))
        torch.testing.assert_close(ours, reference.adjust_hue(grid, shift), atol=2e-6, rtol=0)


def test_greyscale_is_torchvisions(images):
    expected = one_by_one(lambda image, on: reference.rgb_to_grayscale(image, 3) if on else image, images, FLAGS)
    torch.testing.assert_close(pixels.greyscale_(images.clone(), FLAGS), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [3, 9])
def test_blur_is_torchvisions(images, kernel):
    sigma = uniform(0.1, 2.0)

    def blur(image, sigma, on):
        return reference.gaussian_blur(image, [kernel, kernel], [float(sigma)] * 2) if on else image

    expected = one_by_one(blur, images, sigma, FLAGS)
    ours = pixels.blur_(images.clone(), sigma, FLAGS, kernel)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_neutral_parameters_change_nothing(images):
    one, zero, never = torch.ones(B), torch.zeros(B), torch.zeros(B, dtype=torch.bool)
    x = images.clone()
    for function, parameter in (
        (pixels.brightness_, one),
        (pixels.contrast_, one),
        (pixels.saturation_, one),
        (pixels.hue_, zero),
        (pixels.greyscale_, never),
    ):
        torch.testing.assert_close(function(x.clone(), parameter), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels.blur_(x, one, never, 5), images, atol=0, rtol=0)
