"""What was tried: a table of what people bring, a row an input and what is right for it.

Each row is a folder of four pictures of one extension and mode, in a layout, read in a process that a launcher started.
"""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.data import list_images, load_dataset
from pyro_vje.data.decode import EXTENSIONS
from pyro_vje.launch import check_launch, is_first_process

COLOUR = (200, 100, 50)


def grey(value, kind):
    return Image.fromarray(np.full((12, 12), value, kind))


def nearly(value, other, kind):
    """One pixel differs: it must not decide how the others are read."""
    pixels = np.full((12, 12), value, kind)
    pixels[0, 0] = other
    return Image.fromarray(pixels)


MODES = {
    "1": lambda: Image.new("1", (12, 12), 1),
    "L": lambda: Image.new("L", (12, 12), 120),
    "LA": lambda: Image.new("LA", (12, 12), (120, 128)),
    "P": lambda: Image.new("RGB", (12, 12), COLOUR).quantize(4),
    "RGB": lambda: Image.new("RGB", (12, 12), COLOUR),
    "RGBA": lambda: Image.new("RGBA", (12, 12), (*COLOUR, 128)),
    "alpha=0": lambda: Image.new("RGBA", (12, 12), (*COLOUR, 0)),  # whoever wrote it did not mean it
    "CMYK": lambda: Image.new("RGB", (12, 12), COLOUR).convert("CMYK"),
    "I;16": lambda: grey(32768, np.uint16),
    "I;16=255": lambda: nearly(255, 0, np.uint16),  # nearly black, though 255 is its own maximum
    "I": lambda: grey(32768, np.int32),
    "I=65536": lambda: nearly(32768, 65536, np.int32),
    "I<0": lambda: nearly(100, -1000, np.int32),
    "F": lambda: grey(0.5, np.float32),
    "F=1.0005": lambda: nearly(0.5, 1.0005, np.float32),
    "F=255": lambda: nearly(120, 255, np.float32),
    "F=nan": lambda: nearly(0.5, np.nan, np.float32),
    "bytes": None,  # no picture
}
# Files, and how many images each split has; one that is not UTF-8 is read as any other.
LAYOUTS = {
    "flat": ([b"0", b"1", b"2", b"3"], {"all": 4}),
    "classes": ([b"a/0", b"a/1", b"b/0", b"b/1"], {"all": 4}),
    "splits": ([b"train/0", b"train/1", b"train/2", b"test/0"], {"train": 3, "test": 1, "all": 4}),
    "both": ([b"train/a/0", b"train/b/0", b"val/a/0", b"val/b/0"], {"train": 2, "test": 2, "all": 4}),
    "Capitals": ([b"Training/a/0", b"Training/a/1", b"TEST/a/0", b"x/0"], {"train": 2, "test": 1, "all": 4}),
    "deep": ([b"train/a/x/y/0", b"train/0", b"test/a/z/0", b"test/1"], {"train": 2, "test": 2, "all": 4}),
    "bytes": ([b"train/\xe9/\xe9", b"train/a/1", b"test/\xff/0", b"test/a/1"], {"train": 2, "test": 2, "all": 4}),
}
# Environment and --devices; whether this process is the first, or what is wrong.
SRUN, TORCHRUN = {"SLURM_NTASKS": "2"}, {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}
LAUNCHERS = {
    "none": ({}, 1, True),
    "devices=2": ({}, 2, True),
    "sbatch": (SRUN, 1, True),
    "srun:0": ({**SRUN, "SLURM_PROCID": "0"}, 2, True),
    "srun:1": ({**SRUN, "SLURM_PROCID": "1"}, 2, False),
    "srun-1": ({**SRUN, "SLURM_PROCID": "0"}, 1, "srun started 2 processes"),
    "torchrun:1": ({**TORCHRUN, "RANK": "1"}, 2, False),
    "torchrun-4": ({**TORCHRUN, "RANK": "0"}, 4, "torchrun started 2 processes"),
    "RANK": ({"RANK": "1"}, 1, "RANK is set, but no launcher"),
}
TABLE = """
extension  mode      layout    launcher    outcome
png        1         flat      none        255,255,255
png        L         classes   devices=2   120,120,120
png        LA        splits    sbatch      187,187,187
png        P         both      srun:0      200,100,50
png        RGB       bytes     srun:1      200,100,50
png        RGBA      Capitals  srun-1      227,177,152
png        alpha=0   deep      torchrun:1  200,100,50
png        I;16      flat      torchrun-4  128,128,128
png        I;16=255  classes   RANK        1,1,1
PNG        RGB       splits    none        200,100,50
jpg        L         both      devices=2   120,120,120
jpeg       RGB       bytes     sbatch      200,100,50
JPG        RGB       Capitals  srun:0      200,100,50
jpe        RGB       deep      srun:1      200,100,50
jfif       L         flat      srun-1      120,120,120
jpg        CMYK      classes   torchrun:1  200,100,50
bmp        1         splits    torchrun-4  255,255,255
bmp        L         both      RANK        120,120,120
bmp        P         bytes     none        200,100,50
bmp        RGB       Capitals  devices=2   200,100,50
tif        L         deep      sbatch      120,120,120
tiff       RGBA      flat      srun:0      227,177,152
tiff       alpha=0   classes   srun:1      200,100,50
tif        CMYK      splits    srun-1      200,100,50
tif        I;16      both      torchrun:1  128,128,128
tif        I         bytes     torchrun-4  128,128,128
tif        I=65536   Capitals  RANK        integer_values_from_32768_to_65536
tif        I<0       deep      none        integer_values_from_-1000_to_100
tif        F         flat      devices=2   128,128,128
tif        F=1.0005  classes   sbatch      128,128,128
tif        F=255     splits    srun:0      float_values_from_120_to_255
tif        F=nan     both      srun:1      float_values_from_nan
gif        P         bytes     srun-1      200,100,50
gif        L         Capitals  torchrun:1  120,120,120
webp       RGB       deep      torchrun-4  200,100,50
webp       RGBA      flat      RANK        227,177,152
ppm        RGB       classes   none        200,100,50
pgm        L         splits    devices=2   120,120,120
pgm        I         both      sbatch      128,128,128
jp2        RGB       bytes     srun:0      200,100,50
j2k        L         Capitals  srun:1      120,120,120
avif       RGB       deep      srun-1      200,100,50
heic       bytes     flat      torchrun:1  HEIC_can_be_read_where|not_an_image
svg        bytes     classes   torchrun-4  not_an_image_of_a_known_format
dcm        bytes     splits    RANK        not_an_image_of_a_known_format
png        bytes     both      none        not_an_image_of_a_known_format
txt        bytes     bytes     devices=2   left_out
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()[1:]]


def test_the_table_has_everything_that_was_tried():
    columns = list(zip(*ROWS, strict=True))
    for column, known in zip(columns[1:4], (MODES, LAYOUTS, LAUNCHERS), strict=True):
        assert set(column) == set(known)
    assert len({tuple(row[:2]) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("extension", "mode", "layout", "launcher", "outcome"), ROWS)
def test_a_row(extension, mode, layout, launcher, outcome, tmp_path, monkeypatch):
    environment, devices, first = LAUNCHERS[launcher]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(first, str):
        with pytest.raises(ValueError, match=first):
            check_launch(devices)
    else:
        check_launch(devices)
        assert is_first_process() == first

    if MODES[mode] and f".{extension.lower()}" not in EXTENSIONS:
        pytest.skip(f"this Pillow has no {extension}")
    files, splits = LAYOUTS[layout]
    for name in files:
        path = tmp_path / os.fsdecode(name + b"." + extension.encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        if MODES[mode] is None:
            path.write_bytes(b"no picture")
        else:
            kind = Image.registered_extensions()[f".{extension.lower()}"]
            content = io.BytesIO()
            MODES[mode]().save(content, kind, **({"lossless": True} if extension == "webp" else {}))
            path.write_bytes(content.getvalue())
    if outcome == "left_out":
        with pytest.raises(ValueError, match=f"left out: {len(files)} .{extension}"):
            list_images(tmp_path)
        return
    for split, count in splits.items():
        images = load_dataset("folder", tmp_path, split, image_size=8, residency="stream")
        found = [batch for _, batch in images.batches(8)]
        if outcome[0].isdigit():
            expected = torch.tensor([int(value) for value in outcome.split(",")])
            assert sum(map(len, found)) == count
            pixels = torch.cat(found)[:, :, 4, 4].int()  # away from a pixel that differs
            assert (pixels - expected).abs().max() <= (3 if kind in ("JPEG", "AVIF", "JPEG2000") else 1)
        else:
            assert not found
            assert len(images.failed) == count
            reasons = [text.replace("_", " ") for text in outcome.split("|")]
            assert all(any(text in reason for text in reasons) for _, reason in images.failed)
