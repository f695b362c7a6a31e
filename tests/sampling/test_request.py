"""Images as files, and the parameters in their text chunks."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.sampling.images import read_image, save_image
from anima_jax.sampling.request import ImageRequest, SamplingParams, from_text, to_text

REQUEST = ImageRequest("a (cat:1.2)\n猫 🌸", 512, 768, 2**64 - 1, 3, 2)
PARAMS = SamplingParams(
    "ugly", 7, 3.3, "heun", "beta57", 2.5, 0.1 + 0.2, "torch-cuda:rtx3060", True, (0.1, 1 / 3), paste=0, tile=512
)


def test_a_png_keeps_its_text_chunks(tmp_path):
    path = tmp_path / "a" / "b.png"
    save_image(Image.new("RGB", (8, 8), "red"), path, to_text(REQUEST, PARAMS) | {"vae": "x.safetensors"})
    assert from_text("b.png", Image.open(path).text) == (REQUEST, PARAMS)
    assert Image.open(path).text["vae"] == "x.safetensors"
    assert Image.open(path).getpixel((3, 3)) == (255, 0, 0)
    assert [file.name for file in path.parent.iterdir()] == ["b.png"]
    for kind, changed in ((ImageRequest(""), REQUEST), (SamplingParams(), PARAMS)):
        defaults = dataclasses.asdict(kind)
        assert all(value != defaults[name] for name, value in dataclasses.asdict(changed).items())


@given(st.floats(0.001, 1.0), st.text(), st.integers(0, 2**64 - 1))
def test_numbers_and_text_survive_exactly(number, words, seed):
    request = ImageRequest(words, seed=seed)
    params = SamplingParams(words, shift=number, guidance_interval=(0.0, number))
    assert from_text("x", to_text(request, params)) == (request, params)


def test_missing_text_chunks_mean_the_default_and_wrong_ones_are_an_error():
    assert from_text("x.png", {"prompt": "a", "seed": "3"}) == (ImageRequest("a", seed=3), SamplingParams())
    for text, message in (
        ({}, "x.png: no parameters in its text chunks"),
        ({"seed": "1\n2"}, "x.png: seed '1\n2' in its text chunks"),
        ({"cfg_zero_star": "yes"}, "x.png: cfg_zero_star 'yes'"),
        ({"guidance_interval": "0.5"}, "x.png: guidance_interval '0.5'"),
        ({"width": "44"}, "width 44, expected a positive multiple of 8"),
        ({"batch_index": "1"}, "batch_index 1, expected 0 to 0"),
        ({"sampler": "eular"}, "sampler 'eular'"),
    ):
        with pytest.raises(UserError, match=message):
            from_text("x.png", ({"prompt": "a", "seed": "3"} | text) if text else {})


def test_an_image_is_rotated_by_its_exif_orientation(tmp_path):
    image = Image.fromarray(np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), [[0, 1, 128, 255]])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "file" / "a.png")


def test_every_parameter_is_a_flag():
    from anima_jax.sampling.flags import parse_arguments

    arguments = parse_arguments(["--prompt", "x", "-o", "x.png"])
    for field in dataclasses.fields(SamplingParams):
        assert getattr(arguments, field.name) is None
