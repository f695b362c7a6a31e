"""`attention` against its definition in float64 numpy, values and gradients."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import ShapedArray
from jax.extend.core import Primitive

from anima_jax.models import attention as module
from anima_jax.models.attention import attention
from anima_jax.models.dit import REMAT_POLICIES
from anima_jax.platform import compiling_for


def reference(q, k, v, mask, zero_keys=0):
    """The definition, in float64; `mask` (b, l, n) true where a query looks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    ratio = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, ratio, 2), np.repeat(v, ratio, 2)
    scores = np.einsum("blhk,bnhk->bhln", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) * mask[:, None]
    total = weights.sum(-1, keepdims=True) + zero_keys
    return np.einsum("bhln,bnhk->blhk", weights / np.where(total == 0, 1, total), v)


def random_qkv(batch=2, queries=37, keys=29, heads=4, groups=4, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((batch, queries, heads, size), (batch, keys, groups, size), (batch, keys, groups, size))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


# 1e-5: float32 rounding of sums of 30 terms of order one.
@pytest.mark.parametrize(
    ("blocks", "causal", "padding", "zero_keys"), itertools.product((1, 5), (0, 1), (0, 1), (0, 40))
)
def test_xla_equals_the_definition(monkeypatch, blocks, causal, padding, zero_keys):
    q, k, v = random_qkv(groups=2)
    monkeypatch.setattr(module, "_SCORE_BYTES", 4 * 2 * 4 * 29 * (64 if blocks == 1 else 16))
    lengths = jnp.array([29, 11])
    mask = np.ones((2, 37, 29), bool)
    if padding:
        mask &= (np.arange(29) < np.asarray(lengths)[:, None])[:, None]
    if causal:
        mask &= np.arange(37)[:, None] >= np.arange(29)
    out = attention(q, k, v, key_lengths_b=lengths if padding else None, causal=bool(causal), zero_keys=zero_keys)
    np.testing.assert_allclose(out, reference(q, k, v, mask, zero_keys), atol=1e-5)


def numerical_gradient(function, x, eps=1e-4):
    grad = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[index] = eps
        grad[index] = (function(x + step) - function(x - step)) / (2 * eps)
    return grad


def test_gradients_equal_finite_differences_of_the_definition(monkeypatch):
    monkeypatch.setattr(module, "_SCORE_BYTES", 1)  # blocks of 16 queries
    q, k, v = random_qkv(batch=1, queries=19, keys=7, heads=2, groups=1, size=4)
    target = np.random.default_rng(1).normal(size=q.shape)
    mask = (np.arange(7) < 5)[None, None] & (np.arange(19)[:, None] >= np.arange(7))[None]

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, key_lengths_b=jnp.array([5]), causal=True, zero_keys=3) * target)

    grads = jax.grad(loss, (0, 1, 2))(q, k, v)
    inputs = [np.asarray(x, np.float64) for x in (q, k, v)]
    for i, grad in enumerate(grads):
        expected = numerical_gradient(
            lambda x, i=i: np.sum(reference(*inputs[:i], x, *inputs[i + 1 :], mask, 3) * target), inputs[i]
        )
        np.testing.assert_allclose(grad, expected, atol=2e-5)


def test_a_query_without_keys_gives_zero_and_finite_gradients():
    q, k, v = random_qkv()
    mask = jnp.zeros((2, 29), bool).at[1, 3].set(True)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, key_mask_bn=mask) ** 2)

    out = attention(q, k, v, key_mask_bn=mask)
    assert np.all(np.asarray(out[0]) == 0)
    np.testing.assert_allclose(out[1], np.broadcast_to(v[1, 3], out[1].shape), atol=1e-6)
    for grad in jax.grad(loss, (0, 1, 2))(q, k, v):
        assert np.all(np.isfinite(grad))
        assert np.all(np.asarray(grad[0]) == 0)


def test_zero_keys_equal_stored_zeros():
    q, k, v = random_qkv()
    pad = ((0, 0), (0, 11), (0, 0), (0, 0))
    np.testing.assert_allclose(
        attention(q, k, v, zero_keys=11), attention(q, jnp.pad(k, pad), jnp.pad(v, pad)), atol=1e-6
    )


# bfloat16 has 8 bits: rounding of inputs and weights gives a few parts in 256.
def test_bfloat16_stays_near_float32_forward_and_backward():
    q, k, v = random_qkv(queries=64, keys=64)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v).astype(jnp.float32)))

    exact = jax.grad(loss, (0, 1, 2))(q, k, v)
    rounded = jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b) < 2e-2


