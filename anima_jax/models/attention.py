"""Scaled dot-product attention: one function with several back ends.

`xla` runs on all hardware. It processes the queries in blocks, so the scores of all queries are never in memory at
once. Its backward pass is hand-written and recomputes the scores, as in FlashAttention (arXiv 2205.14135). Softmax
statistics are float32, and every product has operands of one dtype and a float32 result, which is the fast path for
16-bit products on all hardware. In float16 the weights and their gradients, which at 4,096 keys may be smaller than its
smallest number, are multiplied by powers of two before they are rounded, and the products divided by them.
`cudnn` is NVIDIA's fused kernel. Padding is passed to it as lengths, because it would materialise a mask. Zero keys are
added to its softmax's sum afterwards.
`splash` is JAX's Pallas kernel for TPUs. Padding is passed to it as segment ids, and zero keys as an attention sink.

On a mesh each device computes attention for its own examples and heads (`jax.shard_map`). If the tokens are sharded
over the context axis, an all-to-all reshards from tokens to heads before attention, and another one reverses this
afterwards (arXiv 2309.14509).

Axes: b batch, l queries, n keys, h heads (g key/value heads, h = g · r), k head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from anima_jax.models.constraints import MESH_AXES, active_mesh, constrain, partition_spec
from anima_jax.platform import hardware, platform

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

_SCORE_BYTES = 16 * 2**20
"""Maximum bytes of the float32 scores of one block of queries; 16 queries are always allowed."""

TILE = 128
"""Tokens per tile: the TPU kernel needs lengths that are multiples of this."""

_SPLASH_BLOCK, _SPLASH_PARTS = 1024, 10
"""Maximum tokens of the TPU kernel's blocks, and maximum number of blocks of keys for one backward kernel."""

CUDNN_CAPABILITY = 8.0
"""Compute capability from which NVIDIA devices have cuDNN's fused attention: Ampere; V100 has 7.0 and T4 7.5."""

_FLOOR = -1e30
"""A finite stand-in for the maximum over no keys: exp(−inf − floor) is 0, not NaN."""


