"""Reading and writing of GGUF files, versions 2 and 3, as specified in `gguf.md` of https://github.com/ggml-org/ggml.

A file has key–value pairs, then the names, shapes, types and offsets of its tensors, then their data. A tensor's axes
are listed from the last to the first. ComfyUI-GGUF and stable-diffusion.cpp keep Anima's own names; llama.cpp's names
of the Qwen3 text encoder are translated to Hugging Face's. Everything that a header claims is checked before it is
used: the cost of a hostile file is bounded by its size and by the limits below.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np

from anima_jax.checkpoints import locations, safetensors
from anima_jax.checkpoints.names import qwen3
from anima_jax.checkpoints.quantised import ggml
from anima_jax.checkpoints.quantised.ggml import BlockFormat
from anima_jax.checkpoints.quantised.parts import QuantisationError
from anima_jax.checkpoints.safetensors import OpenFile
from anima_jax.checkpoints.safetensors_header import MOST_TENSORS, HeaderError, TensorInfo

MAGIC = b"GGUF"

LIMIT = 2**27
"""Largest header in bytes: a text encoder's contains its vocabulary of about 10 MB."""

MOST_ITEMS = 2**20
"""Strings and arrays that may be in arrays, all together: a vocabulary and its merges are about 300,000."""

MOST_KEPT = 64
"""Longest array that is kept; vocabularies are skipped."""

