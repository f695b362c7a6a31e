"""PEFT's settings, in `adapter_config.json` or in a file's header: read for the scales of adapters."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic_core import SchemaError, SchemaValidator, core_schema

from anima_jax.adapters.dialects import DIALECTS, PEFT_PREFIX
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints import locations
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.errors import UserError, first_line, one_line, show_value

FILE = "adapter_config.json"

DIFFUSERS_SETTINGS = "lora_adapter_metadata"
"""Metadata key under which diffusers stores PEFT's settings."""

_COMPONENTS = ("transformer.", "text_conditioner.")
"""What diffusers' settings and names begin with."""

_DEFAULT = 8.0
"""Rank and alpha of an adapter whose settings have none, in PEFT's configuration classes."""

_OTHER_BASE = re.compile(r"(pissa|corda|olora|loftq)\w*")
"""Values of `init_lora_weights` with which PEFT changes the base's weights before it trains, and when it loads."""

_VARIANTS = (
    *("velora_config", "alora_invocation_tokens", "monteclora_config", "use_bdlora", "arrow_config"),
    *("kasa_config", "use_qalora", "layer_replication", "lora_bias"),
)
"""Settings with which an adapter is not PEFT's plain LoRA or DoRA, unless they are null or false."""


@dataclasses.dataclass(frozen=True)
class PeftSettings:
    """The settings of a file (`values`), and where they come from. `metadata` is the file's, without the settings.

    `missing` says that the names are PEFT's and the settings are not there.
    """

    source: str
    values: Mapping[str, Any]
    metadata: Mapping[str, str]
    missing: bool = False

    def check(self) -> None:
        """Raise UserError if a value is not valid or means an adapter that cannot be read."""
        _Scales(self.source, self.values, "")

    def warning(self, path: str) -> str:
        """Return a warning about the file `path` if its settings are missing, or ""."""
        if not self.missing:
            return ""
        found = f"found no {self.source}" if self.source.endswith(FILE) else self.source
        return f"warning: {path}: {found}; without PEFT's settings the scale (alpha / rank) is taken as 1"

    @property
    def is_of_conditioner(self) -> bool:
        """Whether the names are those of diffusers' text conditioner, as PEFT says of what it wrapped."""
        mapping = self.values.get("auto_mapping")
        return isinstance(mapping, dict) and mapping.get("base_model_class") == "AnimaTextConditioner"


def read_settings(file: TensorFile) -> PeftSettings:
    """Return a file's settings: from its metadata, where diffusers stores them, or from the JSON beside it.

    The JSON counts only for a file with PEFT's names. Raises UserError if the settings cannot be read.
    """
    inside = {key for key in file.metadata if key == DIFFUSERS_SETTINGS or key.startswith(_COMPONENTS)}
    metadata = {key: value for key, value in file.metadata.items() if key not in inside}
    if DIFFUSERS_SETTINGS in inside:
        source = f"{file.path}: {DIFFUSERS_SETTINGS}"
        return PeftSettings(source, _parsed(source, file.metadata[DIFFUSERS_SETTINGS]), metadata)
    if inside:
        return PeftSettings(f"{file.path}: its metadata", {key: _value(file.metadata[key]) for key in inside}, metadata)
    remote = locations.is_remote(file.path)
    source = f"{file.path.rpartition('/')[0]}/{FILE}" if remote else str(pathlib.Path(file.path).with_name(FILE))
    if not any(key.startswith(PEFT_PREFIX) for key in file.tensors):
        return PeftSettings(source, {}, metadata)
    if not (remote or os.path.isfile(source)):
        return PeftSettings(source, {}, metadata, missing=True)
    try:
        opened, _ = locations.open_for_reading(locations.resolve(source))
    except UserError as error:
        if not remote:
            raise
        return PeftSettings(one_line(error), {}, metadata, missing=True)
    try:
        with opened:
            text = opened.read(_LONGEST + 1).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: PEFT's settings cannot be read: {first_line(error)}") from error
    return PeftSettings(source, _parsed(source, text), metadata)


