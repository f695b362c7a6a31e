"""Data sets of tensorflow-datasets: the quick start's, drawn on first use, and others that lie on disk."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from anima_jax.config.dataset import TfdsSource
from anima_jax.data import shapes
from anima_jax.data.examples import read_examples
from anima_jax.data.file_index import FileIndex
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.data.tfds_source import TfdsReader
from anima_jax.errors import UserError


def other(builder_dir, split: str = "train", image: str = "photo", caption: str = "text", **keys) -> TfdsSource:
    """A `[[tfds]]` that names a prepared data set's folder."""
    return TfdsSource.model_construct(builder_dir=str(builder_dir), split=split, image=image, caption=caption, **keys)


def in_dir(directory, name: str = "anima_shapes", **keys) -> TfdsSource:
    """A `[[tfds]]` that names a data set in a folder of prepared ones."""
    return TfdsSource.model_construct(name=name, data_dir=str(directory), **keys)


def read(source: TfdsSource, *, index: FileIndex | None = None):
    """Entries, summary line and problems of a split."""
    problems = Problems()
    entries, line = read_entries(TfdsReader(source), index or FileIndex(), problems)
    return entries, line, problems


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def pixels(entry) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(entry.media.read())).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


DRAWN = 80 * 240
"""Images of training: those of every scene that is not held out."""

VERSION = "1.2.0"


@pytest.fixture(scope="module")
def train(shapes_dir):
    return read(in_dir(shapes_dir))[0]


def nearest_colour(pixel, colours) -> str:
    return min(colours, key=lambda name: np.abs(np.array(colours[name]) - pixel).sum())


def test_shapes_are_drawn_on_first_use_and_show_what_their_captions_say(train):
    assert len(train) == DRAWN
    assert len({entry.digest for entry in train}) == len({entry.media.read() for entry in train}) > 0.98 * DRAWN
    for entry in train[::97]:
        assert (entry.width, entry.height, entry.frames) == (64, 64, 1)
        picture = pixels(entry)
        words = entry.captions[0].split()
        assert nearest_colour(picture[0, 0], shapes.BACKGROUNDS) == words[-2]
        differs = np.abs(picture - picture[0, 0]).sum(-1) > 0
        assert nearest_colour(np.median(picture[differs], axis=0), shapes.COLOURS) == words[1]


def test_held_out_scenes_are_never_in_training(shapes_dir, train):
    held_out, _, _ = read(in_dir(shapes_dir, split="held_out"))
    unseen, seen = {entry.captions for entry in held_out}, {entry.captions for entry in train}
    assert len(held_out) == 160
    assert len(unseen) == 16
    assert len(seen) == 80
    assert not unseen & seen
    # Every word of a held-out caption was seen, so that its picture can be composed.
    assert {word for (text,) in unseen for word in text.split()} <= {w for (text,) in seen for w in text.split()}


def test_a_slice_is_the_beginning_of_the_split(shapes_dir, train):
    few, line, _ = read(in_dir(shapes_dir, split="train[:5]"))
    assert [(e.digest, e.captions) for e in few] == [(e.digest, e.captions) for e in train[:5]]
    assert line == "tfds data set 'anima_shapes': split train[:5]: 5 images"


def test_a_data_set_is_found_by_its_directory(shapes_dir, train):
    by_directory, _, _ = read(other(shapes_dir / "anima_shapes" / VERSION, image="image", caption="caption"))
    assert [(e.digest, e.captions) for e in by_directory] == [(e.digest, e.captions) for e in train]


FEW = {"train": 3, "held_out": 1}  # for the tests that draw once more: 240 images instead of DRAWN


def build(data_dir, *, killed_at_picture: int | None = None) -> list[tuple[bytes, tuple[str, ...]]]:
    """Draw a few pictures a scene into `data_dir`; the process may kill itself in the middle."""
    drawn = itertools.count(1)

    def draw(*scene_and_placement):
        if next(drawn) == killed_at_picture:
            os.kill(os.getpid(), signal.SIGKILL)
        return shapes.draw(*scene_and_placement)

    with mock.patch.multiple("anima_jax.data.shapes_builder", IMAGES_PER_SCENE=FEW, draw=draw):
        return [(entry.digest, entry.captions) for entry in read(in_dir(data_dir))[0]]


