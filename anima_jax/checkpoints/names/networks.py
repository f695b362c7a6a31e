"""The networks in a file and their prefixes: every tool that saves Anima adds its own prefix to the names.

A `Network` describes the names of one network without the prefix. `locate` finds the prefix under which most of them
occur. Every other tensor in the file is a known extra buffer, which is skipped, part of another network, or unknown.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from anima_jax.checkpoints.names import Rule, dit, qwen3, wan_vae
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import LLMAdapter, LLMAdapterConfig
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE

_DIT_PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.", "net.", "model.", "")
_QWEN_IN_BUNDLE = "text_encoders.qwen3_06b.transformer."


class AdapterAlone(nnx.Module):
    """The LLM adapter alone, with the parameter paths that it has inside a transformer."""

    def __init__(self, config: LLMAdapterConfig, *, rngs: nnx.Rngs):
        self.llm_adapter = LLMAdapter(config, rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One network and its tensors in files.

    Names are read with any of `prefixes` and written with `saved_prefix`. `typical` matches the beginning of names
    (without prefix) that no other network has. `stacks` are its numbered blocks: (the part that contains them, their
    name). `rules` and `config_from_shapes` are the network's table. `extra_buffers` are patterns for tensors that it
    does not need. `rename` is prepended to names to form those in the table.
    """

    title: str
    module: Callable[..., nnx.Module]
    prefixes: tuple[str, ...]
    saved_prefix: str
    typical: str
    stacks: tuple[tuple[str, str], ...]
    rules: Callable[[Any], Sequence[Rule]]
    config_from_shapes: Callable[[Mapping[str, tuple[int, ...]]], Any]
    extra_buffers: tuple[str, ...] = ()
    rename: str = ""


DIT = Network(
    title="Anima transformer",
    module=AnimaDiT,
    prefixes=_DIT_PREFIXES,
    saved_prefix="net.",
    typical=r"(x_embedder|t_embedder|t_embedding_norm|final_layer)\.|blocks\.\d+\.(adaln_\w+|self_attn\.output_proj|mlp\.layer)",
    stacks=(("", "blocks."), (dit.ADAPTER, "blocks.")),
    rules=lambda config: dit.RULES,
    config_from_shapes=dit.config_from_shapes,
    extra_buffers=dit.EXTRA_BUFFERS,
)
ADAPTER = Network(
    title="Anima text adapter",
    module=AdapterAlone,
    prefixes=(*(prefix + dit.ADAPTER for prefix in _DIT_PREFIXES), *_DIT_PREFIXES),
    saved_prefix="net.",
    typical=r"(embed|in_proj|out_proj)\.|blocks\.\d+\.(norm_\w+|mlp\.[02]|(self|cross)_attn\.o_proj)\.",
    stacks=((dit.ADAPTER, "blocks."),),
    rules=lambda config: dit.RULES,
    config_from_shapes=dit.adapter_config_from_shapes,
    rename=dit.ADAPTER,
)
QWEN3 = Network(
    title="Qwen3 text encoder",
    module=Qwen3,
    prefixes=(_QWEN_IN_BUNDLE + "model.", _QWEN_IN_BUNDLE, "model.", ""),
    saved_prefix="model.",
    typical=r"embed_tokens\.|layers\.\d+\.",
    stacks=(("", "layers."),),
    rules=lambda config: qwen3.RULES,
    config_from_shapes=qwen3.config_from_shapes,
    extra_buffers=(*qwen3.EXTRA_BUFFERS, r"rotary_emb\.inv_freq"),
)
WAN_VAE = Network(
    title="Wan VAE",
    module=WanVAE,
    prefixes=("first_stage_model.", "vae.", ""),
    saved_prefix="",
    typical=r"(encoder|decoder)\.(conv1|downsamples|upsamples|middle|head)\.",
    stacks=(),
    rules=wan_vae.rules,
    config_from_shapes=wan_vae.config_from_shapes,
)
NETWORKS = (DIT, ADAPTER, QWEN3, WAN_VAE)

TEXT_ENCODER = "text_encoder."
"""Prefix of the text encoder's modules and parameter paths where they appear next to the transformer's."""

BUNDLED = ("model.diffusion_model.", "text_encoders.", "first_stage_model.", "vae.")
"""Prefixes of the networks in a file that contains several."""

QUANTISED = re.compile(r"(^|\.)(scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|scaled_fp8)$")
"""Pattern for names that occur only in files with quantised weights."""


@dataclasses.dataclass(frozen=True)
class NetworkKeys:
    """The keys of a file, classified for one network.

    `keys` maps each name in the network's table to the file's key. `skipped` are known extra buffers, `elsewhere` are
    tensors of other networks, `unknown` are all other keys.
    """

    prefix: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def locate(network: Network, file_keys: Iterable[str]) -> NetworkKeys | None:
    """Classify the keys of a file for `network`; return None if no name is typical of it."""
    file_keys = list(file_keys)
    typical = re.compile(network.typical)
    counts = {
        prefix: sum(1 for key in file_keys if key.startswith(prefix) and typical.match(key, len(prefix)))
        for prefix in network.prefixes
    }
    prefix = max(counts, key=lambda prefix: counts[prefix])
    if not counts[prefix]:
        return None
    extra = re.compile("|".join(network.extra_buffers) or r"(?!)")
    keys: dict[str, str] = {}
    skipped: list[str] = []
    elsewhere: list[str] = []
    unknown: list[str] = []
    for key in file_keys:
        name = key.removeprefix(prefix) if key.startswith(prefix) else None
        if extra.fullmatch(key) or (name is not None and extra.fullmatch(name)):
            skipped.append(key)
        elif _is_elsewhere(network, prefix, key):
            elsewhere.append(key)
        elif name is not None:
            keys[network.rename + name] = key
        else:
            unknown.append(key)
    return NetworkKeys(prefix, keys, tuple(skipped), tuple(elsewhere), tuple(unknown))


def _is_elsewhere(network: Network, prefix: str, key: str) -> bool:
    """Return whether `key` belongs to another network of a bundle, or to the transformer that contains the adapter."""
    if network is ADAPTER and prefix.endswith(dit.ADAPTER):
        return not key.startswith(prefix)
    return any(key.startswith(other) and not prefix.startswith(other) for other in BUNDLED)
