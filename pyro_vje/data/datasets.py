"""The data sets by name. A new one is one function from a Request to an ImageSet, and one entry in DATASETS."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_vje.data.decode import image_shape, list_images
from pyro_vje.data.imageset import RESIDENCIES, ImageSet, LazyImages, counted, read_images
from pyro_vje.data.views import CleanView, TwoViews
from pyro_vje.plugins import look_up, users_code

logger = logging.getLogger("pyro_vje")

SPLITS = ("pretrain", "train", "test", "all")


@dataclass(frozen=True)
class Request:
    """What a data set's function is asked for; see :func:`load_dataset`. Training asks for the split ``"pretrain"``."""

    name: str
    root: Path
    split: str
    image_size: int | None
    download: bool
    residency: str
    interpolation: str = "bilinear"
    fit: str = "crop"


@dataclass(frozen=True)
class Dataset:
    """A function of a :class:`Request`, and how its images are seen.

    ``mean`` and ``std`` are of each channel, in [0, 1]: by default ImageNet's, so that every folder is read alike.
    """

    load: Callable[[Request], ImageSet]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    recipe: str | None = None
    """Name of the augmentation in :data:`pyro_vje.data.RECIPES`; ``None``: by the image size."""
    image_size: int | None = None
    """Side in pixels when the user does not say; ``None``: the function chooses."""

    def __call__(self, request: Request) -> ImageSet:
        """Load what is asked for."""
        return self.load(request)


def find_dataset(name: str) -> Dataset:
    """A data set by name, ``module:function`` (a `Dataset`, or its function), or entry point; else ``ValueError``."""
    form = "from a Request to an ImageSet"
    found = look_up(name, DATASETS, what="data set", form=form, group="pyro_vje.datasets")
    return found if isinstance(found, Dataset) else Dataset(found)


def recipe_for(name: str, image_size: int) -> str:
    """Return the name of a data set's augmentation at an image size; raises ``ValueError`` for an unknown data set."""
    by_size = "cifar" if image_size <= 40 else "stl10" if image_size <= 128 else "imagenet"
    return find_dataset(name).recipe or by_size


