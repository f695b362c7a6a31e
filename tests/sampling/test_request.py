"""Pictures as files: what a PNG says of itself is read back as it was."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.sampling.request import ImageRequest, SamplingParams, from_text, read_picture, save_picture, to_text

PICTURE = ImageRequest("a (cat:1.2)\n猫 🌸", 512, 768, 2**64 - 1, 3, 2)
SETTINGS = SamplingParams("ugly", 7, 3.3, "heun", "beta57", 2.5, 0.1 + 0.2, "torch-cuda:rtx3060", True, (0.1, 1 / 3))


def test_a_png_carries_its_text_and_gives_it_back(tmp_path):
    path = tmp_path / "a" / "b.png"
    save_picture(Image.new("RGB", (8, 8), "red"), path, to_text(PICTURE, SETTINGS) | {"vae": "x.safetensors"})
    assert from_text("b.png", Image.open(path).text) == (PICTURE, SETTINGS)
    assert Image.open(path).text["vae"] == "x.safetensors"
    assert Image.open(path).getpixel((3, 3)) == (255, 0, 0)
    assert [file.name for file in path.parent.iterdir()] == ["b.png"]
    for kind, changed in ((ImageRequest(""), PICTURE), (SamplingParams(), SETTINGS)):
        defaults = dataclasses.asdict(kind)
        assert all(value != defaults[name] for name, value in dataclasses.asdict(changed).items())


@given(st.floats(0.001, 1.0), st.text(), st.integers(0, 2**64 - 1))
def test_numbers_and_words_survive_exactly(number, words, seed):
    picture, settings = (
        ImageRequest(words, seed=seed),
        SamplingParams(words, shift=number, guidance_interval=(0.0, number)),
    )
    assert from_text("x", to_text(picture, settings)) == (picture, settings)


def test_what_a_png_does_not_say_is_the_default_and_what_it_says_wrong_is_refused():
    assert from_text("x.png", {"prompt": "a", "seed": "3"}) == (ImageRequest("a", seed=3), SamplingParams())
    for text, message in (
        ({}, "x.png: holds no settings in its text chunks"),
        ({"seed": "1\n2"}, "x.png: seed '1\n2' in its text chunks"),
        ({"cfg_zero_star": "yes"}, "x.png: cfg_zero_star 'yes'"),
        ({"guidance_interval": "0.5"}, "x.png: guidance_interval '0.5'"),
        ({"width": "40"}, "width 40, expected a positive multiple of 16"),
        ({"batch_index": "1"}, "batch_index 1, expected 0 to 0"),
        ({"sampler": "eular"}, "sampler 'eular'"),
    ):
        with pytest.raises(UserError, match=message):
            from_text("x.png", ({"prompt": "a", "seed": "3"} | text) if text else {})


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    image = Image.fromarray(np.arange(16 * 32 * 3, dtype=np.uint8).reshape(16, 32, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(str(tmp_path / "a.png")), np.rot90(np.asarray(image), -1))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(str(tmp_path / "a.png")), [[0, 1, 128, 255]])


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "file" / "a.png")


def test_every_setting_is_a_flag():
    from anima_jax.generate import parse_arguments

    arguments = parse_arguments(["--prompt", "x", "-o", "x.png"])
    for field in dataclasses.fields(SamplingParams):
        assert getattr(arguments, field.name) is None