_PIECE = 2**20
_STEP = 2**23  # values that are read or written at a time
_MOST_AXES, _MOST_NESTED, _LONGEST_NAME = 8, 3, 4096
_STRING, _ARRAY, _U32 = 8, 9, 4
_OF_CONTAINER = ("general.", "tokenizer.", "split.", "comfy.", "qwen3.")
_ALIGNMENT = 32
_SCALARS = {
    **{0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4")},
    **{5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8")},
    12: np.dtype("<f8"),
}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_F32 = np.dtype("<f4")
_PLAIN_NUMBERS = {dtype: number for number, dtype in ggml.PLAIN.items()}

PLAIN_TYPES = {"f32": _F32, "f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}
"""Types that are not quantised and can be written."""


def has_magic(path: locations.PathLike) -> bool:
    """Return whether a file begins as a GGUF file does. Raises UserError if it cannot be opened."""
    file, _ = locations.open_for_reading(locations.resolve(path))
    with file:
        return file.read(len(MAGIC)) == MAGIC


class GgufFile(OpenFile):
    """An open GGUF file, with `metadata` (str → str) and `tensors` (name → TensorInfo of what `read` returns).

    A quantised tensor is read as float32, another in its own dtype. As a context manager it closes the file. `path` is
    local, `gs://…` or `hf://owner/repo/file`. Raises UserError if the file cannot be opened or is not valid.
    """

    def __init__(self, path: locations.PathLike):
        self.path = os.fspath(path)
        self._file, self.size = locations.open_for_reading(locations.resolve(path))
        with self._reading_header():
            fields, infos = _Header(self.path, self._file, self.size).parse()
            self.metadata = {key: _text(value) for key, value in fields.items() if not isinstance(value, list)}
            self.tensors: dict[str, TensorInfo] = {}
            self._forms: dict[str, BlockFormat | None] = {}
            for name, (info, form) in _translated(infos).items():
                self.tensors[name] = dataclasses.replace(info, name=name)
                self._forms[name] = form

    def storage(self, name: str) -> str | None:
        """Return the name of a tensor's block format, or None if it is not quantised."""
        form = self._forms[name]
        return form.name if form else None

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """Return what the file stores for a quantised tensor: its blocks, uint8 (blocks, bytes)."""
        info, form = self.tensors[name], self._forms[name]
        if form is None:
            return {}
        shape = (math.prod(info.shape) // form.values, form.nbytes)
        return {"blocks": TensorInfo(name, np.dtype("u1"), shape, info.start)}

    def read_part(self, name: str, part: str, rows: slice | None = None) -> np.ndarray:
        """Read a part of a quantised tensor, or these rows of it, as stored."""
        return self._read_rows(self.parts(name)[part], rows)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Read the tensor `name`, or these rows of its first axis, into a new array.

        Raises UserError if the file has been cut off since, or if a scale is NaN or infinite.
        """
        info, form = self.tensors[name], self._forms[name]
        if form is None:
            return self._read_rows(info, rows)
        first, last, _ = (rows or slice(None)).indices(info.shape[0])
        width = math.prod(info.shape[1:])
        out = np.empty((max(0, last - first), *info.shape[1:]), _F32)
        flat, begin, end = out.reshape(-1), first * width, last * width
        step = _STEP // form.values
        for block in range(begin // form.values, -(-end // form.values), step):
            part = slice(block, min(block + step, -(-end // form.values)))
            try:
                values = ggml.dequantise(self.read_part(name, "blocks", part), form)
            except ValueError as error:
                raise QuantisationError(f"{self.path}: {name}: {error}") from error
            at = part.start * form.values
            inside = slice(max(begin, at), min(end, at + len(values)))
            flat[inside.start - begin : inside.stop - begin] = values[inside.start - at : inside.stop - at]
        return out

    def _read_rows(self, tensor: TensorInfo, rows: slice | None) -> np.ndarray:
        return safetensors.read_rows(self.path, self._file, tensor, rows)


def portable(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that is of use in a file of another format: without what describes a GGUF file itself."""
    return {key: value for key, value in metadata.items() if not key.startswith(_OF_CONTAINER)}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _translated(
    infos: Mapping[str, tuple[TensorInfo, BlockFormat | None]],
) -> dict[str, tuple[TensorInfo, BlockFormat | None]]:
    """Return the tensors under Hugging Face's names if they have llama.cpp's. Raises HeaderError for a name twice."""
    renamed = {name: qwen3.from_llama_cpp(name) for name in infos}
    if len(set(renamed.values())) != len(renamed):
        raise HeaderError("some tensors are there twice, under llama.cpp's and under Hugging Face's names")
    return {renamed[name]: info for name, info in infos.items()}


class _Header:
    """The parser of a file's header. It reads the file in pieces, as far as the header goes."""

    def __init__(self, path: str, file: IO[bytes], size: int):
        self.path, self.file, self.size = path, file, size
        self.data = bytearray()
        self.at = 0
        self.items = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, tuple[TensorInfo, BlockFormat | None]]]:
        """Return the fields and, in the file's order, name → (tensor, its block format or None)."""
        self._check_version()
        tensor_count, field_count = self._number(8), self._number(8)
        self._check_count(tensor_count, "tensors", 24)
        self._check_count(field_count, "keys", 13)
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._name("a key")
            if key in fields:
                raise HeaderError(f"the header has the key {key!r:.200} twice")
            fields[key] = self._value(self._number(4), key, 0)
        parts = fields.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            raise HeaderError(
                f"is one of {parts} parts of a split GGUF file; join them with `llama-gguf-split --merge` first"
            )
        claims = [self._claim() for _ in range(tensor_count)]
        tensors: dict[str, tuple[TensorInfo, BlockFormat | None]] = {}
        for info, form in self._placed(claims, _alignment(fields)):
            if info.name in tensors:
                raise HeaderError(f"the header has {info.name!r:.200} twice")
            shape = _original_shape(info, fields.get(_ORIGINAL_SHAPE + info.name))
            tensors[info.name] = dataclasses.replace(info, shape=shape), form
        return fields, tensors

    def _check_version(self) -> None:
        if self._bytes(4) != MAGIC:
            raise HeaderError("is not a GGUF file, or its beginning is damaged")
        version = self._number(4)
        if version & 0xFFFF == 0 and version:
            raise HeaderError("is a GGUF file for big-endian machines, expected little-endian")
        if version not in (2, 3):
            raise HeaderError(f"is a GGUF file of version {version}, expected 2 or 3")

    def _check_count(self, count: int, what: str, least_bytes: int) -> None:
        if count > MOST_TENSORS or count * least_bytes > self.size - self.at:
            raise HeaderError(f"is cut off or damaged: its header claims {count:.6g} {what}")

    def _claim(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return name, stored shape, type number and offset of the next tensor."""
        name = self._name("a tensor's name")
        axes = self._number(4)
        if axes > _MOST_AXES:
            raise HeaderError(f"{name!r:.200} has {axes} axes, expected at most {_MOST_AXES}")
        shape = tuple(self._number(8) for _ in range(axes))[::-1]
        return name, shape, self._number(4), self._number(8)

    def _placed(
        self, claims: Sequence[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> Iterator[tuple[TensorInfo, BlockFormat | None]]:
        """Yield each tensor with its place in the file and its block format, after checking them."""
        data = -(-self.at // alignment) * alignment
        places: list[tuple[int, int, str]] = []
        for name, shape, number, offset in claims:
            form = ggml.BY_NUMBER.get(number)
            if form is None and number not in ggml.PLAIN:
                raise HeaderError(f"{name!r:.200} has type {_type_name(number)}, which is not supported")
            dtype = _F32 if form else ggml.PLAIN[number]
            count = math.prod(filter(None, shape))  # a zero does not hide an absurd size next to it
            if count * 8 >= 2**63:
                raise HeaderError(f"{name!r:.200} has shape {list(shape)!r:.80}, which is absurd")
            if form and (not shape or shape[-1] % form.values):
                raise HeaderError(
                    f"{name!r:.200} has shape {list(shape)!r:.80}, whose rows are not blocks of {form.values} values, "
                    f"as {form.name} has them"
                )
            nbytes = math.prod(shape) // form.values * form.nbytes if form else math.prod(shape) * dtype.itemsize
            if offset % alignment or data + offset + nbytes > self.size:
                raise HeaderError(
                    f"is cut off or damaged: {name!r:.200} should be the {nbytes} bytes from byte {data + offset:.6g}, "
                    f"the file has {self.size}"
                )
            places.append((data + offset, nbytes, name))
            yield TensorInfo(name, dtype, shape, data + offset), form
        places.sort()
        for (start, nbytes, name), (following, _, other) in itertools.pairwise(places):
            if start + nbytes > following:
                raise HeaderError(f"{other!r:.200} overlaps {name!r:.200}")

    def _value(self, kind: int, key: str, depth: int) -> Any:
        """Return a scalar, a string, or the list of a short array; a longer array is skipped and is []."""
        if kind in _SCALARS:
            return np.frombuffer(self._bytes(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()
        if kind == _STRING:
            return self._bytes(self._number(8)).decode(errors="replace")
        if kind != _ARRAY or depth > _MOST_NESTED:
            what = "arrays that are nested too deeply" if kind == _ARRAY else f"type {kind}"
            raise HeaderError(f"the header's {key!r:.200} has {what}")
        kind, count = self._number(4), self._number(8)
        if kind in _SCALARS:
            nbytes = count * _SCALARS[kind].itemsize
            if count > MOST_KEPT:
                self._skip(nbytes)
                return []
            return np.frombuffer(self._bytes(nbytes), _SCALARS[kind]).tolist()
        self.items += count
        if self.items > MOST_ITEMS or count * 8 > self.size - self.at:
            raise HeaderError(f"is cut off or damaged: the header's {key!r:.200} claims {count:.6g} items")
        for _ in range(count):
            if kind == _STRING:
                self._skip(self._number(8))
            else:
                self._value(kind, key, depth + 1)
        return []

    def _name(self, what: str) -> str:
        length = self._number(8)
        if length > _LONGEST_NAME:
            raise HeaderError(f"is damaged: {what} has {length:.6g} bytes, expected at most {_LONGEST_NAME}")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise HeaderError(f"{what} is not UTF-8 (byte {self.at - length + error.start})") from error

    def _number(self, size: int) -> int:
        begin = self.at
        self._skip(size)
        return int.from_bytes(self.data[begin : self.at], "little")

    def _bytes(self, count: int) -> bytes:
        begin = self.at
        self._skip(count)
        return bytes(self.data[begin : self.at])

    def _skip(self, count: int) -> None:
        """Move on by `count` bytes, reading more of the file if needed."""
        end = self.at + count
        if end > self.size:
            raise HeaderError(
                f"is cut off or damaged: its header should go on to byte {end:.6g}, the file has {self.size}"
            )
        if end > LIMIT:
            raise HeaderError(f"its header is longer than {LIMIT} bytes")
        if end > len(self.data):
            more = bytearray(min(max(end, len(self.data) + _PIECE), self.size) - len(self.data))
            safetensors.read_exactly(self.path, self.file, len(self.data), memoryview(more))
            self.data += more
        self.at = end


def _alignment(fields: Mapping[str, Any]) -> int:
    alignment = fields.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _PIECE or alignment & (alignment - 1):
        raise HeaderError(f"the header's general.alignment is {alignment!r:.50}, expected a power of two")
    return alignment


def _original_shape(info: TensorInfo, original: Any) -> tuple[int, ...]:
    """Return the shape before ComfyUI-GGUF's converter reshaped a tensor to rows of 256 values, or its shape."""
    if original is None:
        return info.shape
    valid = isinstance(original, list) and all(type(size) is int and size >= 0 for size in original)
    if not valid or not original or math.prod(original) != math.prod(info.shape):
        raise HeaderError(f"{info.name!r:.200} is {list(info.shape)!r:.80}, not of the original shape {original!r:.80}")
    return tuple(original)


def _type_name(number: int) -> str:
    unsupported = {9: "q8_1", 15: "q8_k", 41: "q1_0"}
    return f"{number} ({unsupported[number]})" if number in unsupported else str(number)


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor to write; `type` is `f32`, `f16`, `bf16` or a block format that can be written (`ENCODERS`)."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def form(self) -> BlockFormat | None:
        """The block format, or None for a type that is not quantised."""
        return ggml.BLOCK_FORMATS.get(self.type)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data. Raises ValueError if its rows are not whole blocks."""
        if self.form is None:
            return math.prod(self.shape) * PLAIN_TYPES[self.type].itemsize
        if not self.shape or self.shape[-1] % self.form.values:
            raise ValueError(f"{self} has rows that are not blocks of {self.form.values} values")
        return math.prod(self.shape) // self.form.values * self.form.nbytes


def write(
    path: locations.PathLike,
    tensors: Sequence[GgufTensor],
    data_of: Callable[[GgufTensor, slice], np.ndarray],
    fields: Mapping[str, str | int],
) -> None:
    """Write `tensors` in their order, and `fields`, as a file of version 3.

    `data_of(tensor, rows)` returns rows of the first axis as they are stored, codes as uint8; it is called for a
    few million values at a time, so that memory is bounded. The file appears under its name only when it is complete.
    Raises UserError for a full disk and similar errors.
    """
    with locations.replacing(path) as file:
        file.write(_header(tensors, fields))
        for tensor in tensors:
            rows = tensor.shape[0] if tensor.shape else 1
            step = max(1, _STEP * rows // max(1, math.prod(tensor.shape)))
            written = 0
            for first in range(0, rows, step):
                data = data_of(tensor, slice(first, min(rows, first + step))).reshape(-1).view(np.uint8)
                file.write(data.data)
                written += data.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"{tensor} has {tensor.nbytes} bytes, {written} were written")
            file.write(bytes(-written % _ALIGNMENT))


def _header(tensors: Sequence[GgufTensor], fields: Mapping[str, str | int]) -> bytes:
    """Return everything that precedes the data. Raises ValueError if two tensors have one name."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise ValueError("two tensors have one name")
    header = bytearray(MAGIC + _le(3, 4) + _le(len(tensors), 8) + _le(len(fields), 8))
    for key, value in fields.items():
        if isinstance(value, int):
            header += _named(key) + _le(_U32, 4) + _le(value, 4)
        else:
            header += _named(key) + _le(_STRING, 4) + _named(value)
    offset = 0
    for tensor in tensors:
        header += _named(tensor.name) + _le(len(tensor.shape), 4)
        header += b"".join(_le(size, 8) for size in reversed(tensor.shape))
        number = tensor.form.number if tensor.form else _PLAIN_NUMBERS[PLAIN_TYPES[tensor.type]]
        header += _le(number, 4) + _le(offset, 8)
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    return bytes(header) + bytes(-len(header) % _ALIGNMENT)


def _le(number: int, size: int) -> bytes:
    return number.to_bytes(size, "little")


def _named(text: str) -> bytes:
    data = text.encode()
    return _le(len(data), 8) + data
