"""Anima's diffusion transformer: Cosmos-Predict2's MiniTrainDIT with the LLM adapter.

Source: `MiniTrainDIT` in diffusion-pipe's models/cosmos_predict2_modeling.py. The core works on tokens, so that images
of every aspect ratio share one compiled program. A token is a patch of 2×2 latent pixels, with values in the order (y,
x, channel); `grid_b3` is each example's number of frames, rows and columns of patches.
Axes: b batch, l image tokens, n context rows, d width, h heads, k head size, c channels, t frames, y rows, x columns.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from anima_jax.errors import plural
from anima_jax.models import parameters
from anima_jax.models.constraints import constrain
from anima_jax.models.control import ControlNetwork, ControlTerm, check_controls, layer_input, stacked
from anima_jax.models.dit_inputs import Condition, KeysValues, Layer, Modulations, check_inputs, of_examples
from anima_jax.models.dit_layers import (
    MLP,
    Attention,
    LayerInput,
    Modulation,
    TimestepEmbedder,
    add_gated,
    modulate,
    timestep_features,
)
from anima_jax.models.layers import Linear, RMSNorm, products_saveable
from anima_jax.models.llm_adapter import LLMAdapter, LLMAdapterConfig
from anima_jax.models.stack import first_and_rest, scan_in_place

PATCH = 2
OUT_CHANNELS = 16

CONTEXT_ROWS = 512
"""Context rows in training. Rows after a caption's last token are zero, and take part in cross-attention."""

ROTARY_THETA = 10000.0

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": products_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "none": None,
}
"""Name → policy: what the backward pass keeps of a block, besides its input, instead of recomputing it.

None keeps everything. "offload" keeps nothing on the device: the blocks' inputs are moved to host memory.
"""