def attention(
    q_blhk: Array,
    k_bnhk: Array,
    v_bnhk: Array,
    *,
    key_lengths_b: Array | None = None,
    key_mask_bn: Array | None = None,
    causal: bool = False,
    zero_keys: int = 0,
    seq_sharded: str = "",
    implementation: str = "auto",
) -> Array:
    """Return softmax(q·kᵀ / sqrt(k)) · v, with the shape and dtype of `q_blhk`.

    Keys and values may have fewer heads than the queries (grouped-query attention). Keys at or beyond `key_lengths_b`
    and keys where `key_mask_bn` is false are masked; the result for a query without any key is 0. With `causal`, query
    l attends to keys 0…l. `zero_keys` is the number of additional all-zero keys and values that take part in the
    softmax; they are not stored.

    `seq_sharded` says which tokens are sharded over the mesh's context axis: none (""), the queries ("q"), or queries,
    keys and values ("qk"). Raises ValueError for an `implementation` that is unknown or does not support the masking,
    and for query heads that are not a multiple of the key heads.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation '{implementation}', expected one of {', '.join(IMPLEMENTATIONS)}")
    if q_blhk.shape[2] % k_bnhk.shape[2]:
        raise ValueError(f"{q_blhk.shape[2]} query heads do not divide into {k_bnhk.shape[2]} key heads")
    if implementation == "auto":
        implementation = _best(q_blhk, k_bnhk, key_mask_bn)
    if implementation in _FUSED and key_mask_bn is not None:
        raise ValueError(f"{implementation} attention accepts key lengths, but no mask")
    if implementation == "splash" and q_blhk.dtype == jnp.float16:
        raise ValueError("splash attention does not support float16; the TPU's kernels have no such operands")
    run = functools.partial(_local, causal=causal, zero_keys=zero_keys, implementation=implementation)
    mesh = active_mesh()
    if mesh is None:
        return run(q_blhk, k_bnhk, v_bnhk, key_lengths_b, key_mask_bn)
    queries, keys = ("blhk" if seq_sharded else "bnhk"), ("blhk" if seq_sharded == "qk" else "bnhk")
    arrays = (constrain(q_blhk, queries), constrain(k_bnhk, keys), constrain(v_bnhk, keys), key_lengths_b, key_mask_bn)
    letters = _letters(k_bnhk.shape[2], seq_sharded, mesh)
    specs = tuple(
        x if x is None else partition_spec(x.shape, axes, mesh) for x, axes in zip(arrays, letters, strict=True)
    )
    # check_vma has no rules for the kernels. With it off, gradients of replicated inputs are summed over the devices.
    out_blhk = jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)
    return constrain(out_blhk, queries)


def _letters(key_heads: int, seq_sharded: str, mesh: Any) -> tuple[str, ...]:
    """Return the axis letters (constraints.py) of queries, keys, values, lengths and mask inside `jax.shard_map`."""

    def divides(letter: str) -> bool:
        return key_heads % math.prod(mesh.shape[name] for name in MESH_AXES[letter][0]) == 0

    if seq_sharded == "qk" and divides("H"):
        queries = keys = "bnHk"
    else:
        heads = "h" if divides("h") else "n"
        queries, keys = f"b{'l' if seq_sharded else 'n'}{heads}k", f"bn{heads}k"
    return queries, keys, keys, "b", "bn"


def _best(q_blhk: Array, k_bnhk: Array, key_mask_bn: Array | None) -> str:
    """Return the implementation that `auto` selects."""
    if key_mask_bn is None and _cudnn_supports(q_blhk):
        return "cudnn"
    # The TPU's kernels have no float16.
    equal_heads = q_blhk.shape[2] == k_bnhk.shape[2]
    if key_mask_bn is None and platform() == "tpu" and equal_heads and q_blhk.dtype != jnp.float16:
        return "splash"
    return "xla"


def _local(
    q_blhk: Array,
    k_bnhk: Array,
    v_bnhk: Array,
    key_lengths_b: Array | None,
    key_mask_bn: Array | None,
    *,
    causal: bool,
    zero_keys: int,
    implementation: str,
) -> Array:
    """Compute attention on one device."""
    if implementation in _FUSED:
        return _FUSED[implementation](q_blhk, k_bnhk, v_bnhk, key_lengths_b, causal, zero_keys)
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


def _cudnn_supports(q_blhk: Array) -> bool:
    head_size = q_blhk.shape[-1]
    return (
        hardware().has_capability(CUDNN_CAPABILITY)
        and q_blhk.dtype in (jnp.bfloat16, jnp.float16)
        and head_size % 8 == 0
        and head_size <= 128
    )


def _cudnn(
    q_blhk: Array, k_bnhk: Array, v_bnhk: Array, key_lengths_b: Array | None, causal: bool, zero_keys: int
) -> Array:
    lengths: tuple[Array, ...] = ()
    if key_lengths_b is not None:
        # An example without keys attends to its first value, which is set to 0, instead of a mean of masked values.
        first_b1hk = jnp.where(key_lengths_b[:, None, None, None] > 0, v_bnhk[:, :1], 0)
        v_bnhk = jax.lax.dynamic_update_slice_in_dim(v_bnhk, first_b1hk, 0, axis=1)
        every_query_b = jnp.full(q_blhk.shape[:1], q_blhk.shape[1], jnp.int32)
        lengths = every_query_b, jnp.maximum(key_lengths_b, 1).astype(jnp.int32)
    return _cudnn_named(q_blhk, k_bnhk, v_bnhk, lengths, causal, zero_keys)


def _cudnn_call(causal: bool, *operands: Array) -> Array:
    """Call the kernel on queries, keys and values, and optionally the lengths of queries and keys (b,)."""
    lengths: dict[str, Any] = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), operands[3:], strict=False))
    return jax.nn.dot_product_attention(*operands[:3], is_causal=causal, implementation="cudnn", **lengths)


def _cudnn_kernel(direction: str, causal: bool, operands: tuple[Array, ...], *more: Array) -> list[Array]:
    """Run the kernel of a direction, "fwd" or "bwd", on the operands of `_cudnn_call` and `more`.

    JAX has no function for it: its primitive and parameters are those in the program of a gradient.
    """

    def gradients(q_blhk: Array, k_bnhk: Array, v_bnhk: Array, *lengths: Array) -> Any:
        out_blhk, backward = jax.vjp(lambda *qkv: _cudnn_call(causal, *qkv, *lengths), q_blhk, k_bnhk, v_bnhk)
        return backward(out_blhk)

    program: Any = jax.make_jaxpr(gradients)(*operands)
    name = f"dot_product_attention_{direction}"
    call = next(call for call in program.eqns if call.primitive.name.startswith(name))
    # Operands that are not used have no elements.
    given = iter((*operands, *more))
    own = [next(given) if x.aval.size else jnp.zeros(x.aval.shape, x.aval.dtype) for x in call.invars]
    return call.primitive.bind(*own, **call.params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cudnn_named(
    q_blhk: Array, k_bnhk: Array, v_bnhk: Array, lengths: tuple[Array, ...], causal: bool, zero_keys: int
) -> Array:
    """Return attention with zero keys, whose residuals have names, which JAX's own gradient of the kernel lacks."""
    if zero_keys == 0:
        return _cudnn_call(causal, q_blhk, k_bnhk, v_bnhk, *lengths)
    return _cudnn_forward(q_blhk, k_bnhk, v_bnhk, lengths, causal, zero_keys)[0]


