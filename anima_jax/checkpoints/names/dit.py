"""Names of the diffusion transformer and its LLM adapter in the original files, without a prefix such as `net.`."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from anima_jax.checkpoints.names import LINEAR, FileLayout, Rule, file_tensors
from anima_jax.models import parameters
from anima_jax.models.dit import PATCH, AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig

ADAPTER = "llm_adapter."

CONNECTOR = "anima_v2_connector."
"""Module of Anima-3.8B v1.1 that adds the states of a second text encoder, Qwen3.5-4B, to the transformer's."""


def _patches_to_model(file: np.ndarray) -> np.ndarray:
    """Transpose the matrix and reorder the file's columns (channel, y, x) to the (y, x, channel) of our tokens."""
    channels = file.shape[1] // PATCH**2
    return file.reshape(-1, channels, PATCH, PATCH).transpose(2, 3, 1, 0).reshape(file.shape[1], -1)


def _patches_to_file(model: np.ndarray) -> np.ndarray:
    channels = model.shape[0] // PATCH**2
    return model.reshape(PATCH, PATCH, channels, -1).transpose(3, 2, 0, 1).reshape(-1, model.shape[0])


RULES = (
    Rule(r"x_embedder\.kernel", "x_embedder.proj.1.weight", FileLayout(_patches_to_model, _patches_to_file)),
    Rule(r"t_embedder\.(linear_\d)\.kernel", r"t_embedder.1.\1.weight", LINEAR),
    Rule(r"t_embedding_norm\.scale", "t_embedding_norm.weight"),
    Rule(r"blocks\.((self|cross)_attn\.\w+_proj)\.kernel", r"blocks.{layer}.\1.weight", LINEAR),
    Rule(r"blocks\.((self|cross)_attn\.[qk]_norm)\.scale", r"blocks.{layer}.\1.weight"),
    Rule(r"blocks\.(mlp\.layer\d)\.kernel", r"blocks.{layer}.\1.weight", LINEAR),
    Rule(r"blocks\.(adaln_modulation_\w+)\.linear_(\d)\.kernel", r"blocks.{layer}.\1.\2.weight", LINEAR),
    Rule(r"final_layer\.adaln_modulation\.linear_(\d)\.kernel", r"final_layer.adaln_modulation.\1.weight", LINEAR),
    Rule(r"final_layer\.linear\.kernel", "final_layer.linear.weight", LINEAR),
    Rule(r"llm_adapter\.embed\.embedding", "llm_adapter.embed.weight"),
    Rule(r"llm_adapter\.(in_proj|out_proj)\.kernel", r"llm_adapter.\1.weight", LINEAR),
    Rule(r"llm_adapter\.(in_proj|out_proj)\.bias", r"llm_adapter.\1.bias"),
    Rule(r"llm_adapter\.norm\.scale", "llm_adapter.norm.weight"),
    Rule(r"llm_adapter\.blocks\.((self|cross)_attn\.\w_proj)\.kernel", r"llm_adapter.blocks.{layer}.\1.weight", LINEAR),
    Rule(r"llm_adapter\.blocks\.((self|cross)_attn\.[qk]_norm)\.scale", r"llm_adapter.blocks.{layer}.\1.weight"),
    Rule(r"llm_adapter\.blocks\.(norm_\w+)\.scale", r"llm_adapter.blocks.{layer}.\1.weight"),
    Rule(r"llm_adapter\.blocks\.mlp\.layer1\.kernel", "llm_adapter.blocks.{layer}.mlp.0.weight", LINEAR),
    Rule(r"llm_adapter\.blocks\.mlp\.layer1\.bias", "llm_adapter.blocks.{layer}.mlp.0.bias"),
    Rule(r"llm_adapter\.blocks\.mlp\.layer2\.kernel", "llm_adapter.blocks.{layer}.mlp.2.weight", LINEAR),
    Rule(r"llm_adapter\.blocks\.mlp\.layer2\.bias", "llm_adapter.blocks.{layer}.mlp.2.bias"),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """Return the config of a model whose tensors have these `shapes` (name without prefix → shape).

    Raises KeyError with the first name that is needed and missing.
    """
    width, columns = shapes["x_embedder.proj.1.weight"]
    head_size = shapes["blocks.0.self_attn.q_norm.weight"][0]
    return DiTConfig(
        width=width,
        blocks=count_blocks(shapes, "blocks."),
        heads=width // head_size,
        mlp_width=shapes["blocks.0.mlp.layer1.weight"][0],
        context_width=shapes["blocks.0.cross_attn.k_proj.weight"][1],
        adaln_rank=shapes["blocks.0.adaln_modulation_self_attn.1.weight"][0],
        latent_channels=columns // PATCH**2 - 1,
        adapter=adapter_config_from_shapes(shapes) if f"{ADAPTER}out_proj.weight" in shapes else None,
    )


def adapter_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> LLMAdapterConfig:
    """Return the config of an LLM adapter, whose names begin with `llm_adapter.`.

    Raises KeyError as `config_from_shapes` does.
    """
    target_width, width = shapes[f"{ADAPTER}out_proj.weight"]
    return LLMAdapterConfig(
        width=width,
        blocks=count_blocks(shapes, f"{ADAPTER}blocks."),
        heads=width // shapes[f"{ADAPTER}blocks.0.self_attn.q_norm.weight"][0],
        mlp_width=shapes[f"{ADAPTER}blocks.0.mlp.0.weight"][0],
        source_width=shapes[f"{ADAPTER}blocks.0.cross_attn.k_proj.weight"][1],
        target_width=target_width,
        vocabulary=shapes[f"{ADAPTER}embed.weight"][0],
    )


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return the number of distinct N in names that begin with `<prefix>N.`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def tensor_names(blocks: int) -> list[str]:
    """Return the names of all tensors of a transformer and its LLM adapter, with `blocks` blocks each."""
    sizes = DiTConfig(8, blocks, 1, 8, 8, 4, adapter=LLMAdapterConfig(8, blocks, 1, 8, 8, 4, 4))
    _, shapes = parameters.abstract(lambda rngs: AnimaDiT(sizes, rngs=rngs))
    return [tensor.name for tensor in file_tensors(RULES, shapes)]
