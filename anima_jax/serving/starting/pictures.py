"""A folder of pictures as a newcomer has it: what training would use of it, and captions for pictures without one."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from anima_jax.checkpoints.locations import reading_folders, replacing, writing_to
from anima_jax.config.dataset import DirectorySource
from anima_jax.data import shapes
from anima_jax.data.captions import CAPTIONS_JSON
from anima_jax.data.file_index import Entry, FileIndex
from anima_jax.data.folder_source import FolderReader
from anima_jax.data.images import IMAGE_SUFFIXES, set_up_pillow
from anima_jax.data.media import FileMedia
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.errors import UserError, os_reason, plural, size_text

NEW_COLOUR = (40, 205, 215)
"""Cyan, which no picture of the quick start shows."""

MOST_UNPACKED = 100 * 10**9
"""Bytes that a .zip may unpack to."""


@dataclasses.dataclass(frozen=True)
class PictureFolder:
    """A folder with pictures; `repeats` is how often an epoch passes over it, as kohya's names of folders say."""

    path: str
    repeats: int
    entries: Sequence[Entry]
    line: str
    """Training's line about the folder: how many pictures, and what is left out."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures in a folder and in the folders in it."""

    path: str
    folders: Sequence[PictureFolder]
    skipped: Sequence[str]
    """A line for each file that cannot be used."""

    @property
    def entries(self) -> list[Entry]:
        """All pictures that can be used."""
        return [entry for folder in self.folders for entry in folder.entries]

    @property
    def bare(self) -> list[Entry]:
        """The pictures without a caption, or with an empty one."""
        return [entry for entry in self.entries if not any(entry.captions) and not any(entry.nl)]

    @property
    def captions(self) -> list[str]:
        """The first caption of each picture that has one."""
        return [text for entry in self.entries for text in [*filter(None, (*entry.captions, *entry.nl))][:1]]

    def report(self) -> str:
        """Return what training would use: pictures, captions, and what is left out and why."""
        count, bare = len(self.entries), len(self.bare)
        lines = [folder.line for folder in self.folders]
        lines += [f"left out: {line}" for line in self.skipped[:20]]
        if len(self.skipped) > 20:
            lines.append(f"left out: {len(self.skipped) - 20} more files that cannot be used")
        return "\n".join(
            [*lines, f"together {plural(count, 'picture')}, {count - bare} with a caption, {bare} without"]
        )


def read_pictures(path: str) -> Pictures:
    """Return the pictures in a folder, and in the folders directly in it, by training's own reader.

    Raises UserError if there is no such folder, or no picture in it that can be used.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: {'is a file' if os.path.exists(path) else 'no such folder'}, expected a folder of pictures"
        )
    set_up_pillow()
    problems, folders = Problems(logged=False), list[PictureFolder]()  # `report` has their lines
    for folder in (path, *_folders_in(path)):
        source = DirectorySource.model_validate({"path": folder, "resolutions": [512], "skip_empty_caption": False})
        entries, line = read_entries(FolderReader(source), FileIndex(keep=False), problems)
        images = [entry for entry in entries if entry.frames == 1]
        if images:
            named = re.match(r"(\d{1,3})_", os.path.basename(folder))
            folders.append(PictureFolder(folder, int(named[1]) if named and folder != path else 1, images, line))
    if not folders:
        unusable = f" ({problems.lines[0]})" if problems.lines else ""
        raise UserError(f"{path}: there are no pictures in this folder that can be used{unusable}")
    return Pictures(path, folders, list(dict.fromkeys(problems.lines)))


def _folders_in(path: str) -> list[str]:
    """Return the folders in a folder that may have pictures of the data set: not hidden ones, nor the cache's."""
    with reading_folders(path), os.scandir(path) as found:
        names = sorted(each.name for each in found if each.is_dir() and not each.name.startswith("."))
    own = [os.path.join(path, name) for name in names if name != "cache"]
    return [folder for folder in own if any(name.lower().endswith(IMAGE_SUFFIXES) for name in _names_in(folder))]


