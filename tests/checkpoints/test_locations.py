"""Writing files: on a full disk the old file stays, and no part of the new one is left."""

import numpy as np
import pytest
from PIL import Image

from anima_jax.checkpoints.locations import replacing
from anima_jax.errors import UserError
from anima_jax.sampling.images import save_image
from tests.disks import fill, small_disk
from tests.training.test_writer import no_file_longer_than


def noise_image(side: int) -> Image.Image:
    """An image that PNG cannot compress."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))


def replace(path, data) -> None:
    with replacing(path) as file:
        file.write(data)


def test_an_image_that_does_not_fit_on_the_disk_is_an_error_and_the_older_one_stays(tmp_path):
    with small_disk(tmp_path / "disk", 256) as disk:
        path = disk / "out.png"
        save_image(noise_image(32), path)
        before = path.read_bytes()
        fill(disk, leave=65536)  # there is room for a part: the first write ends early, without an error
        with pytest.raises(UserError, match=f"{path}: cannot be written: the disk is full"):
            save_image(noise_image(256), path)
        assert path.read_bytes() == before
        assert sorted(file.name for file in disk.iterdir()) == ["ballast", "out.png"]


@pytest.mark.parametrize("data", [bytes(range(256)) * 1000, np.arange(64000, dtype=np.float32)], ids=["bytes", "array"])
def test_a_write_that_the_system_cuts_short_goes_on_until_all_is_written_or_fails(tmp_path, data):
    path = tmp_path / "file"
    replace(path, data)
    assert path.read_bytes() == bytes(data)
    reason = r"the file would be larger than this process may write \(ulimit -f\)"
    with no_file_longer_than(100_000), pytest.raises(UserError, match=f"{path}: cannot be written: {reason}"):
        replace(path, data)
    assert path.read_bytes() == bytes(data)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
