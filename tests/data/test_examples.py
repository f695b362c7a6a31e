"""Examples of entries: ids, buckets, repeats, copies with shuffled tags, and the caption of each epoch."""

import collections
import hashlib
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.config.dataset import DirectorySource
from anima_jax.config.sizes import Size
from anima_jax.data.examples import Example, example_id, examples_of, read_examples
from anima_jax.data.file_index import Entry, FileIndex
from anima_jax.data.media import FileMedia, content_digest
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError
from tests.data.test_folder_source import encoded, reader_of

SQUARE: dict = {"resolutions": (64,)}
TWO_SIZES: dict = {
    "resolutions": (64, 128),
    "enable_ar_bucket": True,
    "ar_buckets": (0.5, 1.0, 2.0),
    "frame_buckets": (1, 5, 9),
}
TAGS = tuple("abcdefghijklmnop")


def entry(number: int, *captions: str, width: int = 100, height: int = 100, frames: int = 1) -> Entry:
    digest = content_digest(str(number).encode())
    return Entry(FileMedia("there", f"{number}.png"), digest, width, height, frames, captions or (f"caption {number}",))


def made(
    entries, problems: Problems | None = None, sizes: dict = SQUARE, *, shuffle_each_epoch: bool = False, **keys
) -> list[Example]:
    """The examples of a source with these keys, others at their defaults."""
    source = DirectorySource.model_construct(path="there", **sizes, **keys)
    return examples_of(entries, source, problems or Problems(), shuffle_each_epoch=shuffle_each_epoch)


# ---- what an epoch holds -------------------------------------------------------------------------------------------


def test_every_caption_at_every_resolution_is_an_example():
    entries = [entry(0, "one", "two"), entry(1, width=200), entry(2, frames=7)]
    examples = made(entries, sizes=TWO_SIZES)
    assert collections.Counter((e.captions, e.bucket.resolution, e.bucket.size.frames) for e in examples) == {
        ((caption,), side, frames): 1
        for caption, frames in [("one", 1), ("two", 1), ("caption 1", 1), ("caption 2", 5)]
        for side in (64.0, 128.0)
    }
    # 64²·2 = 90.5² : 96 × 48 in multiples of 16 (45.3 rounds to 48).
    assert {e.bucket.size for e in examples if e.captions == ("caption 1",)} == {Size(96, 48, 1), Size(176, 96, 1)}
    assert len({example.id for example in examples}) == len(examples)


def test_examples_of_one_size_share_their_bucket_and_those_of_one_image_their_entry():
    # A million examples are small only so.
    examples = made([entry(n, "one", "two") for n in range(5)], sizes=TWO_SIZES, num_repeats=3)
    assert len(examples) == 60
    assert len({id(example.bucket) for example in examples}) == 2
    assert len({id(example.entry) for example in examples}) == 5


def test_an_id_is_made_of_content_size_caption_and_repeat():
    examples = made([entry(7, "one", "two")], sizes=TWO_SIZES, num_repeats=2)
    digest = hashlib.sha256(b"7").digest()
    assert {example.id for example in examples} == {
        example_id(digest, (side, side), caption_index=caption, repeat_index=repeat)
        for side in (64, 128)
        for caption in (0, 1)
        for repeat in (0, 1)
    }


def test_the_prefix_precedes_every_caption_but_an_empty_caption_stays_empty():
    entries = [entry(0, "a cat"), entry(1, "", " ", "a dog")]
    assert [e.captions for e in made(entries, caption_prefix="photo of ")] == [("photo of a cat",), ("photo of a dog",)]
    kept = made([entry(1, "", "a dog")], caption_prefix="photo of ", skip_empty_caption=False)
    assert [e.captions for e in kept] == [("photo of ",), ("photo of a dog",)]


def test_a_skipped_empty_caption_changes_no_id():
    (example,) = made([entry(0, "", "a dog")])
    assert example.id == example_id(content_digest(b"0"), (64, 64), caption_index=1)


