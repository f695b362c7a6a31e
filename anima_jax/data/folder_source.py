"""The images and videos of a `[[directory]]`, in the folder itself and in its tars.

The choice of files, captions and masks follows diffusion-pipe (utils/dataset.py: DirectoryDataset). Captions inside a
`.tar` are our own addition.
"""

import dataclasses
import functools
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from anima_jax.config.dataset import DirectorySource
from anima_jax.data import captions
from anima_jax.data.captions import CAPTIONS_JSON, Captions, CaptionTable, decode_caption, json_captions
from anima_jax.data.file_index import Entry
from anima_jax.data.images import IMAGE_SUFFIXES
from anima_jax.data.media import VIDEO_SUFFIXES, FileMedia, Media
from anima_jax.data.problems import Problems
from anima_jax.data.sources import (
    Candidate,
    CaptionPlace,
    Counts,
    Partners,
    SourceReader,
    count_and_name,
    log_names,
)
from anima_jax.data.tar import TarMember, read_members
from anima_jax.errors import UserError, os_reason

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of caption files. Of several files next to an image, the first of these has its caption."""

SIDE_FILES = (*CAPTION_SUFFIXES, ".npz", ".parquet", ".bak", ".db")
"""Suffixes of files that are often kept next to images; diffusion-pipe ignores them too, except `.caption`."""

NL_ENDING = "_nl"
"""`name_nl.txt` has the natural language of `name.png`, as in forks of diffusion-pipe."""

CACHE = os.path.join("cache", "anima_jax")
"""Path of the cache inside the folder of a source."""

PartnersOf = Callable[[str], Partners]
"""Image file name → the files that belong to it."""


class FolderReader(SourceReader[DirectorySource]):
    """Reader of a `[[directory]]`."""

    media_types = (FileMedia, TarMember)

    def __init__(self, source: DirectorySource):
        self.source = source
        self.name, self.location = source.path, repr(source.path)
        self.cache_dir = os.path.join(source.path, CACHE)
        keys = ("path", "mask_path", "default_mask_file", "skip_empty_caption", "online_captions")
        keys += ("caption_mode", "caption_extension", "captions_file", "cache_shuffle_delimiter")
        self.about = {key: getattr(source, key) for key in keys}
        self.about |= {"control_path": list(source.control_path)} if source.control_path else {}
        self.about |= {"inpaint_mask_path": source.inpaint_mask_path} if source.inpaint_mask_path else {}
        self._folders, self._captions = 0, source.captions_file or os.path.join(source.path, CAPTIONS_JSON)
        self._table: CaptionTable | None = None
        self._texts: _CaptionFiles | None = None

    def candidates(self, problems: Problems, counts: Counts) -> list[Candidate]:
        """List the folder and its tars. With a captions.json, the caption files next to it are not used."""
        folder = self.source.path
        files, self._folders = _list_folder(folder, "a folder of images")
        self._table = None
        if CAPTIONS_JSON in files or self.source.captions_file:
            self._table = self._read_table()
        elif self.source.online_captions:
            raise UserError(f"{self._captions}: no such file, expected one because online_captions is on")
        tables = [self._table] if self._table else []
        (partners_of, unused_partners), ignored = _partners(self.source), Counts()
        members = {file: FileMedia(folder, file) for file in files}
        self._texts = texts = None if tables else _CaptionFiles(members, self.source)
        candidates = list[Candidate]()
        for name, media in members.items():
            if _kind(name) == "tar":
                candidates += self._tar_candidates(media.name, partners_of, problems, ignored)
            else:
                candidates += _candidates(name, media, tables, texts, partners_of, ignored)
        count_and_name(counts, "caption without an image", texts.orphans() if texts else [])
        for reason, names in unused_partners().items():
            count_and_name(counts, reason, names)
        counts[f"other file ignored ({', '.join(sorted(ignored)[:5])})"] = ignored.total()
        return candidates

    def caption_written(self, place: CaptionPlace, value: Any) -> None:
        """Use a caption that was written after `candidates`: the JSON `value` of `place.key`, or a file that is new."""
        media = FileMedia(*os.path.split(place.path))
        if place.key is not None and self._table is not None and self._table.name == place.path:
            self._table.set(place.key, value)
        elif place.key is None and self._texts is not None and media.folder == self.source.path:
            self._texts.add(media.file, media)

    def count_entries(self, entries: Sequence[Entry], counts: Counts) -> None:
        source = self.source
        if self._table is not None:
            counts[f"name in {os.path.basename(self._captions)} without an image"] = self._table.unused()
        if source.mask_path and not source.default_mask_file:
            count_and_name(counts, "without a mask", [entry.media.name for entry in entries if entry.mask is None])
        if source.caption_mode != "tags":
            bare = [entry.media.name for entry in entries if not entry.nl]
            count_and_name(counts, f"without natural language (caption_mode = '{source.caption_mode}')", bare)
        if source.inpaint_mask_path:
            drawn = [entry.media.name for entry in entries if entry.inpaint_mask is None]
            count_and_name(counts, "without an inpainting mask, so that masks are drawn at random", drawn)
        of_partners = (source.mask_path, source.inpaint_mask_path, *(source.control_path or ()))
        inside = {os.path.normpath(folder) for folder in filter(None, of_partners)}
        used = sum(os.path.dirname(folder) == os.path.normpath(source.path) for folder in inside)
        counts["subfolder ignored"] = self._folders - used

    def update_captions(self, entries: list[Entry], problems: Problems) -> list[Entry]:
        """Return the entries with the current captions of captions.json if `online_captions` is on."""
        if not self.source.online_captions:
            return entries
        table, updated, lacking = self._read_table(), [], []
        for entry in entries:
            media = entry.media
            name = media.member if isinstance(media, TarMember) else posixpath.basename(media.name)
            try:
                found = _in_table(table, media, name) or Captions()
            except UserError as error:
                problems.skip(error)
                continue
            if found.tags or found.nl or not self.source.skip_empty_caption:
                updated.append(dataclasses.replace(entry, captions=found.tags or ("",), nl=found.nl))
            else:
                lacking.append(media.name)
        log_names(f"left out without a caption in {os.path.basename(self._captions)} (skip_empty_caption)", lacking)
        return updated

    def _read_table(self) -> CaptionTable:
        media = FileMedia(*os.path.split(self._captions))
        return CaptionTable(media.read(), media.name, self.source.cache_shuffle_delimiter)

    def _tar_candidates(
        self, tar: str, partners_of: PartnersOf, problems: Problems, ignored: Counts
    ) -> Iterator[Candidate]:
        """List a tar. The table of the folder takes precedence over one inside, and that over caption files inside."""
        members = {member.member: member for member in read_members(tar, problems)}
        delimiter = self.source.cache_shuffle_delimiter
        try:
            inside = [
                CaptionTable(member.read(), member.name, delimiter)
                for name, member in members.items()
                if posixpath.basename(name) == CAPTIONS_JSON
            ]
        except UserError as error:
            problems.skip(error)
            return
        tables = [*([self._table] if self._table else []), *inside]
        texts = None if inside else _CaptionFiles(members, self.source)
        for name, member in members.items():
            yield from _candidates(name, member, tables, texts, partners_of, ignored)


class _CaptionFiles:
    """The caption files next to the images of a folder or tar."""

    def __init__(self, members: Mapping[str, FileMedia | TarMember], source: DirectorySource):
        self._with_nl, self._delimiter = source.caption_mode != "tags", source.cache_shuffle_delimiter
        self._suffixes = (source.caption_extension,) if source.caption_extension else CAPTION_SUFFIXES
        images = [name for name in members if _kind(name) == "media"]
        self._images = {*images, *map(_stem, images)}
        self._files: dict[str, dict[str, FileMedia | TarMember]] = {suffix: {} for suffix in CAPTION_SUFFIXES}
        self._files |= {suffix: {} for suffix in self._suffixes}
        for name, media in members.items():
            if self.has(name):
                self._files[_suffix(name)][_stem(name)] = media

    def has(self, name: str) -> bool:
        """Return whether the file is a caption file by its name."""
        return _suffix(name) in self._files and not posixpath.basename(name).startswith(".")

    def orphans(self) -> list[str]:
        """Return the names of the text files that belong to no image."""
        files = [file for suffix, files in self._files.items() if suffix != ".json" for file in files.items()]
        return [media.name for stem, media in files if not {stem, stem.removesuffix(NL_ENDING)} & self._images]

    def of(self, name: str) -> Captions | None:
        """Return an image's captions, None if it has no caption file. Raises UserError if one cannot be read.

        Natural language that is not in the first caption file is read only if the source uses it.
        """
        found = [(suffix, file) for suffix in self._suffixes if (file := self._file(name, suffix))]
        captions = self._read(*found[0]) if found else Captions()
        if not self._with_nl:
            return captions if found else None
        nl = list(captions.nl)
        for suffix, file in self._nl_files(name, found[0][0] if found else ""):
            more = self._read(suffix, file)
            nl += more.nl if suffix == ".json" else more.tags
        return Captions(captions.tags, tuple(filter(None, nl))) if found or nl else None

    def places(self, name: str, media: FileMedia | TarMember) -> Iterator[CaptionPlace]:
        """Yield the files that `of` reads for an image; the first is where its caption is, or would be."""
        in_tar = isinstance(media, TarMember)
        found = [(suffix, file) for suffix in self._suffixes if (file := self._file(name, suffix))]
        if found:
            yield CaptionPlace(found[0][1].name, in_tar=in_tar)
        else:
            yield CaptionPlace(_stem(media.name) + self._suffixes[0], exists=False, in_tar=in_tar)
        for suffix, file in self._nl_files(name, found[0][0] if found else "") if self._with_nl else ():
            yield CaptionPlace(file.name, in_tar=in_tar, nl=suffix != ".json")

    def add(self, name: str, media: FileMedia) -> None:
        """Count a caption file that was written after the folder was listed."""
        self._files[_suffix(name)][_stem(name)] = media

    def _nl_files(self, name: str, first: str) -> Iterator[tuple[str, FileMedia | TarMember]]:
        """Yield the suffix and file of an image's further natural language; `first` is its caption file's suffix."""
        stem = _stem(name) + NL_ENDING
        if stem not in self._images and (file := self._files[".txt"].get(stem)):
            yield ".txt", file
        for suffix in CAPTION_SUFFIXES if first else ():
            if suffix not in {first, ".txt"} and (file := self._file(name, suffix)):
                yield suffix, file

    def _file(self, name: str, suffix: str) -> FileMedia | TarMember | None:
        """Return the caption file of an image: `name.suffix`, or `name.png.suffix`, as gallery-dl writes it."""
        return self._files[suffix].get(_stem(name)) or self._files[suffix].get(name)

    def _read(self, suffix: str, file: FileMedia | TarMember) -> Captions:
        data = file.read(captions.MAX_BYTES)
        return json_captions(data, file.name, self._delimiter) if suffix == ".json" else _caption(data, file.name)


def _candidates(
    name: str,
    media: FileMedia | TarMember,
    tables: Sequence[CaptionTable],
    texts: _CaptionFiles | None,
    partners_of: PartnersOf,
    ignored: Counts,
) -> Iterator[Candidate]:
    """Yield the candidate of a file in a folder or tar if it is an image or video."""
    base = posixpath.basename(name)
    if (kind := _kind(name)) == "media":
        captions_of = functools.partial(_captions, media, name, tables, texts)
        places = functools.partial(_places, media, name, tables, texts)
        yield Candidate(media, captions_of, partners_of(base), places)
    elif not kind and not (texts and texts.has(name)):
        ignored["hidden" if base.startswith(".") else os.path.splitext(base)[1] or base] += 1


def _captions(
    media: FileMedia | TarMember, name: str, tables: Sequence[CaptionTable], texts: _CaptionFiles | None
) -> Captions | None:
    """Return a file's captions from the first table that has it, else from its caption files; None if it has none."""
    for table in tables:
        if (found := _in_table(table, media, name)) is not None:
            return found
    return texts.of(name) if texts else None


