"""What the formats of quantised weights have in common: their parts, and which rows of the parts belong together."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from anima_jax.checkpoints.safetensors_header import CODES, TensorInfo
from anima_jax.errors import UserError

Parts = Mapping[str, np.ndarray]
"""Name of a part, "weight" for the codes → its values."""


class QuantisationError(UserError):
    """Quantised weights that are damaged or of an unknown format."""


class PartLayout(NamedTuple):
    """The shape of a quantised weight and how its rows are found in the parts.

    `per_row` has the parts that differ between the weight's rows, each with its length on the first axis per row of the
    weight; other parts belong to all rows. Rows are read in multiples of `step`.
    """

    shape: tuple[int, ...]
    per_row: Mapping[str, Fraction]
    step: int = 1

    def whole_steps(self, rows: slice) -> slice:
        """Return the smallest range of rows that contains `rows` and begins and ends at a multiple of `step`."""
        end = -(-rows.stop // self.step) * self.step
        return slice(rows.start // self.step * self.step, min(end, self.shape[0]))

    def part_rows(self, part: str, rows: slice, length: int) -> slice | None:
        """Return the range on the first axis, of `length`, of a part that belongs to whole steps of `rows`."""
        if part not in self.per_row:
            return None
        per_row = self.per_row[part]
        end = length if rows.stop == self.shape[0] else int(rows.stop * per_row)
        return slice(int(rows.start * per_row), end)


def required(parts: Mapping[str, TensorInfo], name: str, *dtypes: np.dtype[Any]) -> TensorInfo:
    """Return a part. Raises ValueError if it is missing or its dtype is none of `dtypes`."""
    if name not in parts:
        codes, old = parts["weight"].name, any(part.name.endswith(".scale_input") for part in parts.values())
        named = "scale_weight" if old and name == "weight_scale" else name
        raise ValueError(f"{codes} is quantised, but {codes.removesuffix('weight')}{named} is missing")
    part = parts[name]
    if part.dtype not in dtypes:
        raise ValueError(f"{part.name} is {part.code}, expected {' or '.join(CODES[dtype] for dtype in dtypes)}")
    return part


def checked_scale(name: str, scale: np.ndarray, *, negative: bool = False) -> np.ndarray:
    """Return the scales of the part `name` in float32.

    Raises ValueError for one that is NaN, infinite or, unless allowed, `negative`.
    """
    values = scale.astype(np.float32)
    wrong = ~np.isfinite(values) | ((values < 0) & (not negative))
    if wrong.any():
        least = "" if negative else " of at least 0"
        raise ValueError(f"its {name} has {values[wrong].flat[0]}, expected finite numbers{least}")
    return values
