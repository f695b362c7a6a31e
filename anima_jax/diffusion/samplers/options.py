"""Options of samplers: the keyword-only parameters of their formulas, read from the functions' signatures.

A sampler has the options that its ComfyUI node or function has, with the same names, defaults and ranges.
"""

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from anima_jax.errors import UserError, did_you_mean, shorten


@dataclasses.dataclass(frozen=True)
class Between:
    """The range of a number, both ends included; for use in `Annotated`."""

    low: float
    high: float


Strength = Annotated[float, Between(0.0, 100.0)]
"""A number from 0 to 100, as in most of ComfyUI's nodes."""


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a sampler: its type, its default, and its range or choices."""

    name: str
    kind: type[Any]
    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """Description of the values that are valid, such as "a number from 0 to 100"."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "True or False"
        noun = "a whole number" if self.kind is int else "a number"
        if math.isinf(self.high):
            return noun if math.isinf(self.low) else f"{noun} ≥ {self.low:g}"
        return f"{noun} from {self.low:g} to {self.high:g}"

    def read(self, value: Any) -> Any:
        """Return a value, or the text of one, as the option's type. Raises ValueError if it is not valid."""
        if self.kind is str:
            if value in self.choices:
                return value
        elif self.kind is bool:
            if str(value).lower() in ("true", "false"):
                return str(value).lower() == "true"
        elif not isinstance(value, bool):
            number = float(value)
            if self.low <= number <= self.high and (self.kind is float or number.is_integer()):
                return self.kind(number)
        raise ValueError


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the options that a function or class accepts: its keyword-only parameters, by name."""
    plain = function.func if isinstance(function, functools.partial) else function
    hints = typing.get_type_hints(plain.__init__ if inspect.isclass(plain) else plain, include_extras=True)
    return {
        name: _option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _option(name: str, hint: Any, default: Any) -> Option:
    if get_origin(hint) is Literal:
        return Option(name, str, default, choices=get_args(hint))
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        return Option(name, kind, default, limits.low, limits.high)
    return Option(name, hint, default)


def read_options(sampler: str, known: Mapping[str, Option], values: Any) -> dict[str, Any]:
    """Return the values of a sampler's options, which may be texts, as their types.

    Raises UserError for an option that the sampler does not have and for a value that is not valid.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"sampler_options {shorten([str(values)])}, expected names with values, as in {{'eta': 0.5}}")
    read: dict[str, Any] = {}
    for name, value in cast(Mapping[str, Any], values).items():
        if name not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            near = did_you_mean(str(name), known)
            raise UserError(f"sampler '{sampler}' has no option '{shorten([str(name)])}': {has}{near}")
        try:
            read[name] = known[name].read(value)
        except (ValueError, TypeError, OverflowError):
            found = shorten([str(value)])
            raise UserError(f"{name} '{found}' of sampler '{sampler}', expected {known[name].expected}") from None
    return read
