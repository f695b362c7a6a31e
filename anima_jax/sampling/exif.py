"""Texts in image files: a PNG's text chunks, and the EXIF data of JPEG, WebP and AVIF files.

A1111 writes its text as EXIF's user comment. ComfyUI writes `name:JSON` into the tags of camera model and make
(`SaveAnimatedWEBP`) and its frontend reads every such tag; a third one holds our own text.
"""

import contextlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286

ASCII, LONG, UNDEFINED = 2, 4, 7
"""TIFF's types of values."""

TIFF_HEADER_BYTES = 8

_HEADER = b"Exif\0\0" + b"II*\0" + struct.pack("<I", TIFF_HEADER_BYTES)

PARAMETERS = "parameters"
"""The name of A1111's text; in EXIF data it has none."""

TAGS = {"prompt": 0x0110, "workflow": 0x010F, "anima_jax": 0x010E}
"""Text → its tag: camera model and make as in ComfyUI, and the image's description."""

MAX_EXIF = 65_000
"""EXIF data of a JPEG must be smaller than 64 kB. Beyond this many bytes texts are left out."""

MAX_GUESSED = 2**16
"""Characters of a user comment by which its byte order is guessed."""

DROPPED_FIRST = ("workflow", "prompt", PARAMETERS)


def text_chunks(text: Mapping[str, str]) -> PngInfo:
    """Return a PNG's chunks: tEXt for ASCII, which every program reads, and iTXt for the rest."""
    chunks = PngInfo()
    for key, value in text.items():
        if value.isascii():
            chunks.add_text(key, value)
        else:
            chunks.add_itxt(key, encodable(value))
    return chunks


def exif_of_text(text: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Return EXIF data that holds these texts, and the names of those that do not fit."""
    kept = dict(text)
    while len(data := _exif(kept)) > MAX_EXIF and (drop := [name for name in DROPPED_FIRST if name in kept]):
        del kept[drop[0]]
    if len(data) > MAX_EXIF:
        kept, data = {}, b""
    return data, [name for name in text if name not in kept]


def _exif(text: Mapping[str, str]) -> bytes:
    texts = [(tag, ASCII, f"{name}:{text[name]}\0".encode()) for name, tag in TAGS.items() if name in text]
    if PARAMETERS not in text:
        return _HEADER + _directory(texts, TIFF_HEADER_BYTES) if texts else b""
    texts.append((EXIF_IFD, LONG, b""))
    after = TIFF_HEADER_BYTES + len(_directory(texts, 0))
    comment = b"UNICODE\0" + encodable(text[PARAMETERS]).encode("utf-16-be")
    texts[-1] = (EXIF_IFD, LONG, struct.pack("<I", after))
    return _HEADER + _directory(texts, TIFF_HEADER_BYTES) + _directory([(USER_COMMENT, UNDEFINED, comment)], after)


def _directory(entries: Sequence[tuple[int, int, bytes]], start: int) -> bytes:
    """Return a TIFF directory of (tag, type, value) and its values, for byte `start` of the file.

    PIL would write the user comment with a type that A1111 does not read.
    """
    rows, data, end = b"", b"", start + 2 + 12 * len(entries) + 4
    for tag, kind, value in sorted(entries):
        if kind == LONG:
            rows += struct.pack("<HHI", tag, kind, 1) + value.ljust(4, b"\0")
            continue
        rows += struct.pack("<HHII", tag, kind, len(value), end + len(data))
        data += value + b"\0" * (len(value) % 2)
    return struct.pack("<H", len(entries)) + rows + bytes(4) + data


def encodable(text: str) -> str:
    """Return the text with a question mark for each lone surrogate, which stands for a byte that is not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_text(image: Image.Image) -> dict[str, str]:
    """Return the texts of an image that is loaded, by name."""
    text = {name: value for name, value in image.info.items() if isinstance(name, str) and isinstance(value, str)}
    found: dict[str, str] = {}
    with contextlib.suppress(Exception):  # PIL's reader of broken EXIF data raises many types
        exif = image.getexif()
        for value in exif.values():
            name, colon, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
            if colon and rest.lstrip()[:1] == "{":
                found[name.lower()] = rest
        if comment := exif.get_ifd(EXIF_IFD).get(USER_COMMENT):
            found[PARAMETERS] = _decoded(comment)
    return found | text


def short_texts(text: Mapping[str, str], most: int) -> tuple[dict[str, str], list[str]]:
    """Return the texts that have at most `most` characters together, the shortest first, and the names of the others.

    For servers: while a long text is parsed, nothing else runs.
    """
    found, left_out, total = dict[str, str](), list[str](), 0
    for name, value in sorted(text.items(), key=lambda item: len(item[1])):
        total += len(value)
        if total <= most:
            found[name] = value
        else:
            left_out.append(name)
    return found, left_out


def _decoded(comment: Any) -> str:
    """Return a user comment's text: after the name of its encoding, UTF-16 of either byte order, or UTF-8."""
    if isinstance(comment, str):
        return comment
    encoding, data = bytes(comment[:8]), bytes(comment[8:])
    if encoding != b"UNICODE\0":
        return (
            (data if encoding in (b"ASCII\0\0\0", b"\0" * 8) else bytes(comment)).decode("utf-8", "replace").strip("\0")
        )
    both = [data.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
    return max(both, key=lambda text: sum(character in "\n ,:" for character in text[:MAX_GUESSED])).lstrip("\ufeff")
