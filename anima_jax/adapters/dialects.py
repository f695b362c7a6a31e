"""Key formats of adapter files: every dialect in use for Anima, for every kind of adapter (kinds.py).

A key is the name of a module, in one of the formats in `SPELLINGS`, and a suffix for the part. Inside this package,
modules have their names in the original files, with the prefix `text_encoder.` for the text encoder's, and parts have
ComfyUI's names. Module names are looked up in a table generated from the network's tensors, so the code never guesses
whether a `_` stands for a dot.
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
"""Module → its name in one key format, or None if the format has no name for it."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The key format of one family of programs.

    `parts` maps the parts that it can express to their suffixes. A dialect without `alpha` cannot store a scale, which
    is then 1.
    """

    title: str
    module: Spelling
    parts: Mapping[str, str]
    alpha: bool = True


def _original(prefix: str | None, text_encoder: str | None = None, *, flat: bool = False) -> Spelling:
    """Return the format that puts a prefix before the original name, with `_` for every dot if `flat`.

    A network whose prefix is None has no names in the format.
    """

    def spell(module: str) -> str | None:
        before = text_encoder if module.startswith(TEXT_ENCODER) else prefix
        name = module.removeprefix(TEXT_ENCODER)
        return None if before is None else before + (name.replace(".", "_") if flat else name)

    return spell


def _diffusers(transformer: str, llm_adapter: str, *, flat: bool = False) -> Spelling:
    """Return the format that puts prefixes before diffusers' names for the transformer and its text conditioner."""

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
"""The dialect that the trainer writes."""

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
"""Dialects that can be written."""

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
"""Module name formats that can be read."""


def modules_by_spelling(spellings: Iterable[str]) -> dict[str, str]:
    """Return name in a file → module, for the `spellings` that name a module of an Anima model of any depth."""
    spellings = list(spellings)
    known = _known_spellings(spellings)
    return {spelling: known[spelling] for spelling in spellings if spelling in known}


def nearest_spelling(key: str) -> str:
    """Return `" (did you mean '…'?)"` with the known module name closest to that of a key.

    Returns "" if the key's own module is known, or if no name is close.
    """
    if not (split := split_key(key)):
        return ""
    spelling, known = split[0], _known_spellings(split[:1])
    alike = (one for one in known if one[:4] == spelling[:4])
    return "" if spelling in known else did_you_mean(spelling, alike)


def _known_spellings(spellings: Sequence[str]) -> dict[str, str]:
    """Return name in any format → module, for networks as deep as the numbers in `spellings` require."""
    numbered = re.compile(r"(?:blocks|layers)[._](\d{1,3})(?!\d)")
    numbers = {int(number) for spelling in spellings for number in numbered.findall(spelling)}
    return _all_spellings(1 + max(numbers, default=0))


@functools.lru_cache(maxsize=4)
def _all_spellings(blocks: int) -> dict[str, str]:
    """Return name in any format → module, for networks with `blocks` blocks in each stack."""
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
"""Layout in files of each factor of one layer: matrices are transposed, vectors are columns."""

_BLOCK_RULES = (
    *dit.RULES,
    *(Rule(re.escape(TEXT_ENCODER) + rule.path, TEXT_ENCODER + rule.name, rule.layout) for rule in qwen3.RULES),
)

MODULE_RULES = tuple(
    Rule(rule.path.removesuffix(r"\.kernel"), rule.name.removesuffix(".weight"))
    for rule in _BLOCK_RULES
    if rule.path.endswith(r"\.kernel") and "{layer}" in rule.name
)
"""Path of a module that can take an adapter → its name in files."""

ADAPTER_RULES = tuple(
    Rule(rf"{rule.path}\.{name}", f"{COMFYUI.module(rule.name)}{COMFYUI.parts[factor.part]}", LAYOUTS[name])
    for rule in MODULE_RULES
    for name, factor in FACTORS.items()
)
"""Tensor names of the trainer's adapter files, which are ComfyUI's."""


def module_names(layers: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Return name in files → (path of the stacked module, layer), for every layer.

    `layers` maps the path of each stacked module to its number of layers.
    """
    abstract = {path: np.broadcast_to(np.uint8(0), (count, 1, 1)) for path, count in layers.items()}
    tensors = file_tensors(MODULE_RULES, abstract)
    return {tensor.name: (tensor.path, tensor.layer) for tensor in tensors if tensor.layer is not None}
