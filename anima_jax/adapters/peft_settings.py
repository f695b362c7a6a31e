"""PEFT's settings as they are written: for the trainer's exports, and for adapters in diffusers' and PEFT's formats."""

import collections
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from anima_jax.adapters.dialects import DIALECTS, PEFT_PREFIX, Dialect, module_names
from anima_jax.adapters.kinds import KINDS, factorised
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.adapters.opening import NETWORKS, WEIGHTS
from anima_jax.adapters.patch import Patch
from anima_jax.adapters.peft import FILE
from anima_jax.checkpoints import locations
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names.diffusers import MOST_BLOCKS
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.config.adapter import AdapterConfig
from anima_jax.errors import UserError, plural, shorten
from anima_jax.parallel.hosts import is_process_0


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
        own = {"lora_dropout": adapter.dropout, "bias": "none", "use_dora": bool(kind.magnitude)}
    else:
        own = {key: getattr(adapter, key) for key in kind.peft_keys}
    beside = {"base_model_name_or_path": base_model, "inference_mode": True}
    values = _settings(kind.peft_type, ranks, alphas, adapter.rank, alpha, llm_adapter_blocks)
    return {**values, **beside, **own}


_CLASSES = {
    "": ("CosmosTransformer3DModel", "diffusers.models.transformers.transformer_cosmos"),
    "text_conditioner": ("AnimaTextConditioner", "diffusers.models.condition_embedders.condition_embedder_anima"),
}
"""Folder → class in diffusers of the network that an adapter in PEFT's format is for, and its module."""


def settings_by_network(patches: Mapping[str, Patch], dialect: Dialect) -> dict[str, dict[str, Any]]:
    """Return network → its settings, which PEFT has for one network each.

    Networks are diffusers' components for settings in a file's header, and otherwise the folders of their files. Raises
    UserError as `settings_of` does.
    """
    networks: dict[str, dict[str, Patch]] = {}
    for module, patch in patches.items():
        before, mark, name = (dialect.module(module) or "").partition(
            "." if dialect.settings == "header" else PEFT_PREFIX
        )
        networks.setdefault(before.rstrip("/") if mark else "", {})[name] = patch
    is_original = dialect is DIALECTS["peft_original"]
    found = {network: settings_of(own, MOST_BLOCKS * is_original) for network, own in sorted(networks.items())}
    for network in _CLASSES if dialect is DIALECTS["peft"] else ():
        if network in found:
            name, library = _CLASSES[network]
            found[network]["auto_mapping"] = {"base_model_class": name, "parent_library": library}
    return found


