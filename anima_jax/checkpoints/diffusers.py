"""The diffusers format: a folder with an index and one subfolder per network for its weights and settings.

Values are written as stored. The diffusers library is not needed. `folders` reads the format.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import diffusers
from anima_jax.checkpoints.names.networks import ADAPTER, DIT, QWEN3, WAN_VAE, Network
from anima_jax.models.dit import OUT_CHANNELS, PATCH, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.qwen3 import ROTARY_THETA, Qwen3Config
from anima_jax.models.wan_vae import WanVAEConfig

VERSION = "0.42.0"
"""Version of diffusers whose settings format is written."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A network's subfolder: the library and class that load it, the weights file, and the settings for a config."""

    network: Network
    library: str
    loaded_by: str
    weights: str
    settings: Callable[[Any], dict[str, Any]]


def _transformer_settings(config: DiTConfig) -> dict[str, Any]:
    stretch = 4.0 if config.latent_channels == OUT_CHANNELS else 3.0
    return {
        "in_channels": config.latent_channels,
        "out_channels": OUT_CHANNELS,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_size,
        "num_layers": config.blocks,
        "mlp_ratio": config.mlp_width / config.width,
        "text_embed_dim": config.context_width,
        "adaln_lora_dim": config.adaln_rank,
        "max_size": [128, 240, 240],
        "patch_size": [1, PATCH, PATCH],
        "rope_scale": [1.0, stretch, stretch],
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }


def _text_conditioner_settings(config: LLMAdapterConfig) -> dict[str, Any]:
    return {
        "source_dim": config.source_width,
        "target_dim": config.target_width,
        "model_dim": config.width,
        "num_layers": config.blocks,
        "num_attention_heads": config.heads,
        "mlp_ratio": config.mlp_width / config.width,
        "target_vocab_size": config.vocabulary,
        "use_self_attention": True,
        "use_layer_norm": False,
        "min_sequence_length": 512,
    }


def _text_encoder_settings(config: Qwen3Config) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROTARY_THETA,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def _vae_settings(config: WanVAEConfig) -> dict[str, Any]:
    return {
        "base_dim": config.base_width,
        "z_dim": config.latent_channels,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.blocks_per_level,
        "attn_scales": [],
        "temperal_downsample": list(config.temporal_down),
        "dropout": 0.0,
        "latents_mean": list(config.latent_mean),
        "latents_std": list(config.latent_std),
    }


_WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = {
    "transformer": Component(DIT, "diffusers", "CosmosTransformer3DModel", _WEIGHTS, _transformer_settings),
    "text_conditioner": Component(ADAPTER, "diffusers", "AnimaTextConditioner", _WEIGHTS, _text_conditioner_settings),
    "text_encoder": Component(QWEN3, "transformers", "Qwen3Model", "model.safetensors", _text_encoder_settings),
    "vae": Component(WAN_VAE, "diffusers", "AutoencoderKLQwenImage", _WEIGHTS, _vae_settings),
}

SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

_OTHERS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "t5_tokenizer": ("transformers", "T5Tokenizer"),
}


def folder_name(component: str, name: str, config: Any) -> str:
    """Return the name that a tensor with this original name has in a component's subfolder."""
    if component == "vae":
        return diffusers.vae(name, config.blocks_per_level)
    if component == "text_encoder":
        return name
    return diffusers.transformer(name) if component == "transformer" else diffusers.text_conditioner(name)


def settings(component: str, config: Any) -> dict[str, Any]:
    """Return the contents of a component's `config.json` for a network with this config."""
    row = COMPONENTS[component]
    header = {} if row.library == "transformers" else {"_class_name": row.loaded_by, "_diffusers_version": VERSION}
    return header | row.settings(config)


def index(folder: PathLike, components: Iterable[str]) -> dict[str, Any]:
    """Return the contents of the index file for a folder with these components."""
    found: dict[str, Any] = {
        "_blocks_class_name": "AnimaAutoBlocks",
        "_class_name": "AnimaModularPipeline",
        "_diffusers_version": VERSION,
    }
    for name in sorted(components):
        row = COMPONENTS.get(name)
        library, loaded_by = (row.library, row.loaded_by) if row else _OTHERS[name]
        where = {"pretrained_model_name_or_path": str(folder), "subfolder": name, "revision": None, "variant": None}
        found[name] = [library, loaded_by, {**where, "type_hint": [library, loaded_by]}]
    return found
