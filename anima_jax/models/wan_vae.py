"""Wan 2.1 VAE: pixels to latents and back, 8× in space and 4× in time, with convolutions that are causal in time.

Source: Wan 2.1 (arXiv 2503.20314), diffusion-pipe `models/wan/vae2_1.py`; the file is known as `qwen_image_vae`.

An image is a video of one frame. Longer videos are processed in chunks: the first frame alone, then four frames (one
latent frame) at a time. A layer that needs earlier frames gets the last ones it saw. A single frame needs only 2-D
convolutions, and the layers' memory does not grow with the length of the video.

Axes: b batch, t frames, y rows, x columns, c channels; `i`, `o` channels in and out of a convolution.
Pixels are (b, 1 + 4n, 8y, 8x, 3) in [-1, 1]; latents are (b, 1 + n, y, x, c), normalised per channel.
Activations have the dtype of the input; norms, the last layer of encoder and decoder, and the results are float32.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from anima_jax.models import parameters
from anima_jax.models.attention import attention
from anima_jax.models.layers import Linear, linear

# Statistics of the released encoder's latents (diffusion-pipe `models/wan/vae2_1.py`, WanVAE).
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of the VAE; the defaults are the released model's.

    `base_width · multipliers[i]` is the number of channels at level i; each level has half the rows and columns of the
    previous one. `temporal_down[i]` says whether downsampling from level i to i + 1 also halves the frames. The decoder
    has one more block per level than the encoder.
    """

    base_width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    latent_channels: int = 16
    temporal_down: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD

    def __post_init__(self) -> None:
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise ValueError(f"{len(self.multipliers)} levels need {len(self.multipliers) - 1} temporal_down flags")
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(f"{self.latent_channels} latent channels need as many means and deviations")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    @property
    def space_factor(self) -> int:
        """Pixels per latent pixel along each side: 8 by default."""
        return 2 ** len(self.temporal_down)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame, except for the first: 4 by default."""
        return 2 ** sum(self.temporal_down)

    def __str__(self) -> str:
        return f"widths {', '.join(map(str, self.widths))}, {self.latent_channels} latent channels"


class Stream:
    """The frames before a chunk that each layer needs, in the order in which the layers run.

    `Stream(dtype)` is for the first chunk, which is one frame and has no past; `Stream(dtype, memory)` is for the later
    ones. `dtype` is the convolutions' dtype; the sums in residual blocks are always float32.
    """

    def __init__(self, dtype: DTypeLike, memory: Sequence[Array] | None = None):
        self.dtype = dtype
        self.is_first = memory is None
        self._past = iter(memory or ())
        self._seen: list[tuple[Array, int]] = []

    def with_past(self, x_btyxc: Array, frames: int) -> Array:
        """Return the chunk preceded by the last `frames` frames that this layer saw; the first chunk is unchanged."""
        extended = x_btyxc if self.is_first else jnp.concatenate([next(self._past), x_btyxc], axis=1)
        self._seen.append((extended, frames))
        return extended

    def memory(self) -> list[Array]:
        """Return the memory for the next chunk's `Stream`. Frames before the first are zeros."""
        return [_last_frames(extended, frames) for extended, frames in self._seen]


