"""Which networks are in a file, and under what prefix: each tool that saves Anima puts its own before the names.

A `Network` says how the names of one network look once the prefix is off. `locate` finds the prefix under which most of
them are; everything else in the file is an extra buffer that is known and skipped, a tensor of another network in the
same file, or unknown.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from anima_jax.checkpoints.names import Rule, dit, qwen3, wan_vae

_DIT_PREFIXES = ("model.diffusion_model.net.", "model.diffusion_model.", "diffusion_model.", "net.", "model.", "")
_QWEN_IN_BUNDLE = "text_encoders.qwen3_06b.transformer."


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """What the files of one network look like.

    `typical` matches (from its start, prefix off) names that no other network has; `stacks` are the numbered parts, as
    (what it belongs to, its own name); `rename` is what to put before the names to have those that the table uses.
    """

    title: str
    prefixes: tuple[str, ...]
    typical: str
    stacks: tuple[tuple[str, str], ...]
    rules: Callable[[Any], Sequence[Rule]]
    config_from_shapes: Callable[[Mapping[str, tuple[int, ...]]], Any]
    extra_buffers: tuple[str, ...] = ()
    rename: str = ""


DIT = Network(
    title="Anima transformer",
    prefixes=_DIT_PREFIXES,
    typical=r"(x_embedder|t_embedder|t_embedding_norm|final_layer)\.|blocks\.\d+\.(adaln_\w+|self_attn\.output_proj|mlp\.layer)",
    stacks=(("", "blocks."), (dit.ADAPTER, "blocks.")),
    rules=dit.rules,
    config_from_shapes=dit.config_from_shapes,
    extra_buffers=dit.EXTRA_BUFFERS,
)
ADAPTER = Network(
    title="Anima text adapter",
    prefixes=(*(prefix + dit.ADAPTER for prefix in _DIT_PREFIXES), *_DIT_PREFIXES),
    typical=r"(embed|in_proj|out_proj)\.|blocks\.\d+\.(norm_\w+|mlp\.[02]|(self|cross)_attn\.o_proj)\.",
    stacks=((dit.ADAPTER, "blocks."),),
    rules=dit.rules,
    config_from_shapes=dit.adapter_config_from_shapes,
    rename=dit.ADAPTER,
)
QWEN3 = Network(
    title="Qwen3 text encoder",
    prefixes=(_QWEN_IN_BUNDLE + "model.", _QWEN_IN_BUNDLE, "model.", ""),
    typical=r"embed_tokens\.|layers\.\d+\.",
    stacks=(("", "layers."),),
    rules=qwen3.rules,
    config_from_shapes=qwen3.config_from_shapes,
    extra_buffers=(*qwen3.EXTRA_BUFFERS, r"rotary_emb\.inv_freq"),
)
WAN_VAE = Network(
    title="Wan VAE",
    prefixes=("first_stage_model.", "vae.", ""),
    typical=r"(encoder|decoder)\.(conv1|downsamples|upsamples|middle|head)\.",
    stacks=(),
    rules=wan_vae.rules,
    config_from_shapes=wan_vae.config_from_shapes,
)
NETWORKS = (DIT, ADAPTER, QWEN3, WAN_VAE)

TEXT_ENCODER = "text_encoder."
"""What names of the text encoder's modules, and paths of its parameters, begin with where both networks meet."""

BUNDLED = ("model.diffusion_model.", "text_encoders.", "first_stage_model.", "vae.")
"""What the names of each network begin with where one file holds several."""

QUANTISED = re.compile(r"(^|\.)(scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|scaled_fp8)$")
"""Names that say that the weights beside them are not plain numbers."""


@dataclasses.dataclass(frozen=True)
class NetworkKeys:
    """Where a network is in a file.

    `keys` maps each name without prefix to the file's key; `skipped` are known extra buffers, `elsewhere` tensors of
    other networks, `unknown` keys that belong to nothing.
    """

    prefix: str
    keys: dict[str, str]
    skipped: tuple[str, ...]
    elsewhere: tuple[str, ...]
    unknown: tuple[str, ...]


def locate(network: Network, file_keys: Iterable[str]) -> NetworkKeys | None:
    """Where `network` is among the keys of a file; None if no name is typical of it."""
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
    keys, skipped, elsewhere, unknown = {}, [], [], []
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
    """Whether `key` is another network's: in a bundle, or the transformer around an adapter."""
    if network is ADAPTER and prefix.endswith(dit.ADAPTER):
        return not key.startswith(prefix)
    return any(key.startswith(other) and not prefix.startswith(other) for other in BUNDLED)
