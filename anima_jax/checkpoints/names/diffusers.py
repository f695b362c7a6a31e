"""Names in diffusers' folders, derived from the names in the original files.

Source: `scripts/convert_anima_to_diffusers.py` and the models themselves (CosmosTransformer3DModel,
AnimaTextConditioner, AutoencoderKLQwenImage) in diffusers 0.42.
"""

import re
from collections.abc import Sequence

from anima_jax.checkpoints.names import dit, wan_vae
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.models.wan_vae import WanVAEConfig

MOST_BLOCKS = 256
"""Number of blocks up to which names are translated; the largest Anima has 52."""

_TRANSFORMER = (
    (r"^blocks\.", "transformer_blocks."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])_proj(?=\.|$)", r".to_\1"),
    (r"\.output_proj(?=\.|$)", ".to_out.0"),
    (r"\.([qk])_norm(?=\.|$)", r".norm_\1"),
    (r"\.mlp\.layer1(?=\.|$)", ".ff.net.0.proj"),
    (r"\.mlp\.layer2(?=\.|$)", ".ff.net.2"),
    (r"\.adaln_modulation_self_attn\.", ".norm1.linear_"),
    (r"\.adaln_modulation_cross_attn\.", ".norm2.linear_"),
    (r"\.adaln_modulation_mlp\.", ".norm3.linear_"),
    (r"^final_layer\.adaln_modulation\.", "norm_out.linear_"),
    (r"^final_layer\.linear(?=\.|$)", "proj_out"),
    (r"^t_embedder\.1\.", "time_embed.t_embedder."),
    (r"^t_embedding_norm(?=\.|$)", "time_embed.norm"),
    (r"^x_embedder\.proj\.1(?=\.|$)", "patch_embed.proj"),
)

_VAE = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(\w+)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def _renamed(name: str, rows: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rows:
        name = re.sub(pattern, replacement, name)
    return name


def transformer(name: str) -> str:
    """Return the name in `transformer/` of a tensor or module of the original transformer."""
    return _renamed(name, _TRANSFORMER)


def text_conditioner(name: str) -> str:
    """Return the name in `text_conditioner/` of a tensor or module of the LLM adapter."""
    return name.removeprefix(ADAPTER)


def vae(name: str, blocks_per_level: int) -> str:
    """Return the name in `vae/` of a tensor of the original VAE; `blocks_per_level` is the encoder's."""

    def upsampling(match: re.Match[str]) -> str:
        level, block = divmod(int(match[1]), blocks_per_level + 2)
        part = "upsamplers.0" if block == blocks_per_level + 1 else f"resnets.{block}"
        return f"decoder.up_blocks.{level}.{part}."

    return _renamed(re.sub(r"^decoder\.upsamples\.(\d+)\.", upsampling, name), _VAE)


def transformer_aliases(names: Sequence[str]) -> dict[str, str]:
    """Return name in `transformer/` → original name for a transformer as deep as these names; {} for other formats."""
    blocks = min(MOST_BLOCKS, dit.count_blocks(names, "transformer_blocks."))
    originals = [name for name in dit.tensor_names(blocks) if not name.startswith(ADAPTER)] if blocks else []
    return {transformer(name): name for name in originals}


def vae_aliases(names: Sequence[str]) -> dict[str, str]:
    """Return name in `vae/` → original name for a VAE as deep as these names; {} for other formats."""
    numbers = [match for name in names if (match := re.match(r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", name))]
    if not numbers:
        return {}
    levels, blocks = (max(int(match[group]) for match in numbers) for group in (1, 2))
    config = WanVAEConfig(multipliers=(1,) * (levels + 1), blocks_per_level=blocks, temporal_down=(True,) * levels)
    return {vae(rule.name, blocks): rule.name for rule in wan_vae.rules(config)}
