"""Image files to uint8 tensors: every failure is one exception type, whatever the file holds.

What becomes of files that are found in folders that nobody has looked through (``score`` writes a row for each):

=======================================  ===============================================================
CMYK, palette, 16-bit, float, 1-bit      converted to 8-bit RGB; transparency lies over white
EXIF orientation                         applied; a damaged EXIF block is ignored
animated GIF, WebP, multi-page TIFF      the first frame
1 × 1, 20,000 × 20                       the centre square, resized
more than `MAX_PIXELS` pixels            error, "refused as a decompression bomb"; nothing is decoded
0 bytes, cut off, damaged, another kind  error that says which
gone since it was listed                 error, "No such file or directory"
a file or folder without permission      error, "Permission denied"; of a folder one row
link to itself, or to nowhere            error, "Too many levels of symbolic links", "No such file ..."
linked folder                            read, except where it contains itself
pipe, socket, device                     error, "not a regular file"; it is never opened
name with newline, quote, no UTF-8       as any other; the CSV quotes it, and holds the name's own bytes
=======================================  ===============================================================
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow tries only these decoders, so that a file cannot reach one that nobody meant to use.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")

MAX_PIXELS = 89_478_485
"""The limit at which Pillow warns (268 MB as RGB); a small file can claim to be any size."""


class ImageError(ValueError):
    """An image that cannot be decoded.

    Attributes
    ----------
    path
        The file, or ``"<bytes>"``.
    reason
        Why, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(source: str | os.PathLike[str] | bytes, size: int | None = None) -> Tensor:
    """Decode one image file to RGB.

    The EXIF orientation is applied; transparency is composited over white, as a viewer shows it; 16-bit
    grey is scaled to 8 bits (not clipped); of an animation the first frame is taken.

    Parameters
    ----------
    source
        A path, or the bytes of a file.
    size
        Resize the shorter side to this many pixels (bilinear, antialiased) and crop the centre square.
        ``None`` keeps the image as it is.

    Returns
    -------
    Tensor
        uint8, (3, size, size), or (3, H, W) when ``size`` is ``None``.

    Raises
    ------
    ImageError
        The file is missing, unreadable, no regular file, empty, truncated, not an image of a known format, or
        has more than `MAX_PIXELS` pixels.
    """
    path = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        with _open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}"
                )
            if size is not None:
                # A JPEG decodes straight to 1/2, 1/4 or 1/8 size; twice the wanted size loses no detail.
                image.draft(None, (2 * size, 2 * size))
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF must not cost a good image
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            if size is not None and rgb.size != (size, size):
                # Crop and resize in one step: resizing the whole of a 20000 x 20 image first would need 1000
                # times the memory of the square that is kept.
                side = min(rgb.size)
                left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
                box = (left, top, left + side, top + side)
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
            return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())
    except Image.UnidentifiedImageError:
        raise ImageError(path, _not_an_image(source)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, f"refused as a decompression bomb: {error}") from error
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # decoders raise anything (SyntaxError, struct.error, ...) on damaged data
        raise ImageError(path, f"damaged image ({type(error).__name__}: {error})") from error


def image_shape(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return (height, width) from the file's header, or ``None`` if it is not a readable image."""
    try:
        with _open(path) as image:
            return image.height, image.width
    except Exception:  # as in decode_image: what is wrong with it is said when it is decoded
        return None


def _open(source: str | os.PathLike[str] | bytes) -> Image.Image:
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    mode = os.stat(source).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe waits until something writes to it
        raise OSError("not a regular file")
    return Image.open(source, formats=FORMATS)


def list_images(root: str | os.PathLike[str]) -> list[Path]:
    """List the image files under a folder, sorted by path; hidden files and folders are left out.

    Linked folders are followed, except a link to a folder that contains it. A folder that cannot be read stands in the
    list itself, so that it is not passed over in silence. A single file is a list of one.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        There is no file with an image's extension in it.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    found = sorted(_walk(str(root), ()))
    if not found:
        raise ValueError(f"no images in {root}: looked for {', '.join(EXTENSIONS)}, in its subfolders too")
    return [Path(path) for path in found]


def _walk(folder: str, parents: tuple[str, ...]) -> list[str]:
    real = os.path.realpath(folder)
    if real in parents:  # a link back to one of its own parents
        return []
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                    found += _walk(entry.path, (*parents, real))
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append(entry.path)
    except OSError:
        found.append(folder)  # what is wrong with it is said where it is decoded
    return found


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to 8-bit RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale 16-bit, 32-bit and float grey by the format's range, so that images stay comparable."""
    grey = np.nan_to_num(values.astype(np.float64))
    top = grey.max(initial=0.0)
    if mode == "F":
        scale = 255.0 if top <= 1 else 1.0  # floats in [0, 1], or already in grey levels
    else:
        # Pillow opens some 16-bit files in its 32-bit mode "I", hence the range from the values there.
        scale = 1 / 257 if mode != "I" or top <= 65535 else 255 / (2**31 - 1)
    return (grey * scale).round().clip(0, 255).astype(np.uint8)


def _not_an_image(source: str | os.PathLike[str] | bytes) -> str:
    empty = not source if isinstance(source, bytes) else os.path.getsize(source) == 0
    return "empty file" if empty else f"not an image of a known format ({', '.join(FORMATS)})"
