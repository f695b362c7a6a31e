"""The file index of a cache: what earlier runs found in a source's files, so that unchanged files are not read again.

The index is a file of JSON lines, replaced atomically. Each source has a block: a line with its key (`about`), one line
per inspected file (`file`: stamp, digest, size), one line per entry, and a last line that marks the block as complete.
If the last line is missing or lines are damaged, the files are still known but the source is listed again.
"""

import dataclasses
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.config.sizes import Size
from anima_jax.data.images import is_black
from anima_jax.data.media import Media, Stamp, content_digest, probe, reading
from anima_jax.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 2
SAVE_SECONDS = 60
"""Interval in seconds between saves while files are inspected, which takes hours for many videos."""

_ROWS_PER_WRITE = 1024

_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What a damaged line raises."""


class Partner(NamedTuple):
    """A file that belongs to an image, and the SHA-256 of its content."""

    media: Media
    digest: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One image or video with its captions."""

    media: Media
    digest: bytes
    """SHA-256 of the content."""
    width: int
    """Pixels, after rotation to upright."""
    height: int
    frames: int
    """At 16 per second; 1 for an image."""
    captions: tuple[str, ...]
    """Lists of tags, or captions of any kind; at least one, which may be an empty string."""
    mask: Media | None = None
    mask_digest: bytes | None = None
    nl: tuple[str, ...] = ()
    """Captions that are known to be natural language."""
    controls: tuple[Partner, ...] = ()
    """Its control or reference pictures, in the order of their folders."""
    inpaint_mask: Partner | None = None
    """The mask of what is drawn anew, if it is not drawn at random."""

    @property
    def loss_mask(self) -> Partner | None:
        """`mask` with its digest."""
        return Partner(self.mask, self.mask_digest) if self.mask and self.mask_digest else None

    @property
    def partners(self) -> tuple[Partner, ...]:
        """Its control pictures, then its inpainting mask."""
        return (*self.controls, *([self.inpaint_mask] if self.inpaint_mask else []))


@dataclasses.dataclass(frozen=True, slots=True)
class FileInfo:
    """The result of inspecting one file; `digest` is the SHA-256 of its content."""

    stamp: Stamp | None
    digest: bytes
    size: Size
    black: bool | None = None
    """Whether a mask is black everywhere; None if it was not inspected as a mask."""


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """The result of reading a source, apart from its entries."""

    summary: str
    """The line for the log."""
    skipped: tuple[str, ...] = ()
    """A line for each file that could not be used."""
    fingerprint: str = ""
    """Hash of the state of the whole source, "" if it has none."""


