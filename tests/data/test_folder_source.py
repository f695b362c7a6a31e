"""Folders and tars of pictures: what is found, what is said about the rest, and that nothing hostile gets further."""

import hashlib
import io
import json
import logging
import os
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anima_jax.config.dataset import DirectorySource
from anima_jax.data.file_index import FileIndex
from anima_jax.data.folder_source import FolderReader
from anima_jax.data.media import FileMedia
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.data.tar import TarMember, read_members
from anima_jax.errors import UserError


def encoded(shade: int = 0, size=(32, 16), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "pictures"
    directory.mkdir()
    for number, name in enumerate(["b.png", "a.jpg", "C.webp"]):
        kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.split(".")[1]]
        (directory / name).write_bytes(encoded(40 * number, kind=kind))
        (directory / name).with_suffix(".txt").write_text(f"  picture {name[0]} \n", encoding="utf-8")
    return directory


def reader_of(folder, **keys) -> FolderReader:
    """The reader of a `[[directory]]` with these keys, others at their defaults."""
    return FolderReader(DirectorySource.model_construct(path=str(folder), **keys))


def read(folder, *, strict: bool = False, **keys):
    """Entries, summary line and problems of a folder."""
    problems = Problems(strict)
    entries, line = read_entries(reader_of(folder, **keys), FileIndex(), problems)
    return entries, line, problems


def shown(entries) -> dict:
    """{file name: captions}"""
    return {entry.media.name.rpartition("pictures/")[2]: entry.captions for entry in entries}


def put_tar(path, members: dict[str, bytes], **kinds) -> None:
    with tarfile.open(path, "w", **kinds) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


# ---- folders -------------------------------------------------------------------------------------------------------


def test_images_are_sorted_by_name_with_captions_size_and_content(folder):
    entries, line, _ = read(folder)
    assert shown(entries) == {"C.webp": ("picture C",), "a.jpg": ("picture a",), "b.png": ("picture b",)}
    assert list(shown(entries)) == ["C.webp", "a.jpg", "b.png"]
    assert {(entry.width, entry.height, entry.frames) for entry in entries} == {(32, 16, 1)}
    assert [e.digest for e in entries] == [hashlib.sha256(e.media.read()).digest() for e in entries]
    assert line == f"{folder}: 3 images"


def test_every_ignored_file_is_counted(folder):
    (folder / "a.txt").unlink()
    (folder / "C.txt").write_text(" \n")
    (folder / "orphan.txt").write_text("a caption of nothing")
    for side_file in ["x.npz", "x.json", "x.parquet", "x.bak", "x.db"]:
        (folder / side_file).write_bytes(b"")
    (folder / "scan.psd").write_bytes(b"")
    (folder / "._b.png").write_bytes(b"a Mac's resource fork")
    (folder / "cache").mkdir()
    (folder / "more").mkdir()
    entries, line, problems = read(folder)
    assert shown(entries) == {"b.png": ("picture b",)}
    assert line == (
        f"{folder}: 1 image, 1 caption without an image, 2 other files ignored (.psd, hidden), "
        "1 left out with an empty caption (skip_empty_caption), 1 left out without a caption (skip_empty_caption), "
        "1 subfolder ignored"
    )
    assert problems.count == 0


def test_files_without_a_partner_are_named_up_to_three(folder, tmp_path, caplog):
    for number in range(4):
        (folder / f"bare{number}.png").write_bytes(encoded())
    (folder / "orphan.txt").write_text("a caption of nothing")
    (tmp_path / "masks").mkdir()
    with caplog.at_level(logging.INFO):
        read(folder, mask_path=str(tmp_path / "masks"))
    without = ", ".join(f"{folder}/bare{number}.png" for number in range(3))
    assert caplog.messages == [
        f"caption without an image: {folder}/orphan.txt",
        f"left out without a caption (skip_empty_caption): {without} and 1 more",
        f"without a mask: {folder}/C.webp, {folder}/a.jpg, {folder}/b.png",
    ]


def test_images_without_a_caption_are_kept_on_request_and_counted(folder):
    (folder / "a.txt").unlink()
    entries, line, _ = read(folder, skip_empty_caption=False)
    assert shown(entries) == {"C.webp": ("picture C",), "a.jpg": ("",), "b.png": ("picture b",)}
    assert line == f"{folder}: 3 images, 1 without a caption"


