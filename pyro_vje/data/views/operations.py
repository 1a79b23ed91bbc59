"""Augmentation of a batch of images, each with its own parameters, without a loop over images.

Each takes float32 images (B, 3, H, W) in [0, 1] and parameters (B,), and gives the pixels that the function of
``torchvision.transforms.v2.functional`` in its docstring gives for each; those ending in ``_`` change them in place.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad


def crop_resize(
    images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor, size: int
) -> Tensor:
    """``resized_crop(antialias=True)`` of boxes in pixels to (B, 3, S, S), ``horizontal_flip`` where ``flip`` (B,)."""
    batch, channels, rows, columns = images.shape
    out = (torch.arange(size, device=images.device) + 0.5) / size  # of a box of length 1
    down, across = out.expand(batch, -1), torch.where(flip[:, None], 1 - out, out)
    if max(rows, columns) <= size:  # no box is shrunk, so that two pixels a side are enough
        y = _place(top, height, down, rows)[:, :, None].expand(-1, -1, size)
        x = _place(left, width, across, columns)[:, None].expand(-1, size, -1)
        return grid_sample(images, torch.stack([x, y], -1), mode="bilinear", align_corners=True)
    x = torch.bmm(images.reshape(batch, channels * rows, columns), _weights(left, width, across, columns).mT)
    # one copy of the weights a channel: a broadcast product may be many times slower
    weights = _weights(top, height, down, rows)[:, None].expand(-1, channels, -1, -1).flatten(0, 1)
    return torch.bmm(weights, x.view(batch * channels, rows, size)).view(batch, channels, size, size)


def _place(start: Tensor, length: Tensor, out: Tensor, full: int) -> Tensor:
    """Where ``grid_sample`` finds the positions ``out`` (B, S) of boxes; their edge pixels are repeated."""
    start, length = start[:, None], length[:, None]
    pixel = (out * length - 0.5).clamp_(min=0).minimum(length - 1) + start
    return pixel * (2 / max(full - 1, 1)) - 1


def _weights(start: Tensor, length: Tensor, out: Tensor, full: int) -> Tensor:
    """Weights (B, S, full) of the pixels at the positions ``out`` (B, S) of boxes: a triangle filter.

    Its half width is one pixel of the input or of the output, whichever is larger (the antialiasing of Pillow and
    torchvision), and it is cut off and renormalised at the edges of the box.
    """
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(full, device=out.device) + 0.5 - start  # centres, from the box's edge
    weights = 1 - (pixel - out[:, :, None] * length).abs_() / (length / out.shape[1]).clamp(min=1)
    weights = weights.clamp_(min=0) * ((pixel > 0) & (pixel < length))
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
    """Turn the hue of HSV by ``shift`` turns, at most half a turn either way: ``adjust_hue``.

    With V and m the largest and the smallest channel, c = V - m, and H the hue in sixths of a turn, a channel whose own
    hue is o (0, 2 and -2 for red, green and blue) is m + c (||H - o| - 3| - 1), clipped to [m, V]. This holds for
    |H - o| <= 6, hence for every H in [-3, 3]. With g = max(G - R, 0) and b = max(B - R, 0), c H is G - B + g + 2 b
    where G >= B and G - B - b - 2 g elsewhere, so that nothing is divided.
    """
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    double, triple, base = 2 * chroma, 3 * chroma, low - chroma
    g, b = (green - red).relu_(), (blue - red).relu_()
    hue = green - blue
    hue.add_((g + b).copysign_(hue), alpha=1.5).add_(b.sub_(g), alpha=0.5)  # c H, in [-3 c, 3 c]
    hue.addcmul_(chroma, 6 * shift[:, None, None])
    hue.addcmul_(chroma, (hue < -triple).float() - (hue > triple).float(), value=6)  # back into [-3 c, 3 c]
    for channel, own in enumerate((0, 1, -1)):
        value = torch.sub(hue, double, alpha=own).abs_().sub_(triple).abs_().add_(base)
        torch.clamp(value, low, high, out=images[:, channel])
    return images


def greyscale_(images: Tensor, apply: Tensor) -> Tensor:
    """Replace the colours by their luma where wanted: ``rgb_to_grayscale(num_output_channels=3)``."""
    return images.lerp_(_luma(images).expand_as(images), _per_image(apply.float()))


def blur_(images: Tensor, sigma: Tensor, apply: Tensor, kernel: int) -> Tensor:
    """``gaussian_blur`` of ``sigma`` pixels where wanted, by an odd ``kernel`` smaller than twice the image."""
    offset = torch.arange(kernel, device=images.device) - kernel // 2
    weights = (-0.5 * (offset / sigma[:, None]).square()).exp_()
    weights /= weights.sum(1, keepdim=True)
    batch, channels, height, _ = images.shape
    weights = torch.where(apply[:, None], weights, (offset == 0).float()).repeat_interleave(channels, 0)
    x = pad(images, [kernel // 2] * 4, mode="reflect").view(1, batch * channels, height + kernel - 1, -1)
    x = conv2d(x, weights[:, None, None], groups=batch * channels)
    return images.copy_(conv2d(x, weights[:, None, :, None], groups=batch * channels).view(images.shape))


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    """(B, 1, H, W) in the weights of ITU-R BT.601, rounded as torchvision has them."""
    red, green, blue = images.unbind(1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]