IN_PLACE = ("full", "dots", "attention")
"""Policies with which the backward pass writes gradients over weights."""


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes of the transformer; the defaults are the released 2B model's.

    `latent_channels` is 16, or 17 if the last channel is a conditioning mask (video-to-world models).
    """

    width: int = 2048
    blocks: int = 28
    heads: int = 16
    mlp_width: int = 8192
    context_width: int = 1024
    adaln_rank: int = 256
    latent_channels: int = 16
    adapter: LLMAdapterConfig | None = LLMAdapterConfig()

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def input_features(self) -> int:
        """Input features of the patch embedding: the latent channels and a padding mask, always zero here."""
        return PATCH * PATCH * (self.latent_channels + 1)

    def __str__(self) -> str:
        return (
            f"width {self.width}, {plural(self.blocks, 'block')}, {plural(self.heads, 'head')} of {self.head_size}, "
            f"MLP {self.mlp_width}, context width {self.context_width}, AdaLN rank {self.adaln_rank}, "
            f"{self.latent_channels} latent channels"
        )


def patchify(latents_btyxc: Array) -> Array:
    """Return the tokens (b, l, 4c) of latents (b, t, y, x, c), in row-major order of (frame, row, column)."""
    return rearrange(latents_btyxc, "b t (y m) (x n) c -> b (t y x) (m n c)", m=PATCH, n=PATCH)


def unpatchify(tokens_blc: Array, frames: int, rows: int, columns: int) -> Array:
    """Invert `patchify`; `rows` and `columns` count patches."""
    return rearrange(
        tokens_blc, "b (t y x) (m n c) -> b t (y m) (x n) c", t=frames, y=rows, x=columns, m=PATCH, n=PATCH
    )


def token_positions(grid_b3: Array, length: int) -> Array:
    """Return the (frame, row, column) of `length` tokens, int32 (b, l, 3). Padding gets frames beyond the last."""
    index_1l = jnp.arange(length, dtype=jnp.int32)[None]
    rows_b1, columns_b1 = grid_b3[:, 1:2], grid_b3[:, 2:3]
    within_bl = index_1l % (rows_b1 * columns_b1)
    frame_bl = index_1l // (rows_b1 * columns_b1)
    return jnp.stack([frame_bl, within_bl // columns_b1, within_bl % columns_b1], axis=-1)


def rotary_angles_3d(positions_bl3: Array, config: DiTConfig) -> Array:
    """Return the angles (b, l, k/2): first those of the frame, then those of the row, then those of the column.

    Rows and columns are extrapolated (NTK) by 4, or by 3 for 17 latent channels; frames are not.
    """
    spatial = 2 * (config.head_size // 6)
    spatial_ratio = 3.0 if config.latent_channels == OUT_CHANNELS + 1 else 4.0
    axes = ((config.head_size - 2 * spatial, 1.0), (spatial, spatial_ratio), (spatial, spatial_ratio))
    parts = []
    for axis, (size, ratio) in enumerate(axes):
        # A single frequency is theta⁰ = 1 for every theta.
        theta = ROTARY_THETA * ratio ** (size / (size - 2)) if size > 2 else ROTARY_THETA
        frequencies = theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / max(size, 1))
        parts.append(positions_bl3[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(parts, axis=-1)


def stream_dtype(dtype: Any) -> Any:
    """Return the dtype of the residual stream of a network that computes in `dtype`."""
    # The sum over the blocks exceeds float16's maximum, 65504.
    return jnp.float32 if dtype == jnp.float16 else dtype


class AnimaDiT(nnx.Module):
    """Anima's transformer, which predicts the velocity from noisy latents, their time and context rows.

    `llm_adapter` computes the context rows from text; it is None if the model has no adapter. `text_encoder` is None
    unless it is trained together with the transformer, `control` unless it is the network that is trained on it.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.x_embedder = Linear(config.input_features, config.width, rngs=rngs)
        self.t_embedder = TimestepEmbedder(config.width, rngs=rngs)
        self.t_embedding_norm = RMSNorm(config.width)
        self.blocks = jax.vmap(lambda layer: Block(config, rngs=layer))(rngs.split(config.blocks))
        self.final_layer = FinalLayer(config, rngs=rngs)
        self.llm_adapter = LLMAdapter(config.adapter, rngs=rngs) if config.adapter else None
        self.text_encoder: nnx.Module | None = None
        self.control: ControlNetwork | None = None

    def __repr__(self) -> str:
        sizes = f"{self.config}, {'with' if self.llm_adapter else 'without'} adapter"
        return f"AnimaDiT({sizes}; {parameters.describe(self)})"

    def __call__(self, latents_btyxc: Array, times_b: Array, context_bnd: Array, **options: Any) -> Array:
        """Predict the velocity (noise − data), float32 (b, t, y, x, 16).

        `latents_btyxc` are normalised latents (b, t, y, x, latent channels) with even y and x; their dtype is the
        compute dtype. `times_b` in [0, 1] (0 data, 1 noise) is (b,) or, per latent frame, (b, t). `context_bnd` are the
        context rows (b, n, context width). `options` are passed to `velocity`. Raises ValueError for odd sides, a
        wrong number of channels and what `velocity` refuses.
        """
        if latents_btyxc.ndim != 5:
            raise ValueError(f"latents have the shape {latents_btyxc.shape}, expected (batch, frames, y, x, channels)")
        _, frames, rows, columns, channels = latents_btyxc.shape
        if channels != self.config.latent_channels or rows % PATCH or columns % PATCH:
            raise ValueError(
                f"latents are {rows}×{columns}×{channels}, "
                f"expected even sides and {self.config.latent_channels} channels"
            )
        if times_b.ndim == 2 and times_b.shape[1] != frames:
            raise ValueError(f"times of {times_b.shape[1]} frames for latents of {plural(frames, 'frame')}")
        grid = (frames, rows // PATCH, columns // PATCH)
        return unpatchify(self.velocity(patchify(latents_btyxc), grid, times_b, context_bnd, **options), *grid)

    def velocity(
        self,
        latents_blc: Array,
        grid: Array | tuple[int, int, int],
        times_b: Array | Modulations,
        context_bnd: Array | KeysValues,
        *,
        padded: bool = True,
        prompt_b: Array | None = None,
        context_lengths_b: Array | None = None,
        zero_context: int = 0,
        remat: str = "full",
        remat_every: int = 1,
        scan_unroll: int = 1,
        attention_implementation: str = "auto",
        controls: Sequence[ControlTerm] = (),
        after_first: Callable[[Array, Array, Callable[[Array], Array]], Array] | None = None,
    ) -> Array:
        """Predict the velocity (b, l, 64), float32, of tokens (b, l, 4 · latent channels): the core of the network.

        `grid` is (frames, rows, columns) in patches. It is an int array (b, 3), where tokens beyond an example's own
        are padding that no token attends to, unless `padded` is false: then no example has any. A tuple is the grid of
        all examples, without padding. All context rows take part in the softmax, including rows of zeros, up to
        `context_lengths_b` if given; `zero_context` is the number of additional zero rows after those of `context_bnd`.
        Instead of times and context rows, `velocity` takes what `modulations` (of b times, or of one for the whole
        batch) and `keys_values` compute from them. With `prompt_b`, those are of any number of prompts, and each
        example has those of its own. `remat` is a key of `REMAT_POLICIES`. With `remat_every` n, the backward pass
        keeps only the input of every n-th block and recomputes n blocks from it under that policy.
        `controls` are control networks, each with the embedding (b, l, e) of its control images and a strength, which
        is a number or an array (b,). Their terms are added in order; they take single images only. In sampling,
        `after_first` may replace the blocks after the first: it takes the residual stream before and after that block
        and the function that runs the others, and returns the stream after them. Raises ValueError if n does not divide
        the number of blocks, for arrays whose shapes or dtypes do not fit together, for a control network of another
        size or a video with one and, outside of `jax.jit`, for times outside [0, 1].
        """
        features, width = PATCH * PATCH * self.config.latent_channels, self.config.context_width
        check_inputs(features, width, latents_blc, grid, times_b, context_bnd, prompt_b)
        check_controls(controls, grid, latents_blc.shape, self.config.blocks, self.config.width)
        shape_bl, dtype = latents_blc.shape[:2], latents_blc.dtype
        grid_b3 = jnp.asarray(grid, jnp.int32)[None] if isinstance(grid, tuple) else grid
        positions_bl3 = token_positions(grid_b3, shape_bl[1])
        lengths_b = None if isinstance(grid, tuple) or not padded else jnp.prod(grid_b3, axis=-1)
        if isinstance(times_b, Modulations):
            known, condition = times_b.blocks, times_b.final
        else:
            known, condition = None, self._condition(times_b, jnp.broadcast_to(positions_bl3[..., 0], shape_bl))
        keys = context_bnd if isinstance(context_bnd, KeysValues) else None
        rows_bnd = None if isinstance(context_bnd, KeysValues) else context_bnd.astype(dtype)
        angles_bli, shared = rotary_angles_3d(positions_bl3, self.config), {"implementation": attention_implementation}
        self_options = {"angles_bli": angles_bli, "key_lengths_b": lengths_b, "seq_sharded": "qk", **shared}
        cross_options = {"key_lengths_b": context_lengths_b, "zero_keys": zero_context, "seq_sharded": "q", **shared}

        def run_block(x_bld: Array, layer: Layer) -> tuple[Array, None]:
            block, modulations, keys_values, own = layer
            conditions, memory = modulations or (condition,) * 3, of_examples(keys_values or rows_bnd, prompt_b)
            x_bld = checkpoint_name(constrain(x_bld, "bld"), "block_input")
            options = self_options, cross_options, dtype, layer_input(own, controls)
            return constrain(block(x_bld, conditions, memory, *options), "bld"), None

        policy = REMAT_POLICIES[remat]
        run_recomputed = jax.checkpoint(run_block, policy=policy, prevent_cse=False) if policy else run_block

        def run_blocks(x_bld: Array, layers: Layer) -> Array:
            if remat in IN_PLACE:
                return scan_in_place(lambda x, layer: run_recomputed(x, layer)[0], x_bld, layers, unroll=scan_unroll)
            return jax.lax.scan(run_recomputed, x_bld, layers, unroll=scan_unroll)[0]

        layers: Layer = self.blocks, known, keys, stacked(controls)
        x_bld = constrain(self.x_embedder(self._with_padding_mask(latents_blc), out_dtype=stream_dtype(dtype)), "bld")
        if after_first is not None:
            x_bld = after_first(x_bld, *first_and_rest(lambda x, layer: run_block(x, layer)[0], x_bld, layers))
        elif remat_every == 1:
            x_bld = run_blocks(x_bld, layers)
        else:
            run_group = jax.checkpoint(run_blocks, policy=REMAT_POLICIES["full"], prevent_cse=False)
            x_bld = scan_in_place(run_group, x_bld, self._grouped(layers, remat_every))
        return self.final_layer(x_bld, condition, dtype).astype(jnp.float32)

    def modulations(self, times_b: Array) -> Modulations:
        """Return the AdaLN values of times (b,) in [0, 1], one for each example or evaluation, for `velocity`."""
        if times_b.ndim != 1:
            raise ValueError(f"times have the shape {times_b.shape}, expected (batch,)")
        condition = self._condition(times_b)
        _, blocks = jax.lax.scan(lambda _, block: (None, block.modulations(condition)), None, self.blocks)
        return Modulations(blocks, self.final_layer.adaln_modulation.values(condition))

    def keys_values(self, context_bnd: Array) -> KeysValues:
        """Return the keys and values of context rows (b, n, context width) in all blocks, in the rows' dtype."""

        def of_block(_: None, block: Block) -> tuple[None, list[Array]]:
            return None, [constrain(x.swapaxes(1, 2), "bhnk") for x in block.cross_attn.keys_values(context_bnd)]

        return KeysValues(*jax.lax.scan(of_block, None, self.blocks)[1])

    def _condition(self, times_b: Array, frame_bl: Array | None = None) -> Condition:
        times_bt = times_b[:, None] if times_b.ndim == 1 else times_b
        frames = times_bt.shape[1]
        features_btd = timestep_features(times_bt, self.config.width)
        shared_btd = constrain(self.t_embedder(features_btd), "btd")
        emb_btd = constrain(jax.nn.silu(self.t_embedding_norm(features_btd)), "btd")
        return emb_btd, shared_btd, None if frame_bl is None or frames == 1 else frame_bl.clip(max=frames - 1)

    def _grouped(self, layers: Layer, size: int) -> Layer:
        """Return the stacked layers with their first axis split into (groups, `size`)."""
        if self.config.blocks % size:
            raise ValueError(f"remat_every is {size}, expected a divisor of {self.config.blocks}, the number of blocks")
        return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), layers)

    def _with_padding_mask(self, latents_blc: Array) -> Array:
        """Append the padding-mask channel (zeros) to each of a token's four latent pixels."""
        pixels = latents_blc.reshape(*latents_blc.shape[:2], PATCH * PATCH, self.config.latent_channels)
        return jnp.pad(pixels, ((0, 0),) * 3 + ((0, 1),)).reshape(*latents_blc.shape[:2], -1)


