"""Captions: `name.txt` next to `name.png` contains one caption; `captions.json` may contain several per file."""

import json
from typing import Any

from anima_jax.errors import UserError

CAPTIONS_JSON = "captions.json"

MAX_BYTES = 2**20
"""Maximum size of a caption file in bytes."""


def decode_caption(data: bytes, name: str) -> str:
    """Decode UTF-8 text, with or without byte order mark; convert line ends to "\\n" and strip it.

    Raises UserError for other encodings; `name` is the file name in the message.
    """
    return _decode(data, name).replace("\r\n", "\n").replace("\r", "\n").strip()


class CaptionTable:
    """The contents of a captions.json: {file name: [captions]}. A single string counts as a list of one.

    Captions are not stripped. Raises UserError if `data` is not a JSON object in UTF-8; `name` is the file name in the
    message.
    """

    def __init__(self, data: bytes, name: str):
        try:
            table = json.loads(_decode(data, name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON: {error}") from None
        if not isinstance(table, dict):
            raise UserError(f"{name}: found {_type_name(table)}, expected an object {{file name: [captions]}}")
        self._table: dict[str, Any] = table
        self._name, self._used = name, set[str]()

    def of(self, *names: str) -> tuple[str, ...] | None:
        """Return the captions under the first of a file's `names` that is in the table, or None.

        Raises UserError if the value is not a string or a list of strings, or if a caption contains a lone surrogate.
        """
        key = next((name for name in names if name in self._table), None)
        if key is None:
            return None
        self._used.add(key)
        value = self._table[key]
        captions = value if isinstance(value, list) else [value]
        for caption in captions:
            if not isinstance(caption, str):
                raise UserError(f"{self._name}: {key} has {_type_name(caption)}, expected a list of captions")
            # JSON may contain a lone surrogate, which is not a character and cannot be encoded in UTF-8.
            if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
                raise UserError(f"{self._name}: a caption of {key} contains half a character (a lone surrogate)")
        return tuple(captions)

    def unused(self) -> int:
        """Return the number of names in the table that no call of `of` matched."""
        return len(self._table) - len(self._used)


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder starts counting after a UTF-8 byte order mark; a UTF-16 mark is itself the invalid byte.
        start = error.start + len(data) - len(error.object)
        found = f"byte {start} is {data[start]:#04x}"
        raise UserError(f"{name}: {found}, expected UTF-8 text; save the file as UTF-8") from None


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
