"""The networks in a file and their prefixes: every tool that saves Anima adds its own prefix to the names.

A `Network` describes the names of one network without the prefix. `locate` finds the prefix under which most of them
occur. Every other tensor in the file is a harmless buffer, which is skipped, part of another network, or unknown.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from anima_jax.checkpoints.names import Rule, diffusers, dit, qwen3, wan_vae
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import LLMAdapter, LLMAdapterConfig
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE

_NAMES = r"(?P<prefix>(?:[A-Za-z_][\w-]*\.)*?)"
"""A prefix: the names of the modules in which a tool wraps a network, whatever they are. None of them is a number."""

_BETWEEN = re.compile(r"(?<=[\w])[._](_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)(?=[._])")

HARMLESS = re.compile(
    r"(.*\.)?("
    r"pos_embedder\..*|accum_\w+|_extra_state"  # of Cosmos and TransformerEngine
    r"|(model_sampling|denoiser)\.\w+|(log_)?sigmas|betas|(\w+_)?alphas(_\w+)?|posterior_\w+|model_ema\.(decay|num_updates)"
    r"|inv_freq|(cos|sin)_cached|freqs_(cis|cos|sin)|position_ids|num_batches_tracked"
    r"|logit_scale|lm_head\.weight|spiece_model|tekken_model"
    r")"
)
"""Pattern for tensors that are known to change nothing: buffers that are computed, noise levels, an unused head."""


class AdapterAlone(nnx.Module):
    """The LLM adapter alone, with the parameter paths that it has inside a transformer."""

    def __init__(self, config: LLMAdapterConfig, *, rngs: nnx.Rngs):
        self.llm_adapter = LLMAdapter(config, rngs=rngs)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """One network and its tensors in files.

    Names are read with any prefix and written with `saved_prefix`. `typical` matches the beginning of names (without
    prefix) that no other network has. `stacks` are its numbered blocks: (the part that contains them, their name).
    `component` is its folder in the diffusers format. `rules` and `config_from_shapes` are the network's table.
    `aliases(names)` returns name in diffusers' format → name in the table, for a file with these names. `rename` is
    prepended to names to form those in the table.
    """

    title: str
    component: str
    module: Callable[..., nnx.Module]
    saved_prefix: str
    typical: str
    stacks: tuple[tuple[str, str], ...]
    rules: Callable[[Any], Sequence[Rule]]
    config_from_shapes: Callable[[Mapping[str, tuple[int, ...]]], Any]
    aliases: Callable[[Sequence[str]], Mapping[str, str]] = lambda names: {}
    rename: str = ""


DIT = Network(
    title="Anima transformer",
    component="transformer",
    module=AnimaDiT,
    saved_prefix="net.",
    typical=r"x_embedder\.proj\.1\.|t_embedder\.1\.linear_|t_embedding_norm\."
    r"|blocks\.\d+\.(adaln_modulation_\w+\.[12]|self_attn\.output_proj|mlp\.layer[12])\."
    r"|transformer_blocks\.\d+\.norm\d\.linear_[12]\.|time_embed\.(norm|t_embedder)\.",
    stacks=(("", "blocks."), (dit.ADAPTER, "blocks.")),
    rules=lambda config: dit.RULES,
    config_from_shapes=dit.config_from_shapes,
    aliases=diffusers.transformer_aliases,
)
ADAPTER = Network(
    title="Anima text adapter",
    component="text_conditioner",
    module=AdapterAlone,
    saved_prefix="net.",
    typical=r"blocks\.\d+\.(norm_(self_attn|cross_attn|mlp)|(self|cross)_attn\.o_proj)\.",
    stacks=((dit.ADAPTER, "blocks."),),
    rules=lambda config: dit.RULES,
    config_from_shapes=dit.adapter_config_from_shapes,
    rename=dit.ADAPTER,
)
QWEN3 = Network(
    title="Qwen3 text encoder",
    component="text_encoder",
    module=Qwen3,
    saved_prefix="model.",
    typical=r"layers\.\d+\.self_attn\.[qk]_norm\.",
    stacks=(("", "layers."),),
    rules=lambda config: qwen3.RULES,
    config_from_shapes=qwen3.config_from_shapes,
)
WAN_VAE = Network(
    title="Wan VAE",
    component="vae",
    module=WanVAE,
    saved_prefix="",
    typical=r"(encoder|decoder)\.((down|up)samples|middle|head)\.\d+\.|(encoder|decoder)\.(\w+\.){1,8}gamma",
    stacks=(),
    rules=wan_vae.rules,
    config_from_shapes=wan_vae.config_from_shapes,
    aliases=diffusers.vae_aliases,
)
NETWORKS = (DIT, ADAPTER, QWEN3, WAN_VAE)

_ADAPTER_MODULES = (dit.ADAPTER, "text_conditioner.")
"""Names of the LLM adapter's module: Anima's and diffusers'."""

