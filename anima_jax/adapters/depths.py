"""Remapping of adapters between Anima models of different depths (checkpoints/depths.py).

A remapped adapter changes the blocks that it was trained on, at their new positions.
"""

from collections.abc import Iterable, Mapping

from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.depths import DEPTHS, depth_map
from anima_jax.errors import UserError, shell_command

_BLOCKS = "blocks."


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
