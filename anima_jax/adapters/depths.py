"""Adapters for models of different depths, which others have made of Anima by inserting new blocks.

28 blocks are Anima, 40 Anima-2.9B, 52 Anima-3.8B. An adapter's blocks keep changing the blocks that they were trained
on, wherever those are now.
"""

from collections.abc import Iterable, Mapping

from anima_jax.adapters.patch import Patch
from anima_jax.errors import UserError

INSERTED = {
    40: (2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36),
    52: (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47),
}
"""Depth → the numbers of its new blocks; the others are those of the depth before."""

DEPTHS = (28, *INSERTED)

_BLOCKS = "blocks."


def depth_map(source: int, target: int) -> dict[int, int]:
    """Return block number in a model of `source` blocks → its number in one of `target`; new blocks have none.

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


def depth_mismatch(modules: Iterable[str], weights: Iterable[str]) -> str | None:
    """Return a message if an adapter's modules end with the last block of another depth than `weights` have, else None.

    An adapter may leave the last blocks out, but seldom exactly those that a deeper model has more.
    """
    source, target = (1 + max(map(_number, names), default=-1) for names in (modules, weights))
    if source == target or not {source, target} <= set(DEPTHS):
        return None
    return f"made for {source} blocks, and the model has {target}; `python -m convert lora --remap {source}:{target}`"


def _number(module: str) -> int:
    """Number of the transformer's block that a module or a weight is in, −1 outside of them."""
    number = module.removeprefix(_BLOCKS).partition(".")[0] if module.startswith(_BLOCKS) else ""
    return int(number) if number else -1


def remapped(patches: Mapping[str, Patch], source: int, target: int) -> dict[str, Patch]:
    """Return the patches of a model of `source` blocks for one of `target`.

    Raises UserError with the numbers of blocks that the target does not have.
    """
    numbers, found, lost = depth_map(source, target), {}, set()
    for module, patch in patches.items():
        if not module.startswith(_BLOCKS):
            found[module] = patch
            continue
        number = _number(module)
        if number in numbers:
            found[f"{_BLOCKS}{numbers[number]}{module.removeprefix(f'{_BLOCKS}{number}')}"] = patch
        else:
            lost.add(number)
    if lost:
        named = ", ".join(map(str, sorted(lost)))
        why = (
            f"a model of {target} blocks does not have"
            if max(lost) < source
            else f"a model of {source} blocks does not have either"
        )
        raise UserError(f"the adapter changes blocks {named}, which {why}")
    return found
