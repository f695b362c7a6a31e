"""The file index: unchanged files are not read again, changed ones are, and damage only costs time."""

import json
import logging
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anima_jax.data import file_index
from anima_jax.data.file_index import FileIndex
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.errors import UserError
from tests.data.test_folder_source import encoded, put_tar, reader_of


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "pictures"
    (tmp_path / "masks").mkdir()
    directory.mkdir()
    for number, name in enumerate("abc"):
        (directory / f"{name}.png").write_bytes(encoded(number))
        (directory / f"{name}.txt").write_text(f"caption {name}")
    put_tar(directory / "t.tar", {"d.png": encoded(4), "d.txt": "Bär 🐻".encode()})
    (tmp_path / "masks" / "b.png").write_bytes(encoded(9))
    return directory


def index_of(folder, **options) -> FileIndex:
    return FileIndex(folder.parent / "index" / "files.jsonl", **options)


def read(folder, *, index: FileIndex | None = None, trust: bool = False, strict: bool = False, **keys):
    problems = Problems(strict)
    reader = reader_of(folder, mask_path=str(folder.parent / "masks"), **keys)
    entries, line = read_entries(reader, index or index_of(folder, trust=trust), problems)
    return entries, line, problems


def unreadable(path) -> None:
    """Other bytes of the same length under the same time: only who reads the file can tell."""
    before = path.stat()
    path.write_bytes(b"?" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_unchanged_files_are_not_read_again(folder):
    entries, line, _ = read(folder)
    for path in [*folder.glob("*.png"), folder.parent / "masks" / "b.png"]:
        unreadable(path)
    assert read(folder)[:2] == (entries, line)


@pytest.mark.parametrize(
    "changes",
    [{"file": ["x"]}, {"file": {}}, {"size": [float("inf"), 1, 1]}, {"size": [10**400, 1, 1]}, {"stamp": [1e999, 0]}],
    ids=["a list", "a table", "infinite", "huge", "an infinite time"],
)
def test_odd_values_in_a_memo_only_cost_time(folder, changes):
    entries, line, _ = read(folder)
    path = folder.parent / "index" / "files.jsonl"
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    number = next(number for number, row in enumerate(rows) if "file" in row)
    rows[number] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(folder)[:2] == (entries, line)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_read_again_and_only_that(folder, change):
    before = {entry.media.name: entry.digest for entry in read(folder)[0]}
    changed = folder / "b.png"
    old = changed.stat()
    Image.new("RGB", (32, 16), (200, 0, 9)).save(changed, compress_level=0 if change == "size" else 9)
    os.utime(changed, ns=(old.st_atime_ns, old.st_mtime_ns + (change == "time")))
    unreadable(folder / "a.png")
    after = {entry.media.name: entry.digest for entry in read(folder)[0]}
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == [str(changed)]


def test_captions_are_read_each_time(folder):
    read(folder)
    (folder / "b.txt").write_text("another")
    assert [entry.captions for entry in read(folder)[0]][1] == ("another",)


def test_with_trust_no_file_is_read(folder):
    entries, line, _ = read(folder)
    shutil.move(folder, folder.parent / "away")
    shutil.rmtree(folder.parent / "masks")
    trusted, trusted_line, problems = read(folder, trust=True)
    assert trusted == entries
    assert trusted_line.startswith(line)
    assert problems.count == 0


def test_with_trust_and_online_captions_only_captions_are_read(folder, caplog):
    (folder / "captions.json").write_text(json.dumps({f"{name}.png": ["old"] for name in "abcd"}))
    before, _, _ = read(folder, online_captions=True)
    (folder / "captions.json").write_text(json.dumps({"a.png": ["new", "more"], "d.png": "new", "b.png": [7]}))
    for path in folder.glob("*.png"):
        path.unlink()
    with caplog.at_level(logging.INFO):
        after, _, problems = read(folder, trust=True, online_captions=True)
    assert [entry.captions for entry in after] == [("new", "more"), ("new",)]
    assert [entry.digest for entry in after] == [before[0].digest, before[3].digest]
    assert problems.count == 1  # b.png, whose captions are a number
    assert f"left out without a caption in captions.json (skip_empty_caption): {folder}/c.png" in caplog.messages


def test_skipped_files_are_reported_again_or_read_again_if_strict(folder):
    (folder / "c.png").write_bytes(b"broken")
    _, line, _ = read(folder)
    assert "1 could not be used" in line
    _, line, problems = read(folder, trust=True)
    assert "1 could not be used" in line
    assert [message.split(": ")[0] for message in problems.lines] == [str(folder / "c.png")]
    with pytest.raises(UserError, match=r"c\.png"):
        read(folder, trust=True, strict=True)


def test_trust_applies_only_to_a_source_with_the_same_options(folder):
    read(folder)
    (folder / "a.txt").unlink()
    assert len(read(folder, trust=True)[0]) == 4
    assert read(folder, trust=True, skip_empty_caption=False)[0][0].captions == ("",)


def test_deleted_files_leave_the_index(folder):
    read(folder)
    (folder / "a.png").unlink()
    read(folder)
    text = (folder.parent / "index" / "files.jsonl").read_text()
    assert "a.png" not in text
    assert "b.png" in text


def test_sources_that_share_an_index_read_no_file_twice(folder):
    index = index_of(folder)
    entries = read(folder, index=index)[0]
    for path in folder.glob("*.png"):
        unreadable(path)
    assert read(folder, index=index)[0] == entries
    assert read(folder, index=index, skip_empty_caption=False)[0] == entries


def test_sources_that_share_an_index_keep_each_others_entries(folder):
    index = index_of(folder)
    (folder / "a.txt").unlink()
    read(folder, index=index)
    read(folder, index=index, skip_empty_caption=False)
    read(folder)  # a run of one of them, which is saved again, behind the other
    shutil.move(folder, folder.parent / "away")
    index = index_of(folder, trust=True)
    assert [entry.captions for entry in read(folder, index=index)[0]] == [("caption b",), ("caption c",), ("Bär 🐻",)]
    assert read(folder, index=index, skip_empty_caption=False)[0][0].captions == ("",)


def test_a_killed_run_adds_what_it_learned_and_keeps_complete_sources(folder, monkeypatch):
    read(folder)
    (folder / "e.png").write_bytes(encoded(7))
    (folder / "e.txt").write_text("a newcomer")
    (folder / "z.png").write_bytes(b"broken")
    (folder / "z.txt").write_text("what the run dies of")
    monkeypatch.setattr(file_index, "SAVE_SECONDS", 0)
    with pytest.raises(UserError, match=r"z\.png"):
        read(folder, strict=True)
    (folder / "z.txt").unlink()
    assert len(read(folder, trust=True)[0]) == 4
    unreadable(folder / "e.png")
    entries = read(folder)[0]
    assert [entry.captions[0] for entry in entries] == ["caption a", "caption b", "caption c", "a newcomer", "Bär 🐻"]
    assert read(folder, trust=True)[0] == entries


def test_without_keep_an_index_is_read_and_not_written(folder, monkeypatch):
    monkeypatch.setattr(file_index, "SAVE_SECONDS", 0)
    read(folder, index=index_of(folder, keep=False))
    assert not (folder.parent / "index").exists()
    entries = read(folder)[0]
    for path in folder.glob("*.png"):
        unreadable(path)
    before = (folder.parent / "index" / "files.jsonl").read_bytes()
    assert read(folder, index=index_of(folder, keep=False))[0] == entries
    (folder / "a.txt").write_text("another")
    read(folder, index=index_of(folder, keep=False))
    assert (folder.parent / "index" / "files.jsonl").read_bytes() == before


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_damaged_index_only_costs_time(tmp_path_factory, data):
    base = tmp_path_factory.getbasetemp() / "damaged"
    folder, index = base / "pictures", base / "index" / "files.jsonl"
    if not folder.exists():
        (base / "masks").mkdir(parents=True)
        folder.mkdir()
        for name in "ab":
            (folder / f"{name}.png").write_bytes(encoded(ord(name)))
            (folder / f"{name}.txt").write_text(name)
    index.unlink(missing_ok=True)
    shared = index_of(folder)
    read(folder, index=shared, skip_empty_caption=False)
    expected = read(folder, index=shared)[0]
    lines = index.read_bytes().splitlines(keepends=True)
    damage = data.draw(st.sampled_from(["cut", "line", "garbage", "number"]))
    place = data.draw(st.integers(0, len(lines) - 1))
    if damage == "cut":
        content = b"".join(lines)
        index.write_bytes(content[: data.draw(st.integers(0, len(content) - 2))])
    elif damage == "line":
        index.write_bytes(b"".join(lines[:place] + lines[place + 1 :]))
    elif damage == "garbage":
        index.write_bytes(b"".join([*lines[:place], data.draw(st.binary()) + b"\n", *lines[place + 1 :]]))
    else:
        index.write_bytes(b"".join([*lines[:place], b'{"file": 1, "entry": 2, "format": 3}\n', *lines[place + 1 :]]))
    trust = data.draw(st.booleans())
    assert read(folder, trust=trust)[0] == expected


def test_an_index_that_cannot_be_written_costs_a_warning(folder, caplog):
    (folder.parent / "index").write_text("a file where the folder should be")
    assert len(read(folder)[0]) == 4
    assert len([record for record in caplog.records if "not saved" in record.getMessage()]) == 1


def test_a_saved_index_leaves_no_other_file(folder):
    read(folder)
    read(folder)
    assert [path.name for path in (folder.parent / "index").iterdir()] == ["files.jsonl"]
