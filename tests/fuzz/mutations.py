"""Changes of valid files that make hostile ones: of their bytes, and of the values in their JSON, TOML and headers.

An input is a dictionary, path in a folder → bytes. A change is three integers that hypothesis draws, so that a failure
can be repeated and made smaller.
"""

import io
import itertools
import json
import math
import random
import re
import tarfile
import tomllib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from anima_jax.checkpoints.safetensors_header import DTYPES

Files = dict[str, bytes]

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    255,
    65536,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    10**19,
    10**30,
    0.0,
    -0.0,
    0.5,
    1e-320,
)
FLOATS = (1e-8, 1e8, 3e38, 1e39, 1e300, 1.7e308, math.inf, -math.inf, math.nan)
STRINGS = (
    *(
        "",
        " ",
        "0",
        "1e999",
        "nan",
        "true",
        "x" * 300,
        "x" * 100_000,
        "é漢字🙂",
        "\u202e",
        "a\nb",
        "\x00",
        "\x1b[31mred",
    ),
    *("..", "../..", "/", "/dev/full", "/dev/zero", "/proc/self/mem", "https://example.com/a.safetensors", "file:///x"),
    *("gs://bucket/x", "s3://bucket/x", "hf://owner", "hf://owner/repo/x", "C:\\Users\\x", "~", "~nobody/x", "(a+)+$"),
    *(
        "(a|a)*" * 12,
        "[",
        "*",
        "{}",
        "%s%n",
        "$(id)",
        "{0.__class__}",
        "\ud800",
        "-1",
        "1:2:3",
        "a" * 40 + "!",
        "1_000",
    ),
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": {}}, {"a": 1}, [0] * 1000, ["x"] * 1000)
TOKENS = (
    *(
        b"[" * 5000,
        b'{"a":' * 3000,
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x00" * 600,
        b"\n" * 50,
        b'"',
        b"'",
        b"}",
        b"]",
        b",",
    ),
    *(b"NaN", b"1" * 5000, b"1e400", b"\\u0000", b"\\ud800", b"<lora:x:1>", b"(" * 2000, b"embedding:a ", b":" * 50),
)
MOST_BYTES = 1 << 17
"""Tensors of a changed shape get as many bytes as the shape says, up to this many."""


KINDS = ("tree", "tree", "tree", "bytes", "bytes", "tree", "drop", "splice")
"""What is changed: a value, bytes, a file (left out), or a file for another valid one. Shrinking prefers the first."""


class Change(NamedTuple):
    """`where` and `what` choose the place and the new value."""

    kind: str
    where: int
    what: int


# ---- trees ---------------------------------------------------------------------------------------------------------


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value.encode("utf-8", "replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007f")
    return '"none"' if value is None else str(value)


def _to_toml(tree: Any) -> bytes:
    return "".join(f"{json.dumps(str(key))} = {_toml_value(value)}\n" for key, value in tree.items()).encode()


def _from_safetensors(data: bytes) -> Any:
    end = 8 + int.from_bytes(data[:8], "little")
    tree = json.loads(data[8:end])
    for name, entry in tree.items():
        if name != "__metadata__":
            first, last = entry.pop("data_offsets")
            entry["data"] = data[end + first : end + last]
    return tree


def _to_safetensors(tree: Any) -> bytes:
    """The file of a tree, whose tensors have as many bytes as their shapes say where that is few."""
    header, chunks, at = {}, [], 0
    for name, entry in tree.items():
        if name == "__metadata__" or not isinstance(entry, dict):
            header[name] = entry
            continue
        data = entry.get("data", b"")
        data = data if isinstance(data, bytes) else str(data).encode("utf-8", "replace")
        shape, dtype = entry.get("shape"), entry.get("dtype")
        if (
            isinstance(shape, list)
            and all(type(size) is int and size >= 0 for size in shape)
            and isinstance(dtype, str)
        ):
            wanted = math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
            data = (
                (data * (wanted // max(1, len(data)) + 1) or bytes(wanted))[:wanted] if wanted <= MOST_BYTES else data
            )
        others = {key: value for key, value in entry.items() if key != "data"}
        header[name] = {**others, "data_offsets": [at, at + len(data)]}
        chunks.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def _from_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def _from_png(data: bytes) -> Any:
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append([data[at + 4 : at + 8].decode("latin-1"), data[at + 8 : at + 8 + size]])
        at += 12 + size
    return chunks


def _to_png(tree: Any) -> bytes:
    """A PNG of these chunks, with checksums that are right."""
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in tree:
        body = str(kind).encode("latin-1", "replace")[:4].ljust(4) + (
            data if isinstance(data, bytes) else str(data).encode()
        )
        found += (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return found


def _from_tar(data: bytes) -> Any:
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [
            {"name": info.name, "size": info.size, "type": info.type.decode(), "linkname": "", "mode": info.mode}
            | {"pax_headers": {}, "data": file.extractfile(info).read()}  # type: ignore[union-attr]
            for info in file
        ]


def _to_tar(tree: Any) -> bytes:
    """A tar with these members, whose sizes may be wrong."""
    found = b""
    for member in tree:
        data = member.pop("data", b"")
        info = tarfile.TarInfo(str(member.pop("name", "x")))
        for key, value in member.items():
            setattr(info, key, str(value)[:1].encode() if key == "type" else value)
        found += info.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape") + data + bytes(-len(data) % 512)
    return found + bytes(1024)


CODECS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    ".json": (json.loads, lambda tree: json.dumps(tree).encode()),
    ".jsonl": (_from_lines, lambda tree: b"".join(json.dumps(row).encode() + b"\n" for row in tree)),
    ".toml": (lambda data: tomllib.loads(data.decode()), _to_toml),
    ".safetensors": (_from_safetensors, _to_safetensors),
    ".png": (_from_png, _to_png),
    ".tar": (_from_tar, _to_tar),
}
"""Suffix → how the values of such a file are read and written."""


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key or index in it."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(pairs):
        yield tree, key
        yield from _places(value)


def _value(rng: random.Random, old: Any, tree: Any) -> Any:
    """A value to put in the place of an old one: often of the same type, sometimes from elsewhere in the tree."""
    if isinstance(old, bytes):
        return _changed_bytes(rng, old)
    choice = rng.random()
    if choice < 0.15:
        container, key = rng.choice(list(_places(tree)))
        return container[key]
    if isinstance(old, int | float) and not isinstance(old, bool) and choice < 0.7:
        near = (
            old + 1,
            old - 1,
            -old,
            old * 2,
            old / 2 if abs(old) < 1e300 else 0,
            str(old),
            [old],
            float(old) if abs(old) < 1e300 else 0,
        )
        return rng.choice((*near, *NUMBERS, *FLOATS))
    if isinstance(old, str) and choice < 0.5:
        return _changed_text(rng, old)
    if isinstance(old, str) and choice < 0.8:
        return rng.choice((old.upper(), old + "x", old[:-1], old * 2, *STRINGS))
    return rng.choice((*NUMBERS, *FLOATS, *STRINGS, *OTHERS, [old], {"a": old}))


def _changed_text(rng: random.Random, text: str) -> str:
    """Text with another word, number or mark in the place of one."""
    words = re.findall(r"\w+|\W", text) or [""]
    at = rng.randrange(len(words))
    words[at] = rng.choice(
        (*map(str, (*NUMBERS, *FLOATS)), *STRINGS, rng.choice(words), words[at] * 2, "", *"()<>:,=\\[]{}\"'")
    )
    return "".join(words)


def _changed_tree(rng: random.Random, tree: Any) -> Any:
    places = list(_places(tree))
    if not places:
        return rng.choice((*OTHERS, *NUMBERS))
    container, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):  # another name
            container[str(_value(rng, key, tree))[:400]] = container.pop(key)
        case 2 if isinstance(container, list):
            container.insert(key, container[key])
        case 2:
            container[f"{key}{rng.choice(('2', '.', '.x', ' '))}"] = container[key]
        case 3:
            other, name = rng.choice(places)
            if other is not container[key] and not _contains(container[key], other):
                other[name] = container[key]
        case _:
            container[key] = _value(rng, container[key], tree)
    return tree


def _contains(tree: Any, wanted: Any) -> bool:
    return tree is wanted or any(
        _contains(container[key], wanted) for container, key in itertools.islice(_places(tree), 100)
    )


# ---- bytes ---------------------------------------------------------------------------------------------------------


def _changed_bytes(rng: random.Random, data: bytes) -> bytes:  # noqa: PLR0911 - a list of ways
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 8, 16, 100, 1000))
    if rng.random() < 0.3:
        at = min(at, rng.randrange(256))  # headers
    head, tail = data[:at], data[at:]
    match rng.randrange(8):
        case 0:
            return head + bytes([(tail[0] if tail else 0) ^ 1 << rng.randrange(8)]) + tail[1:]
        case 1:
            return head + rng.randbytes(length) + tail[length:]
        case 2:
            return head
        case 3:
            return head + tail[length:]
        case 4:
            return head + tail[:length] + tail
        case 5:
            return head + rng.choice(TOKENS) + tail
        case 6:
            size = rng.choice((1, 2, 4, 8))
            number = int(rng.choice(NUMBERS[:13])) & (2 ** (8 * size) - 1)
            return head + number.to_bytes(size, rng.choice(("little", "big"))) + tail[size:]
        case _:
            other = rng.randrange(len(data) + 1)
            return head + data[other : other + length] + tail[length:]


def changed(files: Files, change: Change, others: list[Files]) -> Files:
    """Return the input after one change: `kind` is bytes, tree, drop (a file) or splice (with another valid input)."""
    rng = random.Random(hash((change.kind == "tree", change.where, change.what)))
    names = sorted(files)
    name = names[change.where % len(names)]
    suffix = "." + name.rpartition(".")[2]
    if change.kind == "tree" and suffix in CODECS:
        read, write = CODECS[suffix]
        try:
            return {**files, name: write(_changed_tree(rng, read(files[name])))}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError, tarfile.TarError):
            return files  # an earlier change has made the file unreadable
    if change.kind == "drop":
        return {key: data for key, data in files.items() if key != name} or files
    if change.kind == "splice":
        other = rng.choice(others)
        return {**files, name: other[rng.choice(sorted(other))]}
    return {**files, name: _changed_bytes(rng, files[name])}