def _places(
    media: FileMedia | TarMember, name: str, tables: Sequence[CaptionTable], texts: _CaptionFiles | None
) -> list[CaptionPlace]:
    """Return where `_captions` finds the captions of a file, or where a caption of it belongs."""

    def in_table(table: CaptionTable, key: str, exists: bool) -> CaptionPlace:
        in_tar = isinstance(media, TarMember) and table.name.startswith(f"{media.tar}/")
        return CaptionPlace(table.name, key, exists, in_tar)

    for table in tables:
        if (key := table.key_of(*_names(media, name), in_any_folder=posixpath.basename(name) == name)) is not None:
            return [in_table(table, key, True)]
    if texts:
        return list(texts.places(name, media))
    return [in_table(tables[0], name, False)]


def _caption(data: bytes, name: str) -> Captions:
    return Captions((decode_caption(data, name),))


def _partners(source: DirectorySource) -> tuple[PartnersOf, Callable[[], dict[str, list[str]]]]:
    """Return what finds an image's partners, and what then names those that are not used, by reason."""
    default = FileMedia(*os.path.split(source.default_mask_file)) if source.default_mask_file else None
    if default:
        default.stamp()  # a missing file is reported once, not for each image
    doubles, stems = list[str](), set[str]()
    masks = _by_stem(source.mask_path, "a folder of masks (mask_path)", doubles)
    inpaint_masks = _by_stem(source.inpaint_mask_path, "a folder of masks (inpaint_mask_path)", doubles)
    folders = source.control_path or ()
    controls = [_by_stem(folder, "a folder of control pictures (control_path)", doubles) for folder in folders]

    def partners_of(file: str) -> Partners:
        stem = _stem(file)
        stems.add(stem)
        found = [media[stem] for media in controls if stem in media]
        missing = [folder for folder, media in zip(folders, controls, strict=True) if stem not in media]
        return Partners(
            masks.get(stem, default),
            tuple(found),
            inpaint_masks.get(stem),
            f"has no control picture: expected {stem}.png, or with another suffix, in {missing[0]}" if missing else "",
        )

    def unused_partners() -> dict[str, list[str]]:
        files = [(stem, media.name) for found in controls for stem, media in found.items()]
        orphans = sorted(name for stem, name in files if stem not in stems and _kind(name) == "media")
        reason = "partner ignored (mask or control picture of whose name there is another)"
        return {"control picture without an image": orphans, reason: doubles}

    return partners_of, unused_partners


