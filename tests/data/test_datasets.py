"""Every data set from small files in its real on-disk format, read by the real code."""

import logging
import os
import pickle

import numpy as np
import pytest
import torch
from on_disk import RNG, md5, write_image, write_imagenet, write_stl10
from PIL import Image
from torchvision import datasets as torchvision_datasets

from pyro_vje import TrainConfig
from pyro_vje.data import (
    DATASETS,
    ImageSet,
    LazyImages,
    find_dataset,
    imageset,
    load_dataset,
    load_train_set,
    views_for,
    warn_if_shared,
)
from pyro_vje.data.imageset import free_memory, read_images


def write_cifar(root, monkeypatch, kind, files, meta, label_key, classes):
    """Pickled batches as the archive holds them; torchvision is told their checksums."""
    base = root / kind.base_folder
    base.mkdir(parents=True)
    pixels, sums = {}, {}
    for name, count in files.items():
        pixels[name] = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % len(classes) for i in range(count)]
        (base / name).write_bytes(pickle.dumps({"data": pixels[name], label_key: labels}))
        sums[name] = md5(base / name)
    (base / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: classes}))
    monkeypatch.setattr(kind, "meta", {**meta, "md5": md5(base / meta["filename"])})
    train = [name for name in files if "test" not in name]
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in train])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name in files if "test" in name])
    return pixels


