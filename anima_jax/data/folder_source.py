"""The images and videos of a `[[directory]]`, in the folder itself and in its tars.

The choice of files, captions and masks follows diffusion-pipe (utils/dataset.py: DirectoryDataset). Captions inside a
`.tar` are our own addition.
"""

import dataclasses
import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence

from etils import epath

from anima_jax.config.dataset import DirectorySource
from anima_jax.data import captions
from anima_jax.data.captions import CAPTIONS_JSON, CaptionTable, decode_caption
from anima_jax.data.file_index import Entry
from anima_jax.data.images import IMAGE_SUFFIXES
from anima_jax.data.media import VIDEO_SUFFIXES, FileMedia, Media
from anima_jax.data.problems import Problems
from anima_jax.data.sources import Candidate, Counts, SourceReader, count_and_name, log_names
from anima_jax.data.tar import TarMember, read_members
from anima_jax.errors import UserError, os_reason

SIDE_FILES = (".txt", ".npz", ".json", ".parquet", ".bak", ".db")
"""Suffixes that diffusion-pipe ignores, because such files are often kept next to images."""

CACHE = os.path.join("cache", "anima_jax")
"""Path of the cache inside the folder of a source."""

MaskOf = Callable[[str], Media | None]
"""Image file name → mask, or None."""


class FolderReader(SourceReader[DirectorySource]):
    """Reader of a `[[directory]]`."""

    media_types = (FileMedia, TarMember)

    def __init__(self, source: DirectorySource):
        self.source = source
        self.name, self.location = source.path, repr(source.path)
        self.cache_dir = os.path.join(source.path, CACHE)
        keys = ("path", "mask_path", "default_mask_file", "skip_empty_caption", "online_captions")
        self.about = {key: getattr(source, key) for key in keys}
        self._folders = 0
        self._table: CaptionTable | None = None

    def candidates(self, problems: Problems, counts: Counts) -> list[Candidate]:
        """List the folder and its tars. With a captions.json, the `.txt` files next to it are not used."""
        folder = self.source.path
        files, self._folders = _list_folder(folder, "a folder of images")
        if CAPTIONS_JSON in files:
            self._table = self._read_table()
        elif self.source.online_captions:
            raise UserError(
                f"{os.path.join(folder, CAPTIONS_JSON)}: no such file, expected one because online_captions is on"
            )
        tables = [self._table] if self._table else []
        mask_of, ignored = _masks(self.source), Counts()
        members = {file: FileMedia(folder, file) for file in files}
        texts = {} if tables else _texts(members)
        candidates = list[Candidate]()
        for name, media in members.items():
            if _kind(name) == "tar":
                candidates += _tar_candidates(media.name, tables, mask_of, problems, ignored)
            else:
                candidates += _candidates(name, media, tables, texts, mask_of, ignored)
        stems = {_stem(name) for name in members if _kind(name) == "media"}
        orphans = [text.name for stem, text in texts.items() if stem not in stems]
        count_and_name(counts, "caption without an image", orphans)
        counts[f"other file ignored ({', '.join(sorted(ignored)[:5])})"] = ignored.total()
        return candidates

    def count_entries(self, entries: Sequence[Entry], counts: Counts) -> None:
        source = self.source
        if self._table is not None:
            counts[f"name in {CAPTIONS_JSON} without an image"] = self._table.unused()
        if source.mask_path and not source.default_mask_file:
            count_and_name(counts, "without a mask", [entry.media.name for entry in entries if entry.mask is None])
        masks_inside = source.mask_path and os.path.dirname(os.path.normpath(source.mask_path))
        counts["subfolder ignored"] = self._folders - (masks_inside == os.path.normpath(source.path))

    def update_captions(self, entries: list[Entry], problems: Problems) -> list[Entry]:
        """Return the entries with the current captions of captions.json if `online_captions` is on."""
        if not self.source.online_captions:
            return entries
        table, updated, lacking = self._read_table(), [], []
        for entry in entries:
            media = entry.media
            name = media.member if isinstance(media, TarMember) else posixpath.basename(media.name)
            try:
                texts = table.of(*_names(name)) or ()
            except UserError as error:
                problems.skip(error)
                continue
            if texts or not self.source.skip_empty_caption:
                updated.append(dataclasses.replace(entry, captions=texts or ("",)))
            else:
                lacking.append(media.name)
        log_names(f"left out without a caption in {CAPTIONS_JSON} (skip_empty_caption)", lacking)
        return updated

    def _read_table(self) -> CaptionTable:
        media = FileMedia(self.source.path, CAPTIONS_JSON)
        return CaptionTable(media.read(), media.name)


