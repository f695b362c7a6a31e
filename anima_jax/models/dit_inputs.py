"""Inputs of the diffusion transformer's blocks, and the check that those of `AnimaDiT.velocity` fit together.

Axes: b batch, l image tokens, n context rows, d width, h heads, k head size, t frames.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

Condition = tuple[Array, Array, Array | None]
"""SiLU of the timestep embedding (b, t, d), AdaLN term shared by all blocks (b, t, 3d), each token's frame (b, l).

t is 1, or the number of frames if each frame has its own time. With t = 1 the tokens' frames are None.
"""


class Modulations(NamedTuple):
    """AdaLN values at b noise levels, float32: what `AnimaDiT.modulations` computes once for many evaluations."""

    blocks: tuple[Array, ...]
    """Those of self-attention, cross-attention and MLP, each (layers, b, 1, 3d)."""

    final: Array
    """Those of the final layer, (b, 1, 2d)."""

    def at(self, index: Array) -> "Modulations":
        """Return those of one of the levels, for a whole batch."""
        blocks = tuple(jax.lax.dynamic_slice_in_dim(values, index, 1, axis=1) for values in self.blocks)
        return Modulations(blocks, jax.lax.dynamic_slice_in_dim(self.final, index, 1))

    def of_examples(self, index_b: Array) -> "Modulations":
        """Return those of the level that each example has."""
        return Modulations(tuple(values[:, index_b] for values in self.blocks), self.final[index_b])


class KeysValues(NamedTuple):
    """Keys and values of the context rows, (layers, b, h, n, k) or one layer's: the result of `AnimaDiT.keys_values`.

    Heads come before rows, as the attention kernels read them, so that an evaluation transposes nothing.
    """

    keys: Array
    values: Array


def of_examples(memory: Any, prompt_b: Array | None) -> Any:
    """Return the context rows, or keys and values of a layer, of the prompt that each example has."""
    return memory if prompt_b is None else jax.tree.map(lambda prompts: prompts[prompt_b], memory)


Layer = tuple[Any, tuple[Array, ...] | None, KeysValues | None, tuple[Any, ...]]
"""A block, or the stack of all, its modulations and keys and values if they are known, and its control modules."""


def check_inputs(
    features: int,
    context_width: int,
    tokens_blc: Array,
    grid: Array | tuple[int, int, int],
    times_b: Array | Modulations,
    context_bnd: Array | KeysValues,
    prompt_b: Array | None = None,
) -> None:
    """Raise ValueError unless these inputs of `AnimaDiT.velocity` fit together.

    `features` are those of a token. Traced times are not compared.
    """
    # Arrays of the same batch take the place of what was computed from times and context rows.
    times: Any = times_b
    if isinstance(times_b, Modulations):
        times = np.zeros(len(tokens_blc) if len(times_b.final) == 1 else len(times_b.final))
    known = isinstance(context_bnd, KeysValues)
    context: Any = np.zeros((context_bnd.keys.shape[1], 0, context_width)) if known else context_bnd
    for name, array in (("latents", tokens_blc), ("times", times), ("context rows", context)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} are {array.dtype}, expected floating-point numbers")
    if tokens_blc.ndim != 3 or tokens_blc.shape[2] != features:
        raise ValueError(f"tokens have the shape {tokens_blc.shape}, expected (batch, tokens, {features})")
    if times.ndim not in (1, 2):
        raise ValueError(f"times have the shape {times.shape}, expected (batch,) or (batch, frames)")
    if context.ndim != 3 or context.shape[2] != context_width:
        raise ValueError(f"context rows are {context.shape}, expected (batch, rows, {context_width})")
    prompts = len(context) if prompt_b is None else len(prompt_b)
    batches = {"latents": len(tokens_blc), "times": len(times), "context rows": prompts}
    if isinstance(grid, tuple):
        if math.prod(grid) != tokens_blc.shape[1]:
            raise ValueError(f"{tokens_blc.shape[1]} tokens for a grid of {' × '.join(map(str, grid))} patches")
    else:
        batches["grid"] = len(grid)
    if len(set(batches.values())) > 1:
        unequal = ", ".join(f"{name} {size}" for name, size in batches.items())
        raise ValueError(f"batch sizes differ: {unequal}")
    if isinstance(times, Tracer) or not getattr(times, "is_fully_addressable", True):
        return
    times = np.asarray(times, np.float32)
    if not np.all((times >= 0) & (times <= 1)):
        raise ValueError(f"times {times.min():g} to {times.max():g}, expected 0 (data) to 1 (noise)")
