"""Pictures and masks as the trainer sees them. Oracles: PIL's own resize of known pixels, colours worked out by hand,
torch's nearest-exact."""

import concurrent.futures
import contextlib
import io
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from skimage import data as photographs

from anima_jax.config.sizes import Size
from anima_jax.data import memory
from anima_jax.data.images import AVIF, JPEG2000, over_white, read_image, read_mask
from anima_jax.data.media import probe, read_clip, read_file
from anima_jax.errors import UserError

needs_avif = pytest.mark.skipif(not AVIF, reason="this pillow reads no AVIF")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(photographs.astronaut())


LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
    "TGA": {"compression": "tga_rle"},
    **({"JPEG2000": {"irreversible": False}} if JPEG2000 else {}),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_image_is_cropped_around_its_centre_and_resized_bicubically(photograph, kind):
    picture = photograph.crop((0, 0, 400, 300))
    read = read_image(encoded(picture, kind, **LOSSLESS[kind]), (96, 96), name="p")
    # A square of a 400×300 picture is its middle 300 columns. Resampling sees the columns just outside (a bicubic
    # filter reaches two pixels far), a crop does not; elsewhere they may round one grey level apart.
    middle = picture.crop((50, 0, 350, 300)).resize((96, 96), Image.Resampling.BICUBIC)
    assert np.abs(read.astype(int) - np.asarray(middle))[:, 2:-2].max() <= 1


def test_jpeg_is_read_to_within_its_own_loss(photograph):
    read = read_image(encoded(photograph, "JPEG", quality=95), (128, 64), name="p")
    expected = np.asarray(ImageOps.fit(photograph, (128, 64), Image.Resampling.BICUBIC))
    assert read.shape == (64, 128, 3)
    assert np.abs(read.astype(int) - expected).mean() < 2.0  # quality 95 leaves about one grey level on average


@needs_avif
def test_avif_is_read_to_within_its_own_loss(photograph):
    read = read_image(encoded(photograph, "AVIF", quality=95), (128, 64), name="p")
    expected = np.asarray(ImageOps.fit(photograph, (128, 64), Image.Resampling.BICUBIC))
    assert np.abs(read.astype(int) - expected).mean() < 2.0


