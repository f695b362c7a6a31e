"""Texts in JPEG, WebP and AVIF files: as A1111 and ComfyUI read ours, and ours read theirs."""

import struct

import pytest
from PIL import Image, features

from anima_jax.errors import UserError
from anima_jax.sampling.exif import exif_of_text, read_text
from anima_jax.sampling.image_text import read_recipe, to_text
from anima_jax.sampling.images import save_image
from anima_jax.sampling.request import ImageRequest, SamplingParams

TEXT = to_text(ImageRequest("a (cat:1.2)\n猫 🌸"), SamplingParams("ugly"), {"transformer": "a.safetensors"})


def exif_of(path):
    """The TIFF block of a JPEG's APP1 segment or of a WebP's EXIF chunk, found as ComfyUI's frontend finds it."""
    data = path.read_bytes()
    if data[:2] == b"\xff\xd8":
        start = data.index(b"Exif\0\0")
        return data[start + 6 : start - 2 + int.from_bytes(data[start - 2 : start], "big")]
    at = 12
    while data[at : at + 4] != b"EXIF":
        at += 8 + (size := int.from_bytes(data[at + 4 : at + 8], "little")) + size % 2
    return data[at + 8 : at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")].removeprefix(b"Exif\0\0")


def directory(tiff, start):
    """Tag → type and value of a TIFF directory, by the TIFF specification."""
    rows = {}
    for index in range(struct.unpack_from("<H", tiff, start)[0]):
        tag, kind, count, value = struct.unpack_from("<HHII", tiff, start + 2 + 12 * index)
        rows[tag] = kind, value if kind == 4 else tiff[value : value + count]
    return rows


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_the_tags_are_those_that_a1111_and_comfyui_read(tmp_path, suffix):
    save_image(Image.new("RGB", (16, 16)), tmp_path / f"a{suffix}", TEXT)
    tiff = exif_of(tmp_path / f"a{suffix}")
    assert tiff[:4] == b"II*\0"
    tags = directory(tiff, struct.unpack_from("<I", tiff, 4)[0])
    # ComfyUI's frontend takes every ASCII tag (type 2) of the first directory as `name:text`.
    assert tags[0x0110] == (2, f"prompt:{TEXT['prompt']}\0".encode())
    assert tags[0x010E] == (2, f"anima_jax:{TEXT['anima_jax']}\0".encode())
    # A1111 reads Exif.UserComment (type 7, undefined) by piexif: an encoding's name, then UTF-16 big-endian.
    kind, comment = directory(tiff, tags[0x8769][1])[0x9286]
    assert (kind, comment[:8]) == (7, b"UNICODE\0")
    assert comment[8:].decode("utf-16-be") == TEXT["parameters"]


def comment_of(text, form):
    forms = {"be": "utf-16-be", "le": "utf-16-le"}
    return b"UNICODE\0" + text.encode(forms[form]) if form in forms else form + text.encode()


FORMATS = [".jpg", ".webp", ".png", *([".avif"] if features.check("avif") else [])]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("form", ["be", "le", b"ASCII\0\0\0", b"\0" * 8, b""])
def test_user_comments_of_every_encoding_are_read(tmp_path, suffix, form):
    text = "1girl, cat\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, Seed: 3, Size: 64x96"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment_of(text, form)
    Image.new("RGB", (16, 16)).save(tmp_path / f"a{suffix}", exif=exif.tobytes())
    values = read_recipe(str(tmp_path / f"a{suffix}")).values
    assert (values["prompt"], values["sampler"], values["height"]) == ("1girl, cat", "euler_ancestral", 96)


def test_a_size_that_is_not_said_is_the_images_own(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a\nSteps: 20, Seed: 3".encode("utf-16-be")
    Image.new("RGB", (70, 50)).save(tmp_path / "a.jpg", exif=exif)
    values = read_recipe(str(tmp_path / "a.jpg")).values
    assert (values["width"] // 8, values["height"] // 8) == (8, 6)


def test_texts_that_do_not_fit_a_jpeg_are_named(tmp_path):
    text = to_text(ImageRequest("word " * 8000), SamplingParams(), {})
    assert save_image(Image.new("RGB", (16, 16)), tmp_path / "a.jpg", text) == ["parameters", "prompt"]
    assert read_recipe(str(tmp_path / "a.jpg")).values["prompt"] == "word " * 8000
    exif, dropped = exif_of_text(to_text(ImageRequest("猫" * 20_000), SamplingParams(), {}))
    assert (exif, sorted(dropped)) == (b"", ["anima_jax", "parameters", "prompt"])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_no_text(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    image = Image.open(tmp_path / "a.jpg")
    image.load()
    assert read_text(image) == {}
    with pytest.raises(UserError, match="no parameters in its text chunks"):
        read_recipe(str(tmp_path / "a.jpg"))


def test_quality_and_lossless_formats(tmp_path):
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    for name, quality in (("a.webp", None), ("b.webp", 40), ("c.jpg", None), ("d.jpg", 40)):
        save_image(noise, tmp_path / name, {}, quality)
    assert Image.open(tmp_path / "a.webp").convert("RGB").tobytes() == noise.tobytes()
    sizes = [(tmp_path / name).stat().st_size for name in ("a.webp", "b.webp", "c.jpg", "d.jpg")]
    assert sizes[1] < sizes[0]
    assert sizes[3] < sizes[2]
    with pytest.raises(UserError, match=r"a\.webp: 16384×1 pixels cannot be written as WEBP"):
        save_image(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
