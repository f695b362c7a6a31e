"""Reference pictures in sampling, against arithmetic on latents joined by hand."""

import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.models.dit import patchify
from anima_jax.sampling.packing import TokenPacking, grid_of, wrapped
from anima_jax.sampling.references import EncodedReferences, Reference, join, packed_references
from tests.models.networks import normal

SIZES = ((6, 8), (7, 5), (8, 8))
"""Rows and columns of latents; the second are odd."""
REFERENCES = (2, 1, 0)


def test_an_images_tokens_are_followed_by_its_references_and_padding():
    images = [normal(1, *size, 16, seed=index) for index, size in enumerate(SIZES)]
    others = [
        [normal(1, *size, 16, seed=10 * index + n) for n in range(count)]
        for index, (size, count) in enumerate(zip(SIZES, REFERENCES, strict=True), 1)
    ]
    packing = TokenPacking([image.shape[:3] for image in images])
    references = packed_references(packing, others)
    assert references is not None
    joined_blc, size_b3 = join(packing.pack(images), packing.size_b3, references)
    found_blc = np.asarray(wrapped(joined_blc, size_b3))
    assert grid_of(np.asarray(size_b3)).tolist() == [[3, 3, 4], [2, 4, 3], [1, 4, 4]]
    for row, image, own in zip(found_blc, images, others, strict=True):
        clip = np.concatenate([image, *own])
        # ComfyUI's pad_to_patch_size repeats the opposite edge.
        clip = np.pad(clip, [(0, 0), *((0, side % 2) for side in clip.shape[1:3]), (0, 0)], mode="wrap")
        expected = np.asarray(patchify(clip[None]))[0]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        np.testing.assert_array_equal(row[len(expected) :], 0.0)
    assert packed_references(packing, [[], [], []]) is None


def test_a_reference_is_read_fitted_and_encoded_once_for_each_size(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 80, 4), np.uint8))
    picture.save(tmp_path / "reference.png")
    in_memory, read = Reference.of(picture), Reference.of(tmp_path / "reference.png")
    assert (in_memory.digest, read.path) == (read.digest, str(tmp_path / "reference.png"))
    assert in_memory != read == Reference.of(str(tmp_path / "reference.png"))
    # Scaled to 32 rows, then the middle of 64 columns; a picture of the right size is not touched.
    fitted = np.asarray(read.fitted(32, 32), np.float32)
    whole = np.asarray(read.picture.resize((64, 32), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(fitted - whole[:, 16:48]).max() <= 1.0
    assert read.fitted(80, 40) is read.picture
    encoded = []

    def encode(pixels):
        encoded.append(pixels.shape)
        return pixels

    run = EncodedReferences()
    for _ in range(2):
        run([(read, in_memory), (read,), ()], [(32, 32), (16, 32), (32, 32)], encode)
    assert encoded == [(1, 32, 32, 3), (1, 32, 16, 3)]


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for given, message in (
        (tmp_path / "nothing.png", r"nothing\.png: no such file"),
        (tmp_path / "notes.png", r"notes\.png: cannot be read as an image"),
        (3, "reference 3, expected a PIL image or the path of an image"),
    ):
        with pytest.raises(UserError, match=message):
            Reference.of(given)
