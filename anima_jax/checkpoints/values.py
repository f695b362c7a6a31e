"""Values that a file should not have: NaN, infinity, and tensors of zeros only."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.quantised.parts import QuantisationError
from anima_jax.checkpoints.safetensors import TensorInfo
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.errors import UserError, plural, shorten

_CHUNK = 2**26  # bytes that are read at once


class ValueCheck(NamedTuple):
    """The tensors of a file with NaN or infinite values, each with their number, and those of zeros only.

    `unreadable` are the errors of quantised tensors whose scales are not valid.
    """

    not_finite: dict[str, int]
    zero: list[str]
    unreadable: list[str]

    @property
    def problem(self) -> str | None:
        """The tensors with invalid scales, NaN or infinite values as text, or None."""
        if self.unreadable:
            more = len(self.unreadable) - 1
            return self.unreadable[0] + (f" ({plural(more, 'more tensor')} of the kind)" if more else "")
        if not self.not_finite:
            return None
        listed = shorten([f"{name} ({count})" for name, count in self.not_finite.items()])
        return f"NaN or infinite values in {plural(len(self.not_finite), 'tensor')}: {listed}"


def check_values(file: TensorFile) -> ValueCheck:
    """Read every tensor of floating-point numbers, a part at a time."""
    found = ValueCheck({}, [], [])
    for name, tensor in file.tensors.items():
        if tensor.dtype.kind in "iub" or not tensor.nbytes:
            continue
        broken, any_value = 0, False
        try:
            for rows in _chunks(tensor):
                values = file.read(name, rows)
                finite = np.isfinite(values)
                broken += values.size - int(np.count_nonzero(finite))
                any_value = any_value or bool(np.any(values))
        except QuantisationError as error:
            found.unreadable.append(str(error).removeprefix(f"{file.path}: "))
            continue
        if broken:
            found.not_finite[name] = broken
        if not any_value:
            found.zero.append(name)
    return found


def first_problem(paths: Iterable[PathLike]) -> str | None:
    """Return the first file that has NaN or infinite values, with their tensors, or None. Other paths are passed by."""
    for path in paths:
        try:
            with open_model(path) as file:
                problem = check_values(file).problem
        except UserError:  # a folder, or a file that has been deleted since
            continue
        if problem:
            return f"{path}: {problem}"
    return None


def _chunks(tensor: TensorInfo) -> Iterator[slice | None]:
    """Yield ranges of rows of the tensor's first axis that together are all of it."""
    if not tensor.shape:
        yield None
        return
    rows = max(1, _CHUNK // max(1, tensor.nbytes // tensor.shape[0]))
    for first in range(0, tensor.shape[0], rows):
        yield slice(first, first + rows)
