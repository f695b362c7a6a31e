"""What a folder of pictures and videos holds: an entry for each that can be used, and a line about all that cannot.

Which files count, and which caption and mask belong to each, is as in diffusion-pipe (utils/dataset.py:
DirectoryDataset). Captions inside a `.tar` are ours.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from etils import epath

from anima_jax.data import captions
from anima_jax.data.archive import TarMember, read_members
from anima_jax.data.captions import CAPTIONS_JSON, CaptionTable, decode_caption, read_caption
from anima_jax.data.manifest import Entry, FileMedia, Media, Memo, Summary
from anima_jax.data.media import MAX_BYTES, PICTURE_SUFFIXES, VIDEO_SUFFIXES, read_file
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError, os_reason

log = logging.getLogger(__name__)

SIDE_FILES = (".txt", ".npz", ".json", ".parquet", ".bak", ".db")
"""Suffixes that diffusion-pipe passes over: such files lie beside pictures for good reasons."""

NAMED = 3
"""So many of what is passed over are named; of all of it the number is told."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Directory:
    """A `[[directory]]`."""

    path: str
    mask_path: str | None = None
    """Folder of masks: a mask has its picture's name up to the suffix."""
    default_mask_file: str | None = None
    """Mask of what has none there."""
    skip_empty_caption: bool = True
    online_captions: bool = False
    """Read captions.json again even where the rest is trusted to be unchanged."""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A picture or video and what belongs to it; nothing of it is read yet."""

    media: Media
    captions: Callable[[], tuple[str, ...] | None]
    """Reads them; None: it has none. Raises UserError."""
    mask: Media | None = None


def read_directory(
    directory: Directory, memo: Memo, problems: Problems, *, threads: int = 8
) -> tuple[list[Entry], str]:
    """The usable pictures and videos directly in a folder and in its tars, by name; and a line for the log.

    Unusable ones go to `problems`. Each thread may hold a whole video in memory. Raises UserError if the folder, its
    captions.json or the masks' folder is missing or cannot be read.
    """
    about = dataclasses.asdict(directory)
    if memo.trust and (recalled := memo.recall(about, (FileMedia, TarMember))):
        entries, summary = recalled
        if not (problems.strict and summary.skipped):
            if directory.online_captions:
                entries = _recaptioned(entries, directory, problems)
            problems.skip(*summary.skipped)
            return entries, f"{summary.summary} (as remembered: its files are trusted to be unchanged)"
    before, counts = len(problems.lines), Counts()
    files, folders = _listing(directory.path, "a folder of pictures")
    table = _caption_table(directory, files)
    found = _gather(directory.path, files, table, _masks(directory), problems, counts)
    entries = look_at(found, directory.skip_empty_caption, memo, problems, counts, threads=threads)
    if table is not None:
        counts[f"names in {CAPTIONS_JSON} without a picture"] = table.unused()
    if directory.mask_path and not directory.default_mask_file:
        count(counts, "without a mask", [entry.media.name for entry in entries if entry.mask is None])
    masks_inside = directory.mask_path and os.path.dirname(os.path.normpath(directory.mask_path))
    counts["folders in it not looked into"] = folders - (masks_inside == os.path.normpath(directory.path))
    skipped = tuple(problems.lines[before:])
    counts["could not be used"] = len(skipped)
    line = summary_line(directory.path, entries, counts)
    memo.save(about, entries, Summary(line, skipped))
    return entries, line


def look_at(
    found: Sequence[Found], skip_empty_caption: bool, memo: Memo, problems: Problems, counts: Counts, *, threads: int
) -> list[Entry]:
    """The entries of what can be used, in order; the rest go to `problems` or, for want of a caption, to `counts`."""
    entries, noted = [], collections.defaultdict[str, list[str]](list)
    looked_at = in_threads(lambda each: _look(each, memo, skip_empty_caption), found, threads)
    for each, (result, note) in zip(found, looked_at, strict=True):
        if note:
            noted[note].append(each.media.name)
        if isinstance(result, UserError):
            problems.skip(result)
        elif result is not None:
            entries.append(result)
    for note, names in noted.items():
        count(counts, note, names)
    return entries


def count(counts: Counts, what: str, names: Sequence[str]) -> None:
    """Count what is passed over, and name it."""
    counts[what] = len(names)
    name_first(what, names)


def name_first(what: str, names: Sequence[str]) -> None:
    """Log the first of `names`, if there are any, and how many more."""
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.info("%s: %s%s", what, ", ".join(names[:NAMED]), more)


def summary_line(name: str, entries: Sequence[Entry], counts: Counts) -> str:
    """How many of what a source has."""
    videos = sum(entry.frames > 1 for entry in entries)
    line = f"{name}: {len(entries) - videos} pictures" + (f", {videos} videos" if videos else "")
    return line + "".join(f", {number} {what}" for what, number in counts.items() if number)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], threads: int, chunk: int = 1024
) -> Iterator[Result]:
    """`function` of each item, in order. Only a chunk of items waits at a time: each that waits takes a kilobyte."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        for start in range(0, len(items), chunk):
            yield from pool.map(function, items[start : start + chunk])
    finally:
        pool.shutdown(cancel_futures=True)


