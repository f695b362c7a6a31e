"""Tensor names of the text encoder: Hugging Face's, without `model.`; and llama.cpp's."""

import re
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

_LLAMA_CPP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""llama.cpp's names (`gguf.constants.TENSOR_NAMES`) → Hugging Face's. Qwen3's rows are not permuted, as Llama's are."""

_TO_LLAMA_CPP = {theirs: ours for ours, theirs in _LLAMA_CPP.items()}


def from_llama_cpp(name: str) -> str:
    """Return Hugging Face's name for llama.cpp's name of a tensor of Qwen3; another name is returned as it is."""
    match = re.fullmatch(r"(?P<prefix>(?:[\w-]+\.)*?)(?P<block>blk\.\d+\.)?(?P<module>\w+)\.weight", name)
    theirs = match and _LLAMA_CPP.get(match["module"])
    if not match or not theirs or bool(match["block"]) == theirs.startswith(("model.", "lm_head")):
        return name
    block = match["block"].replace("blk.", "model.layers.") if match["block"] else ""
    return f"{match['prefix']}{block}{theirs}.weight"


def to_llama_cpp(name: str) -> str:
    """Return llama.cpp's name for Hugging Face's, with `model.`, of a tensor of Qwen3; the inverse of the former."""
    match = re.fullmatch(r"(?:model\.layers\.(?P<layer>\d+)\.)?(?P<module>.+)\.weight", name)
    theirs = match and _TO_LLAMA_CPP.get(match["module"])
    block = f"blk.{match['layer']}." if match and match["layer"] else ""
    return f"{block}{theirs}.weight" if theirs else name


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
