"""Editing captions in their own files: text files, JSON of one image, and JSON files with the captions of many.

Only what was edited changes: byte order mark, line ends, indentation, order and all other values stay. What is written
is read again first, as training reads it; if that would not give the new text, nothing is written.
"""

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from anima_jax.checkpoints.locations import is_remote, replacing, writing_to
from anima_jax.data.captions import (
    COMMON_WORDS,
    MAX_BYTES,
    NL_KEYS,
    TAG_KEYS,
    Captions,
    decode_caption,
    parse_captions,
    read_json,
)
from anima_jax.data.media import read_file
from anima_jax.data.sources import CaptionPlace
from anima_jax.errors import UserError
from anima_jax.serving.http.routes import ConflictError

MAX_TABLE_BYTES = 2**28
"""Of a JSON file with the captions of many images."""

CaptionKind = Literal["tags", "nl"]
JsonPath = tuple[str | int, ...]

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


class CaptionField(NamedTuple):
    """One caption of an image: its text, what kind it is, where it is, and its path in the JSON value there."""

    text: str
    kind: CaptionKind
    place: CaptionPlace
    path: JsonPath = ()


class FileChange(NamedTuple):
    """A file that was edited, and its bytes before and after; None: it did not exist."""

    path: str
    before: bytes | None
    after: bytes


def read_fields(places: Sequence[CaptionPlace], delimiter: str = ", ") -> list[CaptionField]:
    """Return the captions in these places, at least one, which is empty if there are none. Raises UserError."""
    found = [field for place in places for field in _fields(place, delimiter)]
    return found or [CaptionField("", "tags", place) for place in places[:1]]


def version_of(places: Sequence[CaptionPlace]) -> str:
    """Return a hash of the captions in these places, which changes with them. Raises UserError."""
    digest = hashlib.sha256()
    for place in places:
        value = _content(place)
        text = json.dumps(_value(value, place), sort_keys=True).encode() if place.key is not None else value
        digest.update(b"\0none" if text is None else b"\0" + hashlib.sha256(text).digest())
    return digest.hexdigest()[:32]


def write_captions(
    edits: Sequence[tuple[CaptionField, str]], roots: Sequence[str], delimiter: str = ", "
) -> tuple[FileChange, dict[str, Any]]:
    """Replace the texts of captions that are all in one file, atomically.

    Return what changed, and key → new JSON value if the file has keys. Raises UserError if the file is in a tar,
    remote, or not below one of the folders `roots` (or one of these files), and if a text cannot be written so.
    """
    place = edits[0][0].place
    path, content = _allowed(place, roots), _content(place)
    texts = [(field, text.replace("\r\n", "\n").replace("\r", "\n").strip()) for field, text in edits]
    if any("\ud800" <= letter <= "\udfff" for _, text in texts for letter in text):
        raise UserError(f"{place.name}: the caption has half a character (a lone surrogate)")
    values = dict[str, Any]()
    if place.key is not None or path.lower().endswith(".json"):
        new = _json_edited(content, texts, delimiter, values)
    else:
        new = _text_edited(content or b"", texts[-1][1])
        if decode_caption(new, place.name) != texts[-1][1]:
            raise UserError(f"{place.name}: the caption cannot be written to this file as it is")
    limit = MAX_BYTES if place.key is None else MAX_TABLE_BYTES
    if len(new) > limit:
        raise UserError(f"{place.name}: {len(new)} bytes, expected at most {limit}")
    _replace(path, content, new)
    return FileChange(path, content, new), values


def undo_change(change: FileChange) -> None:
    """Write back a file as it was. Raises ConflictError if it was changed meanwhile."""
    if (read_file(change.path, MAX_TABLE_BYTES) if os.path.lexists(change.path) else None) != change.after:
        raise ConflictError(f"{os.path.basename(change.path)}: was changed meanwhile, so it stays as it is")
    if change.before is None:
        with writing_to(change.path):
            os.unlink(change.path)
    else:
        _replace(change.path, change.after, change.before)


