"""Scaled dot-product attention: one function, several back ends.

`xla` runs everywhere. It works through the queries in blocks, so that the scores of all queries never exist at once,
and its backward is written out (FlashAttention's recomputation, arXiv 2205.14135): the softmax statistics stay float32
and every product has operands of one dtype and a float32 result, the fast path of 16-bit products everywhere.
`cudnn` is NVIDIA's fused kernel; padding is expressed to it by lengths, never by a mask, which it would materialise.

Axes: b batch, l queries, n keys, h heads (g key/value heads, h = g · r), k head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

IMPLEMENTATIONS = ("auto", "xla", "cudnn")

_SCORE_BYTES = 16 * 2**20
"""Float32 scores that one block of queries may occupy."""

_FLOOR = -1e30
"""A finite stand-in for the maximum over no keys at all: exp(−inf − floor) is 0, not NaN."""


def attention(
    q_blhk: Array,
    k_bnhk: Array,
    v_bnhk: Array,
    *,
    key_lengths_b: Array | None = None,
    key_mask_bn: Array | None = None,
    causal: bool = False,
    zero_keys: int = 0,
    implementation: str = "auto",
) -> Array:
    """softmax(q·kᵀ / sqrt(k)) · v, shaped and typed as `q_blhk`.

    Keys and values may have fewer heads than the queries (grouped-query attention). Keys at or beyond `key_lengths_b`
    and keys where `key_mask_bn` is false take no part; a query without any key gives 0. `causal` lets query l see
    keys 0…l. `zero_keys` more keys and values of zeros take part in the softmax without being stored.

    Raises ValueError for an unknown or unsuitable `implementation`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation '{implementation}', expected one of {', '.join(IMPLEMENTATIONS)}")
    if q_blhk.shape[2] % k_bnhk.shape[2]:
        raise ValueError(f"{q_blhk.shape[2]} query heads do not divide into {k_bnhk.shape[2]} key heads")
    if implementation == "auto":
        implementation = "cudnn" if key_mask_bn is None and _cudnn_takes(q_blhk) else "xla"
    if implementation == "cudnn":
        if key_mask_bn is not None or (zero_keys and key_lengths_b is not None):
            raise ValueError("cudnn attention takes key lengths: no mask, and no zero keys behind them")
        return _cudnn(q_blhk, k_bnhk, v_bnhk, key_lengths_b, causal, zero_keys)
    batch, keys = k_bnhk.shape[:2]
    if key_lengths_b is not None:
        within_bn = jnp.arange(keys) < key_lengths_b[:, None]
        key_mask_bn = within_bn if key_mask_bn is None else within_bn & key_mask_bn
    elif key_mask_bn is not None:
        key_mask_bn = jnp.broadcast_to(key_mask_bn.astype(bool), (batch, keys))
    q_bhlk, k_bgnk, v_bgnk = (x.swapaxes(1, 2) for x in (q_blhk, k_bnhk, v_bnhk))
    out_bhlk: Array = _xla(q_bhlk, k_bgnk, v_bgnk, key_mask_bn, causal, zero_keys)
    return out_bhlk.swapaxes(1, 2)


# NVIDIA


def _cudnn_takes(q_blhk: Array) -> bool:
    head_size = q_blhk.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.devices()[0].client.platform_version.lower()
        and q_blhk.dtype in (jnp.bfloat16, jnp.float16)
        and head_size % 8 == 0
        and head_size <= 128
    )


def _cudnn(q_blhk, k_bnhk, v_bnhk, key_lengths_b, causal, zero_keys):
    if zero_keys:
        k_bnhk, v_bnhk = (jnp.pad(x, ((0, 0), (0, zero_keys), (0, 0), (0, 0))) for x in (k_bnhk, v_bnhk))
    lengths = {}
    if key_lengths_b is not None:
        every_query_b = jnp.full(q_blhk.shape[:1], q_blhk.shape[1], jnp.int32)
        lengths = {"key_value_seq_lengths": key_lengths_b.astype(jnp.int32), "query_seq_lengths": every_query_b}
    out_blhk = jax.nn.dot_product_attention(q_blhk, k_bnhk, v_bnhk, is_causal=causal, implementation="cudnn", **lengths)
    return checkpoint_name(out_blhk, "attention_out")


# Everywhere


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _xla(q_bhlk, k_bgnk, v_bgnk, key_mask_bn, causal, zero_keys):
    return _xla_forward(q_bhlk, k_bgnk, v_bgnk, key_mask_bn, causal, zero_keys)[0]


def _xla_forward(q_bhlk, k_bgnk, v_bgnk, key_mask_bn, causal, zero_keys):
    blocks_q, size = _query_blocks(q_bhlk, k_bgnk)

    def block(q_bgmk, start):
        scores = _scores(q_bgmk, k_bgnk, key_mask_bn, causal, start, size)
        peak = jnp.maximum(scores.max(-1, keepdims=True), 0.0 if zero_keys else _FLOOR)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True) + zero_keys * jnp.exp(-peak)
        out = _product("bgmn,bgnk->bgmk", weights.astype(v_bgnk.dtype), v_bgnk) / jnp.where(total > 0, total, 1.0)
        # With no key at all the log of the total is +inf, so that the backward's weights exp(score − log total) are 0.
        log_total = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)
        return out.astype(q_bhlk.dtype), log_total

    out, log_total = _map_blocks(block, blocks_q, size)
    out_bhlk = checkpoint_name(_join_blocks(out, q_bhlk), "attention_out")
    log_total = checkpoint_name(log_total, "attention_out")
    return out_bhlk, (q_bhlk, k_bgnk, v_bgnk, key_mask_bn, out_bhlk, log_total)


