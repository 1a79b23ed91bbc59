"""Small data sets in the formats in which the real ones lie on disk."""

import hashlib

import numpy as np
from PIL import Image
from torchvision import datasets as torchvision_datasets

RNG = np.random.default_rng(0)


def md5(path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_image(path, side=(20, 24), value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.integers(0, 256, (*side, 3), dtype=np.uint8)
    Image.fromarray(pixels if value is None else np.full_like(pixels, value)).save(path)


def write_stl10(root, monkeypatch, train=6, test=4, unlabelled=9):
    kind = torchvision_datasets.STL10
    base = root / kind.base_folder
    base.mkdir(parents=True)
    arrays = {}
    for name, count in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        arrays[name] = RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        arrays[name].transpose(0, 1, 3, 2).tofile(base / f"{name}_X.bin")  # column-major in the file
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(base / f"{name}_y.bin")  # 1-based in the file
    (base / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    for attribute in ("train_list", "test_list"):
        sums = [[name, md5(base / name)] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, sums)
    return arrays


def write_imagenet(root, train, val):
    """So many images of each of two classes, as the archives are extracted."""
    for part, count in (("train", train), ("val", val)):
        for wnid in ("n01440764", "n01443537"):
            for i in range(count):
                write_image(root / part / wnid / f"{wnid}_{i}.JPEG", (260, 300))