def names(directory) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_two_processes_that_draw_at_once_both_get_the_whole(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(build, [tmp_path, tmp_path], chunksize=1)
    assert one == other
    assert len(one) == 240
    assert names(tmp_path / "anima_shapes") == [VERSION]


def test_of_two_builds_the_later_uses_the_data_of_the_earlier(tmp_path):
    from anima_jax.data import shapes_builder

    def overtaken(*scene_and_placement):
        if not (tmp_path / "anima_shapes" / VERSION).exists():
            subprocess.run([sys.executable, "-c", child_code(tmp_path)], check=True)
        return shapes.draw(*scene_and_placement)

    with mock.patch.multiple(shapes_builder, IMAGES_PER_SCENE=FEW, draw=overtaken):
        entries, _, _ = read(in_dir(tmp_path))
    assert len(entries) == 240
    assert pixels(entries[-1]).shape == (64, 64, 3)
    assert names(tmp_path / "anima_shapes") == [VERSION]


def child_code(data_dir, **options) -> str:
    return f"from tests.data.test_tfds_source import build; build({str(data_dir)!r}, **{options!r})"


def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path):
    child = subprocess.run([sys.executable, "-c", child_code(tmp_path, killed_at_picture=100)], check=False)
    assert child.returncode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "anima_shapes").iterdir()
    assert unfinished.name.startswith("incomplete.")
    os.utime(unfinished, (0, 0))  # so old that nobody can still be at work on it
    assert len(build(tmp_path)) == 240
    assert names(tmp_path / "anima_shapes") == [VERSION]


def test_drawing_is_silent_and_reproducible(tmp_path, train):
    out = subprocess.run([sys.executable, "-c", child_code(tmp_path)], capture_output=True, text=True, check=False)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")
    # The scenes take turns: fewer pictures a scene are the first of the many.
    assert build(tmp_path) == [(entry.digest, entry.captions) for entry in train[:240]]


EDGES = png_of(Image.new("RGB", (30, 15), (255, 0, 9)))


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """A data set that is not ours: grey pictures, a number, several captions, and damaged records.

    It is where tfds keeps one that it knows by name, whose code needs TensorFlow.
    """
    import tensorflow_datasets as tfds

    directory = tmp_path_factory.mktemp("other") / "coco_captions" / "2014" / "1.0.0"
    directory.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(name="other", version="1.0.0", data_dir=str(directory), module_name="")
    features = tfds.features.FeaturesDict(
        {
            "photo": tfds.features.Image(shape=(None, None, 1)),
            "edges": tfds.features.Image(shape=(None, None, 3)),
            "text": tfds.features.Text(),
            "texts": tfds.features.Sequence(tfds.features.Text()),
            "number": tfds.features.Scalar(np.int32),
        }
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, 100, overwrite=True, file_format="array_record")
    writer.initialize_splits(["train", "damaged"])
    png = io.BytesIO()
    Image.new("L", (40, 20), 90).save(png, "PNG")

    def put(split: str, text: str | bytes, texts: list[str], picture: bytes = png.getvalue()) -> None:
        edges = io.BytesIO(EDGES if split == "train" else b"no picture")
        record = {"photo": io.BytesIO(picture), "edges": edges, "text": text, "texts": texts, "number": 1}
        writer.add_examples({split: [record]})

    put("train", "  a grey square ", ["one", " zwei Bären "])
    put("train", "", [])
    put("damaged", b"\xff\xfe", ["x"])
    put("damaged", "fine", ["fine"])
    put("damaged", "no picture", ["x"], b"what is this")
    writer.close_all()
    return str(directory)


