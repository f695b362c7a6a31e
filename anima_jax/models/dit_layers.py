"""Layers of the diffusion transformer's blocks: timestep embedding, AdaLN modulation, attention and MLP.

Source: diffusion-pipe's models/cosmos_predict2_modeling.py.
Axes: b batch, l image tokens, n context rows, d width, h heads, k head size, t frames.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from anima_jax.models.attention import attention
from anima_jax.models.constraints import constrain
from anima_jax.models.dit_inputs import Condition, KeysValues
from anima_jax.models.layers import Linear, RMSNorm, apply_rotary, gelu

LayerInput = Callable[[str, Array], Array]
"""Returns what a linear layer is given: a function of the layer's name and the input that it would have."""

TIMESTEP_MAX_PERIOD = 10000.0
LAYER_NORM_EPS = 1e-6


def unchanged(name: str, x: Array) -> Array:
    """Return `x`: the `LayerInput` without control networks."""
    del name
    return x


def timestep_features(times: Array, width: int) -> Array:
    """Return [cos(t f), sin(t f)] (…, width), float32, with f falling geometrically from 1 towards 1/10000."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(TIMESTEP_MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = times.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nnx.Module):
    """Linear, SiLU and linear to 3d, in float32: the AdaLN term shared by all blocks."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(width, width, rngs=rngs)
        self.linear_2 = Linear(width, 3 * width, rngs=rngs)

    def __call__(self, features_btd: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(features_btd)))


class Modulation(nnx.Module):
    """AdaLN-LoRA: a low-rank map of the timestep embedding plus the term shared by all blocks, in float32."""

    def __init__(self, width: int, rank: int, parts: int, *, rngs: nnx.Rngs):
        self.parts = parts
        self.linear_1 = Linear(width, rank, axes="if", rngs=rngs)
        self.linear_2 = Linear(rank, parts * width, zero=True, axes="fo", rngs=rngs)

    def __call__(self, condition: Condition | Array) -> list[Array]:
        """Return `parts` arrays (b, 1 or l, d): shift, scale and, if there are three, gate.

        Instead of the condition it takes its own `values`.
        """
        values = condition if isinstance(condition, Array) else self.values(condition)
        return jnp.split(values, self.parts, axis=-1)

    def values(self, condition: Condition) -> Array:
        """Return the same as one array (b, 1 or l, parts · d)."""
        emb_btd, shared_btd, frame_bl = condition
        low_btr = constrain(self.linear_1(emb_btd), "btf")
        values = constrain(self.linear_2(low_btr), "btd") + shared_btd[..., : self.parts * emb_btd.shape[-1]]
        return values if frame_bl is None else jnp.take_along_axis(values, frame_bl[..., None], axis=1)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def modulate(x_bld: Array, shift: Array, scale: Array, dtype: DTypeLike) -> Array:
    """Return LayerNorm(x) · (1 + scale) + shift, computed in float32, in `dtype`. The backward pass keeps only x."""
    x32 = x_bld.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    if x_bld.dtype == jnp.float32:
        variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    else:
        # One pass over x, which XLA fuses into what computes it. It cancels less than the rounding of 16-bit x.
        variance = jnp.maximum(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    normed = (x32 - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPS)
    return (normed * (1.0 + scale) + shift).astype(dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def add_gated(x_bld: Array, gate: Array, update_bld: Array) -> Array:
    """Return x + gate · update, computed in float32, in the dtype of the residual stream `x_bld`."""
    return (x_bld.astype(jnp.float32) + gate * update_bld.astype(jnp.float32)).astype(x_bld.dtype)


class Attention(nnx.Module):
    """Attention of tokens to rows or `KeysValues`, with per-head RMS norm, and rotary embedding if angles are given."""

    def __init__(self, width: int, memory_width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = Linear(width, width, axes="if", rngs=rngs)
        self.k_proj = Linear(memory_width, width, axes="if", rngs=rngs)
        self.v_proj = Linear(memory_width, width, axes="if", rngs=rngs)
        self.output_proj = Linear(width, width, axes="fo", rngs=rngs)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def __call__(
        self,
        x_bld: Array,
        memory: Array | KeysValues,
        stream_dtype: DTypeLike,
        layer_input: LayerInput,
        angles_bli: Array | None = None,
        **options: Any,
    ) -> Array:
        q_blhk = self.q_norm(self._heads(self.q_proj(layer_input("q_proj", x_bld))))
        if isinstance(memory, KeysValues):
            k_bnhk, v_bnhk = (x_bhnk.swapaxes(1, 2) for x_bhnk in memory)
        else:
            k_bnhk, v_bnhk = self.keys_values(memory, layer_input)
        if angles_bli is not None:
            q_blhk, k_bnhk = apply_rotary(q_blhk, angles_bli), apply_rotary(k_bnhk, angles_bli)
        out_bld = attention(q_blhk, k_bnhk, v_bnhk, **options).reshape(x_bld.shape)
        return self.output_proj(out_bld, out_dtype=stream_dtype)

    def keys_values(self, memory_bnd: Array, layer_input: LayerInput = unchanged) -> tuple[Array, Array]:
        """Return the keys, normalised but not rotated, and the values of these rows, (b, n, h, k)."""
        keys_bnd = self.k_proj(layer_input("k_proj", memory_bnd))
        return self.k_norm(self._heads(keys_bnd)), self._heads(self.v_proj(layer_input("v_proj", memory_bnd)))

    def _heads(self, projected_bnd: Array) -> Array:
        return projected_bnd.reshape(*projected_bnd.shape[:2], self.heads, -1)


class MLP(nnx.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.layer1 = Linear(width, hidden, axes="if", rngs=rngs)
        self.layer2 = Linear(hidden, width, axes="fo", rngs=rngs)

    def __call__(self, x: Array, stream_dtype: DTypeLike, layer_input: LayerInput) -> Array:
        hidden = constrain(gelu(self.layer1(layer_input("layer1", x))), "blf")
        return self.layer2(hidden, out_dtype=stream_dtype)