def _replace(path: str, before: bytes | None, after: bytes) -> None:
    with replacing(path) as file:
        if before is not None:
            shutil.copymode(path, str(file.name))
        file.write(after)


def is_editable(place: CaptionPlace, roots: Sequence[str]) -> str:
    """Return why a caption cannot be edited, "" if it can."""
    try:
        _allowed(place, roots)
    except UserError as error:
        return str(error)
    return ""


def _allowed(place: CaptionPlace, roots: Sequence[str]) -> str:
    """Return the real path of a place. Raises UserError unless it is a file of the data set that can be written."""
    if place.in_tar:
        raise UserError(f"{place.name}: is in a tar, which is not changed here")
    if is_remote(place.path):
        raise UserError(f"{place.name}: is not on this machine, so it is not changed here")
    real = os.path.realpath(place.path)
    for root in map(os.path.realpath, roots):
        if real == root or real.startswith(os.path.join(root, "")):
            return real
    raise UserError(f"{place.name}: is a link out of the data set's folder, so it is not changed here")


def _content(place: CaptionPlace) -> bytes | None:
    """Return the bytes of a place's file, None if it does not exist."""
    if place.in_tar:
        return b""
    limit = MAX_BYTES if place.key is None else MAX_TABLE_BYTES
    return read_file(place.path, limit) if place.key is not None or os.path.lexists(place.path) else None


def _value(content: bytes | None, place: CaptionPlace) -> Any:
    """Return the JSON value of a place, None if it has none yet."""
    if content is None:
        return None
    value = _table(content, place.name) if place.key is not None else read_json(content, place.name)
    if place.key is None:
        return value
    return value.get(place.key) if isinstance(value, dict) else None


@functools.lru_cache(maxsize=2)
def _table(content: bytes, name: str) -> Any:
    """Return the value in a JSON file of many captions, which is read for each of them."""
    return read_json(content, name)


# ---- reading ------------------------------------------------------------------------------------------------------


def _fields(place: CaptionPlace, delimiter: str) -> list[CaptionField]:
    content = _content(place)
    if content is None or place.in_tar:
        return []
    if place.key is None and not place.path.lower().endswith(".json"):
        return [CaptionField(decode_caption(content, place.name), "nl" if place.nl else "tags", place)]
    value = _value(content, place)
    if value is None:
        return []
    found = parse_captions(value, place.name, delimiter)
    paths = _paths(value, found)
    fields = [CaptionField(text, "tags", place) for text in found.tags]
    fields += [CaptionField(text, "nl", place) for text in found.nl]
    return [field._replace(path=path) for field, path in zip(fields, paths, strict=True)]


def _paths(value: Any, found: Captions) -> list[JsonPath]:
    """Return the path of each caption that `parse_captions` found in a JSON value."""
    if isinstance(value, str):
        return [()]
    if isinstance(value, list):
        return [(index,) for index in range(len(value))]
    nl_key = next((key for key in NL_KEYS if value.get(key) and (key not in COMMON_WORDS or _is_text(value[key]))), "")
    tag_key = next((key for key in TAG_KEYS if value.get(key)), "")
    paths: list[JsonPath] = [(tag_key,)] if found.tags and tag_key else []
    paths += [("caption",)] if len(found.tags) == 1 and not paths else []
    paths += [("caption", index) for index in range(len(found.tags))] if len(found.tags) > 1 else []
    several = isinstance(value.get(nl_key), list)
    return paths + [(nl_key, index) if several else (nl_key,) for index in range(len(found.nl))]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# ---- writing ------------------------------------------------------------------------------------------------------


def _text_edited(content: bytes, text: str) -> bytes:
    """Return a text file with another caption: byte order mark, line ends and white space around it stay."""
    body = content.removeprefix(_BOM)
    data = text.replace("\n", "\r\n" if b"\r\n" in body else "\n").encode()
    stripped = body.strip()
    start = body.find(stripped) if stripped else 0
    around = (body[:start], body[start + len(stripped) :]) if stripped else (b"", body)
    return content[: len(content) - len(body)] + around[0] + data + around[1]


