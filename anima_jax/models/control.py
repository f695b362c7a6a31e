"""ControlNet-LLLite for Anima ("v2"): small modules at the transformer's linear layers that a control image steers.

Source: kohya-ss/sd-scripts' networks/control_net_lllite_anima.py and ComfyUI's comfy/ldm/anima/lllite.py. The trunk
computes one embedding of the control image, which depends on neither time nor prompt. A module adds to the input of its
linear layer what it computes from that input and the embedding.

The trunk works on tokens of 16×16 pixels, the transformer's, so that images of several sizes share one program: what a
convolution reads of other tokens is shifted to where it is needed, and statistics are those of an image's own tokens.
Axes: b batch, l tokens, p values of a patch of pixels in the order (y, x, channel), y rows, x columns, c channels, d
width of the transformer, e width of the embedding, m width of a module's hidden features, n blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array
from jax.core import Tracer

from anima_jax.errors import plural
from anima_jax.models import parameters
from anima_jax.models.constraints import constrain
from anima_jax.models.layers import Linear, silu

PATCH = 16
"""Pixels along each side of a token."""

CELLS = 4
"""Rows and columns of a token between the two strided convolutions."""

LAYERS = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "cross_attn_q_proj", "mlp_layer1")
"""The linear layers of a block that can have a module, in the order of the block, by their names in files."""

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Sizes of a control network; the defaults are sd-scripts', for the released 2B model.

    `channels` of the control image are 3, or 4 for inpainting: the image, which with `masked_input` is hidden where it
    is to be drawn anew, and the mask of that place. `dilations` are those of the ASPP, or () without one. `layers` are
    those of `LAYERS` that have a module, in all `blocks` but those in `absent`, such as "3.mlp_layer1".
    """

    channels: int = 3
    trunk_width: int = 64
    embedding_width: int = 32
    mlp_width: int = 64
    resblocks: int = 1
    dilations: tuple[int, ...] = ()
    layers: tuple[str, ...] = LAYERS[:1]
    blocks: int = 28
    masked_input: bool = False
    width: int = 2048
    absent: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.channels not in (3, 4):
            raise ValueError(f"{self.channels} channels of control images, expected 3, or 4 with a mask")
        if unknown := [name for name in self.layers if name not in LAYERS]:
            raise ValueError(f"no control modules at {', '.join(unknown)}, expected some of {', '.join(LAYERS)}")

    def __str__(self) -> str:
        aspp = f", ASPP {', '.join(map(str, self.dilations))}" if self.dilations else ""
        blocks = plural(self.resblocks, "residual block")
        return (
            f"{self.channels} channels, trunk {self.trunk_width} with {blocks}{aspp}, "
            f"embedding {self.embedding_width}, MLP {self.mlp_width}, for {self.blocks} blocks of width {self.width}"
        )