@pytest.mark.parametrize("backward", [False, True])
def test_temporaries_stay_below_400_mb_at_4096_tokens(backward):
    x = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v))

    function = jax.grad(loss, (0, 1, 2)) if backward else attention
    memory = jax.jit(function).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 400e6


def test_unknown_and_unsuitable_implementations_are_refused():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="expected one of auto, xla, cudnn, splash"):
        attention(q, k, v, implementation="flash")
    with pytest.raises(ValueError, match="no mask"):
        attention(q, k, v, key_mask_bn=jnp.ones((2, 29), bool), implementation="cudnn")
    with pytest.raises(ValueError, match="splash attention does not support float16"):
        attention(*(x.astype(jnp.float16) for x in (q, k, v)), implementation="splash")


# Splash works in blocks of 128 with other sums: 5e-6 of the largest value.
@pytest.mark.parametrize(
    "options",
    [
        {"key_lengths_b": jnp.array([150, 33])},
        {"key_lengths_b": jnp.array([0, 33])},
        {"zero_keys": 40},
        {"zero_keys": 400},
        {"key_lengths_b": jnp.array([0, 33]), "zero_keys": 7},
        {"causal": True},
    ],
    ids=["lengths", "no keys", "few zero keys", "zero keys", "zero keys after lengths", "causal"],
)
def test_splash_equals_xla_in_the_interpreter_forward_and_backward(options):
    q, k, v = random_qkv(queries=200, keys=150, groups=2, size=64)
    target = np.random.default_rng(1).normal(size=q.shape)

    def loss(q, k, v, implementation):
        return jnp.sum(attention(q, k, v, implementation=implementation, **options) * target)

    out, expected = (attention(q, k, v, implementation=name, **options) for name in ("splash", "xla"))
    np.testing.assert_allclose(out, expected, atol=5e-6 * np.abs(expected).max())
    found, exact = (jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(q, k, v, name) for name in ("splash", "xla"))
    for grad, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(grad, other, atol=5e-6 * np.abs(other).max())


def test_one_splash_kernel_for_all_gradients_of_16_bit_queries():
    q, k, v = random_qkv(queries=200, keys=1100, size=64)  # two blocks of keys

    def gradients(dtype, implementation):
        def loss(*qkv):
            return jnp.sum(jnp.sin(attention(*qkv, zero_keys=9, implementation=implementation).astype(jnp.float32)))

        return jax.grad(loss, (0, 1, 2))(*(x.astype(dtype) for x in (q, k, v)))

    for found, exact in zip(gradients(jnp.bfloat16, "splash"), gradients(jnp.float32, "xla"), strict=True):
        assert np.linalg.norm(found.astype(jnp.float32) - exact) / np.linalg.norm(exact) < 2e-2  # as above