def views_for(name: str, image_size: int) -> tuple[TwoViews, CleanView]:
    """Return the training and the evaluation views for a data set's name (`find_dataset`)."""
    data = find_dataset(name)
    two_views = TwoViews(image_size, recipe_for(name, image_size), data.mean, data.std)
    return two_views, CleanView(image_size, data.mean, data.std)


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    download: bool = True,
    residency: str = "auto",
    interpolation: str = "bilinear",
    fit: str = "crop",
) -> ImageSet:
    """Load one split of a data set (`find_dataset`) as square RGB images of side ``image_size`` (by default its own).

    ``data_dir`` is where the data lie or are downloaded to: of a folder and ImageNet the folder itself, else what
    torchvision calls ``root``; by default ``$PYRO_VJE_DATA``, or ``data_sets``. ``split`` is ``"train"``, ``"test"``,
    ``"pretrain"`` (``train``, and the images without labels where there are any) or ``"all"`` (of a folder every image
    in it, else every labelled one). Image files are decoded once (``residency`` ``"memory"``), when they are read
    (``"stream"``), or as the memory allows (``"auto"``), resized by ``interpolation``, ``"bilinear"`` or ``"bicubic"``,
    and made square by ``fit`` (`decode_image`). Raises ``ValueError`` for an unknown name or split, or where no image
    can be decoded, and ``FileNotFoundError`` where the data are absent and were not, or could not be, downloaded.
    """
    entry = find_dataset(name)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if residency not in RESIDENCIES:
        raise ValueError(f"unknown residency {residency!r}; known: {', '.join(RESIDENCIES)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    root = Path(data_dir if data_dir is not None else os.environ.get("PYRO_VJE_DATA", "data_sets"))
    size = image_size or entry.image_size
    request = Request(name, root, split, size, download, residency, interpolation, fit)
    with users_code(f"data set {name!r} failed"):
        images = entry(request)
    if not isinstance(images, ImageSet):
        raise ValueError(f"data set {name!r} gave a {type(images).__name__}: it must return an ImageSet")
    logger.debug("%s, split %s: %s of side %d", name, split, counted(len(images)), images.image_size)
    return images


Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # uint8 images (N, 3, H, W), labels (N,), class names


def _digits(request: Request, split: str) -> Arrays:
    """scikit-learn's 1,797 digits, enlarged to 16 x 16 for a random crop; in each class every fifth is a test image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(data.target).long()
    rank = (labels[:, None] == labels).tril().sum(1) - 1  # position of each image in its class
    here = (rank % 5 == 4) == (split == "test")
    return grey[here, None].expand(-1, 3, -1, -1), labels[here], tuple("0123456789")


def _cifar(request: Request, split: str) -> Arrays:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.name]
    data = _torchvision(kind, request, kind.base_folder, train=split == "train")
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets), tuple(data.classes)


def _stl10(request: Request, split: str) -> Arrays:
    from torchvision.datasets import STL10

    data = _torchvision(STL10, request, STL10.base_folder, split=split)
    return torch.from_numpy(data.data), torch.from_numpy(data.labels).long(), tuple(data.classes)


def _torchvision(kind: type[Any], request: Request, folder: str, **arguments: Any) -> Any:
    """Read a torchvision data set from ``request.root``, downloading it if absent and wanted."""
    for download in (False, True) if request.download else (False,):
        try:
            return kind(str(request.root), download=download, **arguments)
        except Exception as error:  # absent, incomplete; of a network or disk it is not one type
            failure = error
    place = (request.root / folder).absolute()
    why = f"not found in {place}, and the download failed ({type(failure).__name__}: {failure})"
    way = f"Fetch {kind.url} where there is a connection, and unpack it so that {place} exists"
    if not request.download:
        why = f"not found, or incomplete, in {place}"
        way = f"Allow the download, or give the folder that holds {folder}/ as data_dir (--data-dir)"
        way += _elsewhere(request.root)
    raise FileNotFoundError(f"{request.name}: {why}. {way}") from failure


def _in_memory(
    read: Callable[[Request, str], Arrays], pretrain: tuple[str, ...] = ("train",)
) -> Callable[[Request], ImageSet]:
    """The data set's function where ``read`` returns ``"train"``, ``"test"`` and the names in ``pretrain``."""

    def load(request: Request) -> ImageSet:
        splits = {"pretrain": pretrain, "all": ("train", "test")}.get(request.split, (request.split,))
        parts = [read(request, split) for split in splits]
        size = request.image_size or parts[0][0].shape[-1]
        out = torch.empty((sum(len(images) for images, _, _ in parts), 3, size, size), dtype=torch.uint8)
        filled = 0
        for block in (block for images, _, _ in parts for block in images.split(1000)):  # copies stay small
            if size != block.shape[-1]:
                block = interpolate(block.contiguous(), (size, size), mode="bilinear", antialias=True)
            out[filled : filled + len(block)] = block
            filled += len(block)
        counts = zip(splits, (len(images) for images, _, _ in parts), strict=True)
        paths = [f"{request.name}/{split}/{i:05d}" for split, count in counts for i in range(count)]
        return ImageSet(out, paths, torch.cat([labels for _, labels, _ in parts]), parts[0][2])

    return load


def _imagenet(request: Request) -> ImageSet:
    """ImageNet as extracted: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, without the devkit."""
    places = [request.root.absolute() / part for part in ("train", "val")]
    if missing := " and no ".join(str(place) for place in places if not place.is_dir()):
        raise FileNotFoundError(
            f"imagenet: no folder {missing}. ImageNet cannot be downloaded without an account: get ILSVRC2012 from "
            "image-net.org, extract it to train/<class>/ and val/<class>/, and give the folder that holds both as "
            f"data_dir{_elsewhere(request.root)}"
        )
    return _folder(request, ("val",))


PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validation"), "val")
"""Names of folders, in any case, that are splits."""


def _folder(request: Request, held_out: tuple[str, ...] = ("test", "val")) -> ImageSet:
    """Any tree of images.

    With subfolders ``train`` and ``test`` (or ``val``; see `PARTS`), these are the splits and the folders in them the
    classes. Otherwise the first-level folders are the classes, and a tenth of the files, by a hash of each path in the
    tree, the test split: none changes sides when others come or go. Other images are unlabelled (-1).
    """
    root, split = request.root, request.split
    if not root.exists():
        how = f"give the right one as data_dir (--data-dir){_elsewhere(root)}"
        raise FileNotFoundError(f"no such folder: {root.absolute()}: {how}")
    known = [name for name in os.listdir(root) if name.lower() in PARTS] if root.is_dir() else []
    parts = {name: PARTS[name.lower()] for name in sorted(known) if (root / name).is_dir()}
    test = next((part for part in held_out if part in parts.values()), None)
    if test is None or "train" not in parts.values():
        if parts and split != "all":
            logger.warning("%s lacks train/, or test/ or val/: %s is read as a class", root, ", ".join(parts))
        parts, test = {}, "test"

    def split_and_class(place: tuple[str, ...]) -> tuple[str, str]:
        if not parts:
            return "test" if _is_test(place) else "train", place[0] if len(place) > 1 else ""
        inside = place[1:] if place[0] in parts else ()
        return parts.get(place[0], ""), inside[0] if len(inside) > 1 else ""

    every = [(str(path), *split_and_class(path.relative_to(root).parts)) for path in list_images(root)]
    names = sorted({name for _, _, name in every} - {""})
    wanted = test if split == "test" else "train"
    files = [(path, name) for path, part, name in every if split == "all" or part == wanted]
    if not parts and split != "all":
        train = "to train on, a tenth by a hash of the paths for testing"
        what = "kept for testing" if split == "test" else train
        logger.info("no folders train/ and test/: %d of %s %s", len(files), counted(len(every)), what)
    if not files:
        how = "without train/ and test/ about a tenth are test images, by a hash of the path. Add images, "
        how += "sort them into train/ and test/, or take the split 'all'"
        raise ValueError(f"{root} has no image in the split {split!r}: {how}")
    paths = [path for path, _ in files]
    index = {"": -1, **{name: i for i, name in enumerate(names)}}
    labels = torch.tensor([index[name] for _, name in files])
    sized = [path for path, part, _ in every if not parts or part == "train"]
    lazy = LazyImages(paths, request.image_size or _typical_size(sized), request.interpolation, request.fit)
    labelled = labels if (labels >= 0).any() else None
    images = ImageSet(lazy, paths, labelled, tuple(names) or None, root=str(root))
    return read_images(images, request.residency)


def _images(request: Request) -> ImageSet:
    """Every image of a tree, in any split, without classes."""
    return replace(_folder(replace(request, split="all")), labels=None, classes=None)


def _elsewhere(root: Path) -> str:  # a run keeps its data_dir as it was typed
    return "" if root.is_absolute() else ", or work in the folder from which the run was trained"


def _is_test(place: tuple[str, ...]) -> bool:
    name = "/".join(place) or "."  # a single file is its own root
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] % 10 == 0


