"""What the formats of quantised weights have in common: their parts, and which rows of the parts belong together."""

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Parts = Mapping[str, np.ndarray]
"""Name of a part, "weight" for the codes → its values."""


class PartLayout(NamedTuple):
    """The shape of a quantised weight and how its rows are found in the parts.

    `per_row` has the parts that differ between the weight's rows, each with its length on the first axis per row of the
    weight; other parts belong to all rows. Rows are read in multiples of `step`.
    """

    shape: tuple[int, ...]
    per_row: Mapping[str, Fraction]
    step: int = 1

    def whole_steps(self, rows: slice) -> slice:
        """Return the smallest range of rows that contains `rows`, begins at a multiple of `step` and ends at one."""
        end = -(-rows.stop // self.step) * self.step
        return slice(rows.start // self.step * self.step, min(end, self.shape[0]))

    def part_rows(self, part: str, rows: slice, length: int) -> slice | None:
        """Return the range on the first axis, of `length`, of a part that belongs to whole steps of `rows`."""
        if part not in self.per_row:
            return None
        per_row = self.per_row[part]
        end = length if rows.stop == self.shape[0] else int(rows.stop * per_row)
        return slice(int(rows.start * per_row), end)