def calls_of_kernels(monkeypatch, implementation, policy, zero_keys):
    """How often a block's forward and backward kernels stand in the program of a gradient, lowered for their device."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_, **__: 91000)  # there is no such device to ask
    platform, forward, backward = {
        "cudnn": ("cuda", r"fmhaSoftmax\b(?!Backward)", r"fmhaSoftmaxBackward"),
        "splash": ("tpu", r"splash_mha_fwd", r"splash_mha_dkv"),
    }[implementation]

    def loss(w, lengths):
        def block(x, _):
            y = x * w
            out = attention(y, y, y, key_lengths_b=lengths, zero_keys=zero_keys, implementation=implementation)
            return out + x, None

        block = jax.checkpoint(block, policy=REMAT_POLICIES[policy], prevent_cse=False)
        return jnp.sum(jax.lax.scan(block, w, None, length=3)[0].astype(jnp.float32))

    x, lengths = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    with compiling_for("gpu" if platform == "cuda" else platform):
        text = jax.jit(jax.grad(loss)).trace(x, lengths).lower(lowering_platforms=(platform,)).as_text()
    assert "640" not in text  # 256 keys and 384 zero keys
    return len(re.findall(forward, text)), len(re.findall(backward, text))


@pytest.mark.parametrize(("implementation", "zero_keys"), [("cudnn", 0), ("cudnn", 384), ("splash", 384)])
def test_the_forward_kernel_runs_once_per_layer_under_the_attention_policy(monkeypatch, implementation, zero_keys):
    assert calls_of_kernels(monkeypatch, implementation, "full", zero_keys) == (2, 1)
    assert calls_of_kernels(monkeypatch, implementation, "attention", zero_keys) == (1, 1)


def for_tpu(dtype=jnp.bfloat16, **options):
    """The program of attention of 256 queries to 128 keys, forward and backward, lowered for a TPU."""
    q, k = (jax.ShapeDtypeStruct((2, length, 4, 64), dtype) for length in (256, 128))
    gradient = jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, **options).astype(jnp.float32)), (0, 1, 2))
    with compiling_for("tpu"):
        return jax.jit(gradient).trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()


def test_tpus_attend_to_zero_keys_without_storing_or_masking_them():
    text = for_tpu(zero_keys=384)
    assert re.findall(r"splash_mha_\w+(?=_residuals)", text)
    assert "segmented" not in text
    assert "x512x" not in text
    assert "splash_mha_dq" not in text  # the gradients of q, k and v come from one kernel
    assert "segmented" in for_tpu(key_lengths_b=jnp.array([100, 128]))


def test_tpus_compute_float16_without_their_kernel():
    assert "tpu_custom_call" in for_tpu()
    assert "tpu_custom_call" not in for_tpu(jnp.float16)


def fake_cudnn(monkeypatch):
    """Let JAX's cuDNN attention be these products, as primitives with the names and operands of its kernels."""

    def scores(q, k, lengths):
        scores = jnp.einsum("blhk,bnhk->bhln", q, k) / np.sqrt(q.shape[-1])
        return jnp.where(jnp.arange(k.shape[1]) < lengths[:, None, None, None], scores, -jnp.inf)

    def forward(q, k, v, unused, queries, keys):
        weights = scores(q, k, keys)
        log_total = jax.nn.logsumexp(weights, axis=-1)
        return [jnp.einsum("bhln,bnhk->blhk", jnp.exp(weights - log_total[..., None]), v), log_total]

    def backward(q, k, v, unused, queries, keys, log_total, out, grad):
        weights = jnp.exp(scores(q, k, keys) - log_total[..., None])
        shared = jnp.einsum("blhk,blhk->bhl", out, grad)
        by_score = weights * (jnp.einsum("blhk,bnhk->bhln", grad, v) - shared[..., None]) / np.sqrt(q.shape[-1])
        return [
            jnp.einsum("bhln,bnhk->blhk", by_score, k),
            jnp.einsum("bhln,blhk->bnhk", by_score, q),
            jnp.einsum("bhln,blhk->bnhk", weights, grad),
        ]

    def primitive(name, function):
        own = Primitive(name)
        own.multiple_results = True
        own.def_impl(function)
        own.def_abstract_eval(lambda *avals: [ShapedArray(x.shape, x.dtype) for x in jax.eval_shape(function, *avals)])
        return own

    run, run_backward = (
        primitive("dot_product_attention_fwd", forward),
        primitive("dot_product_attention_bwd", backward),
    )

    @jax.custom_vjp
    def call(*operands):
        return run.bind(*operands)[0]

    def call_forward(*operands):
        out, log_total = run.bind(*operands)
        return out, (*operands, log_total, out)

    call.defvjp(call_forward, lambda residuals, grad: (*run_backward.bind(*residuals, grad), None, None, None))

    def attend(q, k, v, *, is_causal, implementation, query_seq_lengths=None, key_value_seq_lengths=None):
        every = [jnp.full(x.shape[0], x.shape[1]) for x in (q, k)]
        queries, keys = (query_seq_lengths, key_value_seq_lengths) if query_seq_lengths is not None else every
        return call(q, k, v, jnp.zeros(0), queries, keys)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.mark.parametrize("lengths", [[29, 11], [0, 29]])
def test_zero_keys_are_added_to_cudnns_softmax_and_its_gradient(monkeypatch, lengths):
    fake_cudnn(monkeypatch)
    q, k, v = random_qkv()
    target = np.random.default_rng(1).normal(size=q.shape)

    def loss(q, k, v, implementation):
        out = attention(q, k, v, key_lengths_b=jnp.array(lengths), zero_keys=40, implementation=implementation)
        return jnp.sum(out * target)

    found, expected = (jax.value_and_grad(loss, (0, 1, 2))(q, k, v, name) for name in ("cudnn", "xla"))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
