"""Files of every kind that users have, good and bad."""

import contextlib
import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.data import ImageError, decode, decode_image, list_images
from pyro_vje.data.decode import EXTENSIONS, FORMATS, image_shape

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(dtype, *values) -> Image.Image:
    """A few values in the first row, the last of them in all others."""
    pixels = np.full((16, 16), values[-1], dtype)
    pixels[0, : len(values)] = values
    return Image.fromarray(pixels)


COLOUR = Image.new("RGB", (16, 16), (200, 100, 50))
GREY = Image.new("L", (16, 16), 51)
# What was tried: each mode in every extension that can hold it, and the colour that is read, or the reason why not.
MODES = {
    "RGB": (COLOUR, (200, 100, 50)),
    "RGBA": (COLOUR.convert("RGBA"), (200, 100, 50)),
    "RGBA, alpha 0 everywhere": (Image.new("RGBA", (16, 16), (200, 100, 50, 0)), (200, 100, 50)),
    "P": (COLOUR.quantize(2), (200, 100, 50)),
    "CMYK": (COLOUR.convert("CMYK"), (200, 100, 50)),
    "L": (GREY, (51, 51, 51)),
    "LA": (GREY.convert("LA"), (51, 51, 51)),
    "1": (Image.new("1", (16, 16), 1), (255, 255, 255)),
    "16-bit": (flat(np.uint16, 51 * 257), (51, 51, 51)),
    "16-bit, dark": (flat(np.uint16, 255), (1, 1, 1)),
    "16-bit, one hot pixel": (flat(np.uint16, 65535, 51 * 257), (51, 51, 51)),
    "32-bit": (flat(np.int32, 65535, 51 * 257), (51, 51, 51)),
    "32-bit, too large": (flat(np.int32, 65536, 51 * 257), "integer values from 13107 to 65536, .* 16 bits"),
    "32-bit, negative": (flat(np.int32, -1, 51 * 257), "integer values from -1 to 13107, where 0 to 65535"),
    "float": (flat(np.float32, 0, 1, 0.2), (51, 51, 51)),
    "float, dark": (flat(np.float32, 0.2 / 51), (1, 1, 1)),
    "float, rounded": (flat(np.float32, 1.0001, 0.2), (51, 51, 51)),
    "float, one hot pixel": (flat(np.float32, 1.01, 0.2), r"float values from 0\.2 to 1\.01, where 0 to 1"),
    "float, grey levels": (flat(np.float32, 0, 255, 51), "float values from 0 to 255, .*by one rule"),
    "float, negative": (flat(np.float32, -1000, 0.2), "float values from -1000 to 0.2"),
    "float, infinite": (flat(np.float32, np.inf, 0.2), "float values from 0.2 to inf"),
    "float, NaN": (flat(np.float32, np.nan, 0.2), "float values from nan to nan"),
}
DEEP = (".tif", ".tiff")  # 32-bit values, which other formats clip when they are written


@pytest.mark.parametrize("mode", MODES)
def test_each_extension_and_mode(mode, tmp_path):
    image, expected = MODES[mode]
    written = []
    for extension in sorted(DEEP if image.mode in ("I", "F") else EXTENSIONS):
        path = tmp_path / f"image{extension}"
        try:
            image.save(path)
        except (OSError, ValueError, KeyError):  # this format has no such mode
            continue
        with Image.open(path) as stored:
            if image.mode in ("CMYK", "I;16") and stored.mode[0] != image.mode[0]:  # lost by the writer
                continue
        written.append(extension)
        if isinstance(expected, str):
            with pytest.raises(ImageError, match=expected):
                decode_image(path)
            continue
        decoded = decode_image(path)
        assert decoded.dtype == torch.uint8
        assert image_shape(path) == decoded.shape[1:] == (16, 16)
        off = (decoded[:, 8:].float().mean((1, 2)) - torch.tensor(expected)).abs().max()
        assert off < (8 if "A" in mode or mode in ("RGB", "P", "CMYK", "L") else 1e-3), (extension, off)
    assert len(written) >= 2


