"""GLoRA (arXiv 2306.07967), as ComfyUI merges LyCORIS' files (comfy/weight_adapter/glora.py): ΔW = s · (B + W A).

Factors have the layout of files. The functions are what `kinds.OnWeight` asks for.
"""

from collections.abc import Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def _order(shapes: Shapes) -> tuple[str, ...] | None:
    """Return the parts (l, r, f, g) of ΔW / s = l r + W f g, in the order of new or old files; None if neither fits.

    If both do, W is square, and its side is larger than the rank.
    """
    orders = {}
    for order in (("b2", "b1", "a2", "a1"), ("b1", "b2", "a1", "a2")):
        ranks = {shapes[part][axis] for part, axis in zip(order, (1, 0, 1, 0), strict=True)}
        if len(ranks) == 1 and shapes[order[1]][1] == shapes[order[2]][0] == shapes[order[3]][1]:
            orders.setdefault(ranks.pop(), order)
    return orders[min(orders)] if orders else None


def shape(shapes: Shapes) -> tuple[int, ...] | None:
    order = _order(shapes)
    return (shapes[order[0]][0], shapes[order[1]][1]) if order else None


def rank(shapes: Shapes) -> int | None:
    order = _order(shapes)
    return shapes[order[0]][1] if order else None


def change(factors: Mapping[str, np.ndarray], weight: np.ndarray, alpha: float, strength: float) -> np.ndarray:
    del alpha, strength
    order = _order({part: factor.shape for part, factor in factors.items()})
    assert order is not None
    left, right, first, second = (factors[part] for part in order)
    return left @ right + weight.reshape(len(weight), -1) @ first @ second
