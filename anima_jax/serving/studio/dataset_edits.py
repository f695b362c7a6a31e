"""Edits of a data set's captions: one by one, of a tag in many, and back."""

import collections
import threading
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from anima_jax.data.folder_source import FolderReader
from anima_jax.errors import UserError, one_line, plural
from anima_jax.serving.http.routes import ConflictError
from anima_jax.serving.studio.caption_edits import (
    CaptionField,
    FileChange,
    is_editable,
    read_fields,
    undo_change,
    version_of,
    write_captions,
)
from anima_jax.serving.studio.dataset_view import DatasetView, PictureRecord

TagAction = Literal["add", "remove", "rename"]

MAX_UNDO_BYTES = 2**27
"""Of the files that edits replaced, which are kept so that they can be undone."""


class CaptionChange(NamedTuple):
    """A picture's caption before and after an edit."""

    record: PictureRecord
    field: CaptionField
    after: str


class Undo(NamedTuple):
    """What takes an edit back."""

    what: str
    changes: list[tuple[FileChange, list[str]]]
    """Files, and the ids of the pictures whose captions they have."""


class CaptionEditor:
    """Edits the captions of a data set. Its methods may be called from any thread."""

    def __init__(self, view: DatasetView):
        self._view, self._lock = view, threading.Lock()
        self._undo: collections.deque[Undo] = collections.deque()

    @property
    def undoable(self) -> str:
        """What `undo` would take back, "" for nothing."""
        return self._undo[-1].what if self._undo else ""

    def fields(self, record: PictureRecord) -> list[CaptionField]:
        """Return a picture's captions as they are in its files, none if they are in a tar or no file.

        Raises UserError.
        """
        places = record.candidate.places()
        return [] if any(place.in_tar for place in places) else read_fields(places, self._delimiter(record))

    def version(self, record: PictureRecord) -> str:
        """Return what changes with the picture's captions."""
        return version_of(record.candidate.places())

    def why_not(self, record: PictureRecord, field: CaptionField) -> str:
        """Return why a caption cannot be edited, "" if it can."""
        return is_editable(field.place, self._view.roots(record.source))

    def edit(self, record: PictureRecord, index: int, text: str, version: str | None) -> None:
        """Replace a picture's caption number `index`.

        Raises ConflictError if `version` is given and no longer that of its captions, UserError if the caption
        cannot be edited, and LookupError if there is none of this number.
        """
        with self._lock:
            if version is not None and version != self.version(record):
                raise ConflictError(f"{record.name}: the caption was changed meanwhile")
            found = self.fields(record)
            if not found:
                raise UserError(f"{record.name}: its captions are not in a file that can be edited")
            self._write(f"the caption of {record.name}", [CaptionChange(record, found[index], text)])

    def tag_changes(
        self, action: TagAction, tag: str, to: str, records: Iterable[PictureRecord]
    ) -> list[CaptionChange]:
        """Return what adding, removing or renaming a tag would change in these pictures' first captions.

        Pictures whose captions cannot be edited, or read, are left out.
        """
        changes = list[CaptionChange]()
        for record in records:
            try:
                field = next((each for each in self.fields(record) if each.kind == "tags"), None)
            except UserError:
                continue
            if field is None or self.why_not(record, field):
                continue
            after = with_tag(field.text, action, tag.strip(), to.strip(), self._delimiter(record))
            if after != field.text:
                changes.append(CaptionChange(record, field, after))
        return changes

    def apply(self, what: str, changes: Sequence[CaptionChange], expected: int) -> None:
        """Make these changes. Raises ConflictError if they are not `expected` many: then nothing is changed."""
        with self._lock:
            if len(changes) != expected:
                raise ConflictError(f"{plural(len(changes), 'caption')} would change now, expected {expected}")
            self._write(what, changes)

    def undo(self) -> tuple[str, list[str]]:
        """Take the last edit back. Return what it was, and a line for each file that was changed meanwhile.

        Raises LookupError if there is none.
        """
        with self._lock:
            what, changes = self._undo.pop()
            refused = list[str]()
            for change, ids in reversed(changes):
                try:
                    undo_change(change)
                except UserError as error:
                    refused.append(one_line(error))
                    continue
                self._view.own_change()
                records = [record for id in ids if (record := self._view.reading.by_id.get(id))]
                places = [place for record in records for place in record.candidate.places()]
                if change.before is None or any(place.key is not None for place in places):
                    self._view.read()  # a file fewer, or another table
                else:
                    self._view.refresh(records)
            return what, refused

    def _write(self, what: str, changes: Sequence[CaptionChange]) -> None:
        """Write changes file by file, and remember how to take them back. Raises UserError at the first that fails."""
        by_file = collections.defaultdict[str, list[CaptionChange]](list)
        for change in changes:
            by_file[change.field.place.path].append(change)
        written = list[tuple[FileChange, list[str]]]()
        try:
            for own in by_file.values():
                record, place = own[0].record, own[0].field.place
                edits = [(change.field, change.after) for change in own]
                found, values = write_captions(edits, self._view.roots(record.source), self._delimiter(record))
                written.append((found, [change.record.id for change in own]))
                for change in own:
                    key = change.field.place.key
                    for reader in self._view.readers:
                        if isinstance(reader, FolderReader) and (key is not None or not place.exists):
                            reader.caption_written(change.field.place, values.get(key or ""))
                self._view.refresh([change.record for change in own])
        finally:
            if written:
                self._undo.append(Undo(what, written))
                while len(self._undo) > 1 and sum(map(_bytes, self._undo)) > MAX_UNDO_BYTES:
                    self._undo.popleft()

    def _delimiter(self, record: PictureRecord) -> str:
        return self._view.data.sources[record.source].cache_shuffle_delimiter


def _bytes(undo: Undo) -> int:
    return sum(len(change.before or b"") + len(change.after) for change, _ in undo.changes)


def tags_of(text: str, delimiter: str = ", ") -> list[str]:
    """Return the tags of a caption."""
    return [tag.strip() for tag in text.split(_edge(delimiter)) if tag.strip()]


def with_tag(text: str, action: TagAction, tag: str, to: str, delimiter: str) -> str:
    """Return a caption in which a tag is added at the end, removed, or renamed; other tags stay as they are.

    Tags are compared without regard to capital letters. A tag that is there already is not added again.
    """
    edge = _edge(delimiter)
    pieces = text.split(edge) if text.strip() else []
    names = [piece.strip().casefold() for piece in pieces]
    if action == "add":
        return text if tag.casefold() in names else f"{text.rstrip().rstrip(edge)}{delimiter}{tag}" if pieces else tag
    renamed = to if action == "rename" else ""
    if tag.casefold() not in names or renamed == tag:
        return text
    there = {name for name in names if name != tag.casefold()}
    kept = list[str]()
    for piece, name in zip(pieces, names, strict=True):
        if name != tag.casefold():
            kept.append(piece)
        elif renamed and renamed.casefold() not in there:
            kept.append(piece.replace(piece.strip(), renamed))
            there.add(renamed.casefold())
    return edge.join(kept).strip()


def _edge(delimiter: str) -> str:
    return delimiter.strip() or delimiter
