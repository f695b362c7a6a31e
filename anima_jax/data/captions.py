"""Captions of images: tags and natural language, from text files and JSON.

`name.txt` next to `name.png` contains one caption; `captions.json` has the captions of many files. A JSON object may
name tags and natural language, as in the metadata of sd-scripts, gallery-dl and the interfaces of boorus.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from anima_jax.errors import UserError, shorten

CAPTIONS_JSON = "captions.json"

MAX_BYTES = 2**20
"""Maximum size of a caption file in bytes."""

TAG_KEYS = ("tags", "tag_string", "tag")
COMMON_WORDS = ("description", "text", "prompt")
NL_KEYS = ("nl", "nl_caption", "natural_language", "caption", "captions", *COMMON_WORDS)
"""Keys of a JSON object that hold tags and natural language. The first that is not empty counts."""

_EXPECTED = "a list of captions, or an object with tags, caption or nl"


class Captions(NamedTuple):
    """The captions of one file, each of which may be an empty string."""

    tags: tuple[str, ...] = ()
    """Lists of tags, and captions that are not known to be anything else."""
    nl: tuple[str, ...] = ()
    """Natural language."""

    @property
    def empty(self) -> bool:
        """Whether there is no caption with any text."""
        return not any(text.strip() for text in (*self.tags, *self.nl))


def decode_caption(data: bytes, name: str) -> str:
    """Decode UTF-8 text, with or without byte order mark; convert line ends to "\\n" and strip it.

    Raises UserError for other encodings; `name` is the file name in the message.
    """
    return _decode(data, name).replace("\r\n", "\n").replace("\r", "\n").strip()


def json_captions(data: bytes, name: str, delimiter: str = ", ") -> Captions:
    """Return the captions in a JSON file of one image. Raises UserError if it is not JSON or of another form."""
    return parse_captions(read_json(data, name), name, delimiter)


def parse_captions(value: Any, name: str, delimiter: str = ", ") -> Captions:
    """Return the captions in a JSON value: a caption, a list of them, or an object with tags and natural language.

    A list of tags is joined by `delimiter`. Tags that spaces separate are a booru's, whose own spaces are underscores.
    Of a file of gallery-dl (known by its key `category`) only the tags are used, because its texts are the author's.
    Raises UserError for other values; `name` precedes the message.
    """
    if not isinstance(value, dict):
        return Captions(_texts(value, name))
    of_booru = isinstance(value.get("category"), str)
    tags = delimiter.join(_tags(_first(value, TAG_KEYS), name, delimiter, of_booru))
    # Under common words, other programs have other things than text.
    texts = {key: text for key, text in value.items() if key not in COMMON_WORDS or isinstance(text, str)}
    found = _first(texts, NL_KEYS)
    nl = () if of_booru else tuple(text.strip() for text in _texts(found or [], name))
    if not tags and nl and (caption := value.get("caption")) and caption != found:
        return Captions(_texts(caption, name), nl)  # {"caption": "1girl, solo", "nl": "A girl."}
    return Captions((tags,) if tags else (), nl)


class CaptionTable:
    """The contents of a captions.json: {file name: captions}, see `parse_captions`. Lists of captions are not stripped.

    File names may have folders and may lack their suffix. Raises UserError if `data` is not a JSON object in UTF-8;
    `name` is the file name in the message.
    """

    def __init__(self, data: bytes, name: str, delimiter: str = ", "):
        table = read_json(data, name)
        if not isinstance(table, dict):
            raise UserError(f"{name}: found {_type_name(table)}, expected an object {{file name: [captions]}}")
        # Some tools add a setting of their own, "__enable_random_caption__": true.
        self._table: dict[str, Any] = {
            key: value
            for key, value in table.items()
            if isinstance(value, str | list | dict) or not re.fullmatch("__.+__", key)
        }
        self.name, self._delimiter, self._used = name, delimiter, set[str]()

    def of(self, *names: str, in_any_folder: bool = False) -> Captions | None:
        """Return the captions under the first of a file's `names` that is in the table, or None.

        With `in_any_folder`, a key with folders counts by its file name alone, if no other key has the same.
        Raises UserError if the value has another form or a caption contains a lone surrogate.
        """
        key = self.key_of(*names, in_any_folder=in_any_folder)
        if key is None:
            return None
        self._used.add(key)
        return parse_captions(self._table[key], f"{self.name}: {shorten([key])}", self._delimiter)

    def key_of(self, *names: str, in_any_folder: bool = False) -> str | None:
        """Return the name in the table that `of` uses, or None."""
        key = next((name for name in names if name in self._table), None)
        if key is None and in_any_folder:
            key = next((self._by_base[name] for name in names if self._by_base.get(name)), None)
        return key

    def set(self, key: str, value: Any) -> None:
        """Change the JSON value of a name, as it now is in the file."""
        self._table[key] = value
        self.__dict__.pop("_by_base", None)

    def unused(self) -> int:
        """Return the number of names in the table that no call of `of` matched."""
        return len(self._table) - len(self._used)

    @functools.cached_property
    def _by_base(self) -> dict[str, str]:
        """File name without folders → the only key that has it, or "" if there are several."""
        found: dict[str, str] = {}
        for key in self._table:
            if (base := key.replace("\\", "/").rpartition("/")[2]) != key:
                found[base] = "" if base in found else key
        return found


def _first(table: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((table[key] for key in keys if table.get(key)), None)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple."""
    texts = value if isinstance(value, list) else [value]
    return tuple(_text(text, name) for text in texts)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} has {_type_name(value)}, expected {_EXPECTED}")
    # JSON may contain a lone surrogate, which is not a character and cannot be encoded in UTF-8.
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"{name} has a caption with half a character (a lone surrogate)")
    return value


def _tags(value: Any, name: str, delimiter: str, of_booru: bool) -> Iterator[str]:
    """Yield the tags in a text or a list, or in an object of these by category."""
    for group in value.values() if isinstance(value, dict) else [value] if value else []:
        texts = [text.strip() for text in _texts(group, name) if text.strip()]
        joined = isinstance(group, str) and "," not in group and delimiter not in group.strip()
        if joined and (of_booru or "_" in group):
            texts = group.split()
        yield from map(_booru_tag, texts) if of_booru or (joined and "_" in group) else texts


def _booru_tag(tag: str) -> str:
    """Return a booru's tag with spaces for underscores, except in scores, as the model knows them, and in ^_^."""
    return tag if len(tag) <= 3 or tag.startswith("score_") else tag.replace("_", " ")


def read_json(data: bytes, name: str) -> Any:
    """Return the value in a JSON file. Raises UserError if it is none, or not UTF-8."""
    try:
        return json.loads(_decode(data, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}") from None


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