def _json_edited(
    content: bytes | None, edits: Sequence[tuple[CaptionField, str]], delimiter: str, values: dict[str, Any]
) -> bytes:
    """Return a JSON file with other captions; `values` gets key → new value. Raises UserError as `write_captions`."""
    if content is None:
        return f"{json.dumps({'caption': edits[-1][1]}, ensure_ascii=False)}\n".encode()
    text = content.decode("utf-8-sig")
    escaped = text.isascii() and "\\u" in text
    start, _ = _span(text, ())
    if edits[0][0].place.key is None:
        spans = {"": _span(text, ())}
    else:
        members = _members(text, start)
        spans = {json.loads(text[begin:end]): (value, last) for begin, end, value, last in members}
    pieces, added = dict[tuple[int, int], str](), list[tuple[str, str]]()
    for field, new in edits:
        key = field.place.key or ""
        if (span := spans.get(key)) is None:
            added.append((key, new))
            continue
        before = pieces.get(span, text[span[0] : span[1]])
        pieces[span] = _value_edited(before, field, new, delimiter, escaped)
        values[key] = json.loads(pieces[span])
    for span in sorted(pieces, reverse=True):
        text = text[: span[0]] + pieces[span] + text[span[1] :]
    for key, new in added:
        text = _with_member(text, key, new, escaped)
    values |= {key: found for key, found in json.loads(text).items() if key in dict(added)} if added else {}
    return (_BOM if content.startswith(_BOM) else b"") + text.encode()


def _value_edited(before: str, field: CaptionField, text: str, delimiter: str, escaped: bool) -> str:
    """Return the JSON text of an image's value with another caption. Raises UserError if it would not be read so."""
    value = json.loads(before)
    if isinstance(value, dict) and not field.path:
        key = next((key for key in (*TAG_KEYS, *NL_KEYS) if value.get(key) == ""), "caption")
        after = _replaced(before, (key,), text, escaped) if key in value else _with_member(before, key, text, escaped)
    elif isinstance(value, list) and not field.path:
        after = _replaced(before, (), [text], escaped)
    else:
        old = _at(value, field.path)
        of_booru = isinstance(value, dict) and isinstance(value.get("category"), str)
        after = _replaced(before, field.path, _of_form(old, text, delimiter, of_booru), escaped)
    value = json.loads(after)
    read = parse_captions(value, field.place.name, delimiter)
    texts, wanted = [found.strip() for found in (*read.tags, *read.nl)], text
    if field.path and isinstance(_at(value, field.path), dict):
        # The order of the categories stays.
        wanted, texts = _sorted_tags(text, delimiter), [_sorted_tags(found, delimiter) for found in texts]
    if wanted not in texts and (wanted or not read.empty):
        raise UserError(f"{field.place.name}: the caption cannot be written in this file's form; it would be {texts}")
    return after


def _of_form(old: Any, text: str, delimiter: str, of_booru: bool) -> Any:
    """Return a text in the form of an old value: one text, a list of tags, or an object of these by category."""
    if isinstance(old, str):
        joined = "," not in old and delimiter not in old.strip()
        if joined and (of_booru or "_" in old):
            return " ".join(tag.replace(" ", "_") for tag in _split(text, delimiter))
        return text
    tags = _split(text, delimiter)
    if isinstance(old, list):
        return [tag.replace(" ", "_") for tag in tags] if of_booru else tags
    rest, groups = list(tags), dict[str, Any]()
    for name, group in old.items():
        known = group.split() if isinstance(group, str) and "," not in group else group
        known = _split(known, delimiter) if isinstance(known, str) else known
        shown = {tag: tag if not of_booru and "_" not in tag else tag.replace("_", " ") for tag in known}
        kept = [tag for tag in known if shown[tag] in rest or tag in rest]
        for tag in kept:
            rest.remove(tag if tag in rest else shown[tag])
        groups[name] = kept
    first = "general" if "general" in groups else next(iter(groups), "general")
    added = [tag.replace(" ", "_") for tag in rest] if of_booru else rest
    groups[first] = [*groups.get(first, []), *added]
    return {
        name: (" " if "," not in str(old.get(name, ",")) else delimiter).join(tags)
        if isinstance(old.get(name), str)
        else tags
        for name, tags in groups.items()
    }


