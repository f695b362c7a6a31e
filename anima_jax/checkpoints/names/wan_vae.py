"""Names of the Wan 2.1 VAE in its original file (`qwen_image_vae.safetensors`), and the config read from one.

The file numbers residual blocks and resampling steps in one flat list per side (`encoder.downsamples.0`, `.1`, …), so
the table depends on the number of blocks per level.
"""

import re
from collections.abc import Iterator, Mapping

from anima_jax.checkpoints.names import SAME, FileLayout, Rule, permuted
from anima_jax.errors import UserError
from anima_jax.models.wan_vae import LATENT_MEAN, WanVAEConfig

_CONV = permuted(2, 3, 4, 1, 0)
# The resampling convolution has no time axis in the file.
_CONV_2D = FileLayout(lambda file: file.transpose(2, 3, 1, 0)[None], lambda model: model[0].transpose(3, 2, 0, 1))


def _point(axes: int) -> FileLayout:
    """Return the layout of a linear map that the file stores as a convolution over `axes` axes of size 1."""
    return FileLayout(
        lambda file: file.reshape(file.shape[:2]).T, lambda model: model.T.reshape(*model.T.shape, *(1,) * axes)
    )


def _gamma(axes: int) -> FileLayout:
    """Return the layout of a norm's scale, which the file stores with `axes` trailing axes of size 1."""
    return FileLayout(lambda file: file.reshape(file.shape[:1]), lambda model: model.reshape(-1, *(1,) * axes))


# (our name, the file's name, layout), relative to the part of the network that contains them.
_BLOCK = (
    (r"norm1.scale", "residual.0.gamma", _gamma(3)),
    (r"conv1.kernel", "residual.2.weight", _CONV),
    (r"conv1.bias", "residual.2.bias", SAME),
    (r"norm2.scale", "residual.3.gamma", _gamma(3)),
    (r"conv2.kernel", "residual.6.weight", _CONV),
    (r"conv2.bias", "residual.6.bias", SAME),
    (r"shortcut.kernel", "shortcut.weight", _point(3)),
    (r"shortcut.bias", "shortcut.bias", SAME),
)
_RESAMPLE = (
    (r"conv.kernel", "resample.1.weight", _CONV_2D),
    (r"conv.bias", "resample.1.bias", SAME),
    (r"time_conv.kernel", "time_conv.weight", _CONV),
    (r"time_conv.bias", "time_conv.bias", SAME),
)
_ATTENTION = (
    (r"norm.scale", "norm.gamma", _gamma(2)),
    (r"qkv_proj.kernel", "to_qkv.weight", _point(2)),
    (r"qkv_proj.bias", "to_qkv.bias", SAME),
    (r"output_proj.kernel", "proj.weight", _point(2)),
    (r"output_proj.bias", "proj.bias", SAME),
)
_ENDS = (
    (r"conv_in.kernel", "conv1.weight", _CONV),
    (r"conv_in.bias", "conv1.bias", SAME),
    (r"norm_out.scale", "head.0.gamma", _gamma(3)),
    (r"conv_out.kernel", "head.2.weight", _CONV),
    (r"conv_out.bias", "head.2.bias", SAME),
)
_WHOLE = (
    (r"quant.kernel", "conv1.weight", _point(3)),
    (r"quant.bias", "conv1.bias", SAME),
    (r"post_quant.kernel", "conv2.weight", _point(3)),
    (r"post_quant.bias", "conv2.bias", SAME),
)


def rules(config: WanVAEConfig) -> tuple[Rule, ...]:
    """Return the table for a model with this config."""
    return tuple(
        Rule(re.escape(f"{ours}{path}"), f"{theirs}{name}", layout)
        for ours, theirs, rows in _parts(config)
        for path, name, layout in rows
    )


def _parts(config: WanVAEConfig) -> Iterator[tuple[str, str, tuple[tuple[str, str, FileLayout], ...]]]:
    """Yield (our prefix, the file's prefix, rows) of every part of the model."""
    yield "", "", _WHOLE
    for side, flat_list, blocks in (
        ("encoder", "downsamples", config.blocks_per_level),
        ("decoder", "upsamples", config.blocks_per_level + 1),
    ):
        yield f"{side}.", f"{side}.", _ENDS
        yield f"{side}.middle.block1.", f"{side}.middle.0.", _BLOCK
        yield f"{side}.middle.attention.", f"{side}.middle.1.", _ATTENTION
        yield f"{side}.middle.block2.", f"{side}.middle.2.", _BLOCK
        for level in range(len(config.multipliers)):
            first = level * (blocks + 1)
            for block in range(blocks):
                yield f"{side}.levels.{level}.blocks.{block}.", f"{side}.{flat_list}.{first + block}.", _BLOCK
            yield f"{side}.levels.{level}.resample.", f"{side}.{flat_list}.{first + blocks}.", _RESAMPLE


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> WanVAEConfig:
    """Return the config of a model whose tensors have these `shapes` (name without prefix → shape).

    Raises UserError if they are not those of a supported Wan VAE.
    """
    base_width = _shape(shapes, "encoder.conv1.weight", 5)[0]
    latent_channels = _shape(shapes, "conv2.weight", 5)[0]
    if latent_channels != len(LATENT_MEAN):
        raise UserError(f"conv2.weight: {latent_channels} latent channels, expected {len(LATENT_MEAN)}")
    widths, blocks, temporal_down = [], [0], []
    for index in range(len(shapes)):
        part = f"encoder.downsamples.{index}."
        if f"{part}residual.6.weight" in shapes:
            blocks[-1] += 1
            widths[len(blocks) - 1 :] = [_shape(shapes, f"{part}residual.6.weight", 5)[0]]
        elif f"{part}resample.1.weight" in shapes:
            temporal_down.append(f"{part}time_conv.weight" in shapes)
            blocks.append(0)
        else:
            break
    if len(set(blocks)) != 1 or not blocks[0]:
        raise UserError(f"encoder.downsamples: levels of {blocks} residual blocks, expected the same number in each")
    if any(width % base_width for width in widths):
        raise UserError(f"encoder.downsamples: widths {widths} are not multiples of the first one, {base_width}")
    return WanVAEConfig(
        base_width=base_width,
        multipliers=tuple(width // base_width for width in widths),
        blocks_per_level=blocks[0],
        latent_channels=latent_channels,
        temporal_down=tuple(temporal_down),
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"not a Wan VAE: the file has no tensor {name}")
    if len(shapes[name]) != axes:
        raise UserError(f"{name}: shape {tuple(shapes[name])}; expected {axes} axes")
    return tuple(shapes[name])