def test_a_feature_has_the_control_pictures(other_dir, tmp_path):
    keys = {"control": ("edges",)}
    for trust in (False, True):
        (entry,), line, _ = read(other(other_dir, **keys), index=FileIndex(tmp_path / "index", trust=trust))
        assert [(each.media.read(), each.digest) for each in entry.controls] == [
            (EDGES, hashlib.sha256(EDGES).digest())
        ]
        assert "1 image, 1 left out with an empty caption (skip_empty_caption), 1 paired with control pictures" in line
    _, _, problems = read(other(other_dir, "damaged", **keys))
    assert [": its control picture cannot be used: " in line for line in problems.lines] == [False, True, False]
    with pytest.raises(UserError, match=r"no feature 'edgs' \(did you mean 'edges'\?\)"):
        read(other(other_dir, control=("edgs",)))


def test_another_data_set_is_read_with_its_own_feature_names(other_dir):
    (entry,), line, _ = read(other(other_dir))
    assert entry.captions == ("a grey square",)
    assert (entry.width, entry.height, entry.frames) == (40, 20, 1)
    np.testing.assert_array_equal(pixels(entry), np.full((20, 40, 3), 90))
    assert line.endswith("split train: 1 image, 1 left out with an empty caption (skip_empty_caption)")


def test_a_sequence_of_texts_is_several_captions(other_dir):
    split = other(other_dir, caption="texts")
    assert [entry.captions for entry in read(split)[0]] == [("one", "zwei Bären")]
    kept, line, _ = read(other(other_dir, caption="texts", skip_empty_caption=False))
    assert [entry.captions for entry in kept] == [("one", "zwei Bären"), ("",)]
    assert "1 without a caption" in line


def test_unusable_records_are_named_and_left_out(other_dir, caplog):
    entries, line, problems = read(other(other_dir, "damaged"))
    assert [entry.captions for entry in entries] == [("fine",)]
    assert problems.count == 2
    assert f"{other_dir} damaged[0] text: byte 0 is 0xff, expected UTF-8" in caplog.text
    assert f"{other_dir} damaged[2] photo: " in caplog.text
    assert "1 image, 2 could not be used" in line


def test_an_unchanged_data_set_is_not_read_again(other_dir, tmp_path):
    """Records are overwritten behind the index's back: who reads them would find nothing."""
    copy = tmp_path / "1.0.0"
    shutil.copytree(other_dir, copy)
    split = other(copy)
    entries, line, _ = read(split, index=FileIndex(tmp_path / "index.jsonl"))
    (shard,) = copy.glob("*train*")
    before = shard.stat()
    shard.write_bytes(bytes(before.st_size))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(split, index=FileIndex(tmp_path / "index.jsonl"))[:2] == (entries, line)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read(split, index=FileIndex(tmp_path / "index.jsonl"))[2].count == 2


def test_skipped_records_of_a_known_data_set_are_reported_again(other_dir, tmp_path):
    split = other(other_dir, "damaged")
    first = read(split, index=FileIndex(tmp_path / "index.jsonl"))[2]
    assert first.count == 2
    for trust in (False, True):
        assert read(split, index=FileIndex(tmp_path / "index.jsonl", trust=trust))[2].lines == first.lines


def test_with_trust_a_data_set_is_not_read(other_dir, tmp_path):
    copy = tmp_path / "1.0.0"
    shutil.copytree(other_dir, copy)
    split = other(copy)
    entries, _, _ = read(split, index=FileIndex(tmp_path / "index.jsonl"))
    shutil.rmtree(copy)
    assert read(split, index=FileIndex(tmp_path / "index.jsonl", trust=True))[0] == entries


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
    ],
)
def test_a_missing_split_or_feature_is_named(other_dir, split, photo, text, message):
    with pytest.raises(UserError) as caught:
        read(other(other_dir, split, photo, text))
    assert message in str(caught.value)
    assert other_dir in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_prepare_drawings_leave_nothing_behind(tmp_path):
    reader = TfdsReader(in_dir(tmp_path, resolutions=(64,)), prepare=False)
    (examples,) = read_examples([(reader, FileIndex())], Problems())
    assert len(examples) == DRAWN
    assert not list(tmp_path.iterdir())


