"""Names in adapter files: every dialect of LoRA, LoKr, LoHa, DoRA and plain differences that Anima users have.

A key is the name of a module, spelled in one of `SPELLINGS`, and the name of a part (parts.py). Inside this package a
module is named as in the original files, with `text_encoder.` before the text encoder's, and a part as in ComfyUI.
Names of modules are built forward, from the names of the network, and looked up: a `_` that stands for a dot is never
guessed.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from anima_jax.adapters.kinds import PARTS, split_key
from anima_jax.adapters.modules import FACTORS
from anima_jax.checkpoints.names import LINEAR, FileLayout, Rule, diffusers, dit, file_tensors, qwen3
from anima_jax.checkpoints.names.networks import DIT, QWEN3, TEXT_ENCODER
from anima_jax.errors import did_you_mean
from anima_jax.models import parameters
from anima_jax.models.qwen3 import Qwen3, Qwen3Config


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one family of programs writes an adapter.

    `module` spells the name of a module, None if it has none there; `parts` are the endings of those parts that it can
    express. With `alpha` false there is no place for a scale: it is 1.
    """

    title: str
    module: Callable[[str], str | None]
    parts: Mapping[str, str]
    alpha: bool = True


def _dotted(prefix: str | None, text_encoder: str | None = None) -> Callable[[str], str | None]:
    """The original names behind a prefix; None where a network has no names in the dialect."""
    return functools.partial(_spelled, prefix, text_encoder, lambda name: name)


def _flat(prefix: str, text_encoder: str) -> Callable[[str], str | None]:
    """The original names with `_` for every dot, behind a prefix."""
    return functools.partial(_spelled, prefix, text_encoder, lambda name: name.replace(".", "_"))


def _spelled(prefix: str | None, text_encoder: str | None, spell: Callable[[str], str], module: str) -> str | None:
    before = text_encoder if module.startswith(TEXT_ENCODER) else prefix
    return None if before is None else before + spell(module.removeprefix(TEXT_ENCODER))


def _diffusers(transformer: str, adapter: str, module: str) -> str | None:
    if module.startswith(TEXT_ENCODER):
        return None
    if module.startswith(dit.ADAPTER):
        return adapter + diffusers.text_conditioner(module)
    return transformer + diffusers.transformer(module)


def _flat_diffusers(module: str) -> str | None:
    name = _diffusers("lora_transformer_", "lora_text_conditioner_", module)
    return name and name.replace(".", "_")


_COMFYUI_PARTS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    **{part: f".{part}" for part in PARTS if part not in {"lora_A", "lora_B"}},
}

COMFYUI = Dialect("ComfyUI", _dotted("diffusion_model.", "text_encoders.qwen3_06b.transformer.model."), _COMFYUI_PARTS)
"""What the trainer writes too."""

DIALECTS = {
    "comfyui": COMFYUI,
    "kohya": Dialect(
        "kohya's sd-scripts",
        _flat("lora_unet_", "lora_te_"),
        {**_COMFYUI_PARTS, "lora_A": ".lora_down.weight", "lora_B": ".lora_up.weight"},
    ),
    "diffusers": Dialect(
        "diffusers",
        functools.partial(_diffusers, "transformer.", "text_conditioner."),
        {part: _COMFYUI_PARTS[part] for part in ("lora_A", "lora_B")},
        alpha=False,
    ),
}
"""Every dialect that can be written."""

_TEXT_ENCODER_PREFIXES = (TEXT_ENCODER, "text_encoder.model.", "base_model.model.model.")

SPELLINGS: tuple[Callable[[str], str | None], ...] = (
    *(dialect.module for dialect in DIALECTS.values()),
    _flat("lora_prior_unet_", "lora_te1_"),
    _flat("lycoris_", "lycoris_text_encoder_"),
    _flat("lora_unet_net_", "lora_te_model_"),
    _flat_diffusers,
    *(_dotted(prefix) for prefix in (*DIT.prefixes, "diffusion_model.net.", "transformer.")),
    _dotted("base_model.model.", "base_model.model."),
    *(_dotted(None, prefix) for prefix in (*QWEN3.prefixes, *_TEXT_ENCODER_PREFIXES)),
    functools.partial(_diffusers, "", "text_conditioner."),
    functools.partial(_diffusers, "base_model.model.", "base_model.model.text_conditioner."),
)
"""Every way to spell a module's name that is read; the first that fits wins."""

PEFT_PREFIXES = ("base_model.model.", "transformer.", "text_conditioner.")
"""What names begin with in files of PEFT's, whose alphas stand in the metadata or in `adapter_config.json`."""


def modules_by_spelling(spellings: Iterable[str]) -> dict[str, str]:
    """Spelling → module, for those of `spellings` that are modules of an Anima of any depth."""
    spellings = list(spellings)
    known = _known_beside(spellings)
    return {spelling: known[spelling] for spelling in spellings if spelling in known}


def nearest_spelling(key: str) -> str:
    """`" (did you mean '…'?)"` with the module that is spelled most like that of a key, if it is none itself."""
    if not (split := split_key(key)):
        return ""
    spelling, known = split[0], _known_beside(split[:1])
    alike = (one for one in known if one[:4] == spelling[:4])
    return "" if spelling in known else did_you_mean(spelling, alike)


def _known_beside(spellings: Sequence[str]) -> dict[str, str]:
    """Every spelling of every module of networks as deep as the numbers in `spellings` say."""
    numbered = re.compile(r"(?:blocks|layers)[._](\d{1,3})(?!\d)")
    numbers = {int(number) for spelling in spellings for number in numbered.findall(spelling)}
    return _all_spellings(1 + max(numbers, default=0))


@functools.lru_cache(maxsize=4)
def _all_spellings(blocks: int) -> dict[str, str]:
    """Every spelling of every module of networks with so many blocks in each stack."""
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

_KERNEL, _WEIGHT = r"\.kernel", ".weight"
_COLUMN = FileLayout(lambda file: file.reshape(-1), lambda model: model.reshape(-1, 1))

PART_OF_FACTOR = {
    **{name: name for name in FACTORS},
    "lora_a": "lora_A",
    "lora_b": "lora_B",
    "lora_magnitude": "dora_scale",
}
"""Part that a factor, a trained parameter of an adapter, is in a file."""

_BLOCK_RULES = (
    *dit.RULES,
    *(Rule(re.escape(TEXT_ENCODER) + rule.path, TEXT_ENCODER + rule.name, rule.layout) for rule in qwen3.RULES),
)

MODULE_RULES = tuple(
    Rule(rule.path.removesuffix(_KERNEL), rule.name.removesuffix(_WEIGHT))
    for rule in _BLOCK_RULES
    if rule.path.endswith(_KERNEL) and "{layer}" in rule.name
)
"""Path of a module that takes an adapter → its name in files."""


def _file_name(module: str, factor: str) -> str:
    spelled = COMFYUI.module(module)
    assert spelled is not None
    return spelled + COMFYUI.parts[PART_OF_FACTOR[factor]]


ADAPTER_RULES = tuple(
    Rule(
        rule.path + rf"\.{factor}",
        _file_name(rule.name, factor),
        _COLUMN if factor == "lora_magnitude" else LINEAR,
    )
    for rule in MODULE_RULES
    for factor in FACTORS
)
"""Names of the trainer's adapter files, which are ComfyUI's."""