TEXT_ENCODER = "text_encoder."
"""Prefix of the text encoder's modules and parameter paths where they appear next to the transformer's."""

BUNDLED = (
    *("model.diffusion_model.", "text_encoders.", "cond_stage_model.", "conditioner."),
    *("text_encoder.", "first_stage_model.", "vae."),
)
"""Prefixes of the networks in a file that contains several."""


@dataclasses.dataclass(frozen=True)
class NetworkKeys:
    """The keys of a file, classified for one network.

    `keys` maps each name in the network's table to the file's key. `skipped` are harmless buffers, `elsewhere` are
    tensors of other networks, `unknown` are all other keys.
    """

    prefix: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def locate(network: Network, file_keys: Iterable[str]) -> NetworkKeys | None:
    """Classify the keys of a file for `network`; return None if no name is typical of it.

    Its prefix is the one under which most of its typical names occur.
    """
    file_keys = dict.fromkeys(file_keys)
    stored: dict[str, str] = {}
    for key in file_keys:
        name = unwrapped(key)
        stored[key if name in stored or name in file_keys else name] = key
    prefix = _prefix(network, stored)
    if prefix is None:
        return None
    others = {*BUNDLED, *_other_prefixes(network, list(stored))}
    names = {key: key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
    aliases = network.aliases(list(names.values()))
    own_adapter = _adapter_beside(network, prefix, list(stored))
    keys: dict[str, str] = {}
    skipped: list[str] = []
    elsewhere: list[str] = []
    unknown: list[str] = []
    for name, key in stored.items():
        if HARMLESS.fullmatch(name):
            skipped.append(key)
        elif name in own_adapter:
            keys[own_adapter[name]] = key
        elif _is_elsewhere(network, prefix, name, others):
            elsewhere.append(key)
        elif name in names:
            keys[network.rename + aliases.get(names[name], names[name])] = key
        else:
            unknown.append(key)
    return NetworkKeys(prefix, keys, tuple(skipped), tuple(elsewhere), tuple(unknown))


def unwrapped(key: str) -> str:
    """Return a name without the modules that PyTorch and PEFT put between a network's own: `_orig_mod` and others."""
    return _BETWEEN.sub("", key)


def _prefix(network: Network, file_keys: Iterable[str]) -> str | None:
    """Return the prefix under which most names are typical of `network`, or None if none is."""
    typical = re.compile(f"{_NAMES}(?:{network.typical})")
    counts = collections.Counter(match["prefix"] for key in file_keys if (match := typical.match(key, 0, 300)))
    return max(counts, key=lambda prefix: counts[prefix], default=None)


def _other_prefixes(network: Network, file_keys: Sequence[str]) -> set[str]:
    """Return the prefixes of the file's other networks; the transformer contains the adapter's."""
    others = [other for other in NETWORKS if other is not network and {other, network} != {DIT, ADAPTER}]
    return {prefix for other in others if (prefix := _prefix(other, file_keys))}


def _adapter_beside(network: Network, prefix: str, file_keys: Sequence[str]) -> dict[str, str]:
    """Return key → name of an LLM adapter that a file of diffusers or SimpleTuner has beside the transformer."""
    found = _prefix(ADAPTER, file_keys) if network is DIT else None
    if found is None or found == prefix + dit.ADAPTER or not found.endswith(_ADAPTER_MODULES):
        return {}
    return {key: dit.ADAPTER + key.removeprefix(found) for key in file_keys if key.startswith(found)}


def _is_elsewhere(network: Network, prefix: str, key: str, others: Iterable[str]) -> bool:
    """Return whether `key` belongs to another network of a bundle, or to the transformer that contains the adapter."""
    if network is ADAPTER and prefix.endswith(_ADAPTER_MODULES):
        return not key.startswith(prefix)
    if network is DIT and key.startswith(prefix + dit.CONNECTOR):
        return True
    if any(key.startswith(other) and not prefix.startswith(other) for other in others):
        return True
    # In a bundle's folder of text encoders, every text encoder has its own.
    root, _, rest = prefix.partition(".")
    return (
        root == "text_encoders" and key.startswith(f"{root}.") and not key.startswith(f"{root}.{rest.split('.')[0]}.")
    )
