"""Names in adapter files: every dialect that Anima users have, of every kind of adapter (kinds.py).

A key is the name of a module, spelled in one of `SPELLINGS`, and an ending that tells the part. Inside this package a
module is named as in the original files, with `text_encoder.` before the text encoder's, and a part as in ComfyUI.
Spellings are made from the names of the network and looked up: which `_` stands for a dot is never guessed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from anima_jax.adapters.kinds import FACTORS, KINDS, PARTS, split_key
from anima_jax.checkpoints.names import LINEAR, FileLayout, Rule, diffusers, dit, file_tensors, qwen3
from anima_jax.checkpoints.names.networks import DIT, QWEN3, TEXT_ENCODER
from anima_jax.errors import did_you_mean
from anima_jax.models import parameters
from anima_jax.models.qwen3 import Qwen3, Qwen3Config

Spelling = Callable[[str], str | None]
"""Module → how a file names it; None if it has no name there."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one family of programs writes an adapter.

    `parts` are the endings of the parts that it can express. Without `alpha` there is no place for a scale: it is 1.
    """

    title: str
    module: Spelling
    parts: Mapping[str, str]
    alpha: bool = True


def _original(prefix: str | None, text_encoder: str | None = None, *, flat: bool = False) -> Spelling:
    """The original names behind a prefix, `flat` with `_` for every dot; None where a network has no names."""

    def spell(module: str) -> str | None:
        before = text_encoder if module.startswith(TEXT_ENCODER) else prefix
        name = module.removeprefix(TEXT_ENCODER)
        return None if before is None else before + (name.replace(".", "_") if flat else name)

    return spell


def _diffusers(transformer: str, llm_adapter: str, *, flat: bool = False) -> Spelling:
    """Diffusers' names of the transformer and its text conditioner, each behind a prefix."""

    def spell(module: str) -> str | None:
        if module.startswith(TEXT_ENCODER):
            return None
        inside = module.startswith(dit.ADAPTER)
        name = (
            llm_adapter + diffusers.text_conditioner(module) if inside else transformer + diffusers.transformer(module)
        )
        return name.replace(".", "_") if flat else name

    return spell


_SUFFIXES = {factor.part: factor.suffix for kind in KINDS.values() for factor in kind.factors}
_COMFYUI_PARTS = {part: f".{part}{_SUFFIXES.get(part, '')}" for part in PARTS}

COMFYUI = Dialect(
    "ComfyUI", _original("diffusion_model.", "text_encoders.qwen3_06b.transformer.model."), _COMFYUI_PARTS
)
"""What the trainer writes too."""

DIALECTS = {
    "comfyui": COMFYUI,
    "kohya": Dialect(
        "kohya's sd-scripts",
        _original("lora_unet_", "lora_te_", flat=True),
        {**_COMFYUI_PARTS, "lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight"},
    ),
    "diffusers": Dialect(
        "diffusers",
        _diffusers("transformer.", "text_conditioner."),
        {part: _COMFYUI_PARTS[part] for part in ("lora_A", "lora_B")},
        alpha=False,
    ),
}
"""Every dialect that can be written."""

_TEXT_ENCODER_PREFIXES = (TEXT_ENCODER, "text_encoder.model.", "base_model.model.model.")

SPELLINGS: tuple[Spelling, ...] = (
    *(dialect.module for dialect in DIALECTS.values()),
    _original("lora_prior_unet_", "lora_te1_", flat=True),
    _original("lycoris_", "lycoris_text_encoder_", flat=True),
    _original("lora_unet_net_", "lora_te_model_", flat=True),
    _diffusers("lora_transformer_", "lora_text_conditioner_", flat=True),
    *(_original(prefix) for prefix in (*DIT.prefixes, "diffusion_model.net.", "transformer.")),
    _original("base_model.model.", "base_model.model."),
    *(_original(None, prefix) for prefix in (*QWEN3.prefixes, *_TEXT_ENCODER_PREFIXES)),
    _diffusers("", "text_conditioner."),
    _diffusers("base_model.model.", "base_model.model.text_conditioner."),
)
"""Every way to spell a module's name that is read; the first that fits is used."""


def modules_by_spelling(spellings: Iterable[str]) -> dict[str, str]:
    """Spelling → module, for those of `spellings` that are modules of an Anima of any depth."""
    spellings = list(spellings)
    known = _known_spellings(spellings)
    return {spelling: known[spelling] for spelling in spellings if spelling in known}


def nearest_spelling(key: str) -> str:
    """`" (did you mean '…'?)"` with the module whose spelling is most like that of a key, if it is none itself."""
    if not (split := split_key(key)):
        return ""
    spelling, known = split[0], _known_spellings(split[:1])
    alike = (one for one in known if one[:4] == spelling[:4])
    return "" if spelling in known else did_you_mean(spelling, alike)


def _known_spellings(spellings: Sequence[str]) -> dict[str, str]:
    """Every spelling of every module of networks as deep as the numbers in `spellings` say."""
    numbered = re.compile(r"(?:blocks|layers)[._](\d{1,3})(?!\d)")
    numbers = {int(number) for spelling in spellings for number in numbered.findall(spelling)}
    return _all_spellings(1 + max(numbers, default=0))


@functools.lru_cache(maxsize=4)
def _all_spellings(blocks: int) -> dict[str, str]:
    """Every spelling of every module of networks with this many blocks in each stack."""
    sizes = Qwen3Config(8, blocks, 1, 1, 8, 8, 4)
    _, text_encoder = parameters.abstract(lambda rngs: Qwen3(sizes, rngs=rngs))
    names = dit.tensor_names(blocks) + [TEXT_ENCODER + one.name for one in file_tensors(qwen3.RULES, text_encoder)]
    known: dict[str, str] = {}
    for module in (name.removesuffix(".weight") for name in names):
        for spell in SPELLINGS:
            spelling = spell(module)
            if spelling is not None:
                known.setdefault(spelling, module)
    return known


# ---- parameters of attached adapters -------------------------------------------------------------------------------

_COLUMN = FileLayout(lambda file: file.reshape(-1), lambda model: model.reshape(-1, 1))

LAYOUTS = {name: LINEAR if len(factor.axes) > 1 else _COLUMN for name, factor in FACTORS.items()}
"""How a file stores each factor of a layer: a matrix transposed, a vector as a column."""

_BLOCK_RULES = (
    *dit.RULES,
    *(Rule(re.escape(TEXT_ENCODER) + rule.path, TEXT_ENCODER + rule.name, rule.layout) for rule in qwen3.RULES),
)

MODULE_RULES = tuple(
    Rule(rule.path.removesuffix(r"\.kernel"), rule.name.removesuffix(".weight"))
    for rule in _BLOCK_RULES
    if rule.path.endswith(r"\.kernel") and "{layer}" in rule.name
)
"""Path of a module that takes an adapter → its name in files."""

ADAPTER_RULES = tuple(
    Rule(rf"{rule.path}\.{name}", f"{COMFYUI.module(rule.name)}{COMFYUI.parts[factor.part]}", LAYOUTS[name])
    for rule in MODULE_RULES
    for name, factor in FACTORS.items()
)
"""Names of the trainer's adapter files, which are ComfyUI's."""


def module_names(layers: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Name in files of each layer of stacked modules → the module's path, and the layer. `layers` says how many."""
    abstract = {path: np.broadcast_to(np.uint8(0), (count, 1, 1)) for path, count in layers.items()}
    tensors = file_tensors(MODULE_RULES, abstract)
    return {tensor.name: (tensor.path, tensor.layer) for tensor in tensors if tensor.layer is not None}