def _look(found: Found, memo: Memo, skip_empty_caption: bool) -> tuple[Entry | UserError | None, str]:
    """The entry, what is wrong, or None for want of a caption; and a note where there is none or an empty one."""
    try:
        texts, note = found.captions() or (), ""
        if not any(text.strip() for text in texts):
            note = "with an empty caption" if texts else "without a caption"
            if skip_empty_caption:
                return None, f"left out {note} (skip_empty_caption)"
        facts = memo.facts(found.media)
        if found.mask is None:
            return Entry(found.media, facts.digest, *facts.size, texts or ("",)), note
    except UserError as error:
        return error, ""
    try:
        mask = memo.facts(found.mask)
    except UserError as error:
        return UserError(f"{found.media.name}: its mask is of no use: {error}"), ""
    if mask.size != facts.size._replace(frames=1):
        found_size, expected = (f"{size.width}×{size.height}" for size in (mask.size, facts.size))
        kind = "a picture of" if mask.size.frames == 1 else "a video of"
        fault = f"its mask {found.mask.name} is {kind} {found_size} pixels, expected a picture of {expected}"
        return UserError(f"{found.media.name}: {fault}"), ""
    return Entry(found.media, facts.digest, *facts.size, texts or ("",), found.mask, mask.digest), note


# ---- what lies in a folder ---------------------------------------------------------------------------------------


def _gather(
    folder: str,
    files: Sequence[str],
    table: CaptionTable | None,
    masks: Callable[[str], Media | None],
    problems: Problems,
    counts: Counts,
) -> list[Found]:
    """The pictures and videos among the files of a folder and in its tars; counts what is passed over.

    A captions.json takes the place of all `.txt` files beside it.
    """
    texts = {} if table else {_stem(file): file for file in files if _kind(file) == ".txt"}
    found: list[Found] = []
    ignored = Counts()
    for file in files:
        path = os.path.join(folder, file)
        if (kind := _kind(file)) == "media":
            if table:
                read = functools.partial(table.of, *_names(file))
            elif text := texts.get(_stem(file)):
                read = functools.partial(_text, os.path.join(folder, text))
            else:
                read = _none
            found.append(Found(FileMedia(folder, file), read, masks(file)))
        elif kind == "tar":
            found += _of_tar(path, table, masks, problems, ignored)
        elif not kind:
            ignored[_as_ignored(file)] += 1
    stems = {_stem(file) for file in files if _kind(file) == "media"}
    orphans = [os.path.join(folder, text) for stem, text in texts.items() if stem not in stems]
    count(counts, "captions without a picture", orphans)
    counts[f"other files ignored ({', '.join(sorted(ignored)[:5])})"] = ignored.total()
    return found


def _of_tar(
    tar: str,
    table: CaptionTable | None,
    masks: Callable[[str], Media | None],
    problems: Problems,
    ignored: Counts,
) -> Iterator[Found]:
    """The pictures in a tar. A captions.json beside the tar goes before one inside, and that before `.txt` members."""
    members = {member.member: member for member in read_members(tar, problems)}
    try:
        inside = [
            CaptionTable(member.read(), member.name)
            for name, member in members.items()
            if posixpath.basename(name) == CAPTIONS_JSON
        ]
    except UserError as error:
        problems.skip(error)
        return
    texts = {_stem(name): member for name, member in members.items() if _kind(posixpath.basename(name)) == ".txt"}
    for name, member in members.items():
        base = posixpath.basename(name)
        if (kind := _kind(base)) == "media":
            text = None if inside else texts.get(_stem(name))
            tables = [table, *inside] if table else inside
            yield Found(member, functools.partial(_of_member, name, tables, text), masks(base))
        elif not kind:
            ignored[_as_ignored(base)] += 1