class ControlNetwork(nnx.Module):
    """A control network: the trunk that embeds control images, and the modules at the layers of all blocks, stacked."""

    def __init__(self, config: ControlConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.trunk = ControlTrunk(config, rngs=rngs)
        self.blocks = jax.vmap(lambda layer: ControlBlock(config, rngs=layer))(rngs.split(config.blocks))

    def __repr__(self) -> str:
        return f"ControlNetwork({self.config}, at {', '.join(self.config.layers)}; {parameters.describe(self)})"

    def embed(self, pixels_byxc: Array) -> Array:
        """Return the embedding (b, l, e), float32, of control images in [−1, 1] with sides that are multiples of 16.

        A fourth channel is the mask: 1 where the image is to be drawn anew, else −1. Raises ValueError for other sides,
        another number of channels and integers.
        """
        if pixels_byxc.ndim != 4 or pixels_byxc.shape[1] % PATCH or pixels_byxc.shape[2] % PATCH:
            raise ValueError(f"control images of shape {pixels_byxc.shape}, expected (b, 16·rows, 16·columns, c)")
        if pixels_byxc.shape[3] != self.config.channels:
            raise ValueError(
                f"control images with {pixels_byxc.shape[3]} channels for a network of {self.config.channels}"
            )
        patches_blp = rearrange(pixels_byxc, "b (y m) (x n) c -> b (y x) (m n c)", m=PATCH, n=PATCH)
        rows, columns = pixels_byxc.shape[1] // PATCH, pixels_byxc.shape[2] // PATCH
        return self.embed_patches(patches_blp, jnp.array([[1, rows, columns]], jnp.int32))

    def embed_patches(self, patches_blp: Array, grid_b3: Array) -> Array:
        """Return the embedding (b, l, e), float32, of control images of mixed sizes: of each as `embed` alone gives it.

        `patches_blp` are the patches of `embed`'s pixels, row-major for each image, padding after them. `grid_b3` are
        frames (1), rows and columns of each image in tokens. The embedding of padding is zero. Raises ValueError for
        patches of another number of values, or of integers.
        """
        values = PATCH * PATCH * self.config.channels
        if patches_blp.ndim != 3 or patches_blp.shape[2] != values:
            raise ValueError(f"patches of shape {patches_blp.shape}, expected (b, l, {values})")
        if not jnp.issubdtype(patches_blp.dtype, jnp.floating):
            raise ValueError(f"control images of {patches_blp.dtype}, expected floats in [−1, 1]: pixels / 127.5 − 1")
        return self.trunk(patches_blp, grid_b3)

    def present(self) -> Array | None:
        """Return where there is a module, as 1 or 0 (n, layers), or None if there is one in every block."""
        if not self.config.absent:
            return None
        names = [[f"{block}.{layer}" for layer in self.config.layers] for block in range(self.config.blocks)]
        return jnp.array([[name not in self.config.absent for name in row] for row in names], jnp.float32)


ControlTerm = tuple[ControlNetwork, Array, Any]
"""A control network, the embedding (b, l, e) of its control images, and its strength: a number, or an array (b,).

The embedding of one image, (1, l, e), is that of all in the batch.
"""


def stacked(controls: Sequence[ControlTerm]) -> tuple[Any, ...]:
    """Return the stacked modules of control networks and where there are any: part of a scan's layers."""
    return tuple((network.blocks, network.present()) for network, _, _ in controls)


def layer_input(layers: tuple[Any, ...], controls: Sequence[ControlTerm]) -> Callable[[str, Array], Array]:
    """Return the function of a layer's name and input (b, l, d) that adds the terms of control networks, in order.

    `layers` are those of one block: a slice of `stacked`.
    """

    def changed(name: str, x_bld: Array) -> Array:
        for (block, present), (_, embedding_ble, strength) in zip(layers, controls, strict=True):
            if name in block.layers:
                scale = jnp.asarray(strength, jnp.float32).reshape(-1, 1, 1)
                scale = scale if present is None else scale * present[block.layers.index(name)]
                x_bld = getattr(block, name)(x_bld, embedding_ble, scale)
        return x_bld

    return changed


def check_controls(
    controls: Sequence[ControlTerm],
    grid: Array | tuple[int, int, int],
    shape_blc: tuple[int, ...],
    blocks: int,
    width: int,
) -> None:
    """Raise ValueError unless control networks fit a transformer of this depth and width, and embeddings the tokens."""
    if not controls:
        return
    frames = (
        grid[0] if isinstance(grid, tuple) else 1 if isinstance(grid, Tracer) else int(np.max(np.asarray(grid)[:, 0]))
    )
    if frames > 1:
        raise ValueError(f"control networks steer single images, found latents of {frames} frames")
    for network, embedding_ble, strength in controls:
        config = network.config
        if (config.blocks, config.width) != (blocks, width):
            raise ValueError(
                f"a control network for {config.blocks} blocks of width {config.width}, the model has "
                f"{blocks} of width {width}; load_control(…, blocks={blocks}) fits one to deeper models"
            )
        expected = (*shape_blc[:2], config.embedding_width)
        if embedding_ble.shape not in (expected, (1, *expected[1:])):
            raise ValueError(f"a control embedding of shape {embedding_ble.shape}, expected {expected}")
        if jnp.shape(strength) not in ((), shape_blc[:1]):
            raise ValueError(f"control strengths of shape {jnp.shape(strength)}, expected a number or {shape_blc[:1]}")


# ---- modules at linear layers ----------------------------------------------------------------------------------------


class ControlBlock(nnx.Module):
    """The modules of one of the transformer's blocks, by the names of their layers."""

    def __init__(self, config: ControlConfig, *, rngs: nnx.Rngs):
        self.layers = config.layers
        for name in config.layers:
            setattr(self, name, ControlModule(config, rngs=rngs))


class ControlModule(nnx.Module):
    """The module at one linear layer. `up`, `cond_to_film` and `depth_bias` start at zero: the layer is unchanged."""

    def __init__(self, config: ControlConfig, *, rngs: nnx.Rngs):
        embedding, hidden = config.embedding_width, config.mlp_width
        self.depth_bias = nnx.Param(jnp.zeros(embedding))  # `depth_embed` in files
        self.down = _linear(config.width, hidden, rngs)
        self.mid = _linear(embedding + hidden, hidden, rngs)
        self.cond_to_film = Linear(embedding, 2 * hidden, use_bias=True, zero=True, rngs=rngs)
        self.up = Linear(hidden, config.width, use_bias=True, zero=True, rngs=rngs)
        self.dropout = 0.0
        self.keys: nnx.Param[Array] | None = None

    def __call__(self, x_bld: Array, embedding_ble: Array, strength_b11: Array) -> Array:
        """Return x + strength · the module's term, in the dtype of `x_bld`."""
        dtype = x_bld.dtype
        # The sum is in float32, so that the embedding's gradient is, too: it adds up over all layers.
        sum_ble = embedding_ble.astype(jnp.float32) + self.depth_bias[...].astype(jnp.float32)
        steered_ble = jnp.broadcast_to(sum_ble.astype(dtype), (*x_bld.shape[:2], sum_ble.shape[-1]))
        steered_ble = constrain(steered_ble, "ble")
        scale_blm, shift_blm = jnp.split(self.cond_to_film(steered_ble), 2, axis=-1)
        hidden_blm = self.mid(jnp.concatenate([steered_ble, silu(self.down(x_bld))], axis=-1))
        hidden_blm = self._dropped(_modulated_silu(hidden_blm, scale_blm, shift_blm))
        # Without the barrier a TPU would compute the sum again for every tile of the layer's own product.
        return jax.lax.optimization_barrier(_with_term(x_bld, strength_b11, self.up(hidden_blm)))

    def _dropped(self, x_blm: Array) -> Array:
        """Return `x_blm`, in training with dropout: some values are zero and the others are scaled up."""
        if self.keys is None:
            return x_blm
        kept = jax.vmap(lambda key: jax.random.uniform(key, x_blm.shape[1:]) >= self.dropout)(self.keys[...])
        return x_blm * (kept / (1.0 - self.dropout)).astype(x_blm.dtype)


def drop(network: ControlNetwork, keys_b: Array, dropout: float) -> None:
    """Switch on dropout in the modules of `network`, in place, with one random key per example."""
    fold_b = jax.vmap(jax.random.fold_in, (0, None))
    fold_nb = jax.vmap(fold_b, (None, 0))
    for number, name in enumerate(LAYERS):
        if name in network.config.layers:
            module = getattr(network.blocks, name)
            module.dropout = dropout
            module.keys = nnx.data(nnx.Param(fold_nb(fold_b(keys_b, number), jnp.arange(network.config.blocks))))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _modulated_silu(x: Array, scale: Array, shift: Array) -> Array:
    """Return SiLU(x · (1 + scale) + shift), computed in float32, in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.float32) * (1.0 + scale) + shift).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _with_term(x_bld: Array, strength_b11: Array, term_bld: Array) -> Array:
    return (x_bld.astype(jnp.float32) + strength_b11 * term_bld.astype(jnp.float32)).astype(x_bld.dtype)


# ---- trunk -----------------------------------------------------------------------------------------------------------


class ControlTrunk(nnx.Module):
    """Convolutions from pixels to the embedding, in float32.

    The kernel of a k×k convolution is a matrix of k·k·c rows in the order (y, x, channel).
    """

    def __init__(self, config: ControlConfig, *, rngs: nnx.Rngs):
        width, half = config.trunk_width, config.trunk_width // 2
        self.masked_input, self.resblocks = config.masked_input, config.resblocks
        self.conv1 = _linear((PATCH // CELLS) ** 2 * config.channels, half, rngs)
        self.norm1 = GroupNorm(half)
        self.conv2 = _linear(9 * half, half, rngs)
        self.norm2 = GroupNorm(half)
        self.conv3 = _linear(CELLS**2 * half, width, rngs)
        self.norm3 = GroupNorm(width)
        for number in range(config.resblocks):
            setattr(self, f"resblock_{number}", TrunkBlock(width, rngs=rngs))
        self.aspp = ASPP(width, config.dilations, rngs=rngs) if config.dilations else None
        self.proj = _linear(width, config.embedding_width, rngs)
        self.out_norm = LayerNorm(config.embedding_width)

    def __call__(self, patches_blp: Array, grid_b3: Array) -> Array:
        # Devices that share an image's tokens all compute the whole embedding: a token needs its neighbours.
        batch, length = patches_blp.shape[:2]
        tokens = Tokens(jnp.broadcast_to(grid_b3, (batch, 3)), length)
        pixels = constrain(patches_blp, "bnp").astype(jnp.float32).reshape(batch, length, PATCH, PATCH, -1)
        pixels = _with_mask(pixels, self.masked_input) if pixels.shape[-1] == 4 else pixels
        side = PATCH // CELLS
        cells = rearrange(pixels, "b l (y m) (x n) c -> b l y x (m n c)", m=side, n=side)
        cells = jax.nn.silu(self.norm1(self.conv1(cells), tokens))
        cells = jax.nn.silu(self.norm2(_cell_convolution(cells, tokens, self.conv2), tokens))
        x_blc = jax.nn.silu(self.norm3(self.conv3(cells.reshape(batch, length, -1)), tokens))
        for number in range(self.resblocks):
            x_blc = getattr(self, f"resblock_{number}")(x_blc, tokens)
        if self.aspp is not None:
            x_blc = self.aspp(x_blc, tokens)
        embedding_ble = jnp.where(tokens.real_bl[..., None], self.out_norm(self.proj(x_blc)), 0.0)
        return constrain(embedding_ble, "ble")


class TrunkBlock(nnx.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))), convolutions 3×3."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(width)
        self.conv1 = _linear(9 * width, width, rngs)
        self.norm2 = GroupNorm(width)
        self.conv2 = _linear(9 * width, width, rngs)

    def __call__(self, x_blc: Array, tokens: "Tokens") -> Array:
        hidden = _convolution(jax.nn.silu(self.norm1(x_blc, tokens)), tokens, self.conv1, 1)
        return x_blc + _convolution(jax.nn.silu(self.norm2(hidden, tokens)), tokens, self.conv2, 1)


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: 3×3 convolutions at several dilations (1×1 for dilation 1) and a global mean."""

    def __init__(self, width: int, dilations: tuple[int, ...], *, rngs: nnx.Rngs):
        self.dilations = dilations
        for number, dilation in enumerate(dilations):
            setattr(self, f"conv_{number}", _linear(width if dilation == 1 else 9 * width, width, rngs))
            setattr(self, f"norm_{number}", GroupNorm(width))
        self.global_conv, self.global_norm = _linear(width, width, rngs), GroupNorm(width)
        self.proj, self.norm = _linear((len(dilations) + 1) * width, width, rngs), GroupNorm(width)

    def __call__(self, x_blc: Array, tokens: "Tokens") -> Array:
        branches = []
        for number, dilation in enumerate(self.dilations):
            conv, norm = getattr(self, f"conv_{number}"), getattr(self, f"norm_{number}")
            out = conv(x_blc) if dilation == 1 else _convolution(x_blc, tokens, conv, dilation)
            branches.append(jax.nn.silu(norm(out, tokens)))
        mean_b1c = jnp.sum(jnp.where(tokens.real_bl[..., None], x_blc, 0.0), axis=1, keepdims=True)
        mean_b1c = mean_b1c / tokens.count_b[:, None, None]
        of_image = jax.nn.silu(self.global_norm(self.global_conv(mean_b1c), None))
        branches.append(jnp.broadcast_to(of_image, x_blc.shape))
        return jax.nn.silu(self.norm(self.proj(jnp.concatenate(branches, axis=-1)), tokens))


class GroupNorm(nnx.Module):
    """Group norm over an image's own tokens, with the largest of 8, 4, 2 and 1 groups that divides the channels."""

    def __init__(self, channels: int):
        self.groups = next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array, tokens: "Tokens | None") -> Array:
        """Return the normed `x` (b, l, …, c), float32. Without `tokens` all are an image's own."""
        x32 = x.astype(jnp.float32).reshape(*x.shape[:2], -1, self.groups, x.shape[-1] // self.groups)
        values = x32.shape[2] * x32.shape[4]
        if tokens is None:
            real, count = jnp.array(True), jnp.float32(x.shape[1] * values)
        else:
            real, count = tokens.real_bl[:, :, None, None, None], values * tokens.count_b[:, None, None, None, None]
        mean = jnp.sum(jnp.where(real, x32, 0.0), axis=(1, 2, 4), keepdims=True) / count
        centred = x32 - mean
        variance = jnp.sum(jnp.where(real, jnp.square(centred), 0.0), axis=(1, 2, 4), keepdims=True) / count
        normed = (centred * jax.lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
        return normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, with scale and bias, in float32."""

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + NORM_EPS)
        return normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class Tokens:
    """Where the tokens of each image are: its own are the first rows · columns, the others are padding."""

    def __init__(self, grid_b3: Array, length: int):
        index_1l = jnp.arange(length, dtype=jnp.int32)[None]
        self.rows_b1, self.columns_b1 = grid_b3[:, 1:2], jnp.maximum(grid_b3[:, 2:3], 1)
        self.index_bl = jnp.broadcast_to(index_1l, (len(grid_b3), length))
        self.row_bl, self.column_bl = index_1l // self.columns_b1, index_1l % self.columns_b1
        self.real_bl = self.row_bl < self.rows_b1
        self.count_b = jnp.maximum(jnp.sum(self.real_bl, axis=1), 1).astype(jnp.float32)

    def shifted(self, x: Array, dy: int, dx: int) -> Array:
        """Return at each token the values of `x` (b, l, …) that are `dy` rows and `dx` columns away, 0 outside."""
        return _taken(x, self._source(dy, dx), self._source(-dy, -dx))

    def _source(self, dy: int, dx: int) -> Array:
        """Return each token's source, or −1 outside of the image."""
        row_bl, column_bl = self.row_bl + dy, self.column_bl + dx
        inside_bl = (row_bl >= 0) & (row_bl < self.rows_b1) & (column_bl >= 0) & (column_bl < self.columns_b1)
        return jnp.where(inside_bl & self.real_bl, self.index_bl + dy * self.columns_b1 + dx, -1)


@jax.custom_vjp
def _taken(x: Array, source_bl: Array, target_bl: Array) -> Array:
    """Return the values of `x` (b, l, …) at `source_bl`, 0 where it is −1. `target_bl` is where each value goes.

    By it the gradient is taken, too: the scattered sum that JAX would compute is slow on accelerators.
    """
    flat = x.reshape(*x.shape[:2], -1)
    taken = jnp.take_along_axis(flat, jnp.maximum(source_bl, 0)[..., None], axis=1)
    return jnp.where(source_bl[..., None] >= 0, taken, 0).reshape(x.shape)


_taken.defvjp(
    lambda x, source_bl, target_bl: (_taken(x, source_bl, target_bl), (source_bl, target_bl)),
    lambda sources, grad: (_taken(grad, sources[1], sources[0]), None, None),
)


def _convolution(x_blc: Array, tokens: Tokens, conv: Linear, dilation: int) -> Array:
    """Return a 3×3 convolution of tokens, with zeros outside of the image."""
    steps = (-dilation, 0, dilation)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def windows(x_blc: Array) -> Array:
        return jnp.concatenate([tokens.shifted(x_blc, dy, dx) for dy in steps for dx in steps], axis=-1)

    return conv(windows(x_blc))


def _cell_convolution(cells: Array, tokens: Tokens, conv: Linear) -> Array:
    """Return a 3×3 convolution of the cells (b, l, 4, 4, c) of all tokens, with zeros outside of the image."""
    above, below = tokens.shifted(cells[:, :, -1:], -1, 0), tokens.shifted(cells[:, :, :1], 1, 0)
    tall = jnp.concatenate([above, cells, below], axis=2)
    left, right = tokens.shifted(tall[:, :, :, -1:], 0, -1), tokens.shifted(tall[:, :, :, :1], 0, 1)
    wide = jnp.concatenate([left, tall, right], axis=3)
    parts = [wide[:, :, y : y + CELLS, x : x + CELLS] for y in range(3) for x in range(3)]
    return conv(jnp.concatenate(parts, axis=-1))


def _with_mask(pixels: Array, masked_input: bool) -> Array:
    """Return pixels (…, 4) with the mask rounded to ±1 and, with `masked_input`, colours 0 where it is 1."""
    is_drawn = pixels[..., 3:] >= 0
    colours = jnp.where(is_drawn, 0.0, pixels[..., :3]) if masked_input else pixels[..., :3]
    return jnp.concatenate([colours, jnp.where(is_drawn, 1.0, -1.0)], axis=-1)


def _linear(features_in: int, features_out: int, rngs: nnx.Rngs) -> Linear:
    """Return a linear layer with a bias and PyTorch's initial values: uniform within ±1 / √(features in)."""
    layer, bound = Linear(features_in, features_out, use_bias=True, rngs=rngs), 1.0 / math.sqrt(features_in)
    layer.kernel = nnx.Param(
        jax.random.uniform(rngs.params(), (features_in, features_out), minval=-bound, maxval=bound)
    )
    layer.bias = nnx.Param(jax.random.uniform(rngs.params(), (features_out,), minval=-bound, maxval=bound))
    return layer