def write_settings(path: PathLike, networks: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Write the settings of an adapter's networks, and return network → path of the file for its weights.

    `path` is a folder, or the file itself for an adapter of one network. Raises UserError for a folder with files of
    another adapter that this one would not replace.
    """
    path = os.fspath(path)
    targets = {network: os.path.join(path, network, WEIGHTS) for network in networks}
    if path.endswith(".safetensors"):
        if list(networks) != [""]:
            raise UserError(
                f"{path}: PEFT has a file for each network, and the adapter changes others; expected a folder"
            )
        targets = {"": path}
    elif not locations.is_remote(path):
        found = [*pathlib.Path(path).glob("*.safetensors"), *(pathlib.Path(path, name, WEIGHTS) for name in NETWORKS)]
        if others := [str(one) for one in found if one.is_file() and str(one) not in targets.values()]:
            raise UserError(f"{path}: has {others[0]}, of another adapter; choose another OUT")
    for network, target in targets.items() if is_process_0() else ():
        folder = os.path.dirname(target)
        with locations.writing_to(folder):
            if not locations.is_remote(folder):
                os.makedirs(folder or ".", exist_ok=True)
        with locations.replacing(os.path.join(folder, FILE)) as file:
            values = {"inference_mode": True, **networks[network]}
            file.write(json.dumps(values, indent=2, sort_keys=True).encode())
    return targets


def settings_of(patches: Mapping[str, Patch], llm_adapter_blocks: int = 0) -> dict[str, Any]:
    """Return PEFT's settings with which it computes these patches, which map the names in PEFT's base to them.

    Raises UserError, with what PEFT has no place for: several kinds together, or factors that it would not create.
    """
    kinds = {patch.kind.peft_type or "": patch.kind for patch in patches.values()}
    if len(kinds) > 1 or "" in kinds:
        raise UserError(f"{' beside '.join(sorted(kind.title for kind in kinds.values()))}")
    ((peft_type, kind),) = kinds.items()
    doras = [name for name, patch in patches.items() if "dora_scale" in patch.parts]
    if doras and (peft_type != "LORA" or len(doras) < len(patches)):
        beside = f"in a {kind.title}" if peft_type != "LORA" else f"beside LoRA on {len(patches) - len(doras)} others"
        raise UserError(f"dora_scale of {plural(len(doras), 'module')} ({shorten(doras, 3)}) {beside}")
    own: dict[str, Any] = {"lora_dropout": 0.0, "bias": "none", "use_dora": bool(doras)}
    ranks = {name: patch.rank or 0 for name, patch in patches.items()}
    if peft_type == "LOKR":
        ranks, own = _lokr_settings(patches)
    elif peft_type == "LOHA":
        own = {}
        if odd := next(
            (name for name, patch in patches.items() if patch.parts["hada_w2_b"].shape[0] != ranks[name]), ""
        ):
            raise UserError(f"a LoHa whose two products differ in rank, as that of {odd}")
    alphas = {name: _whole(_alpha(patch, ranks[name])) for name, patch in patches.items()}
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    return {**_settings(peft_type, ranks, alphas, rank, alpha, llm_adapter_blocks), **own}


def _settings(
    peft_type: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rank: int,
    alpha: float,
    llm_adapter_blocks: int,
) -> dict[str, Any]:
    """Return the settings that PEFT's kinds have in common. Patterns are for the whole name of a module."""
    return {
        "peft_type": peft_type,
        "r": rank,
        "lora_alpha" if peft_type == "LORA" else "alpha": alpha,
        "target_modules": sorted(ranks),
        "exclude_modules": sorted(_alike(ranks, llm_adapter_blocks) - ranks.keys()) or None,
        "rank_pattern": {f"^{re.escape(name)}": own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {f"^{re.escape(name)}": own for name, own in alphas.items() if own != alpha},
    }


def _alike(names: Iterable[str], llm_adapter_blocks: int) -> set[str]:
    """Return the LLM adapter's modules that PEFT would match too, because their names end like one of `names`."""
    attention = re.compile(r"blocks\.(\d+)\.\w+_attn\.[qkv]_proj")
    found = {name: attention.fullmatch(name) for name in names}
    return {ADAPTER + name for name, match in found.items() if match and int(match[1]) < llm_adapter_blocks}


def _alpha(patch: Patch, rank: int) -> float:
    """Return the alpha that gives the patch's scale when it is divided by `rank`."""
    alpha = patch.alpha if patch.rank and patch.alpha is not None else rank
    return alpha * patch.factor


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _lokr_settings(patches: Mapping[str, Patch]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the rank of each LoKr, and the settings for which PEFT factorises the layers as they are.

    Raises UserError if there are none: PEFT has one `decompose_factor` for all layers, and stores a factor as two
    matrices if and only if the rank is below half of its larger side.
    """
    sides = sorted({side for patch in patches.values() for side in patch.product_shapes[0]})
    for limit, both in itertools.product((-1, *sides), (False, True)):
        ranks = {name: _lokr_rank(patch, limit, both=both) for name, patch in patches.items()}
        if all(ranks.values()):
            return ranks, {"decompose_factor": limit, "decompose_both": both}
    raise UserError(f"LoKr factors of these sizes, as no decompose_factor gives those of all {len(patches)} modules")


def _lokr_rank(patch: Patch, limit: int, *, both: bool) -> int:
    """Return the rank for which PEFT creates the factors of a LoKr, or 0 if there is none."""
    shapes = patch.product_shapes
    for sides in zip(*shapes, strict=True):
        if factorised(math.prod(sides), limit) != sides:
            return 0
    pairs = [f"lokr_w{index}_b" for index in (1, 2)]
    found = {patch.parts[pair].shape[0] for pair in pairs if pair in patch.parts}
    rank = found.pop() if found else max(map(max, shapes))
    expected = [both and 2 * rank < max(shapes[0]), 2 * rank < max(shapes[1])]
    return 0 if found or expected != [pair in patch.parts for pair in pairs] else rank
