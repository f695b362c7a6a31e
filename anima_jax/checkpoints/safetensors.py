"""Reading and writing of safetensors files, one tensor at a time.

This replaces the format's own library, which cannot write a file tensor by tensor, read rows into a given buffer, read
from object stores, or represent float8 in numpy. Everything that a header claims is checked before anything is
allocated (safetensors_header.py). Tensors are read, not memory-mapped: a file that is cut off meanwhile raises an error
instead of crashing the process, and a model is not in memory twice while it is loaded.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, Self

import numpy as np

from anima_jax.checkpoints import file_types, locations, safetensors_header
from anima_jax.checkpoints.safetensors_header import CODES, DTYPES, HeaderError, TensorInfo
from anima_jax.errors import UserError, os_reason

__all__ = ["CODES", "DTYPES", "EXPECTED", "ForeignFileError", "OpenFile", "SafetensorsFile", "TensorInfo", "write"]


EXPECTED = ", expected a .safetensors file"
"""End of what a message says about a file of another type, before its advice."""


class ForeignFileError(UserError):
    """A file of another type than safetensors, as its first bytes tell; the message says which."""


class OpenFile:
    """An open file, which as a context manager it closes. `path` names it in errors."""

    path: str
    _file: Any
    """What is closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @contextlib.contextmanager
    def _reading_header(self) -> Iterator[None]:
        """Close the file after an error in the block, and raise UserError with its path for a HeaderError."""
        try:
            yield
        except HeaderError as error:
            self.close()
            raise UserError(f"{self.path}: {error}") from error
        except BaseException:
            self.close()
            raise


class SafetensorsFile(OpenFile):
    """An open safetensors file, with `metadata` (str → str) and `tensors` (name → TensorInfo, in the header's order).

    As a context manager it closes the file. `path` is local, `gs://…` or `hf://owner/repo/file`. Raises UserError if
    the file cannot be opened or is not a valid safetensors file.
    """

    def __init__(self, path: locations.PathLike):
        self.path = os.fspath(path)
        self._file, self.size = locations.open_for_reading(locations.resolve(path))
        with self._reading_header():
            header = _header_of(self.path, self._file, self.size)
            self.metadata, self.tensors = safetensors_header.parse(header, self.size)

    def storage(self, name: str) -> str | None:
        """Return None: the tensor is plain."""

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """Return {}: the tensor is plain."""
        return {}

    def read_part(self, name: str, part: str, rows: slice | None = None) -> np.ndarray:
        """Raise KeyError: the tensor is plain."""
        raise KeyError(f"{name} is plain, without part {part}")

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Read the tensor `name`, or these rows of its first axis, into a new array of the stored dtype."""
        return read_rows(self.path, self._file, self.tensors[name], rows)


def write(
    path: locations.PathLike,
    tensors: Iterable[TensorInfo],
    array_of: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    mixed: bool = False,
) -> None:
    """Write `tensors`, calling `array_of(name)` for one at a time, so that only one array is in memory.

    Arrays may have any strides; `mixed` is that of `in_file_order`. The file appears under its name only when it is
    complete; after any error an existing file is unchanged. Raises ValueError for an array whose shape or dtype is not
    that in `tensors`, UserError for a full disk, a missing folder and similar errors.
    """
    ordered = in_file_order(tensors, mixed=mixed)
    header = safetensors_header.build(ordered, metadata)
    with locations.replacing(path) as file:
        file.write(header)
        for tensor in ordered:
            array = array_of(tensor.name)
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{tensor} was announced, the array is {array.dtype} {array.shape}")
            file.write(_bytes_of(np.ascontiguousarray(array)))
            del array


def in_file_order(tensors: Iterable[TensorInfo], *, mixed: bool = False) -> list[TensorInfo]:
    """Return the tensors in file order: by decreasing item size, which aligns them, and otherwise unchanged.

    With `mixed` the power of two that divides a tensor's bytes counts instead: that aligns them too, and leaves the
    codes and scales of a weight together.
    """
    return sorted(tensors, key=lambda tensor: -max(tensor.dtype.itemsize, math.gcd(tensor.nbytes, 4) if mixed else 0))


def _bytes_of(array: np.ndarray) -> memoryview:
    """Return the memory of a C-contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def read_rows(path: str, file: IO[bytes], tensor: TensorInfo, rows: slice | None = None) -> np.ndarray:
    """Read a tensor, or these rows of its first axis, from `tensor.start` of an open file into a new array."""
    first, last, _ = (rows or slice(None)).indices(tensor.shape[0]) if tensor.shape else (0, 1, 1)
    array = np.empty((last - first, *tensor.shape[1:]) if tensor.shape else (), tensor.dtype)
    row_bytes = array.nbytes // max(1, last - first)
    read_exactly(path, file, tensor.start + first * row_bytes, _bytes_of(array))
    return array


def read_exactly(path: str, file: IO[bytes], start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the file's bytes from `start`. Raises UserError if they end early or cannot be read."""
    try:
        file.seek(start)
        while buffer:
            count = locations.read_into(file, buffer[: 2**30])  # a system call reads at most 2 GB
            if not count:
                raise UserError(f"{path}: ends early: it was cut off while it was read")
            buffer = buffer[count:]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from error


def _header_of(path: str, file: IO[bytes], size: int) -> bytearray:
    """Return the header's JSON. Raises HeaderError if the file does not begin as a safetensors file does."""
    if size == 0:
        raise HeaderError("is empty")
    start = bytearray(min(size, 512))
    read_exactly(path, file, 0, memoryview(start))
    length = int.from_bytes(start[:8], "little")
    if (start[8:9] != bytearray(b"{") or length > size - 8) and (what := file_types.describe(path, bytes(start))):
        what, semicolon, advice = what.partition("; ")
        raise ForeignFileError(f"{path}: is {what}{EXPECTED}{semicolon}{advice}")
    if start[8:9] != bytearray(b"{"):
        raise HeaderError("is not a safetensors file, or its beginning is damaged")
    if length > size - 8:
        raise HeaderError(f"is cut off or damaged: its header should have {length} bytes, the file has {size}")
    if length > safetensors_header.LIMIT:
        raise HeaderError(f"its header claims {length} bytes, the format allows {safetensors_header.LIMIT}")
    header = bytearray(length)
    read_exactly(path, file, 8, memoryview(header))
    return header
