"""PEFT's settings (`adapter_config.json`): read for their alphas, and written with the trainer's adapters."""

import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from pydantic_core import SchemaError, SchemaValidator, core_schema

from anima_jax.adapters.dialects import DIALECTS, module_names
from anima_jax.adapters.kinds import KINDS
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints import locations
from anima_jax.checkpoints.names.dit import ADAPTER
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.config.adapter import AdapterConfig
from anima_jax.errors import UserError, first_line, one_line, show_value

FILE = "adapter_config.json"

DIFFUSERS_SETTINGS = "lora_adapter_metadata"
"""Metadata key under which diffusers stores PEFT's settings."""

_COMPONENTS = ("transformer.", "text_conditioner.")
"""What diffusers' settings and names begin with."""

_PREFIXES = ("base_model.model.", *_COMPONENTS)
"""Prefixes of names in PEFT's files, whose alphas are in the metadata or in `adapter_config.json`."""


# ---- reading -------------------------------------------------------------------------------------------------------


def with_alphas(
    file: TensorFile, spellings: Mapping[str, str], patches: Mapping[str, Patch]
) -> tuple[dict[str, Patch], dict[str, str]]:
    """Return the patches of a file with the alphas from its settings, and its metadata without the settings.

    `spellings` maps the file's module names to modules. Settings in the metadata count for names of any format. Raises
    UserError if the settings cannot be read or a value is not valid.
    """
    in_header = {key for key in file.metadata if key == DIFFUSERS_SETTINGS or key.startswith(_COMPONENTS)}
    metadata = {key: value for key, value in file.metadata.items() if key not in in_header}
    if not in_header and not any(spelling.startswith(_PREFIXES) for spelling in spellings):
        return dict(patches), metadata
    source, settings = _read(file)
    of_component = functools.cache(lambda component: _Scales(source, settings, component))
    names = {module: spelling for spelling, module in spellings.items()}
    return {
        module: patch if "alpha" in patch.parts else _scaled(patch, module, names.get(module, module), of_component)
        for module, patch in patches.items()
    }, metadata


def _read(file: TensorFile) -> tuple[str, dict[str, Any]]:
    """Return where a file's settings are, and their values.

    They are in its metadata, where diffusers stores them, or in the JSON next to it; without either they are {}.
    """
    if DIFFUSERS_SETTINGS in file.metadata:
        source = f"{file.path}: {DIFFUSERS_SETTINGS}"
        return source, _parsed(source, file.metadata[DIFFUSERS_SETTINGS])
    if direct := {key: _value(text) for key, text in file.metadata.items() if key.startswith(_COMPONENTS)}:
        return f"{file.path}: its metadata", direct
    remote = locations.is_remote(file.path)
    source = f"{file.path.rpartition('/')[0]}/{FILE}" if remote else str(pathlib.Path(file.path).with_name(FILE))
    is_peft = any(key.startswith("base_model.model.") for key in file.tensors)
    if not is_peft or not (remote or os.path.isfile(source)):
        return source, {}
    try:
        opened, _ = locations.open_for_reading(locations.resolve(source))
    except UserError as error:
        if not remote:
            raise
        print(f"warning: {one_line(error)}; without PEFT's settings the scale of {file.path} is 1", file=sys.stderr)
        return source, {}
    try:
        with opened:
            text = opened.read(_LONGEST + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: PEFT's settings cannot be read: {first_line(error)}") from error
    return source, _parsed(source, text)


_LONGEST = 10_000_000
"""Characters of settings; real ones have thousands."""


def _parsed(source: str, text: str) -> dict[str, Any]:
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"longer than {_LONGEST} characters")
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: PEFT's settings cannot be read: {first_line(error)}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source}: found {_shown(settings)}, expected an object with PEFT's settings")
    return settings


