"""Text encoder states of captions and prompts, computed by one program for the cache, training and sampling.

Axes: b batch, n source (Qwen3) tokens, m target (T5) tokens, d features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, merge, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.text.tokenizers import VECTOR, PromptIds

LENGTH_STEP = 64
"""Token lists are padded to a multiple of this, so that captions of many lengths share a few programs."""


class EncodedText(NamedTuple):
    """One caption without padding: Qwen3's states (n, d) and T5 ids (m,)."""

    states_nd: np.ndarray
    target_ids_m: np.ndarray


def text_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype in which text is computed: float32 instead of float16, whose range Qwen3's activations exceed.

    All other dtypes are their own. The LLM adapter, which is small, is computed in it too.
    """
    return jnp.dtype(jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype)


def encode_tokens(qwen: Qwen3, dtype: DTypeLike) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """Return `text_states` of this encoder: (ids_bn, mask_bn) → (b, n, d), on the devices of its parameters.

    They are computed in the `text_dtype` of `dtype`.
    """
    (graphdef, params), dtype = split(qwen), text_dtype(dtype)
    return lambda ids_bn, mask_bn: text_states(params, ids_bn, mask_bn, graphdef=graphdef, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def text_states(
    params: Params,
    ids_bn: Any,
    mask_bn: Any,
    vectors_bnd: Any = None,
    attended_bn: Any = None,
    *,
    graphdef: nnx.GraphDef[Any],
    dtype: Any,
) -> jax.Array:
    """Return Qwen3's states (b, n, d), computed in `dtype`; padded rows are 0. See `Qwen3.__call__`."""
    return merge(graphdef, params)(ids_bn, mask_bn, vectors_bnd=vectors_bnd, attended_bn=attended_bn, dtype=dtype)


def text_rows(captions: Sequence[EncodedText], source_length: int, target_length: int) -> Text:
    """Return the captions as one batch, padded to `source_length` and `target_length` tokens."""
    source_bnd, source_mask_bn = padded([caption.states_nd for caption in captions], source_length)
    target_bm, target_mask_bm = padded([caption.target_ids_m for caption in captions], target_length)
    return Text(source_bnd, source_mask_bn, target_bm, target_mask_bm)


def padded(arrays: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return arrays (n, …) zero-padded and stacked to (b, length, …), and the int32 mask (b, length) of real rows."""
    joined = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    mask = np.zeros((len(arrays), length), np.int32)
    for row, array in enumerate(arrays):
        joined[row, : len(array)] = array
        mask[row, : len(array)] = 1
    return joined, mask


def padded_prompt(ids: PromptIds, length: int) -> tuple[np.ndarray, ...]:
    """Return the arguments of `text_states` for one prompt: ids and mask (1, length), and what its embeddings need."""
    source = padded([ids.qwen_ids], length)
    if ids.vectors is None and ids.attended is None:
        return source
    vectors_nd = np.zeros((len(ids.qwen_ids), 1 if ids.vectors is None else ids.vectors.shape[1]), np.float32)
    if ids.vectors is not None:
        vectors_nd[ids.qwen_ids == VECTOR] = ids.vectors
    attended = np.ones(len(ids.qwen_ids), np.int32) if ids.attended is None else ids.attended
    return *source, padded([vectors_nd], length)[0], padded([attended], length)[0]


def rounded_up(length: int, step: int = LENGTH_STEP) -> int:
    """Return `length`, at least 1, rounded up to a multiple of `step`."""
    return max(1, -(-length // step)) * step
