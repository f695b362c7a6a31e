"""diffusers' CosmosTransformer3DModel as Anima's transformer: its settings, its names, its calls."""

import re
from collections.abc import Iterable

import numpy as np

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.models import parameters
from anima_jax.models.dit import OUT_CHANNELS, AnimaDiT, DiTConfig
from tests.golden_files import channel_last

PEER_TO_ORIGINAL = (
    (r"transformer_blocks\.", "blocks."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.0\.", ".output_proj."),
    (r"\.norm_([qk])\.", r".\1_norm."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.layer1."),
    (r"\.ff\.net\.2\.", ".mlp.layer2."),
    (r"\.norm1\.linear_", ".adaln_modulation_self_attn."),
    (r"\.norm2\.linear_", ".adaln_modulation_cross_attn."),
    (r"\.norm3\.linear_", ".adaln_modulation_mlp."),
    (r"^norm_out\.linear_", "final_layer.adaln_modulation."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^time_embed\.t_embedder\.", "t_embedder.1."),
    (r"^time_embed\.norm\.", "t_embedding_norm."),
    (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
)
"""Parts of diffusers' parameter names and what they are in the original files."""


def original_names(peer_names: Iterable[str]) -> dict[str, str]:
    """Each of diffusers' names → the original one."""
    names = {}
    for peer_name in peer_names:
        name = peer_name
        for pattern, replacement in PEER_TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        names[peer_name] = name
    return names


def transformer(config: DiTConfig):
    """The peer of these sizes, with fresh weights.

    The spatial scales are Cosmos-Predict2's for each number of channels. The padding mask comes as one more channel of
    the input, because diffusers' own way needs torchvision.
    """
    from diffusers import CosmosTransformer3DModel  # pyright: ignore[reportPrivateImportUsage]

    spatial_scale = 4.0 if config.latent_channels == OUT_CHANNELS else 3.0
    return CosmosTransformer3DModel(
        in_channels=config.latent_channels + 1,
        out_channels=OUT_CHANNELS,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_size,
        num_layers=config.blocks,
        mlp_ratio=config.mlp_width / config.width,
        text_embed_dim=config.context_width,
        adaln_lora_dim=config.adaln_rank,
        rope_scale=(1.0, spatial_scale, spatial_scale),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )


def velocity_tensor(peer, latents_bctyx, times, context_bnd):
    """The peer's velocity (b, c, t, y, x) of torch tensors. `times` is (b,) or (b, t)."""
    import torch

    if times.ndim == 2:
        times = times[:, None, :, None, None]
    padding_mask = torch.zeros_like(latents_bctyx[:, :1])
    return peer(latents_bctyx, times, context_bnd, condition_mask=padding_mask, return_dict=False)[0]


def velocity(peer, latents_bctyx: np.ndarray, times: np.ndarray, context_bnd: np.ndarray) -> np.ndarray:
    """The same of numpy arrays, the result with channels last."""
    import torch

    with torch.inference_mode():
        return channel_last(velocity_tensor(peer, *map(torch.from_numpy, (latents_bctyx, times, context_bnd))).numpy())


def our_params(peer, config: DiTConfig) -> parameters.Params:
    """The peer's weights as parameters of our transformer of these sizes."""
    return our_arrays(peer.state_dict(), config)


def our_arrays(state, config: DiTConfig) -> parameters.Params:
    """The same of torch tensors by the peer's names, such as its gradients."""
    tensors = {original: state[name].numpy() for name, original in original_names(state).items()}
    _, shapes = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    params = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
    for tensor in file_tensors(dit.RULES, shapes):
        target = params[tensor.path] if tensor.layer is None else params[tensor.path][tensor.layer]
        target[...] = tensor.layout.to_model(tensors[tensor.name])
    return params
