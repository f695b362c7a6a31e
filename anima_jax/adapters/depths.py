"""Remapping of adapters between Anima models of different depths.

Anima has 28 blocks. Third parties have inserted new blocks: Anima-2.9B has 40, Anima-3.8B has 52. A remapped adapter
changes the blocks that it was trained on, at their new positions.
"""

from collections.abc import Iterable, Mapping

from anima_jax.adapters.patch import Patch
from anima_jax.errors import UserError, shell_command

INSERTED = {
    40: (2, 5, 8, 11, 14, 17, 21, 24, 27, 30, 33, 36),
    52: (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47),
}
"""Depth → indices of the inserted blocks; the other blocks are those of the next smaller depth, in order."""

DEPTHS = (28, *INSERTED)

_BLOCKS = "blocks."


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


def depth_mismatch(modules: Iterable[str], weights: Iterable[str]) -> str | None:
    """Return a message if an adapter seems made for another depth than the model's, else None.

    `modules` are the adapter's and `weights` the model's. An adapter may skip the last blocks of a model, but it rarely
    ends exactly at the last block of another depth.
    """
    source, target = (1 + max(map(_number, names), default=-1) for names in (modules, weights))
    if source == target or not {source, target} <= set(DEPTHS):
        return None
    advice = shell_command("anima_jax.convert", "lora", "--remap", f"{source}:{target}")
    return f"made for {source} blocks, and the model has {target}; `{advice}`"


def _number(module: str) -> int:
    """Return the index of the transformer block that contains a module or weight, or −1 outside the blocks."""
    number = module.removeprefix(_BLOCKS).partition(".")[0] if module.startswith(_BLOCKS) else ""
    return int(number) if number else -1


def remapped(patches: Mapping[str, Patch], source: int, target: int) -> dict[str, Patch]:
    """Return patches for a model of `source` blocks as patches for a model of `target` blocks.

    Raises UserError, with the block indices, for blocks that the target (or the source itself) does not have.
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
