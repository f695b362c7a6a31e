"""Tensor names of the text encoder: Hugging Face's, without `model.`."""

from collections.abc import Mapping

from anima_jax.checkpoints.names import LINEAR, Rule
from anima_jax.checkpoints.names.dit import count_blocks
from anima_jax.models.qwen3 import Qwen3Config

RULES = (
    Rule(r"embed_tokens\.embedding", "embed_tokens.weight"),
    Rule(r"norm\.scale", "norm.weight"),
    Rule(r"layers\.((self_attn|mlp)\.\w+_proj)\.kernel", r"layers.{layer}.\1.weight", LINEAR),
    Rule(r"layers\.(self_attn\.[qk]_norm|\w+_layernorm)\.scale", r"layers.{layer}.\1.weight"),
)


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Qwen3Config:
    """Return the config of a model whose tensors have these `shapes` (name without prefix → shape).

    Raises KeyError with the first name that is needed and missing.
    """
    vocabulary, width = shapes["embed_tokens.weight"]
    head_size = shapes["layers.0.self_attn.q_norm.weight"][0]
    return Qwen3Config(
        width=width,
        layers=count_blocks(shapes, "layers."),
        heads=shapes["layers.0.self_attn.q_proj.weight"][0] // head_size,
        key_heads=shapes["layers.0.self_attn.k_proj.weight"][0] // head_size,
        head_size=head_size,
        mlp_width=shapes["layers.0.mlp.gate_proj.weight"][0],
        vocabulary=vocabulary,
    )
