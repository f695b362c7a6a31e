"""Images as files, and flags for every parameter."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.sampling.images import read_image, save_image
from anima_jax.sampling.request import SamplingParams


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
