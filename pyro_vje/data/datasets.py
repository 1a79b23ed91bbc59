"""The data sets by name. A new one is one function that returns an ImageSet and one entry in DATASETS."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_vje.data.decode import image_shape, list_images
from pyro_vje.data.imageset import ImageSet, counted, read_images

logger = logging.getLogger("pyro_vje")

SPLITS = ("pretrain", "train", "test", "all")


@dataclass(frozen=True)
class Request:
    """What a data set's function is asked for; see :func:`load_dataset`."""

    name: str
    root: Path
    split: str
    image_size: int | None
    download: bool
    residency: str
    memory_budget: int | None


@dataclass(frozen=True)
class Dataset:
    """One entry of :data:`DATASETS`.

    Attributes
    ----------
    load
        Function of a :class:`Request`.
    mean, std
        Of each channel over the training images, in [0, 1].
    recipe
        Name of the augmentation in :data:`pyro_vje.data.views.two_views.RECIPES`; ``None``: by the image size.
    image_size
        Side in pixels when the user does not say; ``None``: found from the files.
    """

    load: Callable[[Request], ImageSet]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipe: str | None
    image_size: int | None


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    image_size: int | None = None,
    download: bool = True,
    residency: str = "auto",
    memory_budget: int | None = None,
) -> ImageSet:
    """Load one split of a data set as square RGB images.

    Parameters
    ----------
    name
        A key of :data:`DATASETS`.
    data_dir
        Where the data lie or are downloaded to: for ``folder`` and ``imagenet`` the folder itself, for the
        others the folder that torchvision calls ``root``. By default ``$PYRO_VJE_DATA``, or ``data_sets``.
    split
        ``"pretrain"`` (``train``, and the images without labels where the data set has any), ``"train"``,
        ``"test"``, or ``"all"`` (every labelled image).
    image_size
        Side in pixels; by default the data set's own.
    download
        Fetch what is missing, where that is possible.
    residency, memory_budget
        See :func:`pyro_vje.data.imageset.read_images`; for data sets of image files.

    Raises
    ------
    ValueError
        Unknown name or split, no image, or not one that can be decoded.
    FileNotFoundError
        The data are absent and were not, or could not be, downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    root = Path(data_dir if data_dir is not None else os.environ.get("PYRO_VJE_DATA", "data_sets"))
    entry = DATASETS[name]
    size = image_size if image_size is not None else entry.image_size
    images = entry.load(Request(name, root, split, size, download, residency, memory_budget))
    logger.info("%s, split %s: %s of side %d", name, split, counted(len(images)), images.image_size)
    return images


def _digits(request: Request) -> ImageSet:
    """Handwritten digits, 8 x 8 grey, that scikit-learn ships: 1,797 images.

    They are enlarged to 16 x 16, so that a random crop and a strided encoder have pixels to work on. In each
    class every fifth image is a test image: the file's order mixes the writers, and no seed is involved.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8))
    labels = torch.from_numpy(data.target).long()
    rank = (labels[:, None] == labels).tril().sum(1) - 1  # position of each image in its class

    def read(split: str) -> Arrays:
        here = (rank % 5 == 4) == (split == "test")
        return grey[here, None].expand(-1, 3, -1, -1), labels[here], tuple("0123456789")

    return _in_memory(request, read)


def _cifar(request: Request) -> ImageSet:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.name]

    def read(split: str) -> Arrays:
        data = _torchvision(kind, request, kind.base_folder, train=split == "train")
        return (
            torch.from_numpy(data.data).permute(0, 3, 1, 2),
            torch.tensor(data.targets),
            tuple(data.classes),
        )

    return _in_memory(request, read)


def _stl10(request: Request) -> ImageSet:
    """STL-10; the 100,000 images without labels (-1) come with the split ``pretrain`` only."""
    from torchvision.datasets import STL10

    def read(split: str) -> Arrays:
        data = _torchvision(STL10, request, STL10.base_folder, split=split)
        labels = torch.from_numpy(np.asarray(data.labels)).long()
        return torch.from_numpy(data.data), labels, tuple(data.classes)

    return _in_memory(request, read, pretrain=("train", "unlabeled"))


def _imagenet(request: Request) -> ImageSet:
    """ImageNet as extracted: ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``, without the devkit."""
    places = [request.root.absolute() / part for part in ("train", "val")]
    missing = [str(place) for place in places if not place.is_dir()]
    if missing:
        raise FileNotFoundError(
            f"imagenet: no folder {' and no '.join(missing)}. ImageNet cannot be downloaded without an "
            "account: get ILSVRC2012 from image-net.org, extract it to train/<class>/ and val/<class>/, "
            f"and give the folder that holds both as data_dir{_elsewhere(request.root)}"
        )
    return _folder(request)