def _typical_size(paths: list[str]) -> int:
    """Choose 32, 64, 96 or 224 pixels from the median shorter side of about 32 files."""
    median = float(np.median([min(shape) for shape in _some_shapes(paths)] or [224]))
    size = next((size for limit, size in ((40, 32), (80, 64), (128, 96)) if median <= limit), 224)
    logger.debug("images resized to %d x %d: the median shorter side is %g pixels", size, size, median)
    return size


def _some_shapes(paths: Sequence[str]) -> list[tuple[int, int]]:
    shapes = map(image_shape, paths[:: max(1, len(paths) // 32)])
    return [shape for shape in shapes if shape is not None]


SQUARE = 0.98
"""Shorter side by longer side, from which on an image counts as square."""


def short_to_long(paths: Sequence[str]) -> float:
    """The shorter side by the longer one, the median of about 32 files; 1 where there are none to look at."""
    return float(np.median([min(shape) / max(shape) for shape in _some_shapes(paths)] or [1.0]))


def say_fit(images: ImageSet, fit: str) -> None:
    """Say what becomes of images that are not square, if most are not."""
    if (kept := short_to_long(images.paths)) < SQUARE:
        what = {
            "crop": f"the central square is kept, {1 - kept:.0%} is cut off (--fit pad or squeeze keeps all)",
            "pad": f"whole, between grey margins of {1 - kept:.0%}",
            "squeeze": "whole, squeezed into a square",
        }
        height, width = _some_shapes(images.paths[:1])[0]
        logger.info("images are not square (such as %d x %d pixels): %s", width, height, what[fit])


_STL10 = _in_memory(_stl10, ("train", "unlabeled"))
DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_in_memory(_digits), (0.305,) * 3, (0.319,) * 3, "digits", 16),
    "cifar10": Dataset(_in_memory(_cifar), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar", 32),
    "cifar100": Dataset(_in_memory(_cifar), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar", 32),
    "stl10": Dataset(_STL10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), "stl10", 96),
    "imagenet": Dataset(_imagenet, recipe="imagenet", image_size=224),
    "folder": Dataset(_folder),
    "images": Dataset(_images),
}
