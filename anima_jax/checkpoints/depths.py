"""Depths of Anima models, and which blocks of one correspond to which of another.

Anima has 28 blocks. Third parties have inserted new blocks: Anima-2.9B has 40, Anima-3.8B has 52.
"""

from anima_jax.errors import UserError

INSERTED = {
    40: (2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36),
    52: (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47),
}
"""Depth → indices of the inserted blocks; the other blocks are those of the next smaller depth, in order."""

DEPTHS = (28, *INSERTED)


def depth_map(source: int, target: int) -> dict[int, int]:
    """Return block index in a model of `source` blocks → index in a model of `target` blocks.

    Blocks that the target does not have are left out.
    Raises UserError for an unknown depth.
    """
    for depth in (source, target):
        if depth not in DEPTHS:
            raise UserError(f"{depth} blocks: expected one of {', '.join(map(str, DEPTHS))}")
    if source > target:
        return {there: here for here, there in depth_map(target, source).items()}
    found = {number: number for number in range(source)}
    for depth, inserted in INSERTED.items():
        if source < depth <= target:
            kept = [number for number in range(depth) if number not in inserted]
            found = {number: kept[there] for number, there in found.items()}
    return found
