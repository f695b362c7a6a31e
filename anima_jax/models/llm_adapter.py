"""The LLM adapter: maps T5 token ids, which attend to Qwen3's hidden states, to the transformer's context rows.

Source: `LLMAdapter` in diffusion-pipe's models/llm_adapter.py. The target tokens (T5's ids) pass through the adapter's
own embedding table, then through blocks of bidirectional self-attention, cross-attention to the source (Qwen3's states)
and an MLP.
Axes: b batch, m target tokens, n source tokens, d features, h heads, k head size.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from anima_jax.errors import plural
from anima_jax.models.attention import attention
from anima_jax.models.constraints import constrain
from anima_jax.models.layers import Embedding, Linear, RMSNorm, apply_rotary, gelu, rotary_angles

ROTARY_THETA = 10000.0


class Text(NamedTuple):
    """The adapter's input for some captions: Qwen3's states and T5's ids, padded at the end; NumPy or JAX arrays."""

    source_bnd: Any
    source_mask_bn: Any
    target_ids_bm: Any
    target_mask_bm: Any


@dataclasses.dataclass(frozen=True)
class LLMAdapterConfig:
    """Sizes of the LLM adapter; the defaults are the released model's.

    `target_width` is the width of the embedding table and of the result.
    """

    width: int = 1024
    blocks: int = 6
    heads: int = 16
    mlp_width: int = 4096
    source_width: int = 1024
    target_width: int = 1024
    vocabulary: int = 32128

    def __str__(self) -> str:
        return (
            f"width {self.width}, {plural(self.blocks, 'block')}, {plural(self.heads, 'head')}, MLP {self.mlp_width}, "
            f"text states {self.source_width} -> context {self.target_width}, vocabulary {self.vocabulary}"
        )


class LLMAdapter(nnx.Module):
    """Maps Qwen3's hidden states and T5's token ids to context rows for the diffusion transformer."""

    def __init__(self, config: LLMAdapterConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocabulary, config.target_width, rngs=rngs)
        projects = config.width != config.target_width
        self.in_proj = Linear(config.target_width, config.width, use_bias=True, rngs=rngs) if projects else None
        self.blocks = jax.vmap(lambda layer: AdapterBlock(config, rngs=layer))(rngs.split(config.blocks))
        self.out_proj = Linear(config.width, config.target_width, use_bias=True, rngs=rngs)
        self.norm = RMSNorm(config.target_width)

    def __call__(
        self,
        source_bnd: Array,
        target_ids_bm: Array,
        source_mask_bn: Array | None = None,
        target_mask_bm: Array | None = None,
    ) -> Array:
        """Return context rows (b, m, target width) in the dtype of `source_bnd`.

        `source_bnd` are Qwen3's hidden states, `target_ids_bm` T5's ids in [0, vocabulary). Masks are true (or 1) for
        real tokens; without a mask all tokens are real. Rows of masked targets are 0. A source without real tokens
        contributes 0, not NaN.
        """
        masks = [None if mask is None else mask.astype(bool) for mask in (source_mask_bn, target_mask_bm)]
        source_mask_bn, target_mask_bm = masks
        x_bmd = constrain(self.embed(target_ids_bm).astype(source_bnd.dtype), "bnd")
        if self.in_proj is not None:
            x_bmd = self.in_proj(x_bmd)
        head_size = self.config.width // self.config.heads
        angles_1mi, angles_1ni = (
            rotary_angles(jnp.arange(x.shape[1]), head_size, ROTARY_THETA)[None] for x in (x_bmd, source_bnd)
        )

        def run_block(x_bmd: Array, block: AdapterBlock) -> tuple[Array, None]:
            x_bmd = block(x_bmd, source_bnd, angles_1mi, angles_1ni, target_mask_bm, source_mask_bn)
            return constrain(x_bmd, "bnd"), None

        x_bmd, _ = jax.lax.scan(jax.checkpoint(run_block, prevent_cse=False), x_bmd, self.blocks)
        context_bmd = self.norm(self.out_proj(x_bmd))
        return context_bmd if target_mask_bm is None else context_bmd * target_mask_bm[..., None]


class AdapterBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and MLP, each added to its input."""

    def __init__(self, config: LLMAdapterConfig, *, rngs: nnx.Rngs):
        self.norm_self_attn = RMSNorm(config.width)
        self.self_attn = AdapterAttention(config.width, config.width, config.heads, rngs=rngs)
        self.norm_cross_attn = RMSNorm(config.width)
        self.cross_attn = AdapterAttention(config.width, config.source_width, config.heads, rngs=rngs)
        self.norm_mlp = RMSNorm(config.width)
        self.mlp = AdapterMLP(config.width, config.mlp_width, rngs=rngs)

    def __call__(
        self,
        x_bmd: Array,
        source_bnd: Array,
        angles_1mi: Array,
        angles_1ni: Array,
        target_mask_bm: Array | None,
        source_mask_bn: Array | None,
    ) -> Array:
        normed_bmd = self.norm_self_attn(x_bmd)
        x_bmd += self.self_attn(normed_bmd, normed_bmd, angles_1mi, angles_1mi, target_mask_bm)
        x_bmd += self.cross_attn(self.norm_cross_attn(x_bmd), source_bnd, angles_1mi, angles_1ni, source_mask_bn)
        return x_bmd + self.mlp(self.norm_mlp(x_bmd))


class AdapterAttention(nnx.Module):
    """Attention with RMS norm and rotary embedding of queries and keys, each at their own positions."""

    def __init__(self, width: int, memory_width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = Linear(width, width, axes="if", rngs=rngs)
        self.k_proj = Linear(memory_width, width, axes="if", rngs=rngs)
        self.v_proj = Linear(memory_width, width, axes="if", rngs=rngs)
        self.o_proj = Linear(width, width, axes="fo", rngs=rngs)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def __call__(
        self, x_bmd: Array, memory_bnd: Array, angles_q: Array, angles_k: Array, memory_mask_bn: Array | None
    ) -> Array:
        def split_heads(projected: Array) -> Array:
            return projected.reshape(*projected.shape[:2], self.heads, -1)

        q_bmhk = apply_rotary(self.q_norm(split_heads(self.q_proj(x_bmd))), angles_q)
        k_bnhk = apply_rotary(self.k_norm(split_heads(self.k_proj(memory_bnd))), angles_k)
        out_bmhk = attention(q_bmhk, k_bnhk, split_heads(self.v_proj(memory_bnd)), key_mask_bn=memory_mask_bn)
        return self.o_proj(out_bmhk.reshape(x_bmd.shape))


class AdapterMLP(nnx.Module):
    """Linear, exact GELU, linear, with biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.layer1 = Linear(width, hidden, use_bias=True, axes="if", rngs=rngs)
        self.layer2 = Linear(hidden, width, use_bias=True, axes="fo", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.layer2(constrain(gelu(self.layer1(x)), "bnf"))