def test_cifar10(tmp_path, monkeypatch):
    kind = torchvision_datasets.CIFAR10
    files = {f"data_batch_{i}": 4 for i in range(1, 6)} | {"test_batch": 6}
    classes = [f"class{i}" for i in range(10)]
    pixels = write_cifar(tmp_path, monkeypatch, kind, files, kind.meta, "labels", classes)
    train = load_dataset("cifar10", tmp_path, "train", download=False)
    expected = np.concatenate([pixels[f"data_batch_{i}"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(train.images.numpy(), expected)
    assert train.images.is_contiguous()
    assert train.labels.tolist() == [0, 1, 2, 3] * 5
    assert train.classes == tuple(classes)
    test = load_dataset("cifar10", tmp_path, "test", download=False)
    assert test.paths[5] == "cifar10/test/00005"
    assert len(load_dataset("cifar10", tmp_path, "all")) == 26
    small = load_dataset("cifar10", tmp_path, "pretrain", image_size=16)
    assert small.images.shape == (20, 3, 16, 16)
    assert (small.images.float().mean((2, 3)) - train.images.float().mean((2, 3))).abs().max() < 3


def test_cifar100(tmp_path, monkeypatch):
    kind = torchvision_datasets.CIFAR100
    classes = [f"fine{i}" for i in range(100)]
    write_cifar(tmp_path, monkeypatch, kind, {"train": 7, "test": 3}, kind.meta, "fine_labels", classes)
    test = load_dataset("cifar100", tmp_path, "test", download=False)
    assert (len(test), test.image_size, len(test.classes)) == (3, 32, 100)


def test_stl10(tmp_path, monkeypatch):
    arrays = write_stl10(tmp_path, monkeypatch)
    train = load_dataset("stl10", tmp_path, "train", download=False)
    assert np.array_equal(train.images.numpy(), arrays["train"])
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]
    pretrain = load_dataset("stl10", tmp_path, "pretrain", download=False)
    assert np.array_equal(pretrain.images[6:].numpy(), arrays["unlabeled"])
    assert pretrain.labels.tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 9
    assert pretrain.paths[6] == "stl10/unlabeled/00000"
    labelled = pretrain.labelled()
    assert labelled.labels.tolist() == [0, 1, 2, 3, 4, 5]
    for split in ("train", "test", "all"):  # what evaluation reads has a label each
        assert (load_dataset("stl10", tmp_path, split).labels >= 0).all()


def test_imagenet_is_read_when_asked_for(tmp_path):
    write_imagenet(tmp_path, train=3, val=2)
    train = load_dataset("imagenet", tmp_path, "train", residency="stream")
    assert isinstance(train.images, LazyImages)
    assert train.images[0].shape == (3, 224, 224)
    assert train.classes == ("n01440764", "n01443537")
    test = load_dataset("imagenet", tmp_path, "test", image_size=64)
    assert test.in_memory
    assert test.labels.tolist() == [0, 0, 1, 1]


def test_imagenet_missing_part(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*val.*image-net\.org"):
        load_dataset("imagenet", tmp_path)


def test_digits():
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert (len(train), len(test)) == (1442, 355)
    assert train.images.shape[1:] == (3, 16, 16)
    assert test.labels.bincount().min() >= 34  # stratified
    assert torch.equal(test.images, load_dataset("digits", split="test").images)
    assert load_dataset("digits", image_size=8).images.max() == 255
    assert len(load_dataset("digits", split="all")) == 1797


def tree(root, names):
    for name in names:
        write_image(root / name)


# What was tried: files, and the classes of those in each split; "-" has no class.
LAYOUTS = {
    "class folders of MVTec": (
        ["train/good/0", "train/good/1", "test/good/2", "test/broken/3", "ground_truth/broken/4"],
        {"train": "good good", "test": "broken good", "all": "- broken good good good"},
    ),
    "no classes": (["train/0", "test/1"], {"train": "-", "test": "-", "all": "- -"}),
    "all three": (
        ["train/a/0", "val/a/1", "test/a/2", "test/b/3", "more/4", "5"],
        {"train": "a", "test": "a b", "all": "- - a b a a"},
    ),
    "capitals": (["Train/a/0", "TEST/b/1"], {"train": "a", "test": "b", "all": "b a"}),
    "long names": (["training/a/0", "testing/b/1"], {"train": "a", "test": "b", "all": "b a"}),
    "valid": (["train/a/0", "valid/b/1"], {"train": "a", "test": "b", "all": "a b"}),
    "validation": (["train/a/x/0", "Validation/b/1"], {"train": "a", "test": "b", "all": "b a"}),
    "deep": (["train/a/x/y/0", "test/a/1"], {"train": "a", "test": "a", "all": "a a"}),
    "not UTF-8": ([b"train/\xe9/\xe9", b"test/\xe9/0"], {"train": "\udce9", "test": "\udce9"}),
    "not UTF-8, no splits": ([b"\xe9/0", b"\xe9/1", b"\xe9/2"], {"train": "\udce9 \udce9 \udce9"}),
    "train alone": (["train/a/0", "cat/1"], {"all": "cat train", "train": "cat train"}),
    "no train": (["val/a/0", "test/a/1"], {"all": "test val", "train": "test val"}),
    "empty train": (["test/a/1", "train/a/notes.txt"], {"test": "a", "all": "a"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_folder(layout, tmp_path, caplog):
    names, splits = LAYOUTS[layout]
    for name in map(os.fsdecode, names):
        path = tmp_path / (name if "." in name else f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path) if path.suffix == ".png" else path.touch()
    for split, expected in splits.items():
        images = load_dataset("folder", tmp_path, split, image_size=8)
        labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
        found = ["-" if label < 0 else images.classes[label] for label in labels]
        assert found == expected.split()
        assert len(set(images.names)) == len(images)
        assert len(images.fingerprint()) == 64
    if layout in ("train alone", "no train"):
        assert "is read as a class" in caplog.text
    if layout == "empty train":
        with pytest.raises(ValueError, match="no image in the split 'train'"):
            load_dataset("folder", tmp_path, "train")


def test_a_fingerprint_says_whether_these_are_the_same_images(tmp_path):
    tree(tmp_path / "here", ["cat/0.png", "cat/1.png", "dog/0.png"])

    def fingerprint(place):
        return load_dataset("folder", tmp_path / place, "all", residency="stream").fingerprint()

    first = fingerprint("here")
    images = load_dataset("folder", tmp_path / "here", "all")
    assert first == images.fingerprint() == images.select([2, 0, 1]).fingerprint()
    assert first != images.select([0, 1]).fingerprint()
    assert images.select([2]).names == ["dog/0.png"]
    (tmp_path / "here").rename(tmp_path / "there")
    assert fingerprint("there") == first
    with open(tmp_path / "there/cat/0.png", "ab") as file:
        file.write(b"more")
    changed = fingerprint("there")
    (tmp_path / "there/cat/0.png").rename(tmp_path / "there/cat/2.png")
    assert len({first, changed, fingerprint("there")}) == 3
    digits = [load_dataset("digits", split=split).fingerprint() for split in ("train", "test", "train")]
    assert digits[0] == digits[2] != digits[1]


def test_training_images_that_are_test_images_or_show_nothing_are_noticed(tmp_path, caplog):
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    warn_if_shared(train, test)
    assert not caplog.records
    warn_if_shared(train, train.select([3, 4]))
    assert "2 of 2 test images are training images too" in caplog.text
    caplog.clear()
    for i in range(8):
        write_image(tmp_path / "black" / f"{i}.png", value=0)
    with pytest.raises(ValueError, match="every pixel of the training images is 0"):
        load_train_set(TrainConfig("folder", str(tmp_path / "black")))
    tree(tmp_path, ["0.png", "1.png"])
    lazy = load_dataset("folder", tmp_path, "all", residency="stream")
    warn_if_shared(lazy, lazy.select([0]))
    assert "1 of 1 test images" in caplog.text


def test_folder_without_splits_never_moves_a_file(tmp_path):
    names = [f"{c}/{i:03d}.png" for c in ("cat", "dog") for i in range(60)]
    tree(tmp_path, names)
    train, test = (load_dataset("folder", tmp_path, split) for split in ("train", "test"))
    assert set(train.paths).isdisjoint(test.paths)
    assert len(train) + len(test) == 120
    assert 3 <= len(test) <= 24
    assert train.classes == ("cat", "dog")
    assert train.image_size == 32
    tree(tmp_path, [f"bird/{i:03d}.png" for i in range(30)])
    more = load_dataset("folder", tmp_path, "test")
    assert set(test.paths) <= set(more.paths)
    assert more.classes == ("bird", "cat", "dog")


def test_the_log_says_where_the_images_went(tmp_path, caplog):
    tree(tmp_path, [f"{i:03d}.png" for i in range(60)])
    with caplog.at_level(logging.DEBUG, "pyro_vje"):
        test = load_dataset("folder", tmp_path, "test")
        said = f"no folders train/ and test/: {len(test)} of 60 images kept for testing"
        assert said in [record.message for record in caplog.records if record.levelno == logging.INFO]
        caplog.clear()
        tree(tmp_path, ["more/train/0.png", "more/test/0.png"])
        load_dataset("folder", tmp_path / "more", "test")
        load_dataset("folder", tmp_path, "all")
        assert "no folders" not in caplog.text
        assert "folder, split test: 1 image of side 32" in caplog.text
        assert "1 image of 32 x 32" in caplog.text


def test_a_place_that_was_given_relative_is_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("folder", rf"{tmp_path}/photos: .*\(--data-dir\)"),
        ("imagenet", rf"{tmp_path}/photos/train"),
        ("cifar10", rf"{tmp_path}/photos/cifar.*\(--data-dir\)"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{message}.*the folder from which the run was trained"):
            load_dataset(name, "photos", download=False)
    with pytest.raises(FileNotFoundError) as absolute:
        load_dataset("folder", tmp_path / "photos")
    assert "was trained" not in str(absolute.value)


def test_folder_flat_and_mixed(tmp_path):
    tree(tmp_path, ["a.png", "b.png"])
    flat = load_dataset("folder", tmp_path, "all")
    assert flat.labels is None
    assert flat.classes is None
    tree(tmp_path, ["cat/deep/c.png", "dog/d.png"])
    mixed = load_dataset("folder", tmp_path, "all")
    assert mixed.labels.tolist() == [-1, -1, 0, 1]
    assert mixed.labelled().labels.tolist() == [0, 1]


def test_every_image_of_a_tree_without_classes(tmp_path):
    tree(tmp_path, ["train/cat/0.png", "test/dog/1.png", "2.png"])
    for split in ("train", "test", "all"):
        images = load_dataset("images", tmp_path, split, image_size=8)
        assert images.names == ["2.png", "test/dog/1.png", "train/cat/0.png"]
        assert (images.labels, images.classes) == (None, None)


def test_bicubic_interpolation_is_pillows(tmp_path):
    pixels = RNG.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    for name in ("bilinear", "bicubic"):
        found = load_dataset("folder", tmp_path, "all", image_size=16, interpolation=name).images[0]
        resized = Image.fromarray(pixels).resize((16, 16), Image.Resampling[name.upper()])
        assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(resized))


@pytest.mark.parametrize(("side", "size"), [(28, 32), (64, 64), (96, 96), (300, 224)])
def test_folder_chooses_a_size(tmp_path, side, size):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", (side, side + 10))
    (tmp_path / "bad.png").write_bytes(b"")
    assert load_dataset("folder", tmp_path, "all").image_size == size
    assert load_dataset("folder", tmp_path, "all", image_size=20).image_size == 20


@pytest.mark.parametrize("residency", ["memory", "stream"])
def test_a_damaged_file_costs_only_itself(tmp_path, caplog, residency):
    for i in range(6):
        write_image(tmp_path / f"{i}.png", value=40 * i)
    for i in (1, 4):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
    with caplog.at_level(logging.WARNING, "pyro_vje"):
        images = load_dataset("folder", tmp_path, "all", residency=residency)
        read = list(images.batches(4))
        read = list(images.batches(4))  # a second reading does not warn again
    assert [path for path, _ in images.failed] == [str(tmp_path / "1.png"), str(tmp_path / "4.png")]
    assert "not an image" in images.failed[0][1]
    assert len(caplog.records) == 2
    pairs = [(images.paths[i], int(x[0, 0, 0])) for index, batch in read for i, x in zip(index, batch, strict=True)]
    assert pairs == [(str(tmp_path / f"{i}.png"), 40 * i) for i in (0, 2, 3, 5)]
    assert max(len(batch) for _, batch in read) <= 4


def test_many_damaged_files_do_not_flood_the_log(tmp_path, caplog):
    for i in range(30):
        (tmp_path / f"{i:02d}.png").write_bytes(b"no")
    write_image(tmp_path / "good.png")
    images = load_dataset("folder", tmp_path, "all")
    assert len(images) == 1
    assert len(images.failed) == 30
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 11


def test_residency_follows_the_free_memory(tmp_path, caplog, monkeypatch):
    assert free_memory() > 0
    tree(tmp_path, ["a.png", "b.png"])
    twice = 2 * 2 * 3 * 32 * 32
    with caplog.at_level(logging.DEBUG, "pyro_vje"):
        for free, residency, in_memory in ((twice, "auto", 1), (twice - 1, "auto", 0), (0, "memory", 1)):
            monkeypatch.setattr(imageset, "free_memory", lambda free=free: free)
            assert load_dataset("folder", tmp_path, "all", residency=residency).in_memory == in_memory
    assert "decoded when read" in caplog.text


def test_absent_data(tmp_path, monkeypatch):
    for name in ("cifar10", "cifar100", "stl10"):
        with pytest.raises(FileNotFoundError, match=f"{name}: not found.*{tmp_path}.*Allow the download"):
            load_dataset(name, tmp_path, download=False)

    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    for kind in (torchvision_datasets.CIFAR10, torchvision_datasets.STL10):
        monkeypatch.setattr(kind, "download", no_network)
        with pytest.raises(FileNotFoundError, match=r"download failed \(OSError: Network.*Fetch http"):
            load_dataset(kind.__name__.lower(), tmp_path / "new")


def test_default_data_dir(tmp_path, monkeypatch):
    tree(tmp_path, ["a.png"])
    monkeypatch.setenv("PYRO_VJE_DATA", str(tmp_path))
    assert len(load_dataset("folder", split="all")) == 1


def test_user_errors_name_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'cifar': choose one of digits, cifar10"):
        load_dataset("cifar")
    with pytest.raises(ValueError, match="unknown split 'val'; known: pretrain, train, test"):
        load_dataset("digits", split="val")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_dataset("digits", image_size=0)
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*nowhere"):
        load_dataset("folder", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images in"):
        load_dataset("folder", tmp_path)
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no image in the split 'test'.* train/ and test/"):
        load_dataset("folder", tmp_path, "test")
    with pytest.raises(ValueError, match="unknown residency 'ram'; known: auto, memory, stream"):
        load_dataset("folder", tmp_path, "all", residency="ram")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="not one of 1 images could be decoded"):
        load_dataset("folder", tmp_path, "all")


def test_image_set_selects():
    pixels = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
    labels = torch.tensor([0, 1, -1, 1, 0, 1])
    images = ImageSet(pixels, [str(i) for i in range(6)], labels, ("cat", "0"))
    assert images.select([4, 0]).paths == ["4", "0"]
    assert images.select(labels == 1).images[:, 0, 0, 0].tolist() == [1, 3, 5]
    assert images.of_class("cat").paths == ["0", "4"]
    assert images.of_class(0).paths == ["0", "4"]
    assert images.of_class("0").paths == ["1", "3", "5"]  # a name comes before an index
    assert images.of_class("1").paths == ["1", "3", "5"]
    with pytest.raises(ValueError, match="no class 'dog' in these images; classes: 0: cat, 1: 0"):
        images.of_class("dog")
    with pytest.raises(ValueError, match="no image of class 'cat' in this split"):
        images.select([1]).of_class("cat")
    unlabelled = ImageSet(pixels, images.paths)
    with pytest.raises(ValueError, match="none, they are unlabelled"):
        unlabelled.of_class("cat")
    with pytest.raises(ValueError, match="no labels"):
        unlabelled.labelled()
    assert images.class_name("1") == images.class_name("0") == "0"
    assert images.class_name(0) == "cat"
    with pytest.raises(ValueError, match="differ in length: 6, 5"):
        ImageSet(pixels, images.paths[:5])
    with pytest.raises(ValueError, match=r"uint8 .*got torch.float32 \(6, 3, 2, 2\): floats in \[0, 1\]"):
        ImageSet(pixels / 255, images.paths)
    with pytest.raises(ValueError, match=r"got torch.uint8 \(6, 1, 2, 2\).*expand"):
        ImageSet(pixels[:, :1], images.paths)


def test_lazy_selection_keeps_paths(tmp_path):
    tree(tmp_path, ["a/0.png", "a/1.png", "b/0.png"])
    images = load_dataset("folder", tmp_path, "all", residency="stream")
    chosen = images.of_class("b")
    assert chosen.images.paths == chosen.paths == [str(tmp_path / "b/0.png")]
    assert torch.equal(chosen.images[0], read_images(images, "memory").images[2])


OWN = """
import torch
from pyro_vje.data import Dataset, ImageSet

def zeros(request):
    count, side = {"train": 3, "test": 2}.get(request.split, 5), request.image_size or 8
    return ImageSet(torch.zeros(count, 3, side, side, dtype=torch.uint8), ["zero"] * count)

entry = Dataset(zeros, mean=(0.5,) * 3, recipe="digits", image_size=16)
nothing = lambda request: None
broken = lambda request: 1 / 0
number = 5
"""


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    assert load_dataset("my_data:zeros").images.shape == (3, 3, 8, 8)
    assert len(load_dataset("my_data:zeros", split="test", image_size=12)) == 2
    assert views_for("my_data:zeros", 8)[1].mean == find_dataset("folder").mean
    assert load_dataset("my_data:entry").image_size == 16
    assert views_for("my_data:entry", 8)[0].recipe.flip == 0
    for name, message in {
        "none": "choose one of digits, .* or name your own as module:attribute",
        "my_data:nothing": "gave a NoneType: it must return an ImageSet",
        "my_data:broken": r"failed \(ZeroDivisionError: division by zero\)",
        "my_data:number": "must be a function from a Request to an ImageSet, not 5",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_dataset(name)
    monkeypatch.setitem(DATASETS, "mine", find_dataset("my_data:entry"))
    assert len(load_dataset("mine")) == 3