def test_a_gif_of_one_frame_is_an_image():
    image = Image.new("P", (20, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    stored = encoded(image, "GIF")
    assert probe(stored, "p") == Size(20, 16, 1)
    assert read_clip(stored, Size(16, 16, 1), name="p").shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(read_image(stored, (16, 16), name="p")[3, 5], [200, 100, 50])


def test_of_an_animated_png_the_first_frame_is_read():
    stored = encoded(solid("RGB", (1, 2, 3)), "PNG", save_all=True, append_images=[solid("RGB", (200, 2, 3))])
    assert probe(stored, "p").frames == 1
    np.testing.assert_array_equal(read_image(stored, (16, 16), name="p")[0, 0], [1, 2, 3])


@pytest.mark.parametrize("kind", ["WEBP", pytest.param("AVIF", marks=needs_avif)])
def test_an_animated_webp_or_avif_is_refused_and_what_to_use_is_named(kind):
    stored = encoded(solid("RGB", (1, 2, 3)), kind, save_all=True, append_images=[solid("RGB", (200, 2, 3))])
    for read in (lambda: probe(stored, "a.webp"), lambda: read_image(stored, (16, 16), name="a.webp")):
        with pytest.raises(UserError, match=rf"a\.webp: an animated {kind}, expected a still one .*GIF, MP4 or WebM"):
            read()


def test_an_image_is_a_clip_of_exactly_one_frame(photograph):
    stored = encoded(photograph)
    clip = read_clip(stored, Size(128, 64, 1), name="p.png")
    np.testing.assert_array_equal(clip[0], read_image(stored, (128, 64), name="p.png"))
    assert clip.shape[0] == 1
    with pytest.raises(UserError, match=r"p\.png: an image is 1 frame, expected 5"):
        read_clip(stored, Size(128, 64, 5), name="p.png")


# What a viewer does with a stored picture, by the EXIF standard's words for each orientation ("the 0th row is the
# visual top …"), and its inverse.
STORED_AS = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: np.rot90,  # the camera was turned: "rotate 90° clockwise to view"
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
)
def test_exif_orientation_is_undone(photograph, orientation, kind, options):
    upright = np.asarray(photograph.crop((0, 0, 64, 48)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    stored = encoded(image, kind, exif=exif, **options)
    assert probe(stored, "p") == Size(64, 48, 1)
    np.testing.assert_array_equal(read_image(stored, (64, 48), name="p"), upright)


def test_an_orientation_after_the_pixels_of_a_png_counts_in_probe_and_image():
    """The PNG standard allows eXIf anywhere between IHDR and IEND."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(solid("RGB", 9, (48, 64)), "PNG", exif=exif)
    at = whole.index(b"eXIf") - 4
    end = at + 12 + struct.unpack(">I", whole[at : at + 4])[0]
    moved = whole[:at] + whole[end:-12] + whole[at:end] + whole[-12:]
    assert probe(moved, "p") == Size(64, 48, 1)
    np.testing.assert_array_equal(read_image(moved, (64, 48), name="p"), np.full((48, 64, 3), [9, 0, 0]))


@pytest.mark.parametrize("exif", [b"Exif\x00\x00not a TIFF header", b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff"])
def test_an_image_with_broken_exif_is_read(photograph, exif):
    stored = encoded(photograph, "PNG", exif=exif)
    assert probe(stored, "p") == Size(512, 512, 1)
    np.testing.assert_array_equal(read_image(stored, (512, 512), name="p"), np.asarray(photograph))


def solid(mode: str, colour, size=(16, 16)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette_with_transparency() -> bytes:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encoded(image, transparency=1)


def grey16(value: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), value, np.uint16)))


def png(width: int, height: int, rows: bytes, depth: int = 8, colour_type: int = 2) -> bytes:
    """A PNG with the header wanted, whatever its pixels are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rgb16(*colour: int) -> bytes:
    return png(16, 16, (b"\0" + struct.pack(">3H", *colour) * 16) * 16, depth=16)


def without_adobe_marker(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0] :]


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
        pytest.param(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0), id="CMYK red, as Adobe inverts it"),
        pytest.param(
            without_adobe_marker(encoded(solid("CMYK", (0, 255, 255, 0)), "JPEG")), (255, 0, 0), id="CMYK, plain"
        ),
        pytest.param(rgb16(257 * 100, 257 * 7, 65535), (100, 7, 255), id="16-bit colours"),
        pytest.param(encoded(solid("P", 0), "GIF", transparency=0), (255, 255, 255), id="GIF with transparency"),
        pytest.param(encoded(solid("P", 0), "PNG"), (0, 0, 0), id="palette"),
        pytest.param(encoded(solid("RGBA", (0, 0, 0, 51)), "TIFF"), (204, 204, 204), id="TIFF with alpha"),
        pytest.param(encoded(solid("RGBA", (0, 0, 0, 51)), "TGA"), (204, 204, 204), id="TGA with alpha"),
        pytest.param(encoded(solid("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0), id="TIFF, CMYK red"),
        pytest.param(
            encoded(Image.fromarray(np.full((16, 16), 25700, np.uint16)), "TIFF"), (100,) * 3, id="TIFF, 16 bits"
        ),
        pytest.param(encoded(Image.fromarray(np.full((16, 16), -5, np.int32)), "TIFF"), (0, 0, 0), id="TIFF below 0"),
    ],
)
def test_every_kind_of_pixel_becomes_rgb(stored, colour):
    read = read_image(stored, (16, 16), name="p")
    assert read.dtype == np.uint8
    # JPEG stores CMYK with loss: one or two grey levels.
    assert np.abs(read.astype(int) - np.array(colour)).max() <= 2


def test_sixteen_bit_ramp_keeps_its_order_and_ends():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    read = read_image(encoded(Image.fromarray(ramp)), (64, 64), name="p")[..., 0].ravel().astype(int)
    np.testing.assert_array_equal(read, np.round(ramp.ravel() / 257.0).astype(int))


WHOLE = encoded(Image.fromarray(photographs.astronaut()), "JPEG")


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"this is a text, not a picture", "not a readable PNG, JPEG, WEBP, BMP, GIF", id="text"),
        pytest.param(WHOLE[: len(WHOLE) // 2], "truncated", id="half a JPEG"),
        pytest.param(encoded(Image.fromarray(photographs.astronaut()))[:5000], "cannot be read", id="half a PNG"),
        pytest.param(png(60000, 60000, b"\0"), "decompression bomb", id="10 GB of pixels in a hundred bytes"),
        pytest.param(png(0, 16, b"\0"), "", id="no columns"),
        pytest.param(b"GIF89a" + bytes(100), "not a readable", id="a GIF without frames"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a readable PNG", id="a format that is not read"),
        pytest.param(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n/etc/hosts\n", "not a readable PNG", id="a playlist"),
        pytest.param(bytes(4) + b"ftypheic" + bytes(100), "not a readable PNG", id="HEIC"),
    ],
)
def test_an_incomplete_image_is_named_with_the_reason(stored, reason):
    with pytest.raises(UserError, match=r"bad\.png: .*") as caught:
        read_clip(stored, Size(16, 16, 1), name="bad.png")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_floating_point_pixels_are_refused_and_a_text_is_no_tga_whatever_its_bytes():
    stored = encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF")
    with pytest.raises(UserError, match=r"^f\.tif: the pixels are floating-point numbers, expected 8 or 16 bits"):
        read_image(stored, (16, 16), name="f.tif")
    tga = encoded(solid("RGB", (1, 2, 3)), "TGA")[:-26]  # without its footer, as version 1 of the format
    assert read_image(tga, (16, 16), name="x.TGA")[0, 0].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"x\.png: not a readable PNG"):
        read_image(tga, (16, 16), name="x.png")


def test_transparency_over_white_is_the_same_in_strips():
    noise = np.random.default_rng(0).integers(0, 256, (600, 30, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(over_white(image)), np.asarray(whole))


def test_threads_decode_no_more_pixels_together_than_the_budget_allows(monkeypatch):
    budget = memory.Budget(1000)
    together, most, lock = 0, 0, threading.Lock()

    def decode(size: int) -> None:
        nonlocal together, most
        with budget.reserve(size):
            with lock:
                together += min(size, 1000)
                most = max(most, together)
            time.sleep(0.001)
            with lock:
                together -= min(size, 1000)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [300, 400, 5000, 10, 600] * 8))
    assert (together, most) == (0, 1000)  # a request for more than all is granted alone
    reserved = []
    monkeypatch.setattr(memory, "PIXELS", Recorder(reserved))
    read_image(encoded(solid("RGBA", 0, (100, 50))), (16, 16), name="p")
    assert reserved[0] >= 100 * 50 * 8  # four bytes a pixel as decoded, and as composited


class Recorder:
    def __init__(self, sizes: list[int]):
        self._sizes = sizes

    def reserve(self, size: int) -> contextlib.AbstractContextManager[None]:
        self._sizes.append(size)
        return contextlib.nullcontext()


def test_a_decompression_bomb_is_refused_by_its_header():
    with pytest.raises(UserError, match=r"bomb\.png: .*decompression bomb"):
        probe(png(60000, 60000, b"\0"), "bomb.png")


def picture_files() -> dict[str, bytes]:
    photograph = Image.fromarray(photographs.astronaut()).resize((48, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {kind: encoded(photograph, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP")}
    others = ("BMP", "GIF", "TIFF", "TGA", *["AVIF"] * AVIF, *["JPEG2000"] * JPEG2000)
    files |= {kind: encoded(photograph, kind) for kind in others}
    files["palette"] = encoded(photograph.quantize(16), "PNG", transparency=3)
    files["16 bits"] = rgb16(1, 2, 3)
    return files


PICTURE_FILES = picture_files()


@settings(max_examples=250, deadline=None)
@given(
    kind=st.sampled_from(sorted(PICTURE_FILES)),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    kept=st.floats(0, 1),
)
def test_damaged_bytes_give_an_image_or_a_user_error(kind, damage, kept):
    data = bytearray(PICTURE_FILES[kind])
    for place, value in damage:
        data[int(place * len(data))] = value
    stored = bytes(data[: round(kept * len(data))])
    with contextlib.suppress(UserError):
        width, height, frames = probe(stored, "p")
        assert width > 0
        assert height > 0
        assert frames >= 1
        assert read_clip(stored, Size(16, 32, 1), name="p").shape == (1, 32, 16, 3)
    with contextlib.suppress(UserError):
        assert read_mask(stored, (40, 48), (16, 32), name="p").shape == (4, 2)


@given(st.binary(max_size=64))
def test_any_bytes_give_an_image_or_a_user_error(stored):
    with contextlib.suppress(UserError):
        probe(stored, "p")
    with contextlib.suppress(UserError):
        read_mask(stored, (16, 16), (16, 16), name="p")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png"):
        read_file(tmp_path / "nowhere.png")


def test_a_file_over_the_limit_is_refused_and_one_at_it_is_read(tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(11))
    with pytest.raises(UserError, match=r"large\.mp4: 11 bytes, expected at most 10"):
        read_file(path, max_bytes=10)
    assert read_file(path, max_bytes=11) == bytes(11)


GREYS = np.random.default_rng(0).integers(0, 256, (130, 210), dtype=np.uint8)


def mask_of_mode(mode: str) -> Image.Image:
    """A mask whose red channel, by the meaning of its mode, is GREYS (or its two values for one bit)."""
    grey = Image.fromarray(GREYS)
    if mode == "RGB":
        return Image.merge("RGB", [grey, Image.new("L", grey.size, 7), Image.new("L", grey.size, 200)])
    if mode == "RGBA":
        return Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 30)])
    if mode == "LA":
        return Image.merge("LA", [grey, Image.new("L", grey.size, 0)])
    if mode == "P":
        image = Image.new("P", grey.size)
        image.putdata((255 - GREYS).ravel().tolist())
        image.putpalette(np.stack([np.arange(255, -1, -1), np.full(256, 9), np.full(256, 99)], -1).ravel().tolist())
        return image
    if mode == "I;16":
        return Image.fromarray(GREYS.astype(np.uint16) * 257)
    return grey


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_a_mask_is_its_red_channel_cropped_as_the_image_and_sampled_nearest_exact(mode):
    torch = pytest.importorskip("torch")
    read = read_mask(encoded(mask_of_mode(mode)), (210, 130), (96, 80), name="m")
    red = np.array(ImageOps.fit(Image.fromarray(np.stack([GREYS] * 3, -1)), (96, 80)))[..., 0]
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(red)[None, None].float(), size=(10, 12), mode="nearest-exact"
    )
    np.testing.assert_array_equal(read, expected[0, 0].numpy())
    assert read.dtype == np.uint8


def test_a_palette_mask_with_a_transparent_entry_keeps_that_entrys_red():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 60, 100, 50])
    read = read_mask(encoded(image, transparency=1), (16, 16), (16, 16), name="m")
    np.testing.assert_array_equal(read, np.full((2, 2), 60))


