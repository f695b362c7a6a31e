"""The drawings of `shapes` as a tensorflow-datasets data set for the quick start, generated at first use.

TensorFlow is not used: the records are array_record and PIL encodes the images. Importing this module imports
tensorflow_datasets and registers the name `anima_shapes`.
"""

import contextlib
import io
import logging
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from anima_jax.data.shapes import SIZE, draw, sample_placement, scenes

log = logging.getLogger(__name__)

IMAGES_PER_SCENE = {"train": 240, "held_out": 10}
STALE_SECONDS = 3600
"""Age in seconds after which an unfinished data set is assumed to be left over from a killed process."""


class AnimaShapes(tfds.core.GeneratorBasedBuilder):
    """64×64 PNG images of one shape each, captioned; the split `held_out` has scenes that are not in `train`."""

    VERSION = tfds.core.Version("1.2.0")
    code_path = epath.Path(__file__)  # tfds guesses it from the package, wrongly for some editable installations

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(shape=(SIZE, SIZE, 3)), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in IMAGES_PER_SCENE}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        held_out = split == "held_out"
        every_scene = scenes(held_out=held_out) * IMAGES_PER_SCENE[split]
        for number, scene in enumerate(every_scene):
            rng = np.random.default_rng([int(held_out), number])
            yield number, {"image": _png(draw(scene, *sample_placement(rng))), "caption": scene.caption}


def prepared_builder(data_dir: str | os.PathLike[str] | None = None) -> AnimaShapes:
    """Return the builder with its data under `data_dir` (default: that of tensorflow-datasets), generated if necessary.

    The data set appears under its name only when it is complete: a killed process leaves none, and if two processes
    generate it at the same time, the first to finish provides it.
    """
    builder = AnimaShapes(data_dir=data_dir)
    if builder.data_path.exists():
        return builder
    _remove_stale(builder.data_path)
    log.info("drawing %d images into %s (once)", _number_of_images(), builder.data_path)
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        if not builder.data_path.exists():
            raise
        # Another process finished first.
    return AnimaShapes(data_dir=data_dir)


def _number_of_images() -> int:
    return sum(len(scenes(held_out=split == "held_out")) * each for split, each in IMAGES_PER_SCENE.items())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence tfds' progress bars and the messages about downloads that it always prints."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)


def _remove_stale(data_path: epath.Path) -> None:
    for unfinished in data_path.parent.glob("incomplete.*"):
        if unfinished.stat().mtime < time.time() - STALE_SECONDS:
            shutil.rmtree(unfinished, ignore_errors=True)


def _png(pixels: np.ndarray) -> io.BytesIO:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    stream.seek(0)
    return stream