def _of_member(name: str, tables: Sequence[CaptionTable], text: TarMember | None) -> tuple[str, ...] | None:
    for table in tables:
        if (found := table.of(*_names(name))) is not None:
            return found
    if text is None:
        return None
    if text.size > captions.MAX_BYTES:
        raise UserError(f"{text.name}: {text.size} bytes, expected at most {captions.MAX_BYTES}")
    return (decode_caption(text.read(), text.name),)


def _text(path: str) -> tuple[str, ...]:
    return (read_caption(path),)


def _none() -> None:
    return None


def _caption_table(directory: Directory, files: Sequence[str]) -> CaptionTable | None:
    path = os.path.join(directory.path, CAPTIONS_JSON)
    if CAPTIONS_JSON in files:
        return CaptionTable(read_file(path, MAX_BYTES), path)
    if directory.online_captions:
        raise UserError(f"{path}: no such file, expected one because online_captions is on")
    return None


def _recaptioned(entries: Sequence[Entry], directory: Directory, problems: Problems) -> list[Entry]:
    """The entries with the captions that captions.json holds now."""
    path = os.path.join(directory.path, CAPTIONS_JSON)
    table = CaptionTable(read_file(path, MAX_BYTES), path)
    renewed, lacking = [], []
    for entry in entries:
        media = entry.media
        name = media.member if isinstance(media, TarMember) else posixpath.basename(media.name)
        try:
            texts = table.of(*_names(name)) or ()
        except UserError as error:
            problems.skip(error)
            continue
        if texts or not directory.skip_empty_caption:
            renewed.append(dataclasses.replace(entry, captions=texts or ("",)))
        else:
            lacking.append(media.name)
    name_first(f"left out without a caption in {CAPTIONS_JSON} (skip_empty_caption)", lacking)
    return renewed


def _masks(directory: Directory) -> Callable[[str], Media | None]:
    """A function from a picture's file name to its mask."""
    folder, default = directory.mask_path, directory.default_mask_file
    files = _listing(folder, "a folder of masks (mask_path)")[0] if folder else []
    by_stem = {_stem(file): file for file in reversed(files) if file[0] != "." and _kind(file) not in SIDE_FILES}
    otherwise = FileMedia(*os.path.split(default)) if default else None
    if otherwise:
        otherwise.stamp()  # a missing one is one mistake, not one for each picture

    def mask_of(file: str) -> Media | None:
        return FileMedia(folder, by_stem[_stem(file)]) if folder and _stem(file) in by_stem else otherwise

    return mask_of


def _listing(folder: str, expected: str) -> tuple[list[str], int]:
    """The names of a folder's files, sorted, and how many folders it has besides the cache."""
    directory = epath.Path(folder)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{folder}: {found}, expected {expected}")
    files, folders = [], 0
    try:
        for path in directory.iterdir():
            # What is neither, like a link to nothing, is named where it is read.
            if path.is_file() or not path.is_dir():
                files.append(path.name)
            elif path.name != "cache" and not path.name.startswith("."):
                folders += 1
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {os_reason(error)}") from None
    return sorted(files), folders


def _names(path: str) -> tuple[str, ...]:
    """What a captions.json may call a file: by its place in a tar, by its name, and by either up to the suffix."""
    base = posixpath.basename(path)
    return path, base, _stem(path), _stem(base)


def _as_ignored(file: str) -> str:
    """How a file that is not read is listed: "hidden", or its suffix, or its name if it has none."""
    return "hidden" if file.startswith(".") else os.path.splitext(file)[1] or file


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _kind(file: str) -> str:
    """ "media", "tar", the suffix of a side file, or the empty string for what is not read."""
    suffix = os.path.splitext(file)[1].lower()
    if file.startswith("."):
        return ""
    if suffix in PICTURE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return "media"
    return "tar" if suffix == ".tar" else suffix if suffix in SIDE_FILES else ""
