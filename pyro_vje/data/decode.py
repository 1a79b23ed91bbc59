"""Image files to uint8 tensors: every failure is one exception type, whatever the file holds.

The page of this module in `docs/api/data.md` has a table of what becomes of each kind of file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

logger = logging.getLogger("pyro_vje")
Source = str | os.PathLike[str] | bytes | NDArray[np.uint8]

with contextlib.suppress(ImportError):
    import_module("pillow_heif").register_heif_opener()
Image.init()
_MEANT = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "HEIF")
FORMATS = tuple(name for name in _MEANT if name in Image.OPEN)
"""Pillow tries only these decoders, so that a file cannot reach one that nobody meant to use."""
EXTENSIONS = frozenset(name for name, kind in Image.registered_extensions().items() if kind in FORMATS)
_HEIC = {".heic", ".heif", ".hif"}
_UNREAD = {".avif", ".jxl", ".psd", ".tga", ".svg", ".exr", ".dcm", ".dng", ".cr2", ".nef", ".arw"}
_LISTED = EXTENSIONS | _HEIC | _UNREAD  # images to whoever put them there: each is decoded, or a failure

MARGIN = (124, 116, 104)
"""RGB of the margins of ``"pad"``: the mean of ImageNet, near zero once an encoder's pixels are normalised."""
MAX_PIXELS = 89_478_485  # where Pillow warns (268 MB as RGB); a small file can claim to be any size


class ImageError(ValueError):
    """An image that cannot be decoded: its ``path`` (or ``"<bytes>"``, ...), and the ``reason`` in one line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(source: Source, size: int | None = None, interpolation: str = "bilinear", fit: str = "crop") -> Tensor:
    """Decode one image file, a path or its bytes, or an array (H, W, 3) of pixels to RGB: uint8 (3, H, W).

    With ``size`` it becomes uint8 (3, size, size), resized by ``interpolation`` (``"bilinear"`` or ``"bicubic"``,
    antialiased): of an image that is not square ``fit`` leaves the centre square (``"crop"``), or the whole, between
    grey margins (``"pad"``) or with other proportions (``"squeeze"``). Raises :class:`ImageError` for whatever reason
    that fails.
    """
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else f"<{type(source).__name__}>"
    try:
        with _open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                message = f"{image.width} x {image.height} pixels, limit {MAX_PIXELS}"
                raise Image.DecompressionBombError(message)
            if size is not None:  # a JPEG decodes straight to 1/2, 1/4 or 1/8; twice the size loses no detail
                image.draft(None, (2 * size, 2 * size))
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF must not cost a good image
                ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image, path)
            if size is not None and rgb.size != (size, size):
                rgb = _square(rgb, size, Image.Resampling[interpolation.upper()], fit)
            return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(path, _not_an_image(source)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(path, f"refused as a decompression bomb: {error}") from error
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error
    except Exception as error:  # decoders raise anything (SyntaxError, struct.error, ...) on damaged data
        raise ImageError(path, f"damaged image ({type(error).__name__}: {error})") from error


def _square(rgb: Image.Image, size: int, how: Image.Resampling, fit: str) -> Image.Image:
    if fit != "pad":  # in one step: the whole of 20000 x 20 would take 1000 times the memory
        return rgb.resize((size, size), how, box=shown_box(*rgb.size, fit))
    longest = max(rgb.size)
    width, height = (max(1, round(size * side / longest)) for side in rgb.size)
    square = Image.new("RGB", (size, size), MARGIN)
    square.paste(rgb.resize((width, height), how), ((size - width) // 2, (size - height) // 2))
    return square


def shown_box(width: int, height: int, fit: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom, in pixels of an image, of the square that `decode_image` makes of it."""
    if fit == "squeeze":
        return 0, 0, width, height
    side = (max if fit == "pad" else min)(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def image_shape(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return (height, width) as its EXIF turns it, from the header, or ``None`` if it is not a readable image."""
    try:
        with _open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # as in decode_image: what is wrong with it is said when it is decoded
        return None


def _open(source: Source) -> Image.Image:
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if stat.S_IFMT(os.stat(source).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # opening a pipe waits
        raise OSError("not a regular file")
    return Image.open(source, formats=FORMATS)


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), path)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):  # else whoever wrote the file did not mean it
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(grey: np.ndarray, path: str) -> np.ndarray:
    """Scale by the kind of number alone, never by what the image shows, so that images stay comparable."""
    kind, top, slack = ("float", 1, 1e-3) if grey.dtype.kind == "f" else ("integer", 65535, 0)
    if not ((grey >= -slack) & (grey <= top + slack)).all():  # nor is it where a value is NaN
        found = f"{kind} values from {grey.min():g} to {grey.max():g}, where 0 to {top} can be read"
        rule = "convert all images by one rule, to 8 or 16 bits or to floats in [0, 1]"
        raise ImageError(path, f"{found}: {rule}")
    return (grey.clip(0, top) * (255 / top)).round().astype(np.uint8)


def _not_an_image(source: Source) -> str:
    unknown = f"not an image of a known format ({', '.join(FORMATS)})"
    if isinstance(source, bytes | np.ndarray):
        return unknown if len(source) else "empty file"
    if "HEIF" not in FORMATS and os.path.getsize(source) and _extension(os.fspath(source)) in _HEIC:
        return "HEIC can be read where pillow-heif is installed: pip install pillow-heif"
    return unknown if os.path.getsize(source) else "empty file"


def list_images(root: str | os.PathLike[str]) -> list[Path]:
    """List the image files under a folder, sorted by path; what is left out is counted in the log.

    Hidden files are left out, run folders, and the pictures that scoring draws. A folder that cannot be read stands in
    the list itself, as images do that nothing here decodes: neither is passed over in silence. A file is a list of one.
    Raises ``FileNotFoundError`` if there is no such folder, ``ValueError`` if there is nothing to list.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    left_out: Counter[str] = Counter()
    found = sorted(_walk(str(root), (), left_out))
    said = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
    if not found:
        looked = f"looked for {', '.join(sorted(EXTENSIONS))}, in its subfolders too"
        raise ValueError(f"no images in {root}: {looked}; left out: {said or 'none'}")
    if said:
        logger.info("left out in %s: %s", root, said)
    return [Path(path) for path in found]


def _walk(folder: str, parents: tuple[str, ...], left_out: Counter[str]) -> list[str]:
    real = os.path.realpath(folder)
    if real in parents:  # a link back to one of its own parents
        return []
    try:
        with os.scandir(folder) as all_entries:
            entries = [entry for entry in all_entries if not entry.name.startswith(".")]
        names = {entry.name for entry in entries}
        if parents and "config.json" in names and names & {"weights.safetensors", "checkpoints"}:
            with open(os.path.join(folder, "config.json"), "rb") as file:
                if b'"schema_version"' in file.read(1 << 20):
                    left_out["run folder"] += 1
                    return []
    except OSError:
        return [folder]  # what is wrong with it is said where it is decoded
    scored = any(name.endswith("_summary.json") for name in names)
    found: list[str] = []
    for entry in entries:
        # entry.is_dir() raises for a link to itself, and os.path.isdir asks the disk for every file
        if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
            if scored and entry.name == "pictures":
                left_out["folder of pictures drawn by scoring"] += 1
            else:
                found += _walk(entry.path, (*parents, real), left_out)
        elif _extension(entry.name) in _LISTED:
            found.append(entry.path)
        else:
            left_out[_extension(entry.name) or "without extension"] += 1
    return found


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()