def test_without_prepare_existing_drawings_are_read(shapes_dir, train):
    reader = TfdsReader(in_dir(shapes_dir, split="train[:5]", resolutions=(64,)), prepare=False)
    (examples,) = read_examples([(reader, FileIndex())], Problems())
    assert [example.entry.digest for example in examples] == [entry.digest for entry in train[:5]]


def test_files_made_from_a_record_have_its_split_and_number(shapes_dir, train):
    few, _, _ = read(in_dir(shapes_dir, split="train[:5]"))
    assert [train[3].media.label, few[3].media.label] == ["train-3", "train[_5]-3"]


def test_an_unknown_or_unprepared_data_set_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'anima_shape': .* \(did you mean 'anima_shapes'\?\)"):
        read(in_dir(tmp_path, name="anima_shape"))
    with pytest.raises(UserError, match="'mnist' is not prepared"):
        read(in_dir(tmp_path, name="mnist"))


@pytest.mark.parametrize("name", ["coco_captions", "coco_captions/2014", "coco_captions/2014:1.0.0"])
def test_a_prepared_data_set_is_found_by_name_without_its_code(other_dir, name):
    data_dir = pathlib.Path(other_dir).parents[2]
    entries, _, _ = read(in_dir(data_dir, name=name, image="photo", caption="text"))
    assert [entry.captions for entry in entries] == [("a grey square",)]


ATTACKS = {
    "a feature": ("features.json", lambda known: {**known, "pythonClassName": "stranger.Evil"}),
    "a protobuf's own key": ("features.json", lambda known: {"python_class_name": "stranger.Evil"}),
    "a nested feature": (
        "features.json",
        lambda known: {**known, "featuresDict": {"features": {"a": {"pythonClassName": "stranger.Evil", "text": {}}}}},
    ),
    "an older description": ("features.json", lambda known: {"type": "stranger.Evil", "content": {}}),
    "an older one in the text of a newer one": (
        "features.json",
        lambda known: {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "jsonFeature": {"json": json.dumps({"feature": {"type": "stranger.Evil", "content": "{}"}, "length": 1})},
        },
    ),
    "the description of the data set": (
        "dataset_info.json",
        lambda known: {**known, "features": {"pythonClassName": "stranger.Evil", "text": {}}},
    ),
    "a name that only begins like ours": (
        "features.json",
        lambda known: {**known, "pythonClassName": "tensorflow_datasets_stranger.Evil"},
    ),
}


@pytest.mark.parametrize("by_name", [False, True], ids=["by folder", "by name"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_data_set_that_names_foreign_code_is_refused_before_it_runs(
    other_dir, tmp_path, monkeypatch, attack, by_name
):
    folder = tmp_path / "data" / "coco_captions" / "2014" / "1.0.0"
    shutil.copytree(other_dir, folder)
    file, changed = ATTACKS[attack]
    (folder / file).write_text(json.dumps(changed(json.loads((folder / file).read_text()))))
    for module in ("stranger", "tensorflow_datasets_stranger"):
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    source = in_dir(tmp_path / "data", "coco_captions", split="train", image="photo", caption="text")
    with pytest.raises(
        UserError, match=rf"^{folder / file}: names the class \w*stranger\.Evil, expected only"
    ) as caught:
        read(source if by_name else other(folder))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"\xff", b'["' + b"[" * 100_000 + b'"]', b"null"], ids=["bytes", "deep", "null"])
def test_damaged_files_of_a_data_set_are_one_line(other_dir, tmp_path, file, content):
    folder = tmp_path / "1.0.0"
    shutil.copytree(other_dir, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(other(folder))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_community_data_sets_whose_code_is_on_the_network_are_refused(tmp_path):
    with pytest.raises(UserError, match="'kaggle:cats': community data sets run code from the network"):
        read(in_dir(tmp_path, name="kaggle:cats"))


def test_a_known_name_that_is_not_prepared_is_an_error_with_the_folder(tmp_path):
    with pytest.raises(UserError, match=rf"'coco_captions/2014': .* prepared in {tmp_path}; ") as caught:
        read(in_dir(tmp_path, name="coco_captions/2014"))
    assert "did you mean" not in str(caught.value)
