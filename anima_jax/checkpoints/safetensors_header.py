"""Safetensors headers: strict parsing, checks against the file's actual size, and writing.

A file consists of eight bytes of header length (little endian), a JSON header (name → dtype, shape, byte range) and the
bytes of the tensors without gaps (https://github.com/huggingface/safetensors, "Format").
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from anima_jax.errors import did_you_mean

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

LIMIT = 100_000_000
"""Largest header in bytes, as in the format's own library."""

MOST_TENSORS = 100_000
"""Models have thousands of tensors; the time and memory that a hostile header costs are bounded."""

_ENTRY_LIMIT = 4096  # characters of one tensor's entry; a real one has about 80
_MAX_AXES = 64  # numpy's limit
_METADATA = "__metadata__"
_SPACE = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()


class HeaderError(Exception):
    """A header that is not valid; the message says why."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it. `start` is its byte offset in the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def code(self) -> str:
        """The format's name for the dtype: `BF16`, `F32`, …"""
        return CODES[self.dtype]


def parse(header: bytes | bytearray, file_size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata and name → TensorInfo of a file of `file_size` bytes. Raises HeaderError if invalid."""
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise HeaderError(f"the header is not UTF-8 (byte {8 + error.start})") from error
    metadata, entries = _Parser(text).header()
    data_start = 8 + len(header)
    tensors = {name: _tensor(name, entry, data_start, file_size) for name, entry in entries.items()}
    _check_gapless(tensors.values(), data_start, file_size)
    return metadata, tensors


def build(tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Return the length and header of a file whose tensors follow in this order.

    Raises ValueError for duplicate names or a header that is too long.
    """
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        if tensor.name in entries or tensor.name == _METADATA:
            raise ValueError(f"two tensors are called {tensor.name!r}")
        range_ = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": range_}
        offset += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise ValueError(f"the header would have {len(text)} bytes, the format allows {LIMIT}")
    return len(text).to_bytes(8, "little") + text


def _tensor(name: str, entry: Mapping[str, Any], data_start: int, file_size: int) -> TensorInfo:
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if code == "F4" and _are_sizes(shape) and shape and shape[-1] % 2 == 0:  # two values a byte
        code, shape = "U8", [*shape[:-1], shape[-1] // 2]
    if not isinstance(code, str) or code not in DTYPES:
        hint = did_you_mean(str(code)[:20], DTYPES)
        raise HeaderError(f"{name!r:.200} has dtype {code!r:.50}{hint}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_AXES:
        raise HeaderError(f"{name!r:.200} has shape {shape!r:.80}, expected a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{name!r:.200} has data_offsets {offsets!r:.80}, expected [begin, end]")
    begin, end = offsets
    if data_start + end > file_size:
        raise HeaderError(
            f"is cut off or damaged: {name!r:.200} should end at byte {data_start + end:.6g}, the file has {file_size}"
        )
    tensor = TensorInfo(name, DTYPES[code], tuple(shape), data_start + begin)
    # Zeros are filtered out, so that a zero does not hide an absurd size next to it.
    if math.prod(filter(None, shape)) * tensor.dtype.itemsize >= 2**63 or tensor.nbytes != end - begin:
        raise HeaderError(f"{name!r:.200} is {code} {shape!r:.80} but has {end - begin} bytes")
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_gapless(tensors: Iterable[TensorInfo], data_start: int, file_size: int) -> None:
    """Raise HeaderError unless each byte of the data belongs to exactly one tensor."""
    at, before = data_start, None
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start < at:
            raise HeaderError(f"{tensor.name!r:.200} overlaps {before!r:.200}")
        if tensor.start > at:
            raise HeaderError(f"{tensor.start - at} bytes before {tensor.name!r:.200} belong to no tensor")
        at, before = tensor.start + tensor.nbytes, tensor.name
    if at != file_size:
        raise HeaderError(f"{file_size - at} bytes at the end of the file belong to no tensor")


class _Parser:
    """A parser for the header's JSON that builds one entry at a time.

    The format has only two kinds of value, the metadata and tensors' entries. A general JSON parser would turn a
    malicious 100 MB of brackets into gigabytes of objects or a deep recursion.
    """

    def __init__(self, text: str):
        self.text = text
        self.at = 0

    def header(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Return the metadata and name → tensor entry, whose values are not yet checked."""
        metadata: dict[str, str] | None = None
        entries: dict[str, dict[str, Any]] = {}
        for name in self._keys():
            if name in entries or (name == _METADATA and metadata is not None):
                raise HeaderError(f"the header has {name!r:.200} twice")
            if name == _METADATA:
                metadata = self._metadata()
            else:
                entries[name] = self._entry(name)
                if len(entries) > MOST_TENSORS:
                    raise HeaderError(f"the header has more than {MOST_TENSORS} tensors")
        self._skip_space()
        if self.at != len(self.text):
            raise self._damaged("nothing more")
        return metadata or {}, entries

    def _metadata(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        for key in self._keys():
            if key in metadata:
                raise HeaderError(f"the header's metadata has {key!r:.200} twice")
            metadata[key] = self._string()
        return metadata

    def _entry(self, name: str) -> dict[str, Any]:
        # No valid string inside an entry contains a brace.
        end = self.text.find("}", self.at, self.at + _ENTRY_LIMIT) + 1
        try:
            if not end:
                raise ValueError
            pairs = json.loads(self.text[self.at : end], object_pairs_hook=tuple)
            if not isinstance(pairs, tuple) or sorted(key for key, _ in pairs) != ["data_offsets", "dtype", "shape"]:
                raise ValueError
        except (ValueError, RecursionError) as error:
            raise HeaderError(
                f"the header's entry of {name!r:.200} is not an object of dtype, shape and data_offsets, each once"
            ) from error
        self.at = end
        return dict(pairs)

    def _keys(self) -> Iterator[str]:
        """Yield the keys of the object that begins here. The caller reads each key's value before the next key."""
        self._expect("{")
        for index in itertools.count():
            if self._take("}"):
                return
            if index:
                self._expect(",")
            key = self._string()
            self._expect(":")
            self._skip_space()
            yield key

    def _string(self) -> str:
        self._skip_space()
        if not self.text.startswith('"', self.at):
            raise self._damaged("a string")
        try:
            value, end = _JSON.raw_decode(self.text, self.at)
            value.encode()  # a lone surrogate is valid JSON but not valid text
        except ValueError as error:
            raise self._damaged("a valid string") from error
        self.at = end
        return value

    def _skip_space(self) -> None:
        space = _SPACE.match(self.text, self.at)
        self.at = space.end() if space else self.at

    def _take(self, character: str) -> bool:
        self._skip_space()
        found = self.text.startswith(character, self.at)
        self.at += found
        return found

    def _expect(self, character: str) -> None:
        if not self._take(character):
            raise self._damaged(f"'{character}'")

    def _damaged(self, expected: str) -> HeaderError:
        found = self.text[self.at : self.at + 20]
        return HeaderError(f"the header is damaged at character {self.at}: expected {expected}, found {found!r}")
