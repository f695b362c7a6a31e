"""Prompts as the transformer's input: context rows, which the LLM adapter computes from Qwen3's states.

Axes: b batch, n source (Qwen3) tokens or context rows, m target (T5) tokens, d features.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.models.constraints import constrain
from anima_jax.models.dit import CONTEXT_ROWS
from anima_jax.models.parameters import Params, merge


class Context(NamedTuple):
    """Context rows of prompts. `lengths_b` is None unless there are more than 512 rows."""

    rows_bnd: Any
    lengths_b: Any


def join_contexts(*contexts: Context, least: int = 0) -> Context:
    """Return all contexts as one batch of `least` rows or more.

    Shorter ones are padded with zeros, which their lengths mask.
    """
    length = max(least, *(context.rows_bnd.shape[1] for context in contexts))
    rows = [jnp.pad(x.rows_bnd, ((0, 0), (0, length - x.rows_bnd.shape[1]), (0, 0))) for x in contexts]
    lengths = None
    if length > CONTEXT_ROWS:
        full = [np.full(len(x.rows_bnd), CONTEXT_ROWS, np.int32) for x in contexts]
        lengths = np.concatenate(
            [own if x.lengths_b is None else x.lengths_b for x, own in zip(contexts, full, strict=True)]
        )
    return Context(jnp.concatenate(rows), lengths)


@functools.partial(jax.jit, static_argnames="graphdef")
def context_rows(
    params: Params,
    states_bnd: Array,
    source_mask_bn: Array,
    target_bm: Array,
    target_mask_bm: Array,
    weights_bm: Array,
    *,
    graphdef: nnx.GraphDef[Any],
) -> Array:
    """Return the LLM adapter's rows (b, m, d), each multiplied by its token's prompt weight."""
    rows_bmd = merge(graphdef, params).llm_adapter(states_bnd, target_bm, source_mask_bn, target_mask_bm)
    return constrain(rows_bmd * weights_bm[..., None].astype(rows_bmd.dtype), "nnn")
