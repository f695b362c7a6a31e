"""PEFT's settings (`adapter_config.json`): read for their alphas, and written with the trainer's adapters."""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from anima_jax.adapters.dialects import DIALECTS, module_names
from anima_jax.adapters.kinds import KINDS
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.config.adapter import AdapterConfig
from anima_jax.errors import UserError

FILE = "adapter_config.json"

DIFFUSERS_SETTINGS = "lora_adapter_metadata"
"""Metadata key under which diffusers stores PEFT's settings."""

_COMPONENTS = ("transformer.", "text_conditioner.")
"""What diffusers' settings and names begin with."""

_PREFIXES = ("base_model.model.", *_COMPONENTS)
"""Prefixes of names in PEFT's files, whose alphas are in the metadata or in `adapter_config.json`."""


# ---- reading -------------------------------------------------------------------------------------------------------


def with_alphas(
    file: SafetensorsFile, spellings: Mapping[str, str], patches: Mapping[str, Patch]
) -> tuple[dict[str, Patch], dict[str, str]]:
    """Return the patches of a file with the alphas from its settings, and its metadata without the settings.

    `spellings` maps the file's module names to modules. Settings in the metadata count for names of any format. Raises
    UserError if the settings cannot be read.
    """
    in_header = {key for key in file.metadata if key == DIFFUSERS_SETTINGS or key.startswith(_COMPONENTS)}
    metadata = {key: value for key, value in file.metadata.items() if key not in in_header}
    if not in_header and not any(spelling.startswith(_PREFIXES) for spelling in spellings):
        return dict(patches), metadata
    settings, names = _read(file), {module: spelling for spelling, module in spellings.items()}
    return {
        module: _scaled(patch, module, names.get(module, ""), settings) for module, patch in patches.items()
    }, metadata


def _read(file: SafetensorsFile) -> dict[str, Any]:
    """Return the settings in a file's metadata, where diffusers stores them, or in the JSON next to it, or else {}."""
    beside = pathlib.Path(file.path).with_name(FILE)
    try:
        if DIFFUSERS_SETTINGS in file.metadata:
            return json.loads(file.metadata[DIFFUSERS_SETTINGS])
        if direct := {key: json.loads(value) for key, value in file.metadata.items() if key.startswith(_COMPONENTS)}:
            return direct
        is_peft = any(key.startswith("base_model.model.") for key in file.tensors)
        return json.loads(beside.read_text(encoding="utf-8")) if is_peft and beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: its PEFT settings ({FILE}) cannot be read: {error}") from error


def _scaled(patch: Patch, module: str, spelling: str, settings: Mapping[str, Any]) -> Patch:
    """Return the patch with the alpha that the settings give it; a patch that has its own is returned unchanged.

    Keys of diffusers' settings begin with the component. PEFT multiplies a LoKr of two matrices by alpha / r too, where
    an alpha would not count in other files, so that the scale is multiplied into a matrix.
    """
    component = (DIALECTS["diffusers"].module(module) or module).partition(".")[0]
    own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
    name = next((spelling.removeprefix(prefix) for prefix in _PREFIXES if spelling.startswith(prefix)), spelling)
    alpha = _of_pattern(own.get("alpha_pattern"), name, own.get("lora_alpha", own.get("alpha")))
    rank = patch.rank or _of_pattern(own.get("rank_pattern"), name, own.get("r"))
    if alpha is None or not rank or "alpha" in patch.parts:
        return patch
    alpha = float(alpha) * rank**0.5 if own.get("use_rslora") else float(alpha)
    if alpha == rank:
        return patch
    return patch.with_alpha(alpha) if patch.rank else patch.multiplied(alpha / rank)


def _of_pattern(values: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the name or its end, as in PEFT's get_pattern_key."""
    matching = (value for pattern, value in (values or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)


# ---- writing -------------------------------------------------------------------------------------------------------


def settings(
    adapter: AdapterConfig, specs: Mapping[str, AdapterSpec], base_model: str | None, llm_adapter_blocks: int
) -> dict[str, Any]:
    """Return PEFT's settings for the transformer's modules, under their original names; {} if PEFT lacks the kind."""
    kind, alpha = KINDS[adapter.type], adapter.alpha or adapter.rank
    if kind.peft_type is None:
        return {}
    ranks, alphas = {}, {}
    for name, (path, layer) in module_names({path: len(spec.ranks) for path, spec in specs.items()}).items():
        if (rank := specs[path].ranks[layer]) and not name.startswith(TEXT_ENCODER):
            # PEFT multiplies by alpha / rank even if the factors have no rank; alpha = rank makes that 1.
            ranks[name], alphas[name] = rank, (adapter.alpha or rank) if specs[path].ranked else rank
    if kind.peft_type == "LORA":
        own = {"lora_alpha": alpha, "lora_dropout": adapter.dropout, "bias": "none", "use_dora": bool(kind.magnitude)}
    else:
        own = {"alpha": alpha, **{key: getattr(adapter, key) for key in kind.peft_keys}}
    return {
        "peft_type": kind.peft_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": adapter.rank,
        "target_modules": sorted(ranks),
        "exclude_modules": sorted(_alike(ranks, llm_adapter_blocks) - ranks.keys()) or None,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != adapter.rank},
        "alpha_pattern": {f"^{re.escape(name)}": one for name, one in alphas.items() if one != alpha},
        **own,
    }


def _alike(names: Iterable[str], llm_adapter_blocks: int) -> set[str]:
    """Return the LLM adapter's modules that PEFT would match too, because their names end like one of `names`."""
    attention = re.compile(r"blocks\.(\d+)\.\w+_attn\.[qkv]_proj")
    found = {name: attention.fullmatch(name) for name in names}
    return {ADAPTER + name for name, match in found.items() if match and int(match[1]) < llm_adapter_blocks}