def test_images_left_out_without_a_caption_are_not_read(folder):
    (folder / "a.txt").unlink()
    (folder / "a.jpg").write_bytes(b"broken")
    assert read(folder)[2].count == 0
    assert read(folder, skip_empty_caption=False)[2].count == 1


def test_what_is_neither_a_file_nor_a_folder_is_named(folder, caplog):
    for name in ["a.jpg", "C.txt"]:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "gone")
    (folder / "b.png").unlink()
    os.mkfifo(folder / "b.png")  # who opens it waits for ever
    (folder / "t.tar").symlink_to(folder / "gone")
    entries, line, problems = read(folder)
    assert entries == []
    assert line == f"{folder}: 0 images, 4 could not be used"
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        f"{folder}/t.tar: cannot be read: No such file or directory",
        f"{folder}/C.txt: cannot be read: No such file or directory",
        f"{folder}/a.jpg: cannot be read: No such file or directory",
        f"{folder}/b.png: cannot be read: a folder, pipe or device, expected a file",
    ]
    assert problems.count == 4


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "jfif"])
def test_every_suffix_of_jpeg_is_known(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(encoded(kind="JPEG"))
    assert len(read(tmp_path, skip_empty_caption=False)[0]) == 1


@pytest.mark.parametrize("threads", [1, 5])
def test_the_number_of_threads_changes_nothing(folder, threads):
    assert read_entries(reader_of(folder), FileIndex(), Problems(), threads=threads)[0] == read(folder)[0]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("a.b.png", "a.b"),
        ("日本 [1], x.jpeg", "日本 [1], x"),
        ('a:b\\c?"\n.png', "a_b_c___"),
        ("caf\udce9.png", "caf_"),
        ("é" * 100 + ".png", "é" * 75),
    ],
)
def test_files_made_from_an_image_have_its_stem(tmp_path, name, label):
    assert FileMedia("/some/folder", name).label == label
    assert TarMember("/some/t.tar", f"../x/{name}", 0, 0, 0).label == label
    (tmp_path / f"{label}.1024x1024x33.mask.png").write_bytes(b"")


def test_suffixes_of_any_case_are_recognised(tmp_path):
    (tmp_path / "A.PNG").write_bytes(encoded())
    (tmp_path / "A.TXT").write_text("shouted")
    assert read(tmp_path)[0][0].captions == ("shouted",)


def test_captions_json_replaces_all_text_files(folder):
    table = {"a.jpg": ["one", "two"], "b.png": "alone", "missing.png": ["x"]}
    (folder / "captions.json").write_text(json.dumps(table), encoding="utf-8-sig")
    entries, line, _ = read(folder)
    assert shown(entries) == {"a.jpg": ("one", "two"), "b.png": ("alone",)}
    assert "1 left out without a caption" in line  # C.webp, in spite of C.txt
    assert "1 name in captions.json without an image" in line


def test_captions_json_may_leave_the_suffix_out(folder):
    (folder / "captions.json").write_text(json.dumps({"a": ["stem"], "b": "stem", "b.png": "name", "p": ["in a tar"]}))
    put_tar(folder / "t.tar", {"x/p.png": encoded(1)})
    entries, line, _ = read(folder)
    assert shown(entries) == {"a.jpg": ("stem",), "b.png": ("name",), "t.tar/x/p.png": ("in a tar",)}
    assert "1 name in captions.json without an image" in line


def test_a_captions_json_that_is_not_a_table_is_an_error(folder):
    (folder / "captions.json").write_text("{")
    with pytest.raises(UserError, match=r"captions\.json: not JSON"):
        read(folder)
    (folder / "captions.json").unlink()
    with pytest.raises(UserError, match=r"captions\.json: .*online_captions is on"):
        read(folder, online_captions=True)


