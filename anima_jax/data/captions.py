"""Captions: `name.txt` beside `name.png` holds one, the whole file; `captions.json` holds several for each file."""

import json
import os
from typing import Any

from anima_jax.data.media import read_file
from anima_jax.errors import UserError

CAPTIONS_JSON = "captions.json"

MAX_BYTES = 2**20
"""A larger text file is no caption."""


def read_caption(path: str | os.PathLike[str]) -> str:
    """The stripped text of a caption file: UTF-8, with or without a byte order mark. Lines end in any system's way.

    Raises UserError for another encoding, or for a file of more than `MAX_BYTES`, which cannot be a caption.
    """
    return decode_caption(read_file(path, MAX_BYTES), os.fspath(path))


def decode_caption(data: bytes, name: str) -> str:
    """Stripped text of UTF-8 bytes, its lines ended by "\\n"; `name` says in an error whose they are."""
    return _decode(data, name).replace("\r\n", "\n").replace("\r", "\n").strip()


class CaptionTable:
    """A captions.json: {file name: [captions]}. A text alone stands for a list of one. Captions are kept as written.

    Raises UserError if `data` is not JSON in UTF-8, or no object; `name` is what the message calls it.
    """

    def __init__(self, data: bytes, name: str):
        try:
            table = json.loads(_decode(data, name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON: {error}") from None
        if not isinstance(table, dict):
            raise UserError(f"{name}: found {_kind(table)}, expected an object {{file name: [captions]}}")
        self._table: dict[str, Any] = table
        self._name, self._asked = name, set[str]()

    def of(self, *names: str) -> tuple[str, ...] | None:
        """The captions under the first of a file's names that is there; None if none is.

        Raises UserError if what is there is neither a text nor a list of texts.
        """
        key = next((name for name in names if name in self._table), None)
        if key is None:
            return None
        self._asked.add(key)
        value = self._table[key]
        captions = value if isinstance(value, list) else [value]
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(f"{self._name}: {key} has {_kind(caption)}, expected a list of captions")
            # JSON can spell half a surrogate pair, which is no character and cannot be written anywhere again.
            if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise UserError(f"{self._name}: a caption of {key} holds half a character (a lone surrogate)")
        return tuple(captions)

    def unused(self) -> int:
        """Number of names that nobody asked for."""
        return len(self._table) - len(self._asked)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from behind a byte order mark; a mark of UTF-16 is itself what is wrong.
        start = error.start + len(data) - len(error.object)
        found = f"byte {start} is {data[start]:#04x}"
        raise UserError(f"{name}: {found}, expected UTF-8 text; save the file as UTF-8") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