def _folder(request: Request) -> ImageSet:
    """Any tree of images.

    With subfolders ``train`` and ``test`` (or ``val``), these are the splits and the folders in them the
    classes. Otherwise the first-level folders are the classes, and a tenth of the files, chosen by a hash
    of each file's path in the tree, are the test split: a file never changes sides when others come or go.
    Images beside the class folders are unlabelled (-1). For the split ``all`` every image of the tree is
    taken.
    """
    root = request.root
    if not root.exists():
        raise FileNotFoundError(
            f"no such folder: {root.absolute()}: give the right one as data_dir (--data-dir){_elsewhere(root)}"
        )
    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is not None and (root / "train").is_dir():
        folders = {"train": root / "train", "test": root / held_out}
        names = sorted({name for folder in folders.values() for name in _class_folders(folder)})
        wanted = (
            ["train", "test"] if request.split == "all" else ["test" if request.split == "test" else "train"]
        )
        files = [(path, folders[part]) for part in wanted for path in list_images(folders[part])]
        size = request.image_size or _typical_size(list_images(folders["train"]))
    else:
        files = [(path, root) for path in list_images(root)]
        names = sorted({_class_of(path, root) for path, root in files} - {""})
        size = request.image_size or _typical_size([path for path, _ in files])
        if request.split != "all":
            test = request.split == "test"
            total = len(files)
            files = [(path, root) for path, root in files if _is_test(path.relative_to(root)) == test]
            if not files:
                raise ValueError(
                    f"{root} has no image in the split {request.split!r}: about a tenth are test images, by "
                    "a hash of the path. Add images, sort them into train/ and test/, or take the split 'all'"
                )
            logger.info(
                "no train/ and test/: a tenth of the images, by a hash of their paths, is the split test; "
                "%d of %s in the split %s",
                *(len(files), counted(total), request.split),
            )
    index = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([index.get(_class_of(path, base), -1) for path, base in files])
    return read_images(
        [str(path) for path, _ in files],
        labels if bool((labels >= 0).any()) else None,
        tuple(names) or None,
        size,
        residency=request.residency,
        memory_budget=request.memory_budget,
    )


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Folders take ImageNet's statistics: nearly right for any photographs, and the same for every folder, so
# that a trained encoder reads a second folder as it read the first.
DATASETS: dict[str, Dataset] = {
    "digits": Dataset(_digits, (0.305,) * 3, (0.319,) * 3, "digits", 16),
    "cifar10": Dataset(_cifar, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "cifar", 32),
    "cifar100": Dataset(_cifar, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "cifar", 32),
    "stl10": Dataset(_stl10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), "stl10", 96),
    "imagenet": Dataset(_imagenet, _IMAGENET_MEAN, _IMAGENET_STD, "imagenet", 224),
    "folder": Dataset(_folder, _IMAGENET_MEAN, _IMAGENET_STD, None, None),
}


Arrays = tuple[Tensor, Tensor, tuple[str, ...]]  # uint8 images (N, 3, H, W), labels (N,), class names


def _in_memory(
    request: Request, read: Callable[[str], Arrays], pretrain: tuple[str, ...] = ("train",)
) -> ImageSet:
    """Make an ImageSet of what ``read`` returns for ``"train"``, ``"test"`` and the names in ``pretrain``."""
    splits = {"pretrain": pretrain, "all": ("train", "test")}.get(request.split, (request.split,))
    parts = [read(split) for split in splits]
    size = request.image_size or parts[0][0].shape[-1]
    out = torch.empty((sum(len(images) for images, _, _ in parts), 3, size, size), dtype=torch.uint8)
    filled = 0
    for images, _, _ in parts:
        for block in images.split(1000):  # in blocks: the temporary copies stay small
            if size != block.shape[-1]:
                block = interpolate(block.contiguous(), (size, size), mode="bilinear", antialias=True)
            out[filled : filled + len(block)] = block
            filled += len(block)
    paths = [
        f"{request.name}/{split}/{i:05d}"
        for split, part in zip(splits, parts, strict=True)
        for i in range(len(part[0]))
    ]
    return ImageSet(out, paths, torch.cat([labels for _, labels, _ in parts]), parts[0][2])


def _torchvision(kind: type[Any], request: Request, folder: str, **arguments: Any) -> Any:
    """Read a torchvision data set from ``request.root``, downloading it if absent and wanted."""
    place = (request.root / folder).absolute()
    try:
        return kind(str(request.root), download=False, **arguments)
    except (RuntimeError, OSError) as error:  # absent, incomplete, or files with other checksums
        if not request.download:
            raise FileNotFoundError(
                f"{request.name}: not found, or incomplete, in {place}. Allow the download, or give the "
                f"folder that holds {folder}/ as data_dir (--data-dir){_elsewhere(request.root)}"
            ) from error
    try:
        request.root.mkdir(parents=True, exist_ok=True)
        return kind(str(request.root), download=True, **arguments)
    except Exception as error:  # what a failing network or disk raises is not one type
        raise FileNotFoundError(
            f"{request.name}: not found in {place}, and the download failed ({type(error).__name__}: "
            f"{error}). Fetch {kind.url} where there is a connection, and unpack it so that {place} exists"
        ) from error


def _elsewhere(root: Path) -> str:
    # A run keeps its data_dir as it was typed.
    return "" if root.is_absolute() else ", or work in the folder from which the run was trained"


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _class_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def _is_test(relative: Path) -> bool:
    return hashlib.sha256(relative.as_posix().encode()).digest()[0] % 10 == 0


def _typical_size(paths: list[Path]) -> int:
    """Choose 32, 64, 96 or 224 pixels from the median shorter side of about 32 files."""
    sample = paths[:: max(1, len(paths) // 32)]
    sides = [min(shape) for shape in map(image_shape, sample) if shape is not None]
    median = float(np.median(sides)) if sides else 224.0
    size = next((size for limit, size in ((40, 32), (80, 64), (128, 96)) if median <= limit), 224)
    logger.info("images resized to %d x %d: the median shorter side is %g pixels", size, size, median)
    return size
