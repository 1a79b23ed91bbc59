"""Augmentation of a batch of images, each with its own parameters, without a loop over images.

Each function takes float images (B, 3, H, W) in [0, 1] and parameters (B,), and gives the pixels that
the function of ``torchvision.transforms.v2.functional`` in its docstring gives for each image alone. Those
whose name ends in ``_`` change the images in place.

A crop, its resizing, a flip and a blur are each one weighted sum over rows and one over columns: a pair of
small matrices an image, and two batched matrix products for the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crop_resize(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: int
) -> Tensor:
    """Cut out a box, resize it and flip it where wanted: ``resized_crop(antialias=True)``, ``horizontal_flip``.

    Parameters
    ----------
    images
        (B, 3, H, W).
    top, left, height, width
        The boxes in pixels, (B,).
    flip
        Bool (B,).
    size
        Side S of the result.

    Returns
    -------
    Tensor
        (B, 3, S, S).
    """
    rows, columns = images.shape[-2:]
    return _weigh(
        images, resize_weights(top, height, rows, size), resize_weights(left, width, columns, size, flip)
    )


def resize_weights(start: Tensor, length: Tensor, full: int, size: int, flip: Tensor | None = None) -> Tensor:
    """Weights (B, size, full) that resize ``length`` pixels from ``start`` to ``size``: a triangle filter.

    Its half width is one pixel of the input or of the output, whichever is larger (the antialiasing of
    Pillow and torchvision), and it is cut off and renormalised at the edges of the box.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    out = torch.arange(size, device=start.device)[:, None] + 0.5
    if flip is not None:
        out = torch.where(flip[:, None, None], size - out, out)
    step = length / size
    pixel = torch.arange(full, device=start.device) + 0.5 - start  # centres, from the box's edge
    weights = (1 - (pixel - out * step).abs_() / step.clamp(min=1)).clamp_(min=0)
    weights *= (pixel > 0) & (pixel < length)
    return weights.div_(weights.sum(-1, keepdim=True))


def brightness_(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the colours: ``adjust_brightness``."""
    return images.mul_(_per_image(factor)).clamp_(0, 1)


def contrast_(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the image's mean luma: ``adjust_contrast``."""
    mean = _luma(images.mean((2, 3), keepdim=True))
    return images.mul_(_per_image(factor)).add_((1 - _per_image(factor)) * mean).clamp_(0, 1)


def saturation_(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from each pixel's luma: ``adjust_saturation``."""
    grey = _luma(images).mul_(1 - _per_image(factor))
    return images.mul_(_per_image(factor)).add_(grey).clamp_(0, 1)


def hue_(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by ``shift`` turns, at most 1/6 either way: ``adjust_hue``.

    With V and m the largest and smallest channel, c = V - m, and H the hue in sixths of a turn, a channel
    whose own hue is o (0, 2 and -2 for red, green and blue) is m + min(max(c |..|, 0), c), with
    |..| = ||H - o| - 3| - 1. This holds for |H - o| <= 6, so that a small shift needs no wrapping, and c H
    is linear in the colours, so that nothing is divided.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    double, triple = 2 * chroma, 3 * chroma
    hue = torch.where(high == green, (blue - red).add_(double), (red - green).sub_(double))
    hue = torch.where(high == red, green - blue, hue)  # c H, in [-3 c, 3 c]
    hue.addcmul_(chroma, 6 * shift[:, None, None])
    for channel, own in enumerate((0, 1, -1)):
        value = torch.sub(hue, double, alpha=own).abs_().sub_(triple).abs_().sub_(chroma)
        torch.add(torch.minimum(value.clamp_(min=0), chroma), low, out=images[:, channel])
    return images


def greyscale_(images: Tensor, apply: Tensor) -> Tensor:
    """Replace the colours by their luma where wanted: ``rgb_to_grayscale(num_output_channels=3)``."""
    return torch.where(_per_image(apply), _luma(images), images, out=images)


def blur(images: Tensor, sigma: Tensor, apply: Tensor, kernel: int) -> Tensor:
    """Blur with a Gaussian where wanted: ``gaussian_blur``, with reflection at the edges.

    Parameters
    ----------
    images
        (B, 3, H, W).
    sigma
        Standard deviation in pixels, (B,).
    apply
        Bool (B,).
    kernel
        Number of pixels that are weighed, odd, smaller than twice the image.
    """
    offset = torch.arange(kernel, device=images.device) - kernel // 2
    weights = (-0.5 * (offset / sigma[:, None]).square()).exp_()
    weights /= weights.sum(1, keepdim=True)
    weights = torch.where(apply[:, None], weights, (offset == 0).float())
    rows, columns = (_band(weights, side) for side in images.shape[-2:])
    return _weigh(images, rows, columns)


def solarise_(images: Tensor, apply: Tensor) -> Tensor:
    """Invert what is at least half bright, where wanted: ``solarize(threshold=0.5)``."""
    return torch.where(_per_image(apply) & (images >= 0.5), 1 - images, images, out=images)


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    """(B, 1, H, W) in the weights of ITU-R BT.601, rounded as torchvision has them."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _weigh(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted sums over the rows with (B, S, H) and over the columns with (B, T, W): (B, 3, S, T)."""
    batch, channels, height, width = images.shape
    x = torch.bmm(images.reshape(batch, channels * height, width), columns.mT)
    # one copy of the weights a channel: a broadcast product is twenty times slower on a CPU
    rows = rows[:, None].expand(-1, channels, -1, -1).flatten(0, 1)
    return torch.bmm(rows, x.view(batch * channels, height, -1)).view(batch, channels, rows.shape[1], -1)


def _band(weights: Tensor, side: int) -> Tensor:
    """Turn the weights (B, K) of a convolution into its matrices (B, side, side), reflecting at the edges."""
    offset = torch.arange(weights.shape[1], device=weights.device) - weights.shape[1] // 2
    place = (torch.arange(side, device=weights.device) + offset[:, None]).abs()  # (K, side)
    place = (side - 1) - (side - 1 - place).abs()
    return (weights @ _one_hot(place, side).flatten(1)).view(-1, side, side)


def _one_hot(index: Tensor, classes: int) -> Tensor:
    # torch's one_hot checks its input, which waits for the device
    return (index[..., None] == torch.arange(classes, device=index.device)).float()