def _xla_backward(causal, zero_keys, residuals, grad_bhlk):
    q_bhlk, k_bgnk, v_bgnk, key_mask_bn, out_bhlk, log_total = residuals
    blocks_q, size = _query_blocks(q_bhlk, k_bgnk)
    dtype, scale = q_bhlk.dtype, 1.0 / math.sqrt(q_bhlk.shape[-1])
    # Σ grad · out, the part of the softmax's derivative that is common to a row.
    shared_bhl1 = jnp.sum(grad_bhlk.astype(jnp.float32) * out_bhlk.astype(jnp.float32), -1, keepdims=True)
    blocks_grad, blocks_shared = (_split_blocks(x, k_bgnk.shape[1], size) for x in (grad_bhlk, shared_bhl1))

    def block(carry, inputs):
        grad_k, grad_v = carry
        q_bgmk, grad_bgmk, shared, log_total, start = inputs
        weights = jnp.exp(_scores(q_bgmk, k_bgnk, key_mask_bn, causal, start, size) - log_total)
        grad_weights = _product("bgmk,bgnk->bgmn", grad_bgmk, v_bgnk)
        grad_scores = (weights * (grad_weights - shared) * scale).astype(dtype)
        grad_v += _product("bgmn,bgmk->bgnk", weights.astype(dtype), grad_bgmk)
        grad_k += _product("bgmn,bgmk->bgnk", grad_scores, q_bgmk)
        return (grad_k, grad_v), _product("bgmn,bgnk->bgmk", grad_scores, k_bgnk).astype(dtype)

    zeros = (jnp.zeros(k_bgnk.shape, jnp.float32), jnp.zeros(v_bgnk.shape, jnp.float32))
    starts = jnp.arange(blocks_q.shape[0]) * size
    inputs = (blocks_q, blocks_grad, blocks_shared, log_total, starts)
    if blocks_q.shape[0] == 1:
        (grad_k, grad_v), grad_q = block(zeros, jax.tree.map(lambda x: x[0], inputs))
        grad_q = grad_q[None]
    else:
        (grad_k, grad_v), grad_q = jax.lax.scan(block, zeros, inputs)
    return _join_blocks(grad_q, q_bhlk), grad_k.astype(k_bgnk.dtype), grad_v.astype(v_bgnk.dtype), None


_xla.defvjp(_xla_forward, _xla_backward)


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q_bgmk, k_bgnk, key_mask_bn, causal, start, size):
    """Float32 scores of one block, −inf where a query must not look. Rows m are (r, block query), queries fastest."""
    scores = _product("bgmk,bgnk->bgmn", q_bgmk, k_bgnk) / math.sqrt(q_bgmk.shape[-1])
    if key_mask_bn is not None:
        scores = jnp.where(key_mask_bn[:, None, None], scores, -jnp.inf)
    if causal:
        rows = start + jnp.arange(scores.shape[2]) % size
        scores = jnp.where(rows[:, None] >= jnp.arange(scores.shape[3]), scores, -jnp.inf)
    return scores


def _query_blocks(q_bhlk: Array, k_bgnk: Array) -> tuple[Array, int]:
    """Queries in blocks (blocks, b, g, r · size, k), padded at the end, and the block size."""
    batch, heads, length, _ = q_bhlk.shape
    limit = max(16, _SCORE_BYTES // (4 * batch * heads * k_bgnk.shape[2]))
    count = -(-length // limit)
    size = -(-length // count)
    return _split_blocks(q_bhlk, k_bgnk.shape[1], size), size


def _split_blocks(x_bhlk: Array, groups: int, size: int) -> Array:
    batch, heads, length, features = x_bhlk.shape
    count = -(-length // size)
    x_bhlk = jnp.pad(x_bhlk, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
    x = x_bhlk.reshape(batch, groups, heads // groups, count, size, features)
    return x.transpose(3, 0, 1, 2, 4, 5).reshape(count, batch, groups, -1, features)


def _join_blocks(blocks: Array, like_bhlk: Array) -> Array:
    batch, heads, length, features = like_bhlk.shape
    count, _, groups, _, _ = blocks.shape
    x = blocks.reshape(count, batch, groups, heads // groups, -1, features).transpose(1, 2, 3, 0, 4, 5)
    return x.reshape(batch, heads, -1, features)[:, :, :length]


def _map_blocks(block, blocks: Array, size: int):
    if blocks.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], block(blocks[0], 0))
    return jax.lax.map(lambda args: block(*args), (blocks, jnp.arange(blocks.shape[0]) * size))