def test_pixels_are_the_files_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(save(Image.fromarray(pixels))).permute(1, 2, 0).numpy(), pixels)


def test_transparency_lies_over_white():
    half = decode_image(save(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert (half[:, 0, 0].int() - torch.tensor([255, 127, 127])).abs().max() <= 1
    hole = Image.new("LA", (2, 2), (0, 0))
    hole.putpixel((0, 0), (9, 255))
    assert decode_image(save(hole))[0].tolist() == [[9, 255], [255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    assert decode_image(save(palette))[:, 0].T.tolist() == [list(RED), list(BLUE)]
    for transparency in (0, bytes([0, 255])):
        decoded = decode_image(save(palette, transparency=transparency))
        assert decoded[:, 0].T.tolist() == [[255, 255, 255], list(BLUE)]
    keyed = Image.new("RGB", (2, 1), GREEN)
    keyed.putpixel((0, 0), RED)
    assert decode_image(save(keyed, transparency=GREEN))[:, 0].T.tolist() == [list(RED), [255, 255, 255]]


def test_exif_orientation_is_applied():
    """The camera was turned: the red corner belongs where the tag says."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = RED
    for orientation, (y, x) in {1: (3, 3), 3: (-4, -4), 6: (3, -4), 8: (-4, 3)}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        decoded = decode_image(save(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
        assert decoded.shape == ((3, 16, 32) if orientation in (1, 3) else (3, 32, 16))
        assert decoded[0, y, x] > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_nothing():
    data = save(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    assert decode_image(data).shape == (3, 8, 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN, BLUE)]
    decoded = decode_image(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded[:, 0, 0].tolist() == list(RED)


def test_any_shape_becomes_the_square():
    for shape in ((1, 1), (20000, 20), (20, 20000), (17, 31), (64, 64)):
        for kind in ("PNG", "JPEG"):
            decoded = decode_image(save(Image.new("RGB", shape, (10, 200, 90)), kind), 32)
            assert decoded.shape == (3, 32, 32)
            assert (decoded.float().mean((1, 2)) - torch.tensor([10.0, 200, 90])).abs().max() < 4


def test_the_square_is_the_centre_and_antialiased():
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    pixels[::2, 64:128] = 0  # stripes that a resize without antialiasing would turn black or white
    decoded = decode_image(save(Image.fromarray(pixels)), 16)
    assert (decoded[:, :, 1:-1].float() - 127.5).abs().max() < 16


def test_the_whole_of_an_image_that_is_not_square():
    """Left half red, right half blue: the centre has both edges cut off, the others keep them."""
    wide = Image.new("RGB", (48, 16), RED)
    wide.paste(BLUE, (24, 0, 48, 16))
    wide.paste(GREEN, (0, 0, 6, 16))
    crop, pad, squeeze = (decode_image(save(wide), 16, fit=fit) for fit in ("crop", "pad", "squeeze"))
    assert not (crop[1] > 0).any()
    assert torch.equal(squeeze, torch.tensor(np.asarray(wide.resize((16, 16), 2))).permute(2, 0, 1))
    row = [tuple(pixel) for pixel in pad[:, 7].T.tolist()]
    assert (row[0], row[4], row[-1]) == (GREEN, RED, BLUE)
    margin = torch.tensor(decode.MARGIN, dtype=torch.uint8)[:, None, None]
    assert (pad[:, :5] == margin).all()
    assert (pad[:, 10:] == margin).all()
    tall = decode_image(save(wide.transpose(Image.Transpose.TRANSPOSE)), 16, fit="pad")
    assert torch.equal(tall, pad.transpose(1, 2))
    for fit in ("pad", "squeeze"):
        for shape in ((1, 1), (20000, 20), (20, 20000)):
            assert decode_image(save(Image.new("RGB", shape)), 16, fit=fit).shape == (3, 16, 16)


def png(**_) -> bytes:
    return save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))


BAD = {
    "empty": (b"", "empty file"),
    "text": (b"this is not an image\n" * 50, "not an image of a known format"),
    "truncated-png": (png()[:3000], "truncated"),
    "truncated-jpeg": (save(Image.open(io.BytesIO(png())), "JPEG")[:1500], "truncated"),
    "header-only": (png()[:40], None),
    "broken-chunk": (png()[:60] + b"\x00" * 500 + png()[560:], None),
    "truncated-tiff": (save(Image.open(io.BytesIO(png())), "TIFF")[:200], None),
    "truncated-gif": (save(Image.open(io.BytesIO(png())), "GIF")[:900], None),
    "truncated-webp": (save(Image.open(io.BytesIO(png())), "WEBP")[:200], None),
    "truncated-bmp": (save(Image.open(io.BytesIO(png())), "BMP")[:200], None),
    "zero-ppm": (b"P6\n0 0\n255\n", None),
    "other-format": (save(Image.new("RGB", (4, 4)), "TGA"), "not an image of a known format"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_an_image_error(name, tmp_path):
    data, reason = BAD[name]
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        decode_image(path, 32)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    assert "\n" not in caught.value.reason
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    assert {"JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"} <= set(FORMATS)
    for kind in FORMATS:
        data = np.frombuffer(save(source, kind), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, min(len(data), 400), 8)] = rng.integers(0, 256, 8)
            with contextlib.suppress(ImageError):
                assert decode_image(damaged.tobytes(), 16).shape == (3, 16, 16)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 60):  # Pillow warns of the one and refuses the other
        with pytest.raises(ImageError, match="decompression bomb"):
            decode_image(save(Image.new("RGB", (side, side))), 8)


def test_missing_file_and_folder_are_image_errors(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        decode_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError):
        decode_image(tmp_path)
    assert image_shape(tmp_path / "none.jpg") is None


def test_image_error_survives_a_worker_process():
    import pickle

    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a.jpg", "truncated", "a.jpg: truncated")
    assert isinstance(error, ValueError)


def test_list_images(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.tiff", "notes.txt", ".hidden.jpg", ".cache/x.jpg", "c/d/e.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "c" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b" / "linked").symlink_to(tmp_path / "c" / "d", target_is_directory=True)
    assert listed(tmp_path) == ["a.tiff", "b/1.png", "b/2.JPG", "b/linked/e.webp", "c/d/e.webp"]
    assert list_images(tmp_path / "a.tiff") == [tmp_path / "a.tiff"]


def test_what_listing_leaves_out_is_counted_aloud(tmp_path, caplog):
    """Our own run folders and pictures; what is no image; but an image that nothing here reads stays listed."""
    images = ["a.JFIF", "a.avif", "a.dng", "a.heic", "a.jp2", "a.jpe", "a.jpeg", "a.psd"]
    others = ["notes.txt", "b.txt", "c.csv", "README", "other/config.json", "scored/x_summary.json"]
    ours = ["grid/cell/weights.safetensors", "grid/cell/pictures/x.png", "scored/pictures/x_strangest.png"]
    for name in (*images, *others, *ours, "other/x.png", "pictures/kept.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "grid/cell/config.json").write_text('{"schema_version": 3}')
    with caplog.at_level(logging.INFO, "pyro_vje"):
        names = listed(tmp_path)
    assert names == [*images, "other/x.png", "pictures/kept.png"]
    (line,) = caplog.messages
    assert set(line.removeprefix(f"left out in {tmp_path}: ").split(", ")) == {
        *("2 .txt", "2 .json", "1 .csv", "1 without extension", "1 run folder"),
        "1 folder of pictures drawn by scoring",
    }


def test_a_heic_file_says_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "FORMATS", tuple(name for name in FORMATS if name != "HEIF"))
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        decode_image(tmp_path / "IMG_1.HEIC")


def listed(root) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images(root)]


def test_list_images_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"no images in {tmp_path}: looked for \.apng.*left out: none"):
        list_images(tmp_path)
