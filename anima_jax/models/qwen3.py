"""Qwen3, the text encoder: a causal decoder whose last hidden states, after the final norm, are the result.

Source: `Qwen3Model` in transformers. Grouped-query attention with RMS norm on each head, rotary positions, gated SiLU
MLP.
Axes: b batch, n tokens, d width, h heads (g key/value heads), k head size.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from anima_jax.models import parameters
from anima_jax.models.attention import attention
from anima_jax.models.constraints import constrain
from anima_jax.models.layers import Embedding, Linear, RMSNorm, apply_rotary, rotary_angles, silu

ROTARY_THETA = 1e6


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of the text encoder; the defaults are Qwen3-0.6B's."""

    width: int = 1024
    layers: int = 28
    heads: int = 16
    key_heads: int = 8
    head_size: int = 128
    mlp_width: int = 3072
    vocabulary: int = 151936

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.layers} layers, {self.heads} query and {self.key_heads} key heads of "
            f"{self.head_size}, MLP {self.mlp_width}, vocabulary {self.vocabulary}"
        )


class Qwen3(nnx.Module):
    """The text encoder, which maps token ids to hidden states."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = Embedding(config.vocabulary, config.width, rngs=rngs)
        self.layers = jax.vmap(lambda layer: Layer(config, rngs=layer))(rngs.split(config.layers))
        self.norm = RMSNorm(config.width)

    def __repr__(self) -> str:
        return f"Qwen3({self.config}; {parameters.describe(self)})"

    def __call__(
        self,
        ids_bn: Array,
        mask_bn: Array | None = None,
        *,
        vectors_bnd: Array | None = None,
        attended_bn: Array | None = None,
        dtype: DTypeLike | None = None,
    ) -> Array:
        """Return the hidden states (b, n, width) of token ids in [0, vocabulary).

        Where `mask_bn` is false (or 0) the result is 0 and no token attends to that position; with `attended_bn` that
        mask decides what is attended to. `vectors_bnd` replace the embeddings of negative ids. `dtype` is the dtype of
        the computation and the result; the default is the embedding table's.
        """
        x_bnd = self.embed_tokens(ids_bn)
        if vectors_bnd is not None:
            x_bnd = jnp.where(ids_bn[..., None] < 0, vectors_bnd.astype(x_bnd.dtype if dtype is None else dtype), x_bnd)
        x_bnd = constrain(x_bnd if dtype is None else x_bnd.astype(dtype), "bnd")
        mask_bn = None if mask_bn is None else mask_bn.astype(bool)
        uniform_bnn = None if attended_bn is None else _uniform_weights(attended_bn.astype(bool))
        attended_bn = mask_bn if attended_bn is None else attended_bn.astype(bool)
        angles_1ni = rotary_angles(jnp.arange(ids_bn.shape[1]), self.config.head_size, ROTARY_THETA)[None]

        def run_layer(x_bnd: Array, layer: Layer) -> tuple[Array, None]:
            return layer(x_bnd, angles_1ni, attended_bn, uniform_bnn), None

        x_bnd, _ = jax.lax.scan(jax.checkpoint(run_layer, prevent_cse=False), x_bnd, self.layers)
        x_bnd = self.norm(x_bnd)
        return x_bnd if mask_bn is None else x_bnd * mask_bn[..., None]


def _uniform_weights(attended_bn: Array) -> Array:
    """Return the attention weights (b, n, n), float32, of the tokens before the first that is attended to; else 0.

    In ComfyUI their scores vanish next to the finite masks: all keys that only one mask hides have the same weight.
    """
    n = attended_bn.shape[1]
    causal_nn = jnp.tril(jnp.ones((n, n), bool))
    hidden_by_one = causal_nn | attended_bn[:, None]
    blind_bn = jnp.cumsum(attended_bn, axis=1) == 0
    weights_bnn = (hidden_by_one & blind_bn[..., None]).astype(jnp.float32)
    return weights_bnn / jnp.maximum(weights_bnn.sum(axis=-1, keepdims=True), 1.0)


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each added to its input."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.width)
        self.self_attn = CausalAttention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.width)
        self.mlp = GatedMLP(config.width, config.mlp_width, rngs=rngs)

    def __call__(
        self, x_bnd: Array, angles_1ni: Array, mask_bn: Array | None, uniform_bnn: Array | None = None
    ) -> Array:
        x_bnd += self.self_attn(self.input_layernorm(x_bnd), angles_1ni, mask_bn, uniform_bnn)
        return constrain(x_bnd + self.mlp(self.post_attention_layernorm(x_bnd)), "bnd")


class CausalAttention(nnx.Module):
    """Grouped-query attention: each key/value head serves h / g query heads."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.head_size = config.head_size
        self.q_proj = Linear(config.width, config.heads * config.head_size, axes="if", rngs=rngs)
        self.k_proj = Linear(config.width, config.key_heads * config.head_size, axes="if", rngs=rngs)
        self.v_proj = Linear(config.width, config.key_heads * config.head_size, axes="if", rngs=rngs)
        self.o_proj = Linear(config.heads * config.head_size, config.width, axes="fo", rngs=rngs)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)

    def __call__(self, x_bnd: Array, angles_1ni: Array, mask_bn: Array | None, uniform_bnn: Array | None) -> Array:
        q_bnhk, k_bngk, v_bngk = (
            projected.reshape(*projected.shape[:2], -1, self.head_size)
            for projected in (self.q_proj(x_bnd), self.k_proj(x_bnd), self.v_proj(x_bnd))
        )
        q_bnhk = apply_rotary(self.q_norm(q_bnhk), angles_1ni)
        k_bngk = apply_rotary(self.k_norm(k_bngk), angles_1ni)
        out_bnhk = attention(q_bnhk, k_bngk, v_bngk, key_mask_bn=mask_bn, causal=True)
        if uniform_bnn is not None:  # such tokens have no key, and the result of attention for them is 0
            mean_bngk = jnp.einsum("bnm,bmgk->bngk", uniform_bnn.astype(v_bngk.dtype), v_bngk)
            out_bnhk += jnp.repeat(mean_bngk, q_bnhk.shape[2] // v_bngk.shape[2], axis=2)
        return self.o_proj(out_bnhk.reshape(*x_bnd.shape[:2], -1))


class GatedMLP(nnx.Module):
    """down(SiLU(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, hidden, axes="if", rngs=rngs)
        self.up_proj = Linear(width, hidden, axes="if", rngs=rngs)
        self.down_proj = Linear(hidden, width, axes="fo", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(constrain(silu(self.gate_proj(x)) * self.up_proj(x), "bnf"))
