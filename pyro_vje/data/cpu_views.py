"""The views on a CPU: every image taken through the whole recipe at once by compiled loops, while the cache holds it.

The pixels are those of :meth:`pyro_vje.data.TwoViews.augment`, which passes over the whole batch once an operation, as
suits a GPU; here that spends most of its time moving numbers between memory and the processor. Compiled by numba when
first called, in some seconds, and kept on disk where that can be written to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from pyro_vje.data.views import ViewParameters

Floats = NDArray[np.float32]
Integers = NDArray[Any]  # of int64 or uint32
Taps = tuple[Integers, Integers, Floats]
"""Of every output pixel of a line: the first of the input's pixels that are weighed, how many there are, weights."""

# The arithmetic stays in float32.
_ZERO, _HALF, _ONE, _SIX, _BYTE = (np.float32(x) for x in (0, 0.5, 1, 6, 255))
_NEXT = np.uint32(1)
"""Added to an unsigned index leaves it one, which needs no check for a negative."""
_AT_ONCE = 4
"""Pairs of neighbours that the blur adds in one pass over a line."""
_FEWEST = 8
"""Images that are worth a thread."""


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Nothing here is NaN; but no sum is reordered: how would differ between code just compiled and code read from disk.
    freedom = {"nnan", "ninf", "nsz"}
    compiler: Any = partial(numba.njit, nogil=True, fastmath=freedom, error_model="numpy")
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written to
        return compiler()(function)