def _cudnn_forward(
    q_blhk: Array, k_bnhk: Array, v_bnhk: Array, lengths: tuple[Array, ...], causal: bool, zero_keys: int
) -> tuple[Array, tuple[Any, ...]]:
    out_blhk, log_total_bhl = _cudnn_kernel("fwd", causal, (q_blhk, k_bnhk, v_bnhk, *lengths))
    if zero_keys:
        with_zeros_bhl = jnp.logaddexp(log_total_bhl, math.log(zero_keys))
        share_blh1 = jnp.exp(log_total_bhl - with_zeros_bhl).swapaxes(1, 2)[..., None]
        out_blhk, log_total_bhl = (out_blhk * share_blh1).astype(q_blhk.dtype), with_zeros_bhl
    out_blhk, log_total_bhl = (checkpoint_name(x, "attention_out") for x in (out_blhk, log_total_bhl))
    return out_blhk, (q_blhk, k_bnhk, v_bnhk, lengths, out_blhk, log_total_bhl)


def _cudnn_backward(causal: bool, _: int, residuals: tuple[Any, ...], grad_blhk: Array) -> tuple[Any, ...]:
    q_blhk, k_bnhk, v_bnhk, lengths, out_blhk, log_total_bhl = residuals
    # The kernel needs the weights of the keys, which follow from the sum with the zero keys, and grad · out.
    operands = (q_blhk, k_bnhk, v_bnhk, *lengths)
    return *_cudnn_kernel("bwd", causal, operands, log_total_bhl, out_blhk, grad_blhk), None


_cudnn_named.defvjp(_cudnn_forward, _cudnn_backward)


# TPU


def _splash(
    q_blhk: Array, k_bnhk: Array, v_bnhk: Array, key_lengths_b: Array | None, causal: bool, zero_keys: int
) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, queries, heads, _), (_, keys, groups, _) = q_blhk.shape, k_bnhk.shape
    block_q, block_kv = _splash_block(queries), _splash_block(keys)
    shape = (-(-queries // block_q) * block_q, -(-keys // block_kv) * block_kv)
    if key_lengths_b is None and shape[1] > keys:
        if zero_keys >= shape[1] - keys and not causal:
            zero_keys -= shape[1] - keys  # the padding is some of them
        else:
            key_lengths_b = jnp.full(len(k_bnhk), keys)
    # One kernel for all gradients writes those of the queries once for each block of keys.
    fused = q_blhk.dtype.itemsize == 2 and shape[1] // block_kv <= _SPLASH_PARTS
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask(shape) if causal else splash.FullMask(shape)] * (heads // groups)),
        block_sizes=_splash_blocks(block_q, block_kv, fused),
        residual_checkpoint_name="attention_out",
        interpret=platform() != "tpu",
    )
    segments = sinks = None
    if key_lengths_b is not None:
        # Padding keys belong to a different segment than the queries.
        beyond_bn = (jnp.arange(shape[1]) >= key_lengths_b[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros((len(beyond_bn), shape[0]), jnp.int32), beyond_bn)
    if zero_keys or segments is not None:
        # A term of the softmax's sum: zero keys have the score 0. The floor matters only to a query without any key.
        sinks = jnp.full(heads // groups, math.log(zero_keys) if zero_keys else _FLOOR, jnp.float32)
    q_bhlk, k_bgnk, v_bgnk = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0)))
        for x, size in zip((q_blhk * q_blhk.shape[-1] ** -0.5, k_bnhk, v_bnhk), (*shape, shape[1]), strict=True)
    )
    # The two cores of a chip can share the examples and groups, over which the kernel is mapped, but not its own grid.
    run = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None, None)), in_axes=(0, 0, 0, 0, None))
    grouped = (x.reshape(*x.shape[:1], groups, -1, *x.shape[2:]) for x in (q_bhlk, k_bgnk, v_bgnk))
    out_bgrlk: Any = run(*grouped, segments, sinks)
    return out_bgrlk.reshape(q_bhlk.shape)[:, :, :queries].swapaxes(1, 2)


