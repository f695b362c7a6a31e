"""What is known of a source's files: entries, and a memo of them, so that nothing unchanged is read again.

The memo is a file of JSON lines, replaced atomically. Each source that it knows has a block: a line of what that is
(`about`), one for each file that was looked at (`file`: stamp, digest, size), one for each entry, and a last line that
says that nothing is missing. Without the last line, or with lines that cannot be read, the files are still known but
the entries are gathered anew.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from etils import epath

from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.data.buckets import Size
from anima_jax.data.media import Stamp, label_of, probe, read_file, stamp_of
from anima_jax.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 2
SAVE_SECONDS = 60
"""Looking at many videos takes hours; so often is what was learned saved."""


class Media(Protocol):
    """Something that holds an encoded picture or video."""

    @property
    def name(self) -> str:
        """What a message calls it, and what the memo knows it by."""
        ...

    @property
    def label(self) -> str:
        """What files made from it may be called, without suffix; several media may have the same."""
        ...

    def read(self) -> bytes:
        """The encoded bytes. Raises UserError if they cannot be read."""
        ...

    def stamp(self) -> Stamp | None:
        """Size in bytes and time of the last change in ns; None: cannot be told without reading."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FileMedia:
    """A file in a folder."""

    folder: str
    file: str

    @property
    def name(self) -> str:
        return os.path.join(self.folder, self.file)

    @property
    def label(self) -> str:
        return label_of(self.file)

    def read(self) -> bytes:
        return read_file(self.name)

    def stamp(self) -> Stamp:
        return stamp_of(self.name)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One picture or video with its captions."""

    media: Media
    digest: bytes
    """SHA-256 of the content."""
    width: int
    """Pixels, upright."""
    height: int
    frames: int
    """At 16 a second; 1 is a picture."""
    captions: tuple[str, ...]
    """As they are written, stripped, empty ones too."""
    mask: Media | None = None
    mask_digest: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What looking at a file's content tells."""

    stamp: Stamp | None
    digest: bytes
    size: Size