def _last_frames(x_btyxc: Array, frames: int) -> Array:
    missing = max(0, frames - x_btyxc.shape[1])
    padded = jnp.pad(x_btyxc, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    return padded[:, padded.shape[1] - frames :]


def convolve(
    x_btyxc: Array, kernel_tyxio: Array, bias_o: Array, *, stride: int = 1, padding: tuple[int, int] = (1, 1)
) -> Array:
    """Convolve over frames (without padding), rows and columns (with `padding` before and after, and `stride`).

    A single frame is treated as if zeros preceded it: only the kernel's last tap in time is applied.
    """
    kernel = (kernel_tyxio if x_btyxc.shape[1] > 1 else kernel_tyxio[-1:]).astype(x_btyxc.dtype)
    if kernel.shape[0] == 1:
        b, t = x_btyxc.shape[:2]
        out = jax.lax.conv_general_dilated(
            x_btyxc.reshape(b * t, *x_btyxc.shape[2:]),
            kernel[0],
            (stride, stride),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        out = out.reshape(b, t, *out.shape[1:])
    else:
        out = jax.lax.conv_general_dilated(
            x_btyxc,
            kernel,
            (1, stride, stride),
            ((0, 0), padding, padding),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
    return out + bias_o.astype(out.dtype)


class Conv(nnx.Module):
    """Convolution with `kernel` (t, y, x, i, o) and `bias` (o), causal in time.

    The kernel is initialised uniformly within ±1/sqrt(fan in), the bias with zeros.
    """

    def __init__(self, features_in: int, features_out: int, taps: tuple[int, int, int], *, rngs: nnx.Rngs):
        bound = 1.0 / math.sqrt(features_in * math.prod(taps))
        shape = (*taps, features_in, features_out)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jnp.zeros(features_out))

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        """Convolve a chunk. The frames before it come from `stream`; rows and columns are padded with zeros."""
        return self.over(stream.with_past(x_btyxc, self.kernel.shape[0] - 1))

    def over(self, x_btyxc: Array, *, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> Array:
        """Convolve these frames alone, without earlier ones."""
        return convolve(x_btyxc, self.kernel[...], self.bias[...], stride=stride, padding=padding)

    def over_time(self, x_btyxc: Array, *, stride: int = 1) -> Array:
        """Convolve with a kernel (t, 1, 1, i, o), as one matrix product over the concatenated frames of all taps."""
        taps, _, _, features_in, features_out = self.kernel.shape
        starts = x_btyxc.shape[1] - taps + 1
        of_taps = jnp.concatenate([x_btyxc[:, tap : tap + starts : stride] for tap in range(taps)], axis=-1)
        return linear(of_taps, self.kernel[...].reshape(taps * features_in, features_out), self.bias[...])


class ChannelNorm(nnx.Module):
    """x / max(‖x‖₂, 1e-12) · sqrt(c) · scale over the channels, then SiLU if `silu`.

    Computed in float32; the result has the dtype of `x`.
    """

    def __init__(self, features: int, *, silu: bool = False):
        self.scale = nnx.Param(jnp.ones(features))
        self.silu = silu

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        # sqrt(max(Σx², ε²)) is max(‖x‖, ε), but also has a gradient where x is zero.
        normed = x32 * (jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * math.sqrt(x.shape[-1]))
        scaled = normed * self.scale[...]
        return (nnx.silu(scaled) if self.silu else scaled).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); if the width changes, x passes through a 1×1 `shortcut`."""

    def __init__(self, features_in: int, features_out: int, *, rngs: nnx.Rngs):
        self.norm1 = ChannelNorm(features_in, silu=True)
        self.conv1 = Conv(features_in, features_out, (3, 3, 3), rngs=rngs)
        self.norm2 = ChannelNorm(features_out, silu=True)
        self.conv2 = Conv(features_out, features_out, (3, 3, 3), rngs=rngs)
        changes = features_in != features_out
        self.shortcut = Linear(features_in, features_out, use_bias=True, rngs=rngs) if changes else None

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        hidden = self.conv1(self.norm1(x_btyxc).astype(stream.dtype), stream)
        hidden = self.conv2(self.norm2(hidden), stream)
        kept = x_btyxc if self.shortcut is None else self.shortcut(x_btyxc.astype(stream.dtype))
        return hidden.astype(jnp.float32) + kept


class FrameAttention(nnx.Module):
    """x + single-head attention over the pixels of each frame."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm(features)
        self.qkv_proj = Linear(features, 3 * features, use_bias=True, rngs=rngs)
        self.output_proj = Linear(features, features, use_bias=True, rngs=rngs)

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        b, t, y, x, c = x_btyxc.shape
        q_blhk, k_blhk, v_blhk = jnp.split(
            self.qkv_proj(self.norm(x_btyxc).astype(stream.dtype)).reshape(b * t, y * x, 1, 3 * c), 3, axis=-1
        )
        return x_btyxc + self.output_proj(attention(q_blhk, k_blhk, v_blhk).reshape(b, t, y, x, c))


class Middle(nnx.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(features, features, rngs=rngs)
        self.attention = FrameAttention(features, rngs=rngs)
        self.block2 = ResidualBlock(features, features, rngs=rngs)

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        return self.block2(self.attention(self.block1(x_btyxc, stream), stream), stream)


class Downsample(nnx.Module):
    """Downsampling: halves rows and columns with `conv` and, if `temporal`, frames after the first with `time_conv`.

    The first frame bypasses `time_conv`; frame k ≥ 1 of the result is computed from frames 2k − 2, 2k − 1 and 2k.
    """

    def __init__(self, features: int, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = Conv(features, features, (1, 3, 3), rngs=rngs)
        self.time_conv = Conv(features, features, (3, 1, 1), rngs=rngs) if temporal else None

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        x_btyxc = self.conv.over(x_btyxc.astype(stream.dtype), stride=2, padding=(0, 1))
        if self.time_conv is None:
            return x_btyxc
        extended = stream.with_past(x_btyxc, 1)
        return x_btyxc if stream.is_first else self.time_conv.over_time(extended, stride=2)


class Upsample(nnx.Module):
    """Upsampling: if `temporal`, doubles the frames after the first, then always doubles rows and columns.

    The first frame bypasses `time_conv` and is not part of its past. For later frames `time_conv` doubles the channels,
    and the two halves become two frames. Rows and columns are repeated (nearest) and passed through `conv`.
    """

    def __init__(self, features_in: int, features_out: int, *, temporal: bool, rngs: nnx.Rngs):
        self.time_conv = Conv(features_in, 2 * features_in, (3, 1, 1), rngs=rngs) if temporal else None
        self.conv = Conv(features_in, features_out, (1, 3, 3), rngs=rngs)

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        x_btyxc = x_btyxc.astype(stream.dtype)
        if self.time_conv is not None:
            x_btyxc = self._double_frames(self.time_conv, x_btyxc, stream)
        return self.conv.over(jnp.repeat(jnp.repeat(x_btyxc, 2, axis=2), 2, axis=3))

    @staticmethod
    def _double_frames(time_conv: Conv, x_btyxc: Array, stream: Stream) -> Array:
        if stream.is_first:
            stream.with_past(jnp.zeros_like(x_btyxc), 2)
            return x_btyxc
        b, t, y, x, c = x_btyxc.shape
        halves = time_conv.over_time(stream.with_past(x_btyxc, 2)).reshape(b, t, y, x, 2, c)
        return jnp.moveaxis(halves, 4, 2).reshape(b, 2 * t, y, x, c)


class Level(nnx.Module):
    """Residual blocks at one resolution, then resampling to the next one, if there is one."""

    def __init__(self, widths: Sequence[int], resample: Downsample | Upsample | None, *, rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.blocks = nnx.List([ResidualBlock(width, next_width, rngs=rngs) for width, next_width in pairs])
        self.resample = resample

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        for block in self.blocks:
            x_btyxc = block(x_btyxc, stream)
        return x_btyxc if self.resample is None else self.resample(x_btyxc, stream)


class Encoder(nnx.Module):
    """The encoder without its last 1×1 convolution: maps a chunk of pixels to (b, t, y, x, 2 · latent channels)."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        widths = config.widths
        self.conv_in = Conv(3, widths[0], (3, 3, 3), rngs=rngs)
        self.levels = nnx.List([])
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            resample = None if last else Downsample(width, temporal=config.temporal_down[level], rngs=rngs)
            chain = [widths[max(level - 1, 0)]] + [width] * config.blocks_per_level
            self.levels.append(Level(chain, resample, rngs=rngs))
        self.middle = Middle(widths[-1], rngs=rngs)
        self.norm_out = ChannelNorm(widths[-1], silu=True)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, (3, 3, 3), rngs=rngs)

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        x_btyxc = self.conv_in(x_btyxc, stream)
        for level in self.levels:
            x_btyxc = level(x_btyxc, stream)
        x_btyxc = self.middle(x_btyxc, stream)
        return self.conv_out(self.norm_out(x_btyxc.astype(jnp.float32)), stream)


class Decoder(nnx.Module):
    """The decoder without its first 1×1 convolution: maps one latent frame to its frames of pixels."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        widths, temporal_up = config.widths[::-1], config.temporal_down[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], (3, 3, 3), rngs=rngs)
        self.middle = Middle(widths[0], rngs=rngs)
        self.levels = nnx.List([])
        for level, width in enumerate(widths):
            # Upsampling halves the channels, regardless of the next level's width.
            width_in = widths[0] if level == 0 else widths[level - 1] // 2
            last = level == len(widths) - 1
            resample = None if last else Upsample(width, width // 2, temporal=temporal_up[level], rngs=rngs)
            self.levels.append(Level([width_in] + [width] * (config.blocks_per_level + 1), resample, rngs=rngs))
        self.norm_out = ChannelNorm(widths[-1], silu=True)
        self.conv_out = Conv(widths[-1], 3, (3, 3, 3), rngs=rngs)

    def __call__(self, x_btyxc: Array, stream: Stream) -> Array:
        x_btyxc = self.middle(self.conv_in(x_btyxc, stream), stream)
        for level in self.levels:
            x_btyxc = level(x_btyxc, stream)
        return self.conv_out(self.norm_out(x_btyxc.astype(jnp.float32)), stream)


def _run_in_chunks(step: Callable[[Array, Stream], Array], x_btyxc: Array, frames_in: int, frames_out: int) -> Array:
    """Run `step(frames, stream)` on the first frame, then on `frames_in` frames at a time; join the results, float32.

    The first frame yields one frame, each chunk `frames_out` frames. The results are written in place into one array,
    so that memory is needed only for this array, the input and one chunk.
    """
    stream = Stream(x_btyxc.dtype)
    first = step(x_btyxc[:, :1], stream).astype(jnp.float32)
    chunks = (x_btyxc.shape[1] - 1) // frames_in
    if chunks == 0:
        return first

    def advance(index: Array, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        memory, joined = carry
        stream = Stream(x_btyxc.dtype, memory)
        chunk = jax.lax.dynamic_slice_in_dim(x_btyxc, 1 + frames_in * index, frames_in, axis=1)
        out = step(chunk, stream).astype(jnp.float32)
        return stream.memory(), jax.lax.dynamic_update_slice_in_dim(joined, out, 1 + frames_out * index, axis=1)

    joined = jnp.pad(first, ((0, 0), (0, frames_out * chunks), (0, 0), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, chunks, advance, (stream.memory(), joined))[1]


class WanVAE(nnx.Module):
    """The autoencoder. Call `encode` and `decode` under `jax.jit`; each new shape compiles a new program."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs):
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = Linear(2 * channels, 2 * channels, use_bias=True, rngs=rngs)
        self.post_quant = Linear(channels, channels, use_bias=True, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __repr__(self) -> str:
        return f"WanVAE({self.config}; {parameters.describe(self)})"

    def encode(self, pixels_btyxc: Array) -> Array:
        """Return normalised latents (b, 1 + n, y/8, x/8, c), float32, of pixels (b, 1 + 4n, y, x, 3) in [-1, 1].

        The latents are the posterior's mean. The dtype of the pixels is the compute dtype. Raises ValueError for pixels
        of any other shape.
        """
        self._check_pixels(pixels_btyxc)
        return _run_in_chunks(self._encode_chunk, pixels_btyxc, self.config.time_factor, 1)

    def _encode_chunk(self, pixels_btyxc: Array, stream: Stream) -> Array:
        mean = self.quant(self.encoder(pixels_btyxc, stream))[..., : self.config.latent_channels].astype(jnp.float32)
        return (mean - jnp.array(self.config.latent_mean)) / jnp.array(self.config.latent_std)

    def decode(self, latents_btyxc: Array) -> Array:
        """Return pixels (b, 1 + 4n, 8y, 8x, 3), float32 and not clipped, of normalised latents (b, 1 + n, y, x, c).

        The dtype of the latents is the compute dtype. Raises ValueError for latents of any other shape.
        """
        channels = self.config.latent_channels
        if latents_btyxc.ndim != 5 or latents_btyxc.shape[-1] != channels or not latents_btyxc.shape[1]:
            raise ValueError(f"latents must be (b, t, y, x, {channels}), not {latents_btyxc.shape}")
        return _run_in_chunks(self._decode_chunk, latents_btyxc, 1, self.config.time_factor)

    def _decode_chunk(self, latents_btyxc: Array, stream: Stream) -> Array:
        raw = latents_btyxc.astype(jnp.float32) * jnp.array(self.config.latent_std)
        raw = (raw + jnp.array(self.config.latent_mean)).astype(latents_btyxc.dtype)
        return self.decoder(self.post_quant(raw), stream)

    def _check_pixels(self, pixels_btyxc: Array) -> None:
        space, time = self.config.space_factor, self.config.time_factor
        if pixels_btyxc.ndim != 5 or pixels_btyxc.shape[-1] != 3:
            raise ValueError(f"pixels must be (b, t, y, x, 3), not {pixels_btyxc.shape}")
        _, frames, rows, columns, _ = pixels_btyxc.shape
        if frames < 1 or (frames - 1) % time:
            raise ValueError(f"a video must have 1 + {time}n frames, not {frames}")
        if rows % space or columns % space:
            raise ValueError(f"rows and columns must be multiples of {space}, not {rows}×{columns}")
