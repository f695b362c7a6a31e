"""Captions in text files and in captions.json: encodings, types, errors."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_jax.data.captions import MAX_BYTES, CaptionTable, decode_caption
from anima_jax.data.media import read_file
from anima_jax.errors import UserError


def read_caption(path) -> str:
    return decode_caption(read_file(path, MAX_BYTES), str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_caption_is_utf8_with_or_without_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "c.txt").write_text(" ein Bär, 熊 🐻\n", encoding=encoding)
    assert read_caption(tmp_path / "c.txt") == "ein Bär, 熊 🐻"


def test_a_caption_of_several_lines_is_the_same_from_every_system(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"one\r\ntwo\rthree\nfour\r\n")
    assert read_caption(tmp_path / "c.txt") == "one\ntwo\nthree\nfour"


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        ("ein Bär".encode("latin-1"), "byte 5 is 0xe4"),
        ("ein Bär".encode("utf-16"), "byte 0 is 0xff"),
        (b"\xef\xbb\xbfein B\xe4r", "byte 8 is 0xe4"),
    ],
)
def test_caption_in_another_encoding_is_named_with_its_byte(tmp_path, content, byte):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"c\.txt: {byte}, expected UTF-8"):
        read_caption(tmp_path / "c.txt")


def test_a_huge_caption_file_is_refused_unread(tmp_path):
    with (tmp_path / "c.txt").open("wb") as file:
        file.truncate(2**40)  # sparse: reading it would take all memory
    with pytest.raises(UserError, match=r"c\.txt: 1099511627776 bytes"):
        read_caption(tmp_path / "c.txt")


@given(st.dictionaries(st.text(), st.lists(st.text())))
def test_a_table_returns_captions_unchanged(captions):
    table = CaptionTable(json.dumps(captions).encode(), "captions.json")
    assert {name: table.of(name) for name in captions} == {name: (tuple(texts), ()) for name, texts in captions.items()}
    assert table.unused() == 0


def test_a_single_text_is_a_list_of_one_and_the_first_known_name_counts():
    table = CaptionTable(b'\xef\xbb\xbf{"a.png": " one ", "x/a.png": ["two", "three"], "b.png": []}', "captions.json")
    assert table.of("a.png") == ((" one ",), ())
    assert table.of("x/a.png", "a.png") == (("two", "three"), ())
    assert table.of("y/a.png", "a.png") == ((" one ",), ())
    assert table.of("c.png") is None
    assert table.unused() == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", r"^captions\.json: found a list, expected an object"),
        (b'"x"', r"^captions\.json: found a text"),
        (b"", r"^captions\.json: not JSON"),
        (b'{"a": ', r"^captions\.json: not JSON"),
        (b'{"a": "\xe4"}', r"^captions\.json: byte 7 is 0xe4, expected UTF-8"),
        (b"[" * 200_000, r"^captions\.json: not JSON"),
    ],
)
def test_a_broken_table_is_named(content, message):
    with pytest.raises(UserError, match=message):
        CaptionTable(content, "captions.json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "a.png has a number, expected a list of captions"),
        (None, "a.png has null"),
        ({"caption": {"x": "y"}}, "a.png has an object"),
        ({"tags": ["x", 5]}, "a.png has a number"),
        (["x", ["y"]], "a.png has a list"),
        (["x", True], "a.png has true or false"),
        ("\ud83d", "a.png has a caption with half a character"),
    ],
)
def test_an_entry_that_is_not_a_list_of_texts_is_named_and_others_still_work(value, message):
    table = CaptionTable(json.dumps({"a.png": value, "b.png": ["fine"]}).encode(), "captions.json")
    with pytest.raises(UserError, match=f"^captions.json: {message}"):
        table.of("a.png")
    assert table.of("b.png") == (("fine",), ())


@given(st.binary())
def test_hostile_bytes_give_a_table_or_an_error_of_one_line(data):
    message = ""
    try:
        CaptionTable(data, "captions.json")
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