def with_scales(
    settings: PeftSettings, path: str, spellings: Mapping[str, str], patches: Mapping[str, Patch]
) -> dict[str, Patch]:
    """Return the patches of the file `path` with the scales from its settings, for names of any format.

    `spellings` maps the file's module names to modules. An alpha of the module itself comes first. Warns about PEFT's
    names without settings. Raises UserError if a value is not valid or means an adapter that cannot be read.
    """
    if any(patch.alpha is None for patch in patches.values()) and (warning := settings.warning(path)):
        print(warning, file=sys.stderr)
    if not settings.values:
        return dict(patches)
    of_component = functools.cache(lambda component: _Scales(settings.source, settings.values, component))
    names = {module: spelling for spelling, module in spellings.items()}
    return {
        module: patch if "alpha" in patch.parts else _scaled(patch, module, names.get(module, module), of_component)
        for module, patch in patches.items()
    }


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

    PEFT multiplies a LoKr of two matrices by alpha / r too, where an alpha does not count in other files.
    """
    peer = DIALECTS["diffusers"].module(module) or module
    component, _, inside = peer.partition(".")
    scales, names = of_component(component), _names(spelling, module, inside)
    alpha, rank = scales.alpha.of(*names), patch.rank or scales.rank.of(*names)
    if alpha is None or not rank:
        return patch
    if scales.root_of_rank and patch.kind.peft_type == "LORA":
        alpha *= rank**0.5
    if alpha == rank:
        return patch
    if patch.rank:
        return patch.with_alpha(alpha)
    return dataclasses.replace(patch, factor=alpha / rank) if patch.kind.peft_type else patch


def _names(spelling: str, module: str, peer: str) -> tuple[str, ...]:
    """Return the names of a module that the patterns of settings may mean.

    It is the file's own name if it is PEFT's or diffusers'; in a file of another format, they are the original one and
    diffusers'.
    """
    own = next(
        (spelling.removeprefix(one) for one in (PEFT_PREFIX, *_COMPONENTS) if spelling.startswith(one)), spelling
    )
    return (own,) if own != spelling or own in (module, peer) else (module, peer)


class _Scales:
    """The alphas and ranks of a component's modules. Keys of diffusers' settings begin with the component."""

    def __init__(self, source: str, settings: Mapping[str, Any], component: str):
        own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
        if own.keys() & {"peft_type", "r"}:
            own.setdefault("r", _DEFAULT)
        alphas = [key for key in ("lora_alpha", "alpha") if own.get(key) is not None]
        if not alphas and own.get("r") is not None:
            own["alpha"] = _DEFAULT
        self.alpha = _Numbers(source, own, alphas[0] if alphas else "alpha", "alpha_pattern")
        self.rank = _Numbers(source, own, "r", "rank_pattern")
        self.root_of_rank = own.get("use_rslora") or False
        if not isinstance(self.root_of_rank, bool):
            raise UserError(f"{source}: use_rslora is {_shown(self.root_of_rank)}, expected true or false")
        initial = own.get("init_lora_weights")
        if isinstance(initial, str) and _OTHER_BASE.fullmatch(initial.lower()):
            raise UserError(
                f"{source}: init_lora_weights is {initial}, for which PEFT changes the base's weights; save it as a "
                "plain LoRA in PEFT (path_initial_model_for_weight_conversion)"
            )
        if variant := next((key for key in _VARIANTS if own.get(key)), None):
            raise UserError(f"{source}: {variant} is {_shown(own[variant])}, a variant of LoRA that cannot be read")


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

_MOST_EXPRESSIONS, _MOST_REPEATS, _MOST_COPIES, _LONGEST_EXPRESSION = 100, 10, 1000, 200
"""Bounds of what a file may make us match."""


def _compiled(where: str, pattern: str) -> SchemaValidator:
    """Return a validator of the names that a pattern matches. Raises UserError if it cannot be matched quickly."""
    reason = "is too complex"
    bounds = re.findall(r"\{([\d,]*)", pattern[:_LONGEST_EXPRESSION])
    copies = math.prod(max([1, *map(int, re.findall(r"\d+", counts))]) for counts in bounds)
    repeats = sum(map(pattern.count, "*+?{"))
    if copies <= _MOST_COPIES and repeats <= _MOST_REPEATS and len(pattern) <= _LONGEST_EXPRESSION:
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
