"""Data sets of tensorflow-datasets: the quick start's, drawn on first use, and others that lie on disk."""

import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from anima_jax.data import shapes
from anima_jax.data.tfds_source import tfds_examples
from anima_jax.errors import UserError

SHAPES = ("anima_shapes", "train", "image", "caption", (64, 64))


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def train(shapes_dir):
    return tfds_examples(*SHAPES, data_dir=shapes_dir)


def nearest_colour(pixel, colours) -> str:
    return min(colours, key=lambda name: np.abs(np.array(colours[name]) - pixel).sum())


def test_shapes_are_drawn_on_first_use_and_show_what_their_captions_say(train):
    assert len(train) == 4800
    # An id stands for a picture: the same two are one, different ones are not.
    assert len({example.id for example in train}) == len({example.media.read() for example in train}) > 4700
    for example in train[::97]:
        pixels = example.pixels().astype(int)
        assert pixels.shape == (64, 64, 3)
        words = example.caption.split()
        assert nearest_colour(pixels[0, 0], shapes.BACKGROUNDS) == words[-2]
        differs = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
        assert nearest_colour(np.median(pixels[differs], axis=0), shapes.COLOURS) == words[1]


def test_held_out_scenes_are_never_in_training(shapes_dir, train):
    held_out = tfds_examples("anima_shapes", "held_out", "image", "caption", (64, 64), shapes_dir)
    unseen, seen = {example.caption for example in held_out}, {example.caption for example in train}
    assert len(held_out) == 160
    assert len(unseen) == 16
    assert len(seen) == 80
    assert not unseen & seen
    # Every word of a held-out caption was seen, so that its picture can be composed.
    assert {word for caption in unseen for word in caption.split()} <= {w for c in seen for w in c.split()}


def test_pictures_are_resized_and_the_size_is_in_the_id(shapes_dir, train):
    larger = tfds_examples("anima_shapes", "train[:5]", "image", "caption", (96, 80), shapes_dir)
    assert [example.caption for example in larger] == [example.caption for example in train[:5]]
    assert larger[0].pixels().shape == (80, 96, 3)
    assert not {example.id for example in larger} & {example.id for example in train}


def test_a_data_set_is_found_by_its_directory(shapes_dir, train):
    by_directory = tfds_examples(str(shapes_dir / "anima_shapes" / "1.0.0"), *SHAPES[1:])
    assert [(e.id, e.caption) for e in by_directory] == [(e.id, e.caption) for e in train]


FEW = {"train": 3, "held_out": 1}  # for the tests that draw once more: 240 pictures instead of 4800


def build(data_dir, *, killed_at_picture: int | None = None) -> list[tuple[int, str]]:
    """Draw a few pictures a scene into `data_dir`; the process may kill itself in the middle."""
    drawn = itertools.count(1)

    def draw(*scene_and_placement):
        if next(drawn) == killed_at_picture:
            os.kill(os.getpid(), signal.SIGKILL)
        return shapes.draw(*scene_and_placement)

    with mock.patch.multiple("anima_jax.data.shapes_builder", PICTURES_PER_SCENE=FEW, draw=draw):
        return [(example.id, example.caption) for example in tfds_examples(*SHAPES, data_dir=data_dir)]


def names(directory) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_two_processes_that_draw_at_once_both_get_the_whole(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(build, [tmp_path, tmp_path], chunksize=1)
    assert one == other
    assert len(one) == 240
    assert names(tmp_path / "anima_shapes") == ["1.0.0"]


def test_of_two_builds_the_later_takes_the_data_of_the_earlier(tmp_path):
    from anima_jax.data import shapes_builder

    def overtaken(*scene_and_placement):
        if not (tmp_path / "anima_shapes" / "1.0.0").exists():
            subprocess.run([sys.executable, "-c", child_code(tmp_path)], check=True)
        return shapes.draw(*scene_and_placement)

    with mock.patch.multiple(shapes_builder, PICTURES_PER_SCENE=FEW, draw=overtaken):
        examples = tfds_examples(*SHAPES, data_dir=tmp_path)
    assert len(examples) == 240
    assert examples[-1].pixels().shape == (64, 64, 3)
    assert names(tmp_path / "anima_shapes") == ["1.0.0"]


def child_code(data_dir, **options) -> str:
    return f"from tests.data.test_tfds_source import build; build({str(data_dir)!r}, **{options!r})"


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path):
    child = subprocess.run([sys.executable, "-c", child_code(tmp_path, killed_at_picture=100)], check=False)
    assert child.returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "anima_shapes").iterdir()
    assert unfinished.name.startswith("incomplete.")
    os.utime(unfinished, (0, 0))  # so old that nobody can still be at work on it
    assert len(build(tmp_path)) == 240
    assert names(tmp_path / "anima_shapes") == ["1.0.0"]


def test_drawing_is_silent_and_reproducible(tmp_path, train):
    out = subprocess.run([sys.executable, "-c", child_code(tmp_path)], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    # The scenes take turns: fewer pictures a scene are the first of the many.
    assert build(tmp_path) == [(example.id, example.caption) for example in train[:240]]


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """A data set that is not ours: grey and 16-bit pictures, a number, and one caption that is not UTF-8."""
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("other") / "1.0.0"
    directory.mkdir()
    identity = tfds.core.DatasetIdentity(name="other", version="1.0.0", data_dir=str(directory), module_name="")
    features = tfds.features.FeaturesDict(
        {
            "photo": tfds.features.Image(shape=(None, None, 1)),
            "text": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int32),
        }
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, 100, overwrite=True, file_format="array_record")
    writer.initialize_splits(["train", "wrong"])
    for split, text in [("train", "  a grey square "), ("wrong", b"\xff\xfe")]:
        stream = io.BytesIO()
        Image.new("L", (40, 20), 90).save(stream, "PNG")
        stream.seek(0)
        writer.add_examples({split: [{"photo": stream, "text": text, "number": 1}]})
    writer.close_all()
    return str(directory)


def test_another_data_set_is_read_by_its_own_names(other_dir):
    (example,) = tfds_examples(other_dir, "train", "photo", "text", (16, 16))
    assert example.caption == "a grey square"
    np.testing.assert_array_equal(example.pixels(), np.full((16, 16, 3), 90))


@pytest.mark.parametrize(
    ("split", "photo", "text", "message"),
    [
        ("trian", "photo", "text", "no split 'trian' (did you mean 'train'?)"),
        ("train", "fotos", "text", "no feature 'fotos' (did you mean 'photo'?)"),
        ("train", "photo", "caption", "no feature 'caption' (there are"),
        ("train", "number", "text", "expected an Image"),
        ("train", "photo", "number", "expected a Text"),
        ("train[5:]", "photo", "text", "split train[5:]: "),
        ("train[x", "photo", "text", "split train[x: "),
        ("wrong", "photo", "text", "expected UTF-8"),
    ],
)
def test_what_a_data_set_lacks_is_named(other_dir, split, photo, text, message):
    with pytest.raises(UserError) as caught:
        tfds_examples(other_dir, split, photo, text, (16, 16))
    assert message in str(caught.value)
    assert other_dir in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_or_unprepared_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'anima_shape': .* \(did you mean 'anima_shapes'\?\)"):
        tfds_examples("anima_shape", *SHAPES[1:], data_dir=tmp_path)
    with pytest.raises(UserError, match="'mnist' is not prepared"):
        tfds_examples("mnist", *SHAPES[1:], data_dir=tmp_path)