def _tar_candidates(
    tar: str, tables: Sequence[CaptionTable], mask_of: MaskOf, problems: Problems, ignored: Counts
) -> Iterator[Candidate]:
    """List a tar. A captions.json next to the tar takes precedence over one inside, and that over `.txt` members."""
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
    texts = {} if inside else _texts(members)
    for name, member in members.items():
        yield from _candidates(name, member, [*tables, *inside], texts, mask_of, ignored)


def _candidates(
    name: str,
    media: FileMedia | TarMember,
    tables: Sequence[CaptionTable],
    texts: Mapping[str, FileMedia | TarMember],
    mask_of: MaskOf,
    ignored: Counts,
) -> Iterator[Candidate]:
    """Yield the candidate of a file in a folder or tar if it is an image or video."""
    base = posixpath.basename(name)
    if (kind := _kind(name)) == "media":
        yield Candidate(media, functools.partial(_captions, name, tables, texts.get(_stem(name))), mask_of(base))
    elif not kind:
        ignored["hidden" if base.startswith(".") else os.path.splitext(base)[1] or base] += 1


def _captions(name: str, tables: Sequence[CaptionTable], text: FileMedia | TarMember | None) -> tuple[str, ...] | None:
    """Return a file's captions from the first table that has it, else from its `.txt` file; None if it has none."""
    for table in tables:
        if (found := table.of(*_names(name))) is not None:
            return found
    return (decode_caption(text.read(captions.MAX_BYTES), text.name),) if text else None


def _masks(source: DirectorySource) -> MaskOf:
    folder, default = source.mask_path, source.default_mask_file
    files = _list_folder(folder, "a folder of masks (mask_path)")[0] if folder else []
    by_stem = {_stem(file): file for file in reversed(files) if file[0] != "." and _kind(file) not in SIDE_FILES}
    default_mask = FileMedia(*os.path.split(default)) if default else None
    if default_mask:
        default_mask.stamp()  # a missing file is reported once, not for each image

    def mask_of(file: str) -> Media | None:
        return FileMedia(folder, by_stem[_stem(file)]) if folder and _stem(file) in by_stem else default_mask

    return mask_of


def _list_folder(folder: str, expected: str) -> tuple[list[str], int]:
    """Return the sorted file names and the number of subfolders of a folder, except hidden subfolders and the cache.

    Raises UserError if it cannot be read or is not a folder; `expected` describes it in the message.
    """
    directory = epath.Path(folder)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{folder}: {found}, expected {expected}")
    files, folders = [], 0
    try:
        for path in directory.iterdir():
            # A path that is neither, such as a dangling link, is reported when it is read.
            if path.is_file() or not path.is_dir():
                files.append(path.name)
            elif path.name != "cache" and not path.name.startswith("."):
                folders += 1
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {os_reason(error)}") from None
    return sorted(files), folders


def _texts(members: Mapping[str, FileMedia | TarMember]) -> dict[str, FileMedia | TarMember]:
    """Return stem → file for the `.txt` files."""
    return {_stem(name): media for name, media in members.items() if _kind(name) == ".txt"}


def _names(path: str) -> tuple[str, ...]:
    """Return the names of a file in a captions.json: its path in a tar or its base name, with or without suffix."""
    base = posixpath.basename(path)
    return path, base, _stem(path), _stem(base)


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _kind(path: str) -> str:
    """Return "media", "tar", the suffix of a side file, or "" if the file is not read."""
    base = posixpath.basename(path)
    suffix = os.path.splitext(base)[1].lower()
    if base.startswith("."):
        return ""
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return "media"
    return "tar" if suffix == ".tar" else suffix if suffix in SIDE_FILES else ""