def _names_in(folder: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


def caption_of_name(entry: Entry) -> str:
    """Return a caption made of a picture's name: words, without numbers at its end and separators."""
    stem = pathlib.PurePath(_file_name(entry)).stem
    words = re.sub(r"[\W_]+", " ", re.sub(r"[\W_]*\(?\d+\)?$", "", stem)).strip()
    return (words or stem).encode(errors="replace").decode()


def _file_name(entry: Entry) -> str:
    media = entry.media
    return media.file if isinstance(media, FileMedia) else media.name


def write_captions(pictures: Pictures, captions: dict[str, str], table: pathlib.Path) -> pathlib.Path | None:
    """Write captions (path of a picture → text): a text file beside each picture that has no file of that name.

    Where nothing can be written beside them, or a captions.json has the captions, write all captions to the JSON file
    `table` and return its path. Raises UserError if that fails.
    """
    tables = any(os.path.exists(os.path.join(folder.path, CAPTIONS_JSON)) for folder in pictures.folders)
    if not tables and all(os.access(folder.path, os.W_OK) for folder in pictures.folders):
        for path, text in captions.items():
            beside = f"{os.path.splitext(path)[0]}.txt"
            if not os.path.exists(beside) or not os.path.getsize(beside):  # an empty file is no caption
                with replacing(beside) as file:
                    file.write(f"{text}\n".encode())
        return None
    known = {entry.media.name: next(filter(None, (*entry.captions, *entry.nl)), "") for entry in pictures.entries}
    with writing_to(os.fspath(table)):
        table.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: text for path, text in {**known, **captions}.items() if text}
    with replacing(table) as file:
        file.write(json.dumps(texts, ensure_ascii=False, indent=1).encode())
    return table


def drawn(folder: pathlib.Path) -> str:
    """Draw pictures with captions into a new folder, if it is not there already, and return that.

    They show shapes in cyan, a colour that the quick start's model does not know, among pictures of what it knows.
    """
    if not folder.is_dir():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with writing_to(os.fspath(folder)):
            partial.mkdir(parents=True)
            for number, (picture, caption) in enumerate(_lesson()):
                Image.fromarray(picture).save(partial / f"{number:03}.png")
                (partial / f"{number:03}.txt").write_text(caption, encoding="utf-8")
            os.replace(partial, folder)
    return os.fspath(folder)


def _lesson() -> Iterator[tuple[np.ndarray, str]]:
    for number, (shape, back) in enumerate(itertools.product(shapes.SHAPES, shapes.BACKGROUNDS)):
        for copy in range(6):
            placement = shapes.sample_placement(np.random.default_rng([number, copy]))
            picture = shapes.draw_in_colours(shape, NEW_COLOUR, shapes.BACKGROUNDS[back], *placement)
            yield picture, f"a cyan {shape} on a {back} background"
    for number, scene in enumerate(shapes.scenes(held_out=False)):
        yield shapes.draw(scene, *shapes.sample_placement(np.random.default_rng([number]))), scene.caption


def unpacked(path: str, folder: pathlib.Path) -> str:
    """Unpack a .zip of pictures into a new folder, if it is not there already, and return that.

    Raises UserError for a damaged or too large file, and for one whose names lead out of the folder.
    """
    if folder.is_dir():
        return os.fspath(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            members = [each for each in archive.infolist() if not each.is_dir()]
            size = sum(each.file_size for each in members)
            with writing_to(os.fspath(partial)):
                partial.mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            if size > min(free, MOST_UNPACKED):
                raise UserError(f"{path}: unpacks to {size_text(size)}, {size_text(free)} are free in {folder.parent}")
            for member in members:
                parts = pathlib.PurePosixPath(member.filename.replace("\\", "/")).parts
                if ".." in parts or member.filename.startswith("/") or ":" in member.filename:
                    raise UserError(f"{path}: contains {member.filename!r}, which is outside of its folder")
                if not {"__MACOSX"} & {*parts}:
                    archive.extract(member, partial)
    except UserError:
        raise
    except Exception as error:  # its decoders raise many types for damaged bytes
        raise UserError(f"{path}: cannot be unpacked: {os_reason(error)}") from error
    inner = list(partial.iterdir())
    only = inner[0] if len(inner) == 1 and inner[0].is_dir() else None
    with writing_to(os.fspath(folder)):
        os.replace(only or partial, folder)
    shutil.rmtree(partial, ignore_errors=True)
    return os.fspath(folder)
