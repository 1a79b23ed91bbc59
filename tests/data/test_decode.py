"""Files of every kind that users have, good and bad."""

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.data import ImageError, decode_image, list_images
from pyro_vje.data.decode import FORMATS, image_shape

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(dtype, top: int) -> np.ndarray:
    return np.linspace(0, top, 256).round().astype(dtype).reshape(16, 16)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_decodes(kind, tmp_path):
    image = Image.new("RGB", (20, 12), (200, 100, 50))
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(save(image, kind))
    decoded = decode_image(path)
    assert decoded.shape == (3, 12, 20)
    assert decoded.dtype == torch.uint8
    assert (decoded.float().mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 4
    assert image_shape(path) == (12, 20)


def test_pixels_are_the_files_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(decode_image(save(Image.fromarray(pixels))).permute(1, 2, 0).numpy(), pixels)


def test_grey_becomes_three_equal_channels():
    decoded = decode_image(save(Image.fromarray(gradient(np.uint8, 255))))
    assert np.array_equal(decoded.numpy(), np.stack([gradient(np.uint8, 255)] * 3))
    assert decode_image(save(Image.new("1", (4, 4), 1))).eq(255).all()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (gradient(np.uint16, 65535), "PNG"),
        (gradient(np.uint16, 65535), "TIFF"),
        (gradient(np.int32, 2**31 - 1), "TIFF"),
        (gradient(np.int32, 65535), "TIFF"),
        (gradient(np.float64, 255).astype(np.float32) / 255, "TIFF"),
        (gradient(np.float64, 255).astype(np.float32), "TIFF"),
    ],
    ids=["png16", "tiff16", "tiff32", "tiff32-holding-16", "float-unit", "float-255"],
)
def test_deep_grey_is_scaled_not_clipped(values, kind):
    decoded = decode_image(save(Image.fromarray(values), kind))
    expected = torch.arange(256).view(16, 16)
    assert (decoded[0].int() - expected).abs().max() <= 1


def test_a_float_image_with_a_hole_decodes():
    values = np.full((4, 4), 0.5, np.float32)
    values[0, 0] = np.nan
    assert decode_image(save(Image.fromarray(values), "TIFF"))[0, 1, 1] == 128


def test_transparency_lies_over_white():
    half = decode_image(save(Image.new("RGBA", (2, 2), (255, 0, 0, 128))))
    assert (half[:, 0, 0].int() - torch.tensor([255, 127, 127])).abs().max() <= 1
    assert decode_image(save(Image.new("LA", (2, 2), (0, 0)))).eq(255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    assert decode_image(save(palette))[:, 0].T.tolist() == [list(RED), list(BLUE)]
    for transparency in (0, bytes([0, 255])):
        decoded = decode_image(save(palette, transparency=transparency))
        assert decoded[:, 0].T.tolist() == [[255, 255, 255], list(BLUE)]
    decoded = decode_image(save(Image.new("RGB", (2, 2), GREEN), transparency=GREEN))
    assert decoded.eq(255).all()


def test_cmyk_jpeg():
    red = Image.new("RGB", (16, 16), RED).convert("CMYK")
    decoded = decode_image(save(red, "JPEG", quality=95), 8)
    assert (decoded[:, 4, 4].int() - torch.tensor(RED)).abs().max() < 12


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(orientation):
    """The camera was turned: the red corner belongs where the tag says."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = RED
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(save(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
    assert decoded.shape == ((3, 16, 32) if orientation in (1, 3) else (3, 32, 16))
    y, x = {1: (3, 3), 3: (-4, -4), 6: (3, -4), 8: (-4, 3)}[orientation]
    assert decoded[0, y, x] > 200


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_nothing():
    data = save(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff")
    assert decode_image(data).shape == (3, 8, 8)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, GREEN, BLUE)]
    decoded = decode_image(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded[:, 0, 0].tolist() == list(RED)


@pytest.mark.parametrize("shape", [(1, 1), (20000, 20), (20, 20000), (17, 31), (64, 64), (500, 333)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_any_shape_becomes_the_square(shape, kind):
    decoded = decode_image(save(Image.new("RGB", shape, (10, 200, 90)), kind), 32)
    assert decoded.shape == (3, 32, 32)
    assert (decoded.float().mean((1, 2)) - torch.tensor([10.0, 200, 90])).abs().max() < 4


def test_the_square_is_the_centre_and_antialiased():
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    pixels[::2, 64:128] = 0  # stripes that a resize without antialiasing would turn black or white
    decoded = decode_image(save(Image.fromarray(pixels)), 16)
    assert (decoded[:, :, 1:-1].float() - 127.5).abs().max() < 16


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
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["a.tiff", "b/1.png", "b/2.JPG", "b/linked/e.webp", "c/d/e.webp"]
    assert list_images(tmp_path / "a.tiff") == [tmp_path / "a.tiff"]


def test_list_images_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"no images in {tmp_path}: looked for \.jpg, \.jpeg"):
        list_images(tmp_path)