@pytest.mark.parametrize(("num_repeats", "expected"), [(1, 3), (2, 6), (0.7, 2), (1.5, 4), (2.67, 8), (3.0, 9)])
def test_repeats_give_as_many_examples_as_diffusion_pipe_at_each_resolution(num_repeats, expected):
    examples = made([entry(n) for n in range(3)], sizes=TWO_SIZES, num_repeats=num_repeats)
    assert len({example.id for example in examples}) == len(examples)
    for side in (64.0, 128.0):
        counts = collections.Counter(e.captions for e in examples if e.bucket.resolution == side)
        assert counts.total() == expected
        assert max(counts.values()) - (min(counts.values()) if expected >= 3 else 0) <= 1


def test_repeats_that_leave_no_example_are_logged(caplog):
    assert made([entry(n) for n in range(3)], num_repeats=0.3) == []
    assert caplog.messages == ["num_repeats = 0.3 leaves none of 3 examples at resolution 64"]


@given(st.integers(1, 40), st.floats(0.01, 1.0))
def test_a_subsample_keeps_all_examples_of_an_image_or_none(number, ratio):
    examples = made([entry(n, "one", "two") for n in range(number)], sizes=TWO_SIZES, subsample_ratio=ratio)
    counts = collections.Counter(example.entry.media.name for example in examples)
    assert set(counts.values()) == {4}
    assert len(counts) == max(1, int(number * ratio))


def test_a_subsample_follows_the_content_and_not_the_order():
    entries = [entry(n) for n in range(30)]
    chosen = {example.id for example in made(entries, subsample_ratio=0.5)}
    assert {example.id for example in made(entries[::-1], subsample_ratio=0.5)} == chosen


@pytest.mark.parametrize(
    ("sizes", "frames", "message"),
    [
        (TWO_SIZES, 3, "found a video of 3 frames (16 per second), expected at least 5"),
        (SQUARE, 3, "found a video of 3 frames (16 per second), expected an image: no frame bucket is above 1"),
        ({"size_buckets": (Size(64, 64, 9),)}, 1, "found an image, expected a video of at least 9 frames"),
    ],
)
def test_what_fits_no_bucket_is_named(sizes, frames, message, caplog):
    problems = Problems()
    assert made([entry(0, frames=frames)], problems, sizes) == []
    assert problems.count == 1
    assert message in caplog.text
    assert "there/0.png" in caplog.text


# ---- captions ------------------------------------------------------------------------------------------------------


def test_what_is_cropped_by_more_than_half_is_warned_about(caplog):
    sizes = [(200, 100), (201, 100), (100, 500), (100, 100)]
    made([entry(number, width=width, height=height) for number, (width, height) in enumerate(sizes)], sizes=SQUARE)
    assert caplog.messages == [
        "cropped by more than half of their area: there/1.png (201×100 to 64×64, 50% lost), "
        "there/2.png (100×500 to 64×64, 80% lost)"
    ]


def test_shuffled_copies_replace_the_caption():
    entries = [entry(n, ", ".join(TAGS)) for n in range(2)]
    examples = made(entries, cache_shuffle_num=3, caption_prefix="x, y, ")
    orders = [tuple(e.captions[0].removeprefix("x, y, ").split(", ")) for e in examples]
    assert [sorted(order) for order in orders] == [sorted(TAGS)] * 6
    assert len({*orders, TAGS}) == 7  # of 16! orders: a repetition is no accident
    assert len({e.id for e in examples}) == 6
    assert examples == made(entries, cache_shuffle_num=3, caption_prefix="x, y, ")
    assert all(e.caption(0, epoch) == e.captions[0] for e in examples for epoch in range(3))


