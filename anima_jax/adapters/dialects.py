"""Key formats of adapter files: every dialect in use for Anima, for every kind of adapter (kinds.py).

A key is the name of a module, in one of the formats in `NAMES` and after any `WRAPPERS`, and a suffix for the part.
Inside this package, modules have their names in the original files, with the prefix `text_encoder.` for the text
encoder's, and parts have ComfyUI's names. Module names are looked up in a table generated from the network's tensors,
so the code never guesses whether a `_` stands for a dot.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from anima_jax.adapters.kinds import FACTORS, SUFFIXES, split_key
from anima_jax.checkpoints.names import LINEAR, FileLayout, Rule, diffusers, dit, file_tensors, qwen3
from anima_jax.checkpoints.names.networks import TEXT_ENCODER, unwrapped
from anima_jax.errors import did_you_mean
from anima_jax.models import parameters
from anima_jax.models.qwen3 import Qwen3, Qwen3Config

Spelling = Callable[[str], str | None]
"""Module → its name in one key format, or None if the format has no name for it."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The key format of one family of programs.

    `parts` maps the parts that it can express to their suffixes. A dialect without an alpha for each module has PEFT's
    settings, in the file's "header" or "beside" it. Names with a slash are in a file of that folder.
    """

    title: str
    module: Spelling
    parts: Mapping[str, str]
    settings: str = ""


def _original(prefix: str | None, text_encoder: str | None = None, *, flat: bool = False) -> Spelling:
    """Return the format that puts a prefix before the original name, with `_` for every dot if `flat`.

    A network whose prefix is None has no names in the format.
    """

    def spell(module: str) -> str | None:
        before = text_encoder if module.startswith(TEXT_ENCODER) else prefix
        name = module.removeprefix(TEXT_ENCODER)
        return None if before is None else before + (name.replace(".", "_") if flat else name)

    return spell


def _diffusers(transformer: str, llm_adapter: str, text_encoder: str | None = None) -> Spelling:
    """Return the format that puts prefixes before diffusers' names for the networks of its pipeline.

    A text encoder without a prefix has no names in the format.
    """

    def spell(module: str) -> str | None:
        if module.startswith(TEXT_ENCODER):
            return None if text_encoder is None else text_encoder + module.removeprefix(TEXT_ENCODER)
        if module.startswith(dit.ADAPTER):
            return llm_adapter + diffusers.text_conditioner(module)
        return transformer + diffusers.transformer(module)

    return spell


PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the network that it wraps."""

_CONDITIONER = "text_conditioner."
_TEXT_ENCODER_IN_PEFT = f"text_encoder/{PEFT_PREFIX}"

COMFYUI = Dialect("ComfyUI", _original("diffusion_model.", "text_encoders.qwen3_06b.transformer.model."), SUFFIXES)
"""The dialect that the trainer writes."""

_PEFT = {part: suffix for part, suffix in SUFFIXES.items() if part.startswith(("lora_A", "lora_B", "lokr_w", "hada_w"))}
_PEFT["dora_scale"] = ".lora_magnitude_vector"

DIALECTS = {
    "comfyui": COMFYUI,
    "kohya": Dialect(
        "kohya's sd-scripts",
        _original("lora_unet_", "lora_te_", flat=True),
        {
            **{part: suffix for part, suffix in SUFFIXES.items() if part != "set_b"},
            "lora_A": ".lora_down.weight",
            "lora_B": ".lora_up.weight",
        },
    ),
    "diffusers": Dialect(
        "diffusers",
        _diffusers("transformer.", _CONDITIONER),
        {part: suffix for part, suffix in _PEFT.items() if not part.startswith("hada")},
        settings="header",
    ),
    "peft": Dialect(
        "PEFT (diffusers' names)",
        _diffusers(PEFT_PREFIX, f"text_conditioner/{PEFT_PREFIX}", _TEXT_ENCODER_IN_PEFT),
        _PEFT,
        settings="beside",
    ),
    "peft_original": Dialect(
        "PEFT (original names)",
        _original(PEFT_PREFIX, _TEXT_ENCODER_IN_PEFT),
        _PEFT,
        settings="beside",
    ),
}
"""Dialects that can be written."""