def _split(text: str, delimiter: str) -> list[str]:
    return [tag.strip() for tag in text.split(delimiter.strip() or delimiter) if tag.strip()]


def _at(value: Any, path: JsonPath) -> Any:
    for step in path:
        value = value[step]
    return value


def _sorted_tags(text: str, delimiter: str) -> str:
    return delimiter.join(sorted(_split(text, delimiter)))


def _replaced(text: str, path: JsonPath, value: Any, escaped: bool) -> str:
    """Return JSON text with another value at a path; everything around it stays byte for byte."""
    start, end = _span(text, path)
    if isinstance(value, list) and (spans := _items(text, start) if text[start] == "[" else []):
        first, last = text[start : spans[0][0]], text[spans[-1][1] : end]
        between = text[spans[0][1] : spans[1][0]] if len(spans) > 1 else f",{first[1:] or ' '}"
        items = between.join(json.dumps(item, ensure_ascii=escaped) for item in value)
        return text[:start] + first + items + last + text[end:]
    return text[:start] + json.dumps(value, ensure_ascii=escaped) + text[end:]


def _with_member(text: str, key: str, value: str, escaped: bool) -> str:
    """Return JSON text with one more member at the end of its object, written as its neighbours are."""
    start, end = _span(text, ())
    members = _members(text, start)
    name = json.dumps(key, ensure_ascii=escaped)
    if not members:
        return text[: start + 1] + f"{name}: {json.dumps(value, ensure_ascii=escaped)}" + text[end - 1 :]
    _, last_key, last_value, last_end = members[-1]
    lists = text[last_value] == "["  # the other images have lists of captions
    between = f",{text[start + 1 : members[0][0]]}" if len(members) < 2 else text[members[-2][3] : members[-1][0]]
    shown = json.dumps([value] if lists else value, ensure_ascii=escaped)
    return text[:last_end] + between + name + text[last_key:last_value] + shown + text[last_end:]


def _span(text: str, path: JsonPath) -> tuple[int, int]:
    """Return where the value at a path begins and ends in JSON text. Raises LookupError if it is not there."""
    start = _skip(text, 0)
    for step in path:
        if isinstance(step, int):
            start = _items(text, start)[step][0]
        else:  # of several members of one name, the last counts
            start = [value for first, end, value, _ in _members(text, start) if json.loads(text[first:end]) == step][-1]
    return start, _end(text, start)


def _members(text: str, start: int) -> list[tuple[int, int, int, int]]:
    """Return (begin of key, end of key, begin of value, end of value) of each member of the object at `start`."""
    found = list[tuple[int, int, int, int]]()
    at = _skip(text, start + 1)
    while text[at] != "}":
        end = _end(text, at)
        value = _skip(text, _skip(text, end) + 1)
        found.append((at, end, value, _end(text, value)))
        at = _skip(text, found[-1][3])
        at = _skip(text, at + 1) if text[at] == "," else at
    return found


def _items(text: str, start: int) -> list[tuple[int, int]]:
    """Return (begin, end) of each item of the array at `start`."""
    found = list[tuple[int, int]]()
    at = _skip(text, start + 1)
    while text[at] != "]":
        found.append((at, _end(text, at)))
        at = _skip(text, found[-1][1])
        at = _skip(text, at + 1) if text[at] == "," else at
    return found


def _end(text: str, start: int) -> int:
    return json.JSONDecoder().raw_decode(text, start)[1]


def _skip(text: str, at: int) -> int:
    """Return the position of the first character from `at` on that is no white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at