def _splash_block(length: int) -> int:
    """Return the block size, a multiple of `TILE`, for `length` tokens, which are padded to a multiple of it.

    A step over a block takes about as long as `TILE` more tokens would.
    """
    sizes = range(TILE, _SPLASH_BLOCK + 1, TILE)
    return min(sizes, key=lambda size: (-(-length // size) * (size + TILE), -size))


def _splash_blocks(q: int, kv: int, fused: bool) -> Any:
    """Return the block sizes of the forward kernel and of one (`fused`) or two backward kernels."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    return BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=None if fused else q,
        block_kv_dq=None if fused else kv,
        use_fused_bwd_kernel=fused,
    )


_FUSED = {"cudnn": _cudnn, "splash": _splash}
"""Kernels that accept key lengths but no mask."""


# All hardware


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _xla(q_bhlk: Array, k_bgnk: Array, v_bgnk: Array, key_mask_bn: Array | None, causal: bool, zero_keys: int) -> Array:
    return _xla_forward(q_bhlk, k_bgnk, v_bgnk, key_mask_bn, causal, zero_keys)[0]


def _xla_forward(
    q_bhlk: Array, k_bgnk: Array, v_bgnk: Array, key_mask_bn: Array | None, causal: bool, zero_keys: int
) -> tuple[Array, tuple[Any, ...]]:
    blocks_q, size = _query_blocks(q_bhlk, k_bgnk)

    def block(q_bgmk: Array, start: Any) -> tuple[Array, Array]:
        scores = _scores(q_bgmk, k_bgnk, key_mask_bn, causal, start, size)
        peak = jnp.maximum(scores.max(-1, keepdims=True), 0.0 if zero_keys else _FLOOR)
        weights = jnp.exp(scores - peak)
        total = weights.sum(-1, keepdims=True) + zero_keys * jnp.exp(-peak)
        out = _product("bgmn,bgnk->bgmk", weights.astype(v_bgnk.dtype), v_bgnk) / jnp.where(total > 0, total, 1.0)
        # Without any key log_total is +inf, so the weights exp(score − log_total) in the backward pass are 0.
        log_total = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)
        return out.astype(q_bhlk.dtype), log_total

    out, log_total = _map_blocks(block, blocks_q, size)
    out_bhlk = checkpoint_name(_join_blocks(out, q_bhlk), "attention_out")
    log_total = checkpoint_name(log_total, "attention_out")
    return out_bhlk, (q_bhlk, k_bgnk, v_bgnk, key_mask_bn, out_bhlk, log_total)


def _xla_backward(causal: bool, zero_keys: int, residuals: tuple[Any, ...], grad_bhlk: Array) -> tuple[Any, ...]:
    q_bhlk, k_bgnk, v_bgnk, key_mask_bn, out_bhlk, log_total = residuals
    blocks_q, size = _query_blocks(q_bhlk, k_bgnk)
    dtype, scale = q_bhlk.dtype, 1.0 / math.sqrt(q_bhlk.shape[-1])
    # Σ grad · out: the term of the softmax gradient that is the same for all keys of a query.
    shared_bhl1 = jnp.sum(grad_bhlk.astype(jnp.float32) * out_bhlk.astype(jnp.float32), -1, keepdims=True)
    blocks_grad, blocks_shared = (_split_blocks(x, k_bgnk.shape[1], size) for x in (grad_bhlk, shared_bhl1))

    def block(carry: tuple[Array, Array], inputs: tuple[Any, ...]) -> tuple[tuple[Array, Array], Array]:
        grad_k_bgkn, grad_v_bgkn = carry
        q_bgmk, q_bgkm, grad_bgmk, grad_bgkm, shared, log_total, start = inputs
        weights = jnp.exp(_scores(q_bgmk, k_bgnk, key_mask_bn, causal, start, size) - log_total)
        grad_weights = _product("bgmk,bgnk->bgmn", grad_bgmk, v_bgnk)
        grad_scores, divisor = _in_range(weights * (grad_weights - shared) * scale, dtype)
        weights, weight_divisor = _in_range(weights, dtype, peak=1.0)
        grad_v_bgkn += _product(over_queries, grad_bgkm, weights) / weight_divisor
        grad_k_bgkn += _product(over_queries, q_bgkm, grad_scores) / divisor
        grad_q = (_product("bgmn,bgnk->bgmk", grad_scores, k_bgnk) / divisor).astype(dtype)
        return (grad_k_bgkn, grad_v_bgkn), grad_q

    zero_k, zero_v = (jnp.zeros(x.swapaxes(2, 3).shape, jnp.float32) for x in (k_bgnk, v_bgnk))
    zeros = (zero_k, zero_v)
    starts = jnp.arange(blocks_q.shape[0]) * size
    # A CPU is slow at products whose sum runs over the first axis of both operands: transposed blocks avoid them. XLA
    # would fold the transpose of a single block into its product, and then refuses the product in bfloat16.
    single = blocks_q.shape[0] == 1
    over_queries = "bgmk,bgmn->bgkn" if single else "bgkm,bgmn->bgkn"
    blocks_qt, blocks_gradt = (x if single else x.swapaxes(3, 4) for x in (blocks_q, blocks_grad))
    inputs = (blocks_q, blocks_qt, blocks_grad, blocks_gradt, blocks_shared, log_total, starts)
    if single:
        grads, grad_q = block(zeros, jax.tree.map(lambda x: x[0], inputs))
        grad_q = grad_q[None]
    else:
        grads, grad_q = jax.lax.scan(block, zeros, inputs)
    grad_k, grad_v = (x.swapaxes(2, 3).astype(k_bgnk.dtype) for x in grads)
    return _join_blocks(grad_q, q_bhlk), grad_k, grad_v, None


_xla.defvjp(_xla_forward, _xla_backward)


def _in_range(x: Array, dtype: Any, peak: float | None = None) -> tuple[Array, Any]:
    """Return `x` in `dtype` times a power of two, and that power; only float16, with its small range, needs one.

    The largest value, `peak` if it is known, is then about 4,096, far from both ends of the range.
    """
    if dtype != jnp.float16:
        return x.astype(dtype), 1.0
    largest = jnp.max(jnp.abs(x)) if peak is None else jnp.float32(peak)
    factor = jnp.exp2(12.0 - jnp.ceil(jnp.log2(jnp.clip(largest, 1e-30, 1e30))))
    return (x * factor).astype(dtype), factor


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _scores(q_bgmk: Array, k_bgnk: Array, key_mask_bn: Array | None, causal: bool, start: Any, size: int) -> Array:
    """Return one block's float32 scores, −inf at masked keys. Rows m are (r, query in the block), queries fastest."""
    scores = _product("bgmk,bgnk->bgmn", q_bgmk, k_bgnk) / math.sqrt(q_bgmk.shape[-1])
    if key_mask_bn is not None:
        scores = jnp.where(key_mask_bn[:, None, None], scores, -jnp.inf)
    if causal:
        rows = start + jnp.arange(scores.shape[2]) % size
        scores = jnp.where(rows[:, None] >= jnp.arange(scores.shape[3]), scores, -jnp.inf)
    return scores


def _query_blocks(q_bhlk: Array, k_bgnk: Array) -> tuple[Array, int]:
    """Return the queries as blocks (blocks, b, g, r · size, k), the last one padded, and the block size."""
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


def _map_blocks(block: Callable[[Array, Any], Any], blocks: Array, size: int) -> Any:
    if blocks.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], block(blocks[0], 0))
    return jax.lax.map(lambda args: block(*args), (blocks, jnp.arange(blocks.shape[0]) * size))