def _by_stem(folder: str | None, expected: str, doubles: list[str]) -> dict[str, FileMedia]:
    """Return file name without suffix → file of a folder of images.

    Of several with the same stem it is the first image, else the first file; other images are added to `doubles`.
    """
    files = _list_folder(folder, expected)[0] if folder else []
    found = dict[str, FileMedia]()
    for file in sorted(files, key=lambda file: _kind(file) != "media"):
        if file[0] != "." and _kind(file) not in SIDE_FILES:
            media = FileMedia(folder or "", file)
            if found.setdefault(_stem(file), media) is not media and _kind(file) == "media":
                doubles.append(media.name)
    return found


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


def _in_table(table: CaptionTable, media: Media, name: str) -> Captions | None:
    """Return the captions of a file by its whole path, its path in a tar or its base name, with or without suffix."""
    return table.of(*_names(media, name), in_any_folder=posixpath.basename(name) == name)


def _names(media: Media, name: str) -> tuple[str, ...]:
    base = posixpath.basename(name)
    return media.name, name, base, _stem(media.name), _stem(name), _stem(base)


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _kind(path: str) -> str:
    """Return "media", "tar", the suffix of a side file, or "" if the file is not read."""
    base = posixpath.basename(path)
    suffix = _suffix(base)
    if base.startswith("."):
        return ""
    if suffix in IMAGE_SUFFIXES or suffix in VIDEO_SUFFIXES:
        return "media"
    return "tar" if suffix == ".tar" else suffix if suffix in SIDE_FILES else ""