def content_digest(data: bytes) -> bytes:
    """SHA-256 of a media file's bytes."""
    return hashlib.sha256(data).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What reading a source came to."""

    summary: str
    """For the log."""
    skipped: tuple[str, ...] = ()
    """A line about each file that could not be used."""
    fingerprint: str = ""
    """What the source as a whole was like, where that can be told."""


class Memo:
    """What earlier runs learned of files, in the file `path` (None: there is none).

    Sources may share a memo: what was learned for one is known to the next. With `trust` the entries come from it
    without a look at any file; without `keep` it is read and never written. A damaged memo counts as one that knows
    less; one that cannot be written costs a warning. Safe to use from several threads.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, keep: bool = True, trust: bool = False):
        self.trust, self._keep = trust, keep
        self._path = None if path is None else os.fspath(path)
        self._known = dict(self._read_facts())
        self._used: dict[str, Facts] = {}
        self._lock, self._saved = threading.Lock(), time.monotonic()

    def facts(self, media: Media) -> Facts:
        """Digest and size of a media file: remembered, or read now. Raises UserError if it is of no use."""
        stamp, known = media.stamp(), self._known.get(media.name)
        if known is None or stamp is None or known.stamp != stamp:
            data = media.read()
            known = Facts(stamp, content_digest(data), probe(data, media.name))
        self.learn(media, known)
        return known

    def learn(self, media: Media, facts: Facts) -> None:
        """Remember what was found out about a file."""
        with self._lock:
            self._used[media.name] = facts
            if time.monotonic() < self._saved + SAVE_SECONDS:
                return
            self._saved = time.monotonic()
            self._write({}, self._used, (), None)

    def recall(self, about: dict[str, Any], kinds: Iterable[type[Media]]) -> tuple[list[Entry], Summary] | None:
        """The entries that were saved with the same `about`; None if there are none, or not all.

        `kinds` are the classes, dataclasses each, that their media and masks may have.
        """
        makers = {kind.__name__: kind for kind in kinds}
        head, entries = {"format": FORMAT, "about": about}, list[Entry]()
        rows = itertools.dropwhile(lambda row: row != head, self._lines())
        try:
            for row in itertools.islice(rows, 1, None):
                if "entry" in row:
                    entries.append(self._entry(row, makers))
                elif "entries" in row and row["entries"] == len(entries):
                    skipped = tuple(map(str, row["skipped"]))
                    return entries, Summary(str(row["summary"]), skipped, str(row["fingerprint"]))
                elif "file" not in row:
                    return None
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        return None

    def save(self, about: dict[str, Any], entries: Iterable[Entry], summary: Summary) -> None:
        """Keep the entries, and of the files only those that were asked for since the last `save`.

        They take the place of what was saved with the same `about`; other sources' stay.
        """
        with self._lock:
            self._write(about, self._used, entries, summary)
            self._known |= self._used
            self._used = {}

    def _entry(self, row: dict[str, Any], makers: dict[str, Callable[..., Media]]) -> Entry:
        media = _rebuilt(row["entry"], makers)
        mask = _rebuilt(row["mask"], makers) if row["mask"] else None
        facts, captions = self._known[media.name], tuple(row["captions"])
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("not a list of captions")
        return Entry(media, facts.digest, *facts.size, captions, mask, self._known[mask.name].digest if mask else None)

    def _read_facts(self) -> Iterator[tuple[str, Facts]]:
        lines = self._lines()
        try:
            if next(lines, {}).get("format") != FORMAT:
                return
            for row in lines:
                if "file" not in row:
                    continue
                (width, height, frames), stamp = row["size"], row["stamp"]
                size, digest = Size(int(width), int(height), int(frames)), bytes.fromhex(row["digest"])
                if min(size) < 1 or len(digest) != 32:
                    return
                yield row["file"], Facts((int(stamp[0]), int(stamp[1])) if stamp else None, digest, size)
        except (ValueError, LookupError, TypeError, AttributeError):
            return

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The file's lines up to the first that is not JSON."""
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

    def _others(self, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of the blocks that stay when `about` is saved: all but its own and what a killed run left."""
        stays = False
        for row in self._lines():
            if "format" in row:
                stays = row["format"] == FORMAT and row.get("about") not in (about, {})
            if stays:
                yield row

    def _write(
        self, about: dict[str, Any], facts: dict[str, Facts], entries: Iterable[Entry], summary: Summary | None
    ) -> None:
        if self._path is None or not self._keep:
            return
        try:
            with writing_to(self._path):
                epath.Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                for rows in _in_chunks(itertools.chain(self._others(about), _rows(about, facts, entries, summary))):
                    file.write(rows)
        except (OSError, UserError) as error:
            log.warning("what was learned of the files is not kept: %s", error)


def _rows(
    about: dict[str, Any], facts: dict[str, Facts], entries: Iterable[Entry], summary: Summary | None
) -> Iterator[dict[str, Any]]:
    yield {"format": FORMAT, "about": about}
    for name, known in facts.items():
        yield {"file": name, "stamp": known.stamp, "digest": known.digest.hex(), "size": known.size}
    number = 0
    for entry in entries:
        number += 1
        mask = _fields(entry.mask) if entry.mask else None
        yield {"entry": _fields(entry.media), "captions": entry.captions, "mask": mask}
    if summary is not None:
        yield {"entries": number, **dataclasses.asdict(summary)}


def _fields(media: Any) -> list[Any]:
    return [type(media).__name__, *(getattr(media, field.name) for field in dataclasses.fields(media))]


def _rebuilt(row: list[Any], makers: dict[str, Callable[..., Media]]) -> Media:
    kind, place, *rest = row
    return makers[kind](sys.intern(place), *rest)  # one string for all that lie in the same place


def _in_chunks(rows: Iterable[dict[str, Any]], rows_a_chunk: int = 1024) -> Iterator[bytes]:
    """JSON lines, many in one piece: the file is not buffered."""
    lines: list[str] = []
    for row in rows:
        lines.append(json.dumps(row))
        if len(lines) == rows_a_chunk:
            yield ("\n".join(lines) + "\n").encode()
            lines = []
    if lines:
        yield ("\n".join(lines) + "\n").encode()
