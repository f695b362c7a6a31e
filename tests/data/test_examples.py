"""Directories of captioned pictures: what is found there, what is said about it, and the ids of the examples."""

import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anima_jax.data.captions import read_caption
from anima_jax.data.examples import content_digest, directory_examples, example_id
from anima_jax.data.scan import scan_directory
from anima_jax.errors import UserError


def put_picture(path, shade: int) -> None:
    Image.new("RGB", (32, 32), (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["b.png", "a.jpg", "C.webp"]):
        put_picture(tmp_path / name, 40 * number)
        (tmp_path / name).with_suffix(".txt").write_text(f"  picture {name[0]} \n", encoding="utf-8")
    return tmp_path


def test_pictures_come_in_order_of_name_with_their_captions(folder):
    examples = directory_examples(folder, (16, 16))
    assert [example.caption for example in examples] == ["picture C", "picture a", "picture b"]
    # Shades as drawn: C 80, a 40, b 0; JPEG and WebP may be a level or two off.
    assert [round(example.pixels().mean() / 40) for example in examples] == [2, 1, 0]
    assert examples[0].pixels().shape == (16, 16, 3)


def test_prefix_stands_before_every_caption_but_makes_no_empty_one_count(folder):
    (folder / "a.txt").write_text("\n \n")
    examples = directory_examples(folder, (16, 16), caption_prefix="photo of ")
    assert [example.caption for example in examples] == ["photo of picture C", "photo of picture b"]


def test_empty_captions_are_kept_on_request(folder):
    (folder / "a.txt").unlink()
    examples = directory_examples(folder, (16, 16), skip_empty_caption=False)
    assert [example.caption for example in examples] == ["picture C", "", "picture b"]


def test_summary_counts_everything_that_was_passed_over(folder, caplog):
    (folder / "a.txt").unlink()
    (folder / "C.txt").write_text("")
    (folder / "orphan.txt").write_text("a caption of nothing")
    (folder / "notes.json").write_text("{}")
    (folder / "._b.png").write_bytes(b"a Mac's resource fork")
    (folder / "cache").mkdir()
    with caplog.at_level(logging.INFO):
        directory_examples(folder, (16, 16))
    (line,) = caplog.messages
    assert line == (
        f"{folder}: 3 pictures, 1 without caption file, 1 with an empty caption, "
        "1 captions without a picture, 2 other files ignored"
    )


def test_suffixes_of_any_case_are_recognised(tmp_path):
    put_picture(tmp_path / "A.PNG", 10)
    (tmp_path / "A.TXT").write_text("shouted")
    (picture,) = scan_directory(tmp_path).pictures
    assert picture.caption == "shouted"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_caption_is_utf8_with_or_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "c.txt").write_text(" ein Bär, 熊 🐻\n", encoding=encoding)
    assert read_caption(tmp_path / "c.txt") == "ein Bär, 熊 🐻"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_caption_in_another_encoding_is_named(tmp_path, encoding):
    (tmp_path / "c.txt").write_text("ein Bär", encoding=encoding)
    with pytest.raises(UserError, match=r"c\.txt: byte \d+ is 0x\w\w, expected UTF-8"):
        read_caption(tmp_path / "c.txt")


def test_a_huge_caption_file_is_refused_unread(tmp_path):
    with (tmp_path / "c.txt").open("wb") as file:
        file.truncate(2**40)  # sparse: reading it would take all memory
    with pytest.raises(UserError, match=r"c\.txt: 1099511627776 bytes"):
        read_caption(tmp_path / "c.txt")


def test_unusable_directories_are_named(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: no pictures"):
        directory_examples(empty, (16, 16))
    with pytest.raises(UserError, match="nowhere: does not exist"):
        directory_examples(tmp_path / "nowhere", (16, 16))
    with pytest.raises(UserError, match=r"b\.png: is a file"):
        directory_examples(folder / "b.png", (16, 16))
    for caption in folder.glob("*.txt"):
        caption.unlink()
    with pytest.raises(UserError, match="none of 3 pictures has a caption"):
        directory_examples(folder, (16, 16))


@pytest.mark.parametrize(("num_repeats", "expected"), [(1, 3), (2, 6), (0.7, 2), (1.5, 4), (2.67, 8), (3.0, 9)])
def test_repeats_give_as_many_examples_as_diffusion_pipe(folder, num_repeats, expected):
    examples = directory_examples(folder, (16, 16), num_repeats=num_repeats)
    assert len(examples) == expected
    assert len({example.id for example in examples}) == expected
    counts = [sum(e.caption == caption for e in examples) for caption in ("picture a", "picture b", "picture C")]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("num_repeats", [0, -1, 0.3])
def test_repeats_that_leave_nothing_are_an_error(folder, num_repeats):
    with pytest.raises(UserError, match="num_repeats"):
        directory_examples(folder, (16, 16), num_repeats=num_repeats)


def test_ids_follow_the_content_and_not_its_place(folder, tmp_path_factory):
    before = {example.caption: example.id for example in directory_examples(folder, (16, 16), num_repeats=1.5)[:3]}
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    put_picture(elsewhere / "0 a newcomer.png", 250)
    (elsewhere / "0 a newcomer.txt").write_text("first in line")
    for file in folder.iterdir():
        (elsewhere / ("z" + file.name)).write_bytes(file.read_bytes())
    after = {example.caption: example.id for example in directory_examples(elsewhere, (16, 16))}
    assert before.items() <= after.items()


def test_a_picture_that_cannot_be_read_is_named(folder):
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff not really")
    broken = directory_examples(folder, (16, 16))[1]
    with pytest.raises(UserError, match=r"a\.jpg: "):
        broken.pixels()


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
        "import sys, anima_jax.data.examples, anima_jax.data.plan, anima_jax.data.tfds_source as t; "
        "print([m for m in ('jax', 'flax', 'torch', 'tensorflow_datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