class FileIndex:
    """The file index at `path` (None: empty and never written). Thread-safe.

    Sources may share an index and what it knows about each file. With `trust`, readers use the saved entries without
    looking at any file; without `keep`, the index is read but never written. A damaged index only means that files are
    read again; an index that cannot be written causes a warning.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep: bool = True, trust: bool = False):
        self.trust, self._keep = trust, keep
        self._path = None if path is None else os.fspath(path)
        self._known = dict(self._read_files())
        self._used: dict[str, FileInfo] = {}
        self._lock, self._saved = threading.Lock(), time.monotonic()

    def inspect(self, media: Media, *, as_mask: bool = False) -> FileInfo:
        """Return a media file's info, from the index or by reading the file. Raises UserError if it cannot be used."""
        stamp, info = media.stamp(), self._used.get(media.name) or self._known.get(media.name)
        if info is None or stamp is None or info.stamp != stamp or (as_mask and info.black is None):
            with reading(media, stamp) as data:
                size = probe(data, media.name)
                black = (size.frames == 1 and is_black(data, media.name)) if as_mask else None
                info = FileInfo(stamp, content_digest(data), size, black)
        with self._lock:
            self._used[media.name] = info
            if time.monotonic() >= self._saved + SAVE_SECONDS:
                self._saved = time.monotonic()
                self._write({}, (), None)
        return info

    def load(self, about: dict[str, Any], types: Iterable[type[Media]]) -> tuple[list[Entry], Summary] | None:
        """Return the entries and summary saved under the key `about`; None if there are none or they are incomplete.

        `types` are the dataclasses that the entries' media and masks may have.
        """
        by_name: dict[str, type[Any]] = {each.__name__: each for each in types}
        head, entries = {"format": FORMAT, "about": about}, list[Entry]()
        rows = itertools.dropwhile(lambda row: row != head, self._lines())
        try:
            for row in itertools.islice(rows, 1, None):
                if "entry" in row:
                    entries.append(self._entry(row, by_name))
                elif "entries" in row and row["entries"] == len(entries):
                    skipped = tuple(map(str, row["skipped"]))
                    return entries, Summary(str(row["summary"]), skipped, str(row["fingerprint"]))
                elif "file" not in row:
                    return None
        except _DAMAGED:
            return None
        return None

    def save(self, about: dict[str, Any], entries: Sequence[Entry], summary: Summary) -> None:
        """Save a source's entries and the files inspected since the last `save`, replacing those with the same key."""
        with self._lock:
            self._write(about, entries, summary)
            self._known |= self._used
            self._used = {}

    # ---- reading ----------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of the file up to the first that is not a JSON object."""
        if self._path is None:
            return
        try:
            with epath.Path(self._path).open("rb") as file:
                for line in file:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        return
                    yield row
        except (OSError, ValueError, RecursionError):
            return

    def _read_files(self) -> Iterator[tuple[str, FileInfo]]:
        lines = self._lines()
        try:
            if next(lines, {}).get("format") != FORMAT:
                return
            for row in lines:
                if "file" not in row:
                    continue
                (width, height, frames), stamp = row["size"], row["stamp"]
                size, digest = Size(int(width), int(height), int(frames)), bytes.fromhex(row["digest"])
                if not (0 < min(size) <= max(size) < 2**31) or len(digest) != 32 or not isinstance(row["file"], str):
                    return
                stamp = (int(stamp[0]), int(stamp[1])) if stamp else None
                yield row["file"], FileInfo(stamp, digest, size, bool(row["black"]) if "black" in row else None)
        except _DAMAGED:
            return

    def _entry(self, row: dict[str, Any], types: dict[str, type[Any]]) -> Entry:
        media = _media(row["entry"], types)
        mask = _media(row["mask"], types) if row["mask"] else None
        info, captions, nl = self._known[media.name], tuple(row["captions"]), tuple(row.get("nl", ()))
        for caption in (*captions, *nl):
            caption.encode()  # raises ValueError for a lone surrogate, AttributeError for anything but a string
        if not captions:
            raise ValueError("no caption")
        mask_digest = self._known[mask.name].digest if mask else None
        controls = tuple(self._partner(found, types) for found in row.get("controls", ()))
        inpaint_mask = self._partner(row["inpaint_mask"], types) if "inpaint_mask" in row else None
        return Entry(media, info.digest, *info.size, captions, mask, mask_digest, nl, controls, inpaint_mask)

    def _partner(self, row: list[Any], types: dict[str, type[Any]]) -> Partner:
        media = _media(row, types)
        return Partner(media, self._known[media.name].digest)

    # ---- writing ----------------------------------------------------------------------------------------------------

    def _write(self, about: dict[str, Any], entries: Sequence[Entry], summary: Summary | None) -> None:
        """Replace the file with the other sources' blocks and this source's, which is complete if it has a summary."""
        if self._path is None or not self._keep:
            return
        rows = itertools.chain(self._other_blocks(about), self._block(about, entries, summary))
        try:
            with writing_to(self._path):
                epath.Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:  # unbuffered, hence the large writes
                while lines := [json.dumps(row) for row in itertools.islice(rows, _ROWS_PER_WRITE)]:
                    file.write(("\n".join(lines) + "\n").encode())
        except (OSError, UserError) as error:
            log.warning("the file index is not saved, so the next run reads these files again: %s", error)

    def _other_blocks(self, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of all blocks except the source's own and the incomplete ones (key {}) of killed runs."""
        keep = False
        for row in self._lines():
            if "format" in row:
                keep = row["format"] == FORMAT and row.get("about") not in (about, {})
            if keep:
                yield row

    def _block(
        self, about: dict[str, Any], entries: Sequence[Entry], summary: Summary | None
    ) -> Iterator[dict[str, Any]]:
        yield {"format": FORMAT, "about": about}
        for name, info in self._used.items():
            black = {} if info.black is None else {"black": info.black}
            yield {"file": name, "stamp": info.stamp, "digest": info.digest.hex(), "size": info.size, **black}
        for entry in entries:
            mask = _row(entry.mask) if entry.mask else None
            more: dict[str, Any] = {"nl": entry.nl} if entry.nl else {}
            if entry.controls:
                more["controls"] = [_row(control.media) for control in entry.controls]
            if entry.inpaint_mask:
                more["inpaint_mask"] = _row(entry.inpaint_mask.media)
            yield {"entry": _row(entry.media), "captions": entry.captions, "mask": mask, **more}
        if summary is not None:
            yield {"entries": len(entries), **dataclasses.asdict(summary)}


def _row(media: Any) -> list[Any]:
    return [type(media).__name__, *(getattr(media, field.name) for field in dataclasses.fields(media))]


def _media(row: list[Any], types: dict[str, type[Any]]) -> Media:
    """Return the media of a row. Raises ValueError, LookupError or TypeError if its values have other types."""
    name, folder, *rest = row
    media = types[name](sys.intern(folder), *rest)  # all media of a folder share one string
    for field in dataclasses.fields(media):
        value = getattr(media, field.name)
        if type(value) is not field.type or (isinstance(value, int) and not 0 <= value < 2**63):
            raise ValueError(f"{field.name} is {value!r}")
    return media