class Block(nnx.Module):
    """Self-attention, cross-attention and MLP, each preceded by AdaLN modulation and followed by a gate."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.adaln_modulation_self_attn = Modulation(config.width, config.adaln_rank, 3, rngs=rngs)
        self.self_attn = Attention(config.width, config.width, config.heads, rngs=rngs)
        self.adaln_modulation_cross_attn = Modulation(config.width, config.adaln_rank, 3, rngs=rngs)
        self.cross_attn = Attention(config.width, config.context_width, config.heads, rngs=rngs)
        self.adaln_modulation_mlp = Modulation(config.width, config.adaln_rank, 3, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_width, rngs=rngs)

    def __call__(
        self,
        x_bld: Array,
        conditions: Sequence[Condition | Array],
        memory: Array | KeysValues,
        self_options: Mapping[str, Any],
        cross_options: Mapping[str, Any],
        dtype: DTypeLike,
        layer_input: LayerInput,
    ) -> Array:
        def of(part: str) -> LayerInput:
            return lambda name, x: layer_input(f"{part}_{name}", x)

        shift, scale, gate = self.adaln_modulation_self_attn(conditions[0])
        normed = modulate(x_bld, shift, scale, dtype)
        x_bld = add_gated(x_bld, gate, self.self_attn(normed, normed, x_bld.dtype, of("self_attn"), **self_options))
        shift, scale, gate = self.adaln_modulation_cross_attn(conditions[1])
        normed = modulate(x_bld, shift, scale, dtype)
        x_bld = add_gated(x_bld, gate, self.cross_attn(normed, memory, x_bld.dtype, of("cross_attn"), **cross_options))
        shift, scale, gate = self.adaln_modulation_mlp(conditions[2])
        return add_gated(x_bld, gate, self.mlp(modulate(x_bld, shift, scale, dtype), x_bld.dtype, of("mlp")))

    def modulations(self, condition: Condition) -> tuple[Array, ...]:
        """Return the AdaLN values, which a call takes as its conditions."""
        layers = self.adaln_modulation_self_attn, self.adaln_modulation_cross_attn, self.adaln_modulation_mlp
        return tuple(layer.values(condition) for layer in layers)


class FinalLayer(nnx.Module):
    """Modulated LayerNorm and a linear map to the patches' values."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.adaln_modulation = Modulation(config.width, config.adaln_rank, 2, rngs=rngs)
        self.linear = Linear(config.width, PATCH * PATCH * OUT_CHANNELS, zero=True, rngs=rngs)

    def __call__(self, x_bld: Array, condition: Condition | Array, dtype: DTypeLike) -> Array:
        shift, scale = self.adaln_modulation(condition)
        return self.linear(modulate(x_bld, shift, scale, dtype))