def test_a_one_bit_mask_has_weights_0_and_1():
    image = Image.fromarray(np.arange(32)[None, :].repeat(16, 0) >= 16)
    assert image.mode == "1"
    np.testing.assert_array_equal(read_mask(encoded(image), (32, 16), (32, 16), name="m"), [[0, 0, 255, 255]] * 2)


def test_a_mask_of_another_size_than_its_image_is_refused_with_both_sizes():
    with pytest.raises(UserError, match=r"m\.png: the mask is 20×16 pixels, expected 16×20 as its image"):
        read_mask(encoded(solid("L", 255, (20, 16))), (16, 20), (16, 16), name="m.png")


def test_a_mask_may_not_be_a_decompression_bomb_either():
    with pytest.raises(UserError, match=r"m\.png: .*decompression bomb"):
        read_mask(png(60000, 60000, b"\0"), (60000, 60000), (16, 16), name="m.png")


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path):
    """In a process of its own, since pytest replaces the filters of warnings."""
    files = {
        "large.png": png(10000, 10000, b"\0"),  # over PIL's first limit, where it warns, and truncated
        "exif.png": encoded(solid("RGB", 0), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        "palette.png": encoded(solid("P", 0), transparency=b"\0\x80"),
    }
    for name, stored in files.items():
        (tmp_path / name).write_bytes(stored)
    program = """
import pathlib, sys
from anima_jax.data.images import set_up_pillow, read_image
from anima_jax.data.media import probe
from anima_jax.errors import UserError
set_up_pillow()
for path in pathlib.Path(sys.argv[1]).iterdir():
    probe(path.read_bytes(), path.name)
    try:
        read_image(path.read_bytes(), (16, 16), name=path.name)
    except UserError:
        pass
"""
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
