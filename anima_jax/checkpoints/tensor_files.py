"""Files of tensors, whatever their format: safetensors and GGUF; quantised weights are dequantised when read."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.quantised import view
from anima_jax.checkpoints.quantised.gguf import GgufFile, has_magic
from anima_jax.checkpoints.safetensors import ForeignFileError, SafetensorsFile
from anima_jax.checkpoints.safetensors_header import TensorInfo


class TensorFile(Protocol):
    """An open file of tensors, which as a context manager it closes.

    `path` names it, `size` is its number of bytes, `metadata` its texts. `tensors` maps the name of each tensor to its
    shape and the dtype in which `read` returns it, which is float32 for a quantised one.
    """

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Read a tensor, or these rows of its first axis, into a new array."""
        ...

    def storage(self, name: str) -> str | None:
        """Return the format of a quantised tensor, None for a plain tensor.

        It is a key of `quantised.formats.FORMATS`, or of `ggml.BLOCK_FORMATS`.
        """
        ...

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """Return name → description of the parts of a quantised tensor as stored; {} for a plain tensor."""
        ...

    def read_part(self, name: str, part: str, rows: slice | None = None) -> np.ndarray:
        """Read a part of the quantised tensor `name`, or these rows of the part's first axis, as stored."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...

    def __enter__(self) -> "TensorFile": ...

    def __exit__(self, *_: object) -> None: ...


def open_tensors(path: PathLike) -> TensorFile:
    """Open a file of tensors; its first bytes and its names tell the format.

    `path` is local, `gs://…` or `hf://owner/repo/file`. Raises UserError if the file cannot be opened, is of another
    type, or has quantised weights that are damaged or of an unknown format.
    """
    try:
        file = SafetensorsFile(path)
    except ForeignFileError:
        if has_magic(path):
            return GgufFile(path)
        raise
    try:
        return view.recognise(file)
    except BaseException:
        file.close()
        raise