def test_a_random_choice_is_one_example_and_draws_every_caption_equally_often():
    captions = ("one", "two", "three")
    (example,) = made([entry(0, *captions)], caption_choice="random", caption_prefix="> ")
    assert example.captions == ("> one", "> two", "> three")
    counts = collections.Counter(example.caption(seed=1, epoch=epoch) for epoch in range(3000))
    assert counts.keys() == set(example.captions)
    # Binomial: 1000 ± 26; five deviations.
    assert all(abs(count - 1000) < 130 for count in counts.values())


def test_a_caption_without_random_options_is_the_same_in_each_epoch():
    (example,) = made([entry(0, "a, b, c")], caption_prefix="p, ")
    assert {example.caption(seed, epoch) for seed in range(3) for epoch in range(3)} == {"p, a, b, c"}


def redrawn(text: str = ", ".join(TAGS), **options) -> Example:
    options = {"shuffle_tags": True, "shuffle_each_epoch": True, "caption_prefix": "x, y, "} | options
    return made([entry(0, text)], **options)[0]


def test_tags_are_shuffled_in_each_epoch_and_the_prefix_stays():
    captions = [redrawn().caption(seed=5, epoch=epoch) for epoch in range(20)]
    assert len(set(captions)) == 20
    assert all(caption.startswith("x, y, ") for caption in captions)
    assert all(sorted(caption.removeprefix("x, y, ").split(", ")) == list(TAGS) for caption in captions)
    assert captions == [redrawn().caption(seed=5, epoch=epoch) for epoch in range(20)]
    assert captions != [redrawn().caption(seed=6, epoch=epoch) for epoch in range(20)]


def test_every_order_of_tags_is_equally_likely():
    counts = collections.Counter(redrawn("a, b, c", caption_prefix="").caption(0, epoch) for epoch in range(6000))
    assert len(counts) == 6
    # Binomial: 1000 ± 29; five deviations.
    assert all(abs(count - 1000) < 145 for count in counts.values())


def test_dropout_leaves_out_each_tag_with_its_probability_and_keeps_the_order():
    example = redrawn(shuffle_tags=False, tag_dropout=0.25)
    kept = [example.caption(3, epoch).removeprefix("x, y, ").split(", ") for epoch in range(2000)]
    assert all(tags == sorted(tags) for tags in kept)
    counts = collections.Counter(tag for tags in kept for tag in tags)
    # Binomial: 1500 ± 19.4; five deviations, over 16 tags.
    assert set(counts) == set(TAGS)
    assert all(abs(count - 1500) < 97 for count in counts.values())


@given(
    st.lists(st.text("abc ", min_size=1), min_size=1, max_size=6), st.floats(0.0, 0.999), st.integers(), st.booleans()
)
def test_at_least_one_tag_always_stays(tags, dropout, seed, shuffled):
    example = redrawn(
        "|".join(tags),
        cache_shuffle_delimiter="|",
        tag_dropout=dropout,
        shuffle_each_epoch=shuffled,
        skip_empty_caption=False,
    )
    kept = collections.Counter(example.caption(seed, 0).removeprefix("x, y, ").split("|"))
    assert kept.total() >= 1
    assert kept <= collections.Counter(tags)


def test_dropout_and_order_do_not_depend_on_each_other():
    # Were they drawn from the same words, the tags that stay would come in an order that tells how nearly they went.
    firsts = collections.Counter(
        redrawn("a, b, c", caption_prefix="", tag_dropout=0.5).caption(0, n)[0] for n in range(3000)
    )
    assert all(abs(count - 1000) < 130 for count in firsts.values())


def test_a_caption_never_changes():
    # Written down once: another stream would give a resumed run other captions.
    assert redrawn(tag_dropout=0.5).caption(seed=1, epoch=2) == "x, y, l, o, k, g, i, d, f, e, a"


# ---- sources -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["b", "a"]):
        (tmp_path / f"{name}.png").write_bytes(encoded(number))
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    return tmp_path


def source(folder, **keys):
    return reader_of(folder, **SQUARE, **keys), FileIndex()


