"""What is shown while sampling runs."""

import numpy as np
import pytest
from PIL import Image

from anima_jax.sampling.callbacks import Previews, downsample
from tests.models.networks import normal


def test_previews_are_averages_over_squares_and_no_larger_than_asked():
    latents = normal(1, 70, 33, 2)
    found = downsample(latents, 32)
    assert found.shape == (1, 23, 11, 2)
    np.testing.assert_allclose(found[0, 22, 10], latents[0, 66:69, 30:33].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(downsample(latents, 70), latents)


def test_every_nth_estimate_of_each_image_is_written_next_to_its_output(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    previews = Previews(lambda latents: [x[..., :3].repeat(8, 1).repeat(8, 2) for x in latents], paths, 2)
    for done in range(6):
        previews(done, 5, lambda done=done: [np.full((1, 2, 3, 4), done / 10), np.full((1, 4, 2, 4), -1.0)])
    previews.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.step00{done}.png" for name in "ab" for done in (2, 4)
    ]
    image = Image.open(tmp_path / "a.step004.png")
    assert image.size == (24, 16)
    assert image.getpixel((0, 0)) == (int(1.4 * 127.5),) * 3


def test_a_preview_that_cannot_be_written_is_an_error_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    previews = Previews(lambda latents: latents, [tmp_path / "file" / "a.png"], 1)
    previews(1, 2, lambda: [np.zeros((1, 2, 2, 3))])
    with pytest.raises(Exception, match="cannot be written"):
        previews.close()
