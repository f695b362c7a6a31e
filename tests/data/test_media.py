"""Pictures as the trainer sees them. Oracles: PIL's own resize of known pixels, colours worked out by hand."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from skimage import data as photographs

from anima_jax.data.media import read_picture
from anima_jax.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(photographs.astronaut())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_picture_is_cropped_around_its_centre_and_resized_bicubically(photograph, kind):
    picture = photograph.crop((0, 0, 400, 300))
    read = read_picture(encoded(picture, kind, **({"lossless": True} if kind == "WEBP" else {})), (96, 96))
    # A square of a 400×300 picture is its middle 300 columns. Resampling sees the columns just outside (a bicubic
    # filter reaches two pixels far), a crop does not; elsewhere they may round one grey level apart.
    middle = picture.crop((50, 0, 350, 300)).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(read.astype(int) - np.asarray(middle))[:, 2:-2].max() <= 1


def test_jpeg_is_read_to_within_its_own_loss(photograph):
    read = read_picture(encoded(photograph, "JPEG", quality=95), (128, 64))
    expected = np.asarray(ImageOps.fit(photograph, (128, 64), Image.Resampling.BICUBIC))
    assert read.shape == (64, 128, 3)
    assert np.abs(read.astype(int) - expected).mean() < 2.0  # quality 95 leaves about one grey level on average


def test_reads_from_a_path(tmp_path, photograph):
    path = tmp_path / "a photograph.PNG"
    photograph.save(path)
    np.testing.assert_array_equal(read_picture(path, (512, 512)), np.asarray(photograph))


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),  # the camera was turned: EXIF says "rotate 90° clockwise to view"
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_orientation_is_undone(photograph, orientation, undo):
    upright = photograph.crop((0, 0, 64, 48))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(upright.transpose(undo), "PNG", exif=exif)
    np.testing.assert_array_equal(read_picture(stored, (64, 48)), np.asarray(upright))


def test_broken_exif_does_not_cost_the_picture(photograph):
    stored = encoded(photograph, "PNG", exif=b"Exif\x00\x00not a TIFF header")
    np.testing.assert_array_equal(read_picture(stored, (512, 512)), np.asarray(photograph))


def solid(mode: str, colour, size=(16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encoded(image, transparency=1)


def grey16(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), value, np.uint16)))


@pytest.mark.parametrize(
    ("stored", "colour"),
    [
        pytest.param(encoded(solid("RGBA", (255, 0, 0, 0))), (255, 255, 255), id="transparent is white"),
        pytest.param(encoded(solid("RGBA", (0, 0, 0, 51))), (204, 204, 204), id="a fifth of black over white"),
        pytest.param(encoded(solid("LA", (0, 128))), (127, 127, 127), id="grey with alpha"),
        pytest.param(encoded(solid("RGB", (9, 8, 7)), transparency=(9, 8, 7)), (255, 255, 255), id="colour key"),
        pytest.param(palette_with_transparency(), (255, 255, 255), id="palette with a transparent entry"),
        pytest.param(encoded(solid("L", 77)), (77, 77, 77), id="grey"),
        pytest.param(encoded(solid("1", 1)), (255, 255, 255), id="one bit"),
        pytest.param(grey16(65535), (255, 255, 255), id="16-bit white"),
        pytest.param(grey16(257 * 100), (100, 100, 100), id="16-bit grey, v/257"),
        pytest.param(grey16(300), (1, 1, 1), id="16-bit dark grey is not clipped to white"),
        pytest.param(encoded(solid("CMYK", (0, 0, 0, 0)), "JPEG"), (255, 255, 255), id="CMYK without ink"),
        pytest.param(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0), id="CMYK red"),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(stored, colour):
    read = read_picture(stored, (16, 16))
    assert read.dtype == np.uint8
    # JPEG stores CMYK with loss: one or two grey levels.
    assert np.abs(read.astype(int) - np.array(colour)).max() <= 2


def test_sixteen_bit_ramp_keeps_its_order_and_ends():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    read = read_picture(encoded(Image.fromarray(ramp)), (64, 64))[..., 0].ravel().astype(int)
    np.testing.assert_array_equal(read, np.round(ramp.ravel() / 257.0).astype(int))


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


WHOLE = encoded(Image.fromarray(photographs.astronaut()), "JPEG")


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"this is a text, not a picture", "not a PNG, JPEG, WEBP or BMP", id="text"),
        pytest.param(WHOLE[: len(WHOLE) // 2], "truncated", id="half a JPEG"),
        pytest.param(encoded(Image.fromarray(photographs.astronaut()))[:5000], "cannot be read", id="half a PNG"),
        pytest.param(png_that_claims(60000, 60000), "decompression bomb", id="10 GB of pixels in a hundred bytes"),
        pytest.param(png_that_claims(0, 16), "", id="no columns"),
        pytest.param(b"GIF89a" + bytes(100), "not a PNG", id="another format"),
    ],
)
def test_what_is_not_a_whole_picture_is_named_with_the_reason(tmp_path, stored, reason):
    path = tmp_path / "bad.png"
    path.write_bytes(stored)
    with pytest.raises(UserError, match=r"bad\.png: .*") as caught:
        read_picture(path, (16, 16))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_user_error(photograph, kind):
    whole = bytearray(encoded(photograph.resize((48, 48)), kind))
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(damaged), 12):
            damaged[place] = rng.integers(256)
        with contextlib.suppress(UserError):
            assert read_picture(bytes(damaged), (16, 16)).shape == (16, 16, 3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png"):
        read_picture(tmp_path / "nowhere.png", (16, 16))