NAMES: tuple[Spelling, ...] = (_original("", ""), _diffusers("", _CONDITIONER))
"""Formats of module names without wrappers; each is read with `.` and with `_` for every dot."""

_COMMON = "base_model model module _orig_mod pipe pipeline lora lycoris transformer"
WRAPPERS = {
    False: f"{_COMMON} net network dit unet core diffusion_model prior_unet lora_unet lora_prior_unet lora_dit",
    True: f"{_COMMON} text_encoders text_encoder cond_stage_model qwen3_06b qwen3 qwen te te1 language_model "
    "lora_te lora_te1 clip llm",
}
"""Names that programs put before a module's own, in any order and number: for the transformer's and, if True, the text
encoder's."""

_WRAPPER = {is_text: re.compile(rf"({'|'.join(words.split())})(\.|_(?!.*\.))") for is_text, words in WRAPPERS.items()}


def modules_by_spelling(spellings: Iterable[str], *, of_conditioner: bool = False) -> dict[str, str]:
    """Return name in a file → module, for the `spellings` that name a module of an Anima model of any depth.

    `of_conditioner` says that they are diffusers' names inside the text conditioner, many of which the transformer has
    too. Without it, they are if the conditioner has all of them, and no other network does.
    """
    spellings = list(spellings)
    known = _known_names(spellings)
    found = {spelling: _module(spelling, known) for spelling in spellings}
    if of_conditioner or not all(found.values()):
        inside = {spelling: known.get(_CONDITIONER + spelling.removeprefix(PEFT_PREFIX)) for spelling in spellings}
        found = inside if of_conditioner or all(inside.values()) else found
    return {spelling: module for spelling, module in found.items() if module}


def _module(spelling: str, known: Mapping[str, str]) -> str | None:
    """Return the module that a name in a file means, or None: its wrappers are removed until the rest is known.

    A wrapper of the text encoder does not lead to a module of the transformer, and the reverse.
    """
    spelling = spelling.removeprefix(_TEXT_ENCODER_IN_PEFT).replace(f"/{PEFT_PREFIX}", ".", 1)
    for is_text in (False, True):
        rest: str | None = unwrapped(spelling) if len(spelling) < 300 else None
        while rest is not None:
            module = known.get(rest)
            if module is not None and module.startswith(TEXT_ENCODER) == is_text:
                return module
            wrapper = _WRAPPER[is_text].match(rest)
            rest = rest[wrapper.end() :] if wrapper else None
    return None


def nearest_spelling(key: str) -> str:
    """Return `" (did you mean '…'?)"` with the known module name closest to that of a key.

    Returns "" if the key's own module is known, or if no name is close.
    """
    if not (split := split_key(key)):
        return ""
    spelling, known = split[0], _known_names(split[:1])
    if _module(spelling, known):
        return ""
    rest, before = spelling, ""
    while wrapper := _WRAPPER[False].match(rest):
        rest, before = rest[wrapper.end() :], before + wrapper[0]
    return did_you_mean(spelling, (before + name for name in known if name[:4] == rest[:4]))


def _known_names(spellings: Sequence[str]) -> dict[str, str]:
    """Return name without wrappers → module, for networks as deep as the numbers in `spellings` require."""
    numbered = re.compile(r"(?:blocks|layers)[._](\d{1,3})(?!\d)")
    numbers = {int(number) for spelling in spellings for number in numbered.findall(spelling)}
    return _all_names(1 + max(numbers, default=0))


@functools.lru_cache(maxsize=4)
def _all_names(blocks: int) -> dict[str, str]:
    """Return name without wrappers → module, for networks with `blocks` blocks in each stack.

    Every module has its original name and diffusers', each also with `_` for every dot.
    """
    sizes = Qwen3Config(8, blocks, 1, 1, 8, 8, 4)
    _, text_encoder = parameters.abstract(lambda rngs: Qwen3(sizes, rngs=rngs))
    names = dit.tensor_names(blocks) + [TEXT_ENCODER + one.name for one in file_tensors(qwen3.RULES, text_encoder)]
    known: dict[str, str] = {}
    for module in (name.removesuffix(".weight") for name in names):
        for spell in NAMES:
            spelling = spell(module)
            if spelling is not None:
                known.setdefault(spelling, module)
                known.setdefault(spelling.replace(".", "_"), module)
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