def _value(text: str) -> Any:
    """Return the JSON value of a text, or the text if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _scaled(patch: Patch, module: str, spelling: str, of_component: Callable[[str], "_Scales"]) -> Patch:
    """Return the patch with the alpha that the settings give it.

    PEFT multiplies a LoKr of two matrices by alpha / r too, where an alpha would not count in other files, so that the
    scale is multiplied into a matrix.
    """
    scales = of_component((DIALECTS["diffusers"].module(module) or module).partition(".")[0])
    name = next((spelling.removeprefix(prefix) for prefix in _PREFIXES if spelling.startswith(prefix)), spelling)
    alpha, rank = scales.alpha.of(name, module), patch.rank or scales.rank.of(name, module)
    if alpha is None or not rank:
        return patch
    if scales.root_of_rank:
        alpha *= rank**0.5
    if alpha == rank:
        return patch
    return patch.with_alpha(alpha) if patch.rank else patch.multiplied(alpha / rank)


class _Scales:
    """The alphas and ranks of a component's modules. Keys of diffusers' settings begin with the component."""

    def __init__(self, source: str, settings: Mapping[str, Any], component: str):
        own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
        alphas = [key for key in ("lora_alpha", "alpha") if own.get(key) is not None]
        self.alpha = _Numbers(source, own, alphas[0] if alphas else "alpha", "alpha_pattern")
        self.rank = _Numbers(source, own, "r", "rank_pattern")
        self.root_of_rank = own.get("use_rslora") or False
        if not isinstance(self.root_of_rank, bool):
            raise UserError(f"{source}: use_rslora is {_shown(self.root_of_rank)}, expected true or false")


class _Numbers:
    """A number for each module, as PEFT finds it in its settings (`get_pattern_key` in peft/utils/other.py).

    The first pattern that matches a module's name, or its end after a dot, decides. Patterns are regular expressions.
    Most are names, which are looked up; the others are matched in linear time by Rust's engine.
    """

    def __init__(self, source: str, settings: Mapping[str, Any], key: str, patterns_key: str):
        default, patterns = settings.get(key), settings.get(patterns_key) or {}
        self._default = None if default is None else _number(source, key, default)
        self._names: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, float, SchemaValidator]] = []
        if not isinstance(patterns, dict):
            raise UserError(f"{source}: {patterns_key} is {_shown(patterns)}, expected an object")
        for index, (pattern, value) in enumerate(patterns.items()):
            where = f"{patterns_key} of {show_value(pattern)}"
            number = _number(source, where, value)
            if _NAME.fullmatch(pattern):
                self._names.setdefault(re.sub(r"\\(.)", r"\1", pattern.removesuffix("$")), (index, number))
            elif len(self._expressions) == _MOST_EXPRESSIONS:
                raise UserError(f"{source}: {patterns_key} has over {_MOST_EXPRESSIONS} regular expressions")
            else:
                self._expressions.append((index, number, _compiled(f"{source}: {where}", pattern)))

    def of(self, *names: str) -> float | None:
        """Return the number of the module with these names, or None if there is none."""
        ends = ["^" + name for name in names]
        ends += [name[at:] for name in names for at in (0, *(dot.end() for dot in re.finditer(r"\.", name)))]
        found = [self._names[end] for end in ends if end in self._names]
        found += [
            (index, number)
            for index, number, expression in self._expressions
            if any(map(expression.isinstance_python, names))
        ]
        return min(found)[1] if found else self._default


_NAME = re.compile(r"\^?(\w|\.|\\[.\-_])+\$?")
"""A pattern that is a module's name: a dot, escaped or not, is a dot."""

_MOST_EXPRESSIONS, _MOST_REPEATS, _LONGEST_EXPRESSION = 100, 10, 200
"""Bounds of what a file may make us match."""


def _compiled(where: str, pattern: str) -> SchemaValidator:
    """Return a validator of the names that a pattern matches. Raises UserError if it cannot be matched quickly."""
    reason = "is too complex"
    if "{" not in pattern and len(pattern) <= _LONGEST_EXPRESSION and sum(map(pattern.count, "*+?")) <= _MOST_REPEATS:
        try:
            whole = rf"^(?:(?:.*\.)?(?:{pattern}))$"
            return SchemaValidator(core_schema.str_schema(pattern=whole, regex_engine="rust-regex"))
        except SchemaError:
            reason = "cannot be matched in linear time, or is none"
    raise UserError(f"{where}: this regular expression {reason}")


_LARGEST = float(np.finfo(np.float32).max)


def _number(source: str, key: str, value: Any) -> float:
    """Return a setting as a number. Raises UserError if it is none that a float32 can hold."""
    if type(value) in (int, float) and abs(value) <= _LARGEST:
        return float(value)
    raise UserError(f"{source}: {key} is {_shown(value)}, expected a number")


def _shown(value: Any) -> str:
    return type(value).__name__ if isinstance(value, (dict, list)) else show_value(ascii(value))


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
