"""Captions: `name.txt` beside `name.png` holds one, the whole file."""

import os

from anima_jax.data.media import read_file
from anima_jax.errors import UserError

MAX_BYTES = 2**20


def read_caption(path: str | os.PathLike) -> str:
    """The stripped text of a caption file: UTF-8, with or without a byte order mark.

    Raises UserError for another encoding, or for a file of more than `MAX_BYTES`, which cannot be a caption.
    """
    return decode_caption(read_file(path, MAX_BYTES), os.fspath(path))


def decode_caption(data: bytes, name: str) -> str:
    """Stripped text of UTF-8 bytes; `name` says in an error whose they are."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {data[error.start]:#04x}"
        raise UserError(f"{name}: {found}, expected UTF-8 text; save the caption as UTF-8") from None
    return text.strip()
