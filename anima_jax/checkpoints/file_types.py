"""What a file is that is not safetensors, told by its first bytes: pickles, GGUF, web pages, workflows, images."""

import json
import os
import re

_TYPES: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull` or download the file"),
    (
        rb"\s*(<!doctype|<html|<\?xml|<head)",
        "a web page, not a model: the download went wrong (often a login or licence page)",
    ),
    (rb"GGUF", "a GGUF file"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0\0\0", "an image"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh", "a compressed archive; unpack it first"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"%PDF", "a PDF document"),
    (rb"\x7fELF|MZ", "a program"),
    (rb"....ftyp|\x1aE\xdf\xa3", "a video"),
    (rb"\0{64}", "empty at its beginning: an unfinished download"),
)
"""(pattern for the first bytes, what the file is)."""

_JSON_FILES: tuple[tuple[tuple[set[str], ...], str], ...] = (
    (({"nodes", "links"},), "a ComfyUI workflow"),
    (({"weight_map"},), "the index of a model in several files"),
    (({"peft_type"},), "PEFT's settings of an adapter"),
    (({"_class_name"}, {"architectures"}, {"model_type"}), "the settings of a model"),
)
"""(sets of keys, one of which such a file has, what it is)."""

_JSON_LIMIT = 20_000_000


def describe(path: str, start: bytes) -> str | None:
    """Return what a file is, as in "a GGUF file, …", given its first 512 bytes; None if they do not tell."""
    if start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        member = os.path.splitext(start[30 : 30 + int.from_bytes(start[26:28], "little")])[1]
        if start.startswith(b"PK") and member not in (b"", b".pkl"):
            return "a zip archive; unpack it first"
        return (
            "a pickle (PyTorch .pth, .ckpt, .pt), which can run code and is not supported; convert it once where "
            'PyTorch is installed: python -c "import torch, safetensors.torch as s; s.save_file(torch.load('
            f"{os.path.basename(path)!r}, map_location='cpu', weights_only=True), 'converted.safetensors')\""
        )
    known = (what for pattern, what in _TYPES if re.match(pattern, start, re.IGNORECASE | re.DOTALL))
    return next(known, None) or _json(path, start) or ("a text file" if _is_text(start) else None)


def _is_text(start: bytes) -> bool:
    """Return whether bytes are a few words of printable UTF-8, which may be cut within a character."""
    text = start.decode("utf-8", errors="ignore")
    printable = all(character.isprintable() or character in "\t\r\n\f" for character in text)
    return len(start) > 16 and printable and len(text.encode()) > len(start) - 4


def _json(path: str, start: bytes) -> str | None:
    """Return what a JSON file describes, or None if it is not JSON."""
    try:
        if not re.match(rb"(\xef\xbb\xbf)?\s*[\[{]", start) or os.path.getsize(path) > _JSON_LIMIT:
            return None
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    keys = set(found) if isinstance(found, dict) else set()
    nodes = [node for node in found.values() if isinstance(node, dict)] if isinstance(found, dict) else []
    if any("class_type" in node for node in nodes):
        keys |= {"nodes", "links"}
    known = (what for some, what in _JSON_FILES if any(needed <= keys for needed in some))
    return f"{next(known, 'a file')} in JSON, not a model"