@pytest.mark.parametrize(
    ("files", "keys", "tags", "nl"),
    [
        ({"p.caption": "A cat."}, {}, "A cat.", ()),
        ({"p.txt": "a, b", "p.caption": "A cat."}, {}, "a, b", ()),
        ({"p.txt": "a, b", "p.caption": "A cat."}, {"caption_extension": ".caption"}, "A cat.", ()),
        ({"p.tags": "a, b", "p.txt": "c"}, {"caption_extension": ".tags"}, "a, b", ()),
        ({"p.txt": "a, b", "p.caption": "A cat."}, {"caption_mode": "mixed"}, "a, b", ("A cat.",)),
        ({"p.txt": "a, b", "p_nl.txt": "A cat."}, {"caption_mode": "nl"}, "a, b", ("A cat.",)),
        ({"p_nl.txt": "A cat."}, {"caption_mode": "mixed"}, "", ("A cat.",)),
        ({"p.txt": "a", "p.json": '{"nl": ["One.", "Two."]}'}, {"caption_mode": "mixed"}, "a", ("One.", "Two.")),
        ({"p.json": '{"tags": ["a b", "c"], "nl": "A cat."}'}, {}, "a b, c", ("A cat.",)),
        ({"p.json": '{"caption": "A cat.", "tags": "a, b", "train_resolution": [64, 64]}'}, {}, "a, b", ("A cat.",)),
        ({"p.json": '{"caption": "a, b", "nl": "A cat."}'}, {}, "a, b", ("A cat.",)),
        ({"p.json": '{"caption": "A cat."}'}, {}, "", ("A cat.",)),
        ({"p.json": '{"tags": "a, b", "text": {"size": 5}, "description": null}'}, {}, "a, b", ()),
        ({"p.json": '{"prompt": {"3": {"inputs": {}}}, "tags": "a"}'}, {}, "a", ()),
        ({"p.json": '{"prompt": "A cat.", "seed": 3}'}, {}, "", ("A cat.",)),
        (
            {"p.json": '{"tag_string": "long_hair 1girl ^_^ score_7", "id": 5}'},
            {},
            "long hair, 1girl, ^_^, score_7",
            (),
        ),
        ({"p.png.json": '{"category": "danbooru", "tags": ["long_hair", "1girl"]}'}, {}, "long hair, 1girl", ()),
        (
            {"p.json": '{"category": "e621", "tags": {"general": ["big_cat"], "artist": ["b"]}, "description": "Hi"}'},
            {},
            "big cat, b",
            (),
        ),
    ],
)
def test_caption_files_of_other_tools(tmp_path, files, keys, tags, nl):
    (tmp_path / "p.png").write_bytes(encoded())
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
    ((entry,), line, _), in_tar = read(tmp_path, **keys), tmp_path / "tar"
    assert (entry.captions, entry.nl) == ((tags,), nl)
    assert line == f"{tmp_path}: 1 image"
    in_tar.mkdir()
    put_tar(in_tar / "t.tar", {name: (tmp_path / name).read_bytes() for name in ["p.png", *files]})
    (member,) = read(in_tar, **keys)[0]
    assert (member.captions, member.nl) == ((tags,), nl)


def test_a_metadata_file_of_sd_scripts_has_the_captions_of_all(folder, tmp_path):
    table = {
        "C": {"caption": "A sea.", "tags": "c, d"},
        f"{folder}/a": {"tags": "a"},
        "elsewhere/b.png": {"caption": "B"},
        "gone.png": {"caption": "D"},
    }
    (tmp_path / "meta_lat.json").write_text(json.dumps(table))
    entries, line, _ = read(folder, captions_file=str(tmp_path / "meta_lat.json"))
    assert [(*entry.captions, *entry.nl) for entry in entries] == [("c, d", "A sea."), ("a",), ("", "B")]
    assert line == f"{folder}: 3 images, 1 name in meta_lat.json without an image"


def test_images_without_natural_language_are_counted_if_it_is_asked_for(folder):
    (folder / "a_nl.txt").write_text("A cat.")
    entries, line, _ = read(folder, caption_mode="tags_nl")
    assert [entry.nl for entry in entries] == [(), ("A cat.",), ()]
    assert line == f"{folder}: 3 images, 2 without natural language (caption_mode = 'tags_nl')"
    assert read(folder)[1] == f"{folder}: 3 images"