def render(images: Tensor, p: ViewParameters, out: Tensor, kernel: int, mean: Tensor, std: Tensor) -> None:
    """Write V normalised views of each image, on as many threads as torch uses.

    Parameters
    ----------
    images
        uint8 (B, 3, H, W).
    p
        What was drawn, (V, B).
    out
        float32 (V, B, 3, S, S), contiguous; overwritten.
    kernel
        Number of pixels that the blur weighs on a line, odd, smaller than 2 S.
    mean, std
        Of each channel, three numbers.
    """
    tensors = (
        images.contiguous(),
        torch.stack([p.top, p.left, p.height, p.width], -1).long(),
        torch.stack([p.flip, p.grey, p.blur, p.solarise], -1),
        torch.stack([p.brightness, p.contrast, p.saturation, p.hue, p.sigma], -1),
        mean.flatten(),
        std.flatten(),
        out,
    )
    work = partial(_render, kernel, *(tensor.numpy() for tensor in tensors))
    threads = max(1, min(torch.get_num_threads(), len(images) // _FEWEST))
    edges = [len(images) * i // threads for i in range(threads + 1)]
    # Started anew in every call, which takes a fraction of a millisecond: a process may be forked in between.
    with ThreadPoolExecutor(threads) as pool:
        others = [pool.submit(work, *part) for part in pairwise(edges[1:])]
        work(edges[0], edges[1])
        for other in others:
            other.result()


@_compiled
def _render(
    kernel: int,
    images: NDArray[np.uint8],
    boxes: Integers,
    flags: NDArray[np.bool_],
    factors: Floats,
    mean: Floats,
    std: Floats,
    out: Floats,
    start: int,
    stop: int,
) -> None:
    """Views of the images from ``start`` to before ``stop``."""
    _, _, rows, columns = images.shape
    views, _, _, size, _ = out.shape
    # Once for all images: the taps of a line and of a column, and planes for the blur.
    most = 2 * math.ceil(max(rows, columns) / size) + 2
    down, across = np.empty((size, most), np.float32), np.empty((size, most), np.float32)
    down_start, across_start = np.empty(size, np.uint32), np.empty(size, np.uint32)
    down_count, across_count = np.empty(size, np.uint32), np.empty(size, np.uint32)
    line, means = np.empty(columns + 1, np.float32), np.empty(3, np.float32)
    half = kernel // 2
    pad = (half + _AT_ONCE - 1) // _AT_ONCE * _AT_ONCE
    gauss = np.empty(pad + 1, np.float32)
    tall, wide = np.zeros((size + 2 * pad, size), np.float32), np.zeros((size, size + 2 * pad), np.float32)
    for i in range(start * views, stop * views):
        n, v = divmod(i, views)  # the views of an image one after the other
        top, left, height, width = boxes[v, n]
        flip, grey, blurred, solarised = flags[v, n]
        brightness, contrast, saturation, hue, sigma = factors[v, n]
        view = out[v, n]
        _taps(height, False, down_start, down_count, down)
        _taps(width, flip, across_start, across_count, across)
        for c in range(3):
            means[c] = _crop(
                images[n, c, top : top + height, left : left + width],
                (down_start, down_count, down),
                (across_start, across_count, across),
                brightness,
                line,
                view[c],
            )
        red, green, blue = view[0].reshape(-1), view[1].reshape(-1), view[2].reshape(-1)
        if contrast != 1 or saturation != 1 or hue != 0:
            offset = (_ONE - contrast) * _luma(means[0], means[1], means[2])
            _colour(red, green, blue, contrast, offset, saturation, _SIX * hue)
        if grey:
            _greyscale(red, green, blue)
        if blurred:
            _gaussian(sigma, half, gauss)
        for c in range(3):
            if blurred:
                _blur(view[c], gauss, half, tall, wide)
            _finish(view[c].reshape(-1), solarised, _ONE / std[c], -mean[c] / std[c])


@_compiled
def _taps(length: int, flip: bool, starts: Integers, counts: Integers, weights: Floats) -> None:
    """The triangle filter of `pixels._weights`: for each output pixel where it starts, its length, its weights."""
    size = len(starts)
    scale = length / size
    reach = max(scale, 1.0)
    for i in range(size):
        centre = ((size - 1 - i if flip else i) + 0.5) * scale
        first = max(0, math.ceil(centre - reach - 0.5))
        count = min(length - 1, math.floor(centre + reach - 0.5)) - first + 1
        total = 0.0
        for k in range(count):
            total += max(0.0, 1 - abs(first + k + 0.5 - centre) / reach)
        for k in range(count):
            weights[i, k] = max(0.0, 1 - abs(first + k + 0.5 - centre) / reach) / total
        weights[i, count:] = 0
        starts[i], counts[i] = first, count


@_compiled
def _clip(x: np.float32) -> np.float32:
    return min(max(x, _ZERO), _ONE)


@_compiled
def _luma(red: np.float32, green: np.float32, blue: np.float32) -> np.float32:
    return np.float32(0.2989) * red + np.float32(0.587) * green + np.float32(0.114) * blue


@_compiled
def _crop(
    box: NDArray[np.uint8], down: Taps, across: Taps, brightness: np.float32, line: Floats, out: Floats
) -> np.float32:
    """Resize one channel of a box to [0, 1], scale it, and return its mean."""
    size, width = len(out), box.shape[1]
    down_start, down_count, down_weights = down
    across_start, across_count, across_weights = across
    total = _ZERO
    line[width] = 0
    for i in range(size):
        for k in range(down_count[i]):
            weight, row = down_weights[i, k] / _BYTE, down_start[i] + k
            if k == 0:
                for j in range(width):
                    line[j] = weight * np.float32(box[row, j])
            else:
                for j in range(width):
                    line[j] += weight * np.float32(box[row, j])
        if width <= size:  # two pixels at most: without an inner loop
            for j in range(size):
                k = across_start[j]
                out[i, j] = across_weights[j, 0] * line[k] + across_weights[j, 1] * line[k + _NEXT]
        else:
            for j in range(size):
                value = _ZERO
                for k in range(across_count[j]):
                    value += across_weights[j, k] * line[across_start[j] + k]
                out[i, j] = value
        for j in range(size):
            value = _clip(out[i, j] * brightness)
            out[i, j] = value
            total += value
    return total / np.float32(size * size)


@_compiled
def _colour(
    red: Floats,
    green: Floats,
    blue: Floats,
    contrast: np.float32,
    offset: np.float32,
    saturation: np.float32,
    turn: np.float32,
) -> None:
    """Contrast, saturation and hue in place; for the last see `pixels.hue_`."""
    for i in range(len(red)):
        r = _clip(red[i] * contrast + offset)
        g = _clip(green[i] * contrast + offset)
        b = _clip(blue[i] * contrast + offset)
        grey = (_ONE - saturation) * _luma(r, g, b)
        r, g, b = _clip(r * saturation + grey), _clip(g * saturation + grey), _clip(b * saturation + grey)
        low, high = min(r, g, b), max(r, g, b)
        chroma = high - low
        above, below = max(g - r, _ZERO), max(b - r, _ZERO)
        sixths = np.float32(1.5) * (above + below)
        hue = g - b + _HALF * (below - above) + (sixths if g >= b else -sixths) + turn * chroma
        double, base = chroma + chroma, low - chroma
        triple = double + chroma
        turned = triple + triple
        hue += (turned if hue < -triple else _ZERO) - (turned if hue > triple else _ZERO)
        red[i] = min(max(abs(abs(hue) - triple) + base, low), high)
        green[i] = min(max(abs(abs(hue - double) - triple) + base, low), high)
        blue[i] = min(max(abs(abs(hue + double) - triple) + base, low), high)


@_compiled
def _greyscale(red: Floats, green: Floats, blue: Floats) -> None:
    for i in range(len(red)):
        grey = _luma(red[i], green[i], blue[i])
        red[i], green[i], blue[i] = grey, grey, grey


@_compiled
def _gaussian(sigma: np.float32, half: int, weights: Floats) -> None:
    """The right half of the blur's weights, from its centre; zero beyond ``half`` pixels."""
    weights[:] = 0
    for k in range(half + 1):
        weights[k] = math.exp(-0.5 * (k / sigma) ** 2)
    weights /= 2 * weights.sum() - weights[0]


@_compiled
def _blur(x: Floats, weights: Floats, half: int, tall: Floats, wide: Floats) -> None:
    """Columns, then lines, in place, with reflection at the edges.

    Of ``tall`` (S + 2 K, S) and ``wide`` (S, S + 2 K) the edges, K wide, are zero beyond ``half``.
    """
    size, pad = len(x), len(weights) - 1
    tall[pad : pad + size] = x
    for k in range(1, half + 1):
        tall[pad - k] = x[k]
        tall[pad + size - 1 + k] = x[size - 1 - k]
    for i in range(size):
        line, out = tall[pad + i], wide[i, pad : pad + size]
        for j in range(size):
            out[j] = weights[0] * line[j]
        for k in range(1, pad + 1, _AT_ONCE):
            a, b = tall[pad + i - k - 3 :], tall[pad + i + k :]
            _weigh(out, a[3], a[2], a[1], a[0], b[0], b[1], b[2], b[3], weights[k:])
        for k in range(1, half + 1):
            wide[i, pad - k] = out[k]
            wide[i, pad + size - 1 + k] = out[size - 1 - k]
    for i in range(size):
        line, out = wide[i], x[i]
        for j in range(size):
            out[j] = weights[0] * line[pad + j]
        for k in range(1, pad + 1, _AT_ONCE):
            a, b = line[pad - k - 3 :], line[pad + k :]
            _weigh(out, a[3:], a[2:], a[1:], a, b, b[1:], b[2:], b[3:], weights[k:])


@_compiled
def _weigh(
    out: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats,
    e: Floats,
    f: Floats,
    g: Floats,
    h: Floats,
    weights: Floats,
) -> None:
    """Add four pairs of neighbours; one pair at a time is three times slower."""
    p, q, r, s = weights[0], weights[1], weights[2], weights[3]
    for j in range(len(out)):
        out[j] += p * (a[j] + e[j]) + q * (b[j] + f[j]) + r * (c[j] + g[j]) + s * (d[j] + h[j])


@_compiled
def _finish(x: Floats, solarised: bool, scale: np.float32, shift: np.float32) -> None:
    """Solarisation where wanted, and normalisation."""
    if solarised:
        for i in range(len(x)):
            x[i] = _ONE - x[i] if x[i] >= _HALF else x[i]
    for i in range(len(x)):
        x[i] = x[i] * scale + shift