def test_sources_stay_separate_and_each_logs_a_line(folder, tmp_path_factory, caplog):
    empty = tmp_path_factory.mktemp("empty")
    with caplog.at_level(logging.INFO):
        groups = read_examples([source(folder), source(empty), source(folder, num_repeats=2)], Problems())
    assert [[e.captions[0] for e in group] for group in groups] == [
        ["picture a", "picture b"],
        [],
        ["picture a", "picture b", "picture a", "picture b"],
    ]
    assert caplog.messages == [
        f"{folder}: 2 images: 2 examples per epoch",
        f"{empty}: 0 images: 0 examples per epoch",
        f"{folder}: 2 images: 4 examples per epoch (num_repeats = 2)",
    ]
    # The same picture at the same size is the same example, whichever source names it.
    assert [e.id for e in groups[0]] == [e.id for e in groups[2][:2]]


def test_a_broken_file_in_a_folder_that_is_named_twice_is_one_problem(folder, caplog):
    (folder / "a.png").write_bytes(b"broken")
    problems = Problems()
    twice = [source(folder)] * 2
    with caplog.at_level(logging.INFO):
        read_examples(twice, problems)
    assert problems.count == 1
    line = f"{folder}: 1 image, 1 could not be used: 1 example per epoch"
    assert [message.partition(": ")[0] for message in caplog.messages] == ["skipped", str(folder), str(folder)]
    assert caplog.messages[1:] == [line, line]


def test_no_example_at_all_is_an_error_with_each_sources_summary(folder):
    for caption in folder.glob("*.txt"):
        caption.unlink()
    with pytest.raises(UserError, match=r"nothing to train on: .*2 left out without a caption \(skip_empty_caption\)"):
        read_examples([source(folder)], Problems())


def test_ids_depend_on_the_content_and_not_on_its_path(folder, tmp_path_factory):
    before = {e.captions: e.id for e in read_examples([source(folder)], Problems())[0]}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "0 a newcomer.png").write_bytes(encoded(250))
    (elsewhere / "0 a newcomer.txt").write_text("first in line")
    for file in folder.iterdir():
        (elsewhere / ("z" + file.name)).write_bytes(file.read_bytes())
    after = {e.captions: e.id for e in read_examples([source(elsewhere)], Problems())[0]}
    assert before.items() <= after.items()
    assert len(after) == 3


# ---- ids -----------------------------------------------------------------------------------------------------------

parts = st.tuples(st.binary(max_size=8), st.integers(1, 9999), st.integers(1, 9999), *[st.integers(0, 99)] * 3)


def id_of(part) -> int:
    content, width, height, frames, caption, repeat = part
    indices = {"frames": frames, "caption_index": caption, "repeat_index": repeat}
    return example_id(content_digest(content), (width, height), **indices)


@settings(deadline=None)  # busy machines are slow, not wrong
@given(parts, parts)
def test_ids_are_63_bits_and_differ_with_any_part(one, other):
    assert 0 <= id_of(one) < 2**63
    assert (id_of(one) == id_of(other)) == (one == other)


def test_ids_spread_over_all_their_bits():
    bits = np.array([[id_of((b"x", 16, 16, 1, 0, n)) >> bit & 1 for bit in range(63)] for n in range(2000)])
    # A fair bit's mean over 2000 draws has deviation 0.011; five of them in 63 bits are a 1 in 30,000 event.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.056


def test_ids_never_change():
    # Written down once: a change would give every cached latent and every resumed run other noise.
    assert example_id(content_digest(b"anima"), (1024, 768), caption_index=1, repeat_index=2) == 3764448264707426136


def test_data_needs_neither_jax_nor_tensorflow_datasets():
    code = (
        "import sys, anima_jax.data.examples, anima_jax.data.batch_plan, anima_jax.data.tfds_source as t; "
        "print([m for m in ('jax', 'flax', 'torch', 'tensorflow_datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
