"""Images as files, and flags for every parameter."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UnknownNameError, UserError
from anima_jax.sampling.images import read_image, save_image
from anima_jax.sampling.request import (
    MAX_BATCH,
    ImageRequest,
    SamplingParams,
    batch_of_requests,
    expand_request,
)


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


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("stepz", "steps"),
        ("guidence_scale", "guidance_scale"),
        ("smpler", "sampler"),
        ("s_nose", "s_noise"),
        ("hieght", "height"),
        ("promt", "prompt"),
    ],
)
def test_a_setting_that_does_not_exist_is_told_with_the_nearest_one(name, near):
    with pytest.raises(UnknownNameError, match=rf"has no setting '{name}' \(did you mean '{near}'\?\)"):
        SamplingParams.named({"steps": 3, name: 1})
    with pytest.raises(TypeError, match=r"^AnimaPipeline has no setting 'zzzz'$"):
        SamplingParams.named({"zzzz": 1})


def test_options_of_samplers_may_stand_beside_settings():
    params = SamplingParams.named({"steps": 3, "eta": 0.5, "sampler_options": {"s_noise": 0.9}})
    assert params == SamplingParams(steps=3, sampler_options={"eta": 0.5, "s_noise": 0.9})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "30"}, "steps '30', expected a whole number"),
        ({"steps": 30.0}, "steps 30.0, expected a whole number"),
        ({"steps": True}, "steps True, expected a whole number"),
        ({"steps": None}, "steps None, expected a whole number"),
        ({"shift": [3]}, r"shift \[3\], expected a number"),
        ({"apg": 1}, "apg 1, expected True or False"),
        ({"sampler": 3}, "sampler 3, expected text"),
        ({"tile": "x"}, "tile 'x', expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_told(settings, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        SamplingParams(**settings).check()


def test_numbers_of_numpy_are_numbers():
    SamplingParams(steps=np.int64(3), shift=np.float32(3), guidance_scale=np.array(4), end_at_step=None).check()
    ImageRequest("x", np.int32(64), 64, np.uint64(2**63)).check()


@pytest.mark.parametrize("count", [0, MAX_BATCH + 1, 10**9])
def test_a_batch_has_a_largest_size(count):
    message = f"^batch_size {count}, expected 1 to 4096$"
    with pytest.raises(UserError, match=message):
        ImageRequest("x", batch_size=count).check()
    with pytest.raises(UserError, match=message):
        batch_of_requests("x", 64, 64, 0, count)
    if count:
        with pytest.raises(UserError, match=message):
            expand_request(ImageRequest("x"), batch_size=count)


def test_the_noise_of_a_batch_has_a_largest_size():
    ImageRequest("x", 1024, 1024, batch_size=2048).check()
    with pytest.raises(UserError, match="batch_size 4096 of 1024×1024 pixels, expected at most 2048 images"):
        ImageRequest("x", 1024, 1024, batch_size=4096).check()


def test_there_is_a_largest_number_of_levels():
    with pytest.raises(UserError, match="1000001 sigmas, expected at most 1001"):
        SamplingParams(sigmas=(*[1.0] * 10**6, 0.0)).check()
    with pytest.raises(UserError, match=r"^sigmas 2\.0( 2\.0){7} …, expected two or more noise levels"):
        SamplingParams(sigmas=(2.0,) * 100).check()