def test_a_broken_json_next_to_an_image_is_named_only_if_it_is_needed(folder):
    (folder / "a.json").write_text("{")
    assert read(folder)[2].count == 0
    (folder / "a.txt").unlink()
    assert [line.partition(": ")[0] for line in read(folder)[2].lines] == [f"{folder}/a.json"]


def test_unusable_files_are_named_counted_and_left_out(folder, caplog):
    (folder / "a.jpg").write_bytes(b"\xff\xd8\xff not really")
    (folder / "b.png").write_bytes(b"")
    (folder / "C.txt").write_bytes(b"\xe4")
    entries, line, problems = read(folder)
    assert entries == []
    assert line == f"{folder}: 0 images, 3 could not be used"
    assert problems.count == 3
    assert problems.summary() == "3 files were skipped, named above (--strict_data makes that an error)"
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(": ")[1].rpartition("/")[2] for message in named] == ["C.txt", "a.jpg", "b.png"]
    assert all(len(message.splitlines()) == 1 for message in named)


def test_with_strict_the_first_unusable_file_is_an_error(folder):
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jpg: "):
        read(folder, strict=True)


def test_a_file_name_that_is_not_utf8_is_shown_with_escapes(folder, capfd, caplog):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    try:
        (folder / name).write_bytes(b"broken")
        (folder / name).with_suffix(".txt").write_text("x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    _, _, problems = read(folder)
    assert problems.count == 1
    assert r"/caf\udce9.png: " in caplog.text
    assert "Logging error" not in capfd.readouterr().err  # what logging says of a line that it cannot write


def test_unusable_folders_are_named(tmp_path, folder):
    with pytest.raises(UserError, match="nowhere: does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"b\.png: is a file"):
        read(folder / "b.png")
    with pytest.raises(UserError, match=r"nowhere: does not exist, expected a folder of masks"):
        read(folder, mask_path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nothing\.png: cannot be read: No such file"):
        read(folder, default_mask_file=str(tmp_path / "nothing.png"))


def test_masks_are_matched_by_stem_or_the_default_is_used(folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "a.webp").write_bytes(encoded(200, kind="WEBP"))
    (masks / "a.txt").write_text("not a mask")
    (masks / "default.png").write_bytes(encoded(100))
    default = str(masks / "default.png")
    entries, line, _ = read(folder, mask_path=str(masks))
    assert [entry.mask and entry.mask.name for entry in entries] == [None, str(masks / "a.webp"), None]
    assert entries[1].mask_digest == hashlib.sha256((masks / "a.webp").read_bytes()).digest()
    assert line == f"{folder}: 3 images, 2 without a mask"
    entries, line, _ = read(folder, mask_path=str(masks), default_mask_file=default)
    assert [entry.mask.name for entry in entries] == [default, str(masks / "a.webp"), default]
    assert line == f"{folder}: 3 images"


def test_an_image_whose_mask_has_another_size_is_skipped(folder, tmp_path, caplog):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(encoded(size=(16, 32)))
    (tmp_path / "masks" / "b.png").write_bytes(b"broken")
    entries, _, problems = read(folder, mask_path=str(tmp_path / "masks"))
    assert list(shown(entries)) == ["C.webp"]
    assert problems.count == 2
    masks = tmp_path / "masks"
    size = "is an image of 16×32 pixels, expected an image of 32×16"
    assert caplog.messages[0] == f"skipped: {folder}/a.jpg: its mask {masks}/a.png {size}"
    assert caplog.messages[1].startswith(f"skipped: {folder}/b.png: its mask cannot be used: {masks}/b.png: not a ")


def test_masks_that_are_black_everywhere_are_warned_about_in_every_run(folder, tmp_path, caplog):
    (tmp_path / "masks").mkdir()
    for name, shade in [("a", 0), ("b", 1)]:
        (tmp_path / "masks" / f"{name}.png").write_bytes(encoded(shade))
    said = "with a mask that is black everywhere, so that nothing of them is trained"
    for _ in range(2):
        caplog.clear()
        index = FileIndex(tmp_path / "index.jsonl")
        entries, line = read_entries(reader_of(folder, mask_path=str(tmp_path / "masks")), index, Problems())
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            f"{said}: {folder}/a.jpg"
        ]
        assert f", 1 {said}" in line
        assert len(entries) == 3


def test_captions_left_out_although_there_is_a_prefix_are_warned_about(folder, caplog):
    (folder / "a.txt").write_text("")
    (folder / "b.txt").unlink()
    read(folder, caption_prefix="photo of ")
    kinds = [record.message for record in caplog.records if record.levelname == "WARNING"]
    why = "although caption_prefix is set (skip_empty_caption = false trains the prefix as their caption)"
    assert kinds == [
        f"left out with an empty caption {why}: {folder}/a.jpg",
        f"left out without a caption {why}: {folder}/b.png",
    ]
    caplog.clear()
    read(folder)
    read(folder, caption_prefix="photo of ", skip_empty_caption=False)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_masks_may_be_in_a_subfolder(folder):
    (folder / "masks").mkdir()
    assert read(folder, mask_path=f"{folder}/masks/")[1] == f"{folder}: 3 images, 3 without a mask"


def test_videos_are_entries_too_with_their_length_at_16_frames_a_second(tmp_path):
    frames = [Image.new("RGB", (32, 16), (25 * n, 0, 0)) for n in range(10)]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=100)
    put_tar(tmp_path / "t.tar", {"v.gif": (tmp_path / "v.gif").read_bytes(), "v.txt": b"moving"})
    entries, line, _ = read(tmp_path, skip_empty_caption=False)
    assert line == f"{tmp_path}: 0 images, 2 videos, 1 without a caption"
    assert entries[0].frames == entries[1].frames
    assert abs(entries[0].frames - 16) <= 1  # one second; the filter may round either end


# ---- tars ----------------------------------------------------------------------------------------------------------


IN_TAR = {
    "x/p.png": encoded(1),
    "x/p.txt": b" in the tar ",
    "q.png": encoded(2),
    "./r.png": encoded(3),
    "./r.txt": b"dotted",
    "notes.pdf": b"",
    "._q.png": b"a Mac's",
}


def test_images_in_a_tar_follow_in_its_order_with_their_captions(folder):
    put_tar(folder / "t.tar", IN_TAR)
    entries, line, problems = read(folder)
    assert list(shown(entries)) == ["C.webp", "a.jpg", "b.png", "t.tar/x/p.png", "t.tar/r.png"]
    assert [entry.captions for entry in entries[3:]] == [("in the tar",), ("dotted",)]
    assert "2 other files ignored (.pdf, hidden), 1 left out without a caption" in line
    assert problems.count == 0


def test_images_in_a_tar_are_read_in_place(folder):
    put_tar(folder / "t.tar", IN_TAR)
    before = sorted(folder.iterdir())
    in_tar = read(folder)[0][3:]
    assert [entry.media.read() for entry in in_tar] == [IN_TAR["x/p.png"], IN_TAR["./r.png"]]
    assert in_tar[0].digest == hashlib.sha256(IN_TAR["x/p.png"]).digest()
    assert sorted(folder.iterdir()) == before


def test_suffixes_of_any_case_are_recognised_in_a_tar(tmp_path):
    put_tar(tmp_path / "T.TAR", {"x/A.PNG": encoded(), "x/A.TXT": b"shouted", "A.txt": b"of another folder"})
    assert [entry.captions for entry in read(tmp_path)[0]] == [("shouted",)]


@pytest.mark.parametrize("where", ["beside", "inside", "both"])
def test_captions_json_next_to_a_tar_or_inside_names_members_by_path_or_base_name(folder, where):
    members = {"x/p.png": encoded(1), "x/p.txt": b"text", "y/p.png": encoded(2), "y/q.png": encoded(3)}
    table = json.dumps({"x/p.png": ["path"], "q.png": ["base", "two"]}).encode()
    if where != "beside":
        members["captions.json"] = table if where == "inside" else b'{"q.png": "hidden", "y/p.png": "deep"}'
    if where != "inside":
        (folder / "captions.json").write_bytes(table)
    put_tar(folder / "t.tar", members)
    found = {name: captions for name, captions in shown(read(folder)[0]).items() if name.startswith("t.tar")}
    expected = {"t.tar/x/p.png": ("path",), "t.tar/y/q.png": ("base", "two")}
    assert found == expected | ({"t.tar/y/p.png": ("deep",)} if where == "both" else {})


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_tars_are_read(tmp_path, kind):
    name = "é" * 150 + "/" + "n" * 120
    put_tar(tmp_path / "t.tar", {f"{name}.png": encoded(), f"{name}.txt": b"long"}, format=kind)
    (entry,) = read(tmp_path)[0]
    assert (entry.media.name, entry.captions) == (f"{tmp_path}/t.tar/{name}.png", ("long",))


def test_of_members_with_one_name_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for data in (encoded(1), encoded(2)):
            info = tarfile.TarInfo("a.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (entry,) = read(tmp_path, skip_empty_caption=False)[0]
    assert entry.media.read() == encoded(2)


def hostile_tar(path, *infos: tarfile.TarInfo) -> None:
    """A good picture, then headers without the bytes that they promise."""
    put_tar(path, {"good.png": encoded()})
    content = path.read_bytes()[: 512 * (1 + -(-len(encoded()) // 512))]
    path.write_bytes(content + b"".join(info.tobuf(tarfile.GNU_FORMAT) for info in infos) + bytes(1024))


def made(name: str, *, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([made("huge.png", size=2**50)], r"ends \d+ bytes early, inside 'huge.png'"),
        ([made("back.png", size=-512)], "points backwards"),
        ([made("l.png", kind=tarfile.SYMTYPE, link="/etc/passwd")], r"l\.png: is a link to '/etc/passwd'"),
        ([made("l.png", kind=tarfile.LNKTYPE, link="good.png")], r"l\.png: is a link to 'good\.png'"),
        ([made("/etc/a.png")], "its name leads out of the tar"),
        ([made("x/../../a.png")], "its name leads out of the tar"),
        ([made("d.png", kind=tarfile.CHRTYPE)], "is a sparse file or a device"),
        ([made("s.png", kind=tarfile.GNUTYPE_SPARSE)], "is a sparse file or a device"),
        ([made("name", size=2**40, kind=tarfile.GNUTYPE_LONGNAME)], "a header claims 1099511627776 bytes"),
        ([made("name", size=2**40, kind=tarfile.XHDTYPE)], "a header claims 1099511627776 bytes"),
        ([made("name", size=0, kind=tarfile.GNUTYPE_LONGNAME)] * 5000, r"t\.tar: "),
    ],
)
def test_hostile_tars_are_named_and_the_files_before_are_used(tmp_path, infos, message, caplog):
    hostile_tar(tmp_path / "t.tar", *infos)
    entries, _, problems = read(tmp_path, skip_empty_caption=False)
    assert [entry.media.member for entry in entries] == ["good.png"]
    assert problems.count == 1
    assert re.search(message, caplog.text)


def test_cut_and_damaged_tars_are_named(tmp_path, caplog):
    put_tar(tmp_path / "whole.tar", {"a.png": encoded(1), "b.png": encoded(2)})
    content = bytearray((tmp_path / "whole.tar").read_bytes())
    second = 512 * (1 + -(-len(encoded(1)) // 512))
    (tmp_path / "whole.tar").unlink()
    (tmp_path / "cut.tar").write_bytes(content[: second + 512 + 40])
    (tmp_path / "cut between.tar").write_bytes(content[:second])
    (tmp_path / "cut header.tar").write_bytes(content[: second + 100])
    content[second + 10] ^= 1
    (tmp_path / "damaged.tar").write_bytes(content)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "zip.tar").write_bytes(b"PK\x03\x04" * 500)
    entries, _, problems = read(tmp_path, skip_empty_caption=False)
    assert [entry.media.name.rpartition("/")[2] for entry in entries] == ["a.png"] * 4
    assert problems.count == 6
    for name in ["cut.tar", "cut between.tar", "cut header.tar", "damaged.tar", "empty.tar", "zip.tar"]:
        assert caplog.text.count(f"/{name}: ") == 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_tar_with_any_bytes_changed_is_read_or_reported(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.tar"
    put_tar(path, {"x" * 120 + ".png": encoded(1), "b.png": encoded(2)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 12))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    problems = Problems()
    for member in read_members(str(path), problems):
        assert len(member.read()) == member.size <= len(content)
