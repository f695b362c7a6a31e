"""`[adapter]` applied to a network: which modules get an adapter, ranks, learning rates and initial values."""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from anima_jax.adapters.base_model import base_mismatch
from anima_jax.adapters.dialects import LAYOUTS, module_names
from anima_jax.adapters.file import Adapter, open_adapter
from anima_jax.adapters.kinds import FACTORS, MAGNITUDE, SCALE
from anima_jax.adapters.modules import AdapterSpec, adapter_spec
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.names.groups import group_of
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import MOST
from anima_jax.errors import UserError, did_you_mean, shell_command
from anima_jax.models.parameters import Params

Specs = Mapping[str, AdapterSpec]
"""Module path → spec of its adapter."""


# ---- which modules -------------------------------------------------------------------------------------------------


def plan(
    config: MainConfig, targets: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, AdapterSpec], dict[str, tuple[float, ...]]]:
    """Return module path → spec, and parameter path → learning rate of each layer, relative to its group's rate.

    The second contains only parameters with a rate of their own. `targets` maps the paths of the blocks' linear layers
    to kernel shapes (layers, in, out). Raises UserError for a pattern that matches none of the modules whose group is
    trained, for factors of more numbers than int32 counts, and if nothing would be trained.
    """
    adapter = config.adapter
    assert adapter is not None
    names = module_names({path: shape[0] for path, shape in targets.items()})
    group_rates = {name: config.learning_rates[group_of(name)] for name in names}
    open_names = [name for name, rate in group_rates.items() if rate > 0]
    if not open_names:
        raise UserError(f"{config.path}: every learning rate is 0, so nothing would be trained")
    _require_patterns_fit(config, open_names)
    ranks = {path: [0] * shape[0] for path, shape in targets.items()}
    rates = {path: [1.0] * shape[0] for path, shape in targets.items()}
    for name in open_names:
        path, layer = names[name]
        rate = first_match(adapter.lr_pattern, name, group_rates[name])
        wanted = not adapter.target_modules or matches(adapter.target_modules, name)
        if wanted and rate and not matches(adapter.exclude_modules, name):
            ranks[path][layer] = int(first_match(adapter.rank_pattern, name, adapter.rank))
            rates[path][layer] = rate / group_rates[name]
    specs = {
        path: adapter_spec(adapter.type, shape, ranks[path], adapter.decompose_factor)
        for path, shape in targets.items()
        if any(ranks[path])
    }
    if not specs:
        raise UserError(f"{config.path}: [adapter] leaves every module out, so nothing would be trained")
    _require_countable(config, specs, targets)
    own_rates = {path: tuple(rates[path]) for path in specs if set(rates[path]) != {1.0}}
    return specs, {f"{path}.{factor}": rate for path, rate in own_rates.items() for factor in specs[path].shapes}


def _require_countable(config: MainConfig, specs: Specs, targets: Mapping[str, tuple[int, ...]]) -> None:
    for path, spec in specs.items():
        for factor, shape in spec.shapes.items():
            if (numbers := len(spec.ranks) * math.prod(shape)) > MOST:
                most = min(targets[path][1:])
                raise UserError(
                    f"{config.path}: adapter.rank = {max(spec.ranks)}: {path}.{factor} would have {numbers:,} numbers; "
                    f"expected a rank of at most {most}, that of the layer itself"
                )


def idle_exclusions(config: MainConfig, targets: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return a warning for each pattern in `exclude_modules` that matches nothing: a typo or another model's module."""
    assert config.adapter is not None
    names = list(module_names({path: shape[0] for path, shape in targets.items()}))
    idle = [one for one in config.adapter.exclude_modules if not any(matches([one], name) for name in names)]
    return [
        f"warning: {config.path}: adapter.exclude_modules: '{one}' fits no module{_near(one, names)}" for one in idle
    ]


def _require_patterns_fit(config: MainConfig, names: list[str]) -> None:
    for key in ("target_modules", "rank_pattern", "lr_pattern"):
        require_patterns_fit(getattr(config.adapter, key), names, f"{config.path}: adapter.{key}: ")


def require_patterns_fit(patterns: Iterable[str], names: Sequence[str], label: str = "") -> None:
    """Raise UserError, beginning with `label`, for the first pattern that matches none of the modules' `names`."""
    for pattern in patterns:
        if not any(matches([pattern], name) for name in names):
            raise UserError(
                f"{label}'{pattern}' fits none of the {len(names)} modules, such as {names[0]}{_near(pattern, names)}"
            )


def _near(pattern: str, names: Iterable[str]) -> str:
    """Return a hint with the name, or dotted part of a name, that is closest to a pattern."""
    words = [name.split(".") for name in names]
    parts = {".".join(w[i:j]) for w in words for i, j in itertools.combinations(range(len(w) + 1), 2)}
    return did_you_mean(pattern, sorted(parts))


def matches(patterns: Iterable[str], name: str) -> bool:
    """Return whether one of the patterns matches the name, or a part of it delimited by dots."""
    return any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})(?:\..*)?", name) for pattern in patterns)


def first_match(values: Mapping[str, float], name: str, default: float) -> float:
    """Return the value of the first pattern that matches the name."""
    return next((value for pattern, value in values.items() if matches([pattern], name)), default)


# ---- initial values ------------------------------------------------------------------------------------------------


def scales(config: MainConfig, specs: Specs) -> Params:
    """Return parameter path → scale of each layer."""
    assert config.adapter is not None
    alpha = config.adapter.alpha
    return {f"{path}.{SCALE}": np.asarray(spec.scales(alpha), np.float32) for path, spec in specs.items()}


def existing(config: MainConfig, specs: Specs, own_scales: Params, fresh: Params) -> tuple[Params, list[str]]:
    """Return the parameters that start from `init_from_existing` instead of `fresh` values, and messages about them.

    Raises UserError for a file of another kind or rank, or one that changes modules without an adapter in this run.
    """
    adapter = config.adapter
    assert adapter is not None
    assert adapter.init_from_existing is not None
    places = module_names({path: len(spec.ranks) for path, spec in specs.items()})
    trained = {name for name, (path, layer) in places.items() if specs[path].ranks[layer]}
    with open_adapter(adapter.init_from_existing, allow_unused=config.allow_unused) as found:
        label = f"{config.path}: init_from_existing: {found.path}"
        if strangers := [name for name in found.patches if name not in trained]:
            raise UserError(
                f"{label} changes {len(strangers)} modules that get no adapter in this run, as {strangers[0]}"
            )
        if other := next((patch for patch in found.patches.values() if patch.kind.name != adapter.type), None):
            title = other.kind.title
            article = "" if title.islower() else "an " if title.startswith("O") else "a "
            raise UserError(f"{label} is {article}{title}, and type is '{adapter.type}'")
        messages = [f"{len(found.patches)} of {len(trained)} modules begin from {found.path} ({found.summary})"]
        base = config.model.transformer_files
        if base is not None and (warning := base_mismatch(found.path, found.metadata, base)):
            messages.append(warning)
        return factors_of(found, specs, own_scales, fresh, label), messages


def factors_of(adapter: Adapter, specs: Specs, own_scales: Params, fresh: Params, label: str) -> Params:
    """Return the parameters of `fresh` that an adapter changes, with its values; layers that it leaves out stay fresh.

    If the adapter's scale differs from the run's, the factor that would start at zero is multiplied by their ratio.
    Raises UserError, beginning with `label`, for factors that do not match `specs`.
    """
    places = module_names({path: len(spec.ranks) for path, spec in specs.items()})
    by_path: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for module, patch in adapter.patches.items():
        path, layer = places[module]
        factors = _factors(patch, specs[path], layer, f"{label}: {module}")
        own = own_scales[f"{path}.{SCALE}"][layer]
        for name in (name for name in factors if FACTORS[name].zero):
            factors[name] = factors[name] * (np.float32(patch.scale) / own)
        by_path.setdefault(path, {})[layer] = factors
    result: Params = {}
    for path, layers in by_path.items():
        for name, shape in specs[path].shapes.items():
            values = np.zeros((len(layers), *shape), np.float32)
            for row, factors in zip(values, layers.values(), strict=True):
                row[tuple(map(slice, factors[name].shape))] = factors[name]
            result[f"{path}.{name}"] = fresh[f"{path}.{name}"].at[np.array(list(layers))].set(values)
    return result


def trainable_factors(patch: Patch, label: str, instead: str) -> dict[str, np.ndarray]:
    """Return a patch's factors in float32, in the model's layout.

    Raises UserError, beginning with `label` and ending with what to do `instead`, for a part that cannot be trained.
    """
    names = {factor.part: factor.name for factor in patch.kind.factors if factor.name in FACTORS}
    unfit = [part for part in patch.parts if part not in names and part != "alpha"]
    if patch.parts.keys() >= {MAGNITUDE.part} and patch.parts[MAGNITUDE.part].shape[0] == 1:
        unfit.append(f"{MAGNITUDE.part} for each input")
    if patch.norm_of_base:
        unfit.append(f"{MAGNITUDE.part} for ComfyUI's norm")
    if unfit:
        raise UserError(f"{label}: {unfit[0]} cannot be trained on; {instead}")
    own = {name: patch.parts[part].matrix.float32() for part, name in names.items() if part in patch.parts}
    return {name: LAYOUTS[name].to_model(values) for name, values in own.items()}


def _factors(patch: Patch, spec: AdapterSpec, layer: int, label: str) -> dict[str, np.ndarray]:
    """Return a patch's factors in float32, in the model's layout.

    Raises UserError if they do not match this layer of `spec`.
    """
    factors = trainable_factors(patch, label, "merge the file instead")
    found, expected = {n: f.shape for n, f in factors.items()}, {n: spec.layer_shape(n, layer) for n in spec.shapes}
    if found != expected:
        raise UserError(
            f"{label} has rank {patch.rank}, expected {spec.ranks[layer]}; its factors are {found}, this run's "
            f"{expected}; `{shell_command('anima_jax.convert', 'resize')}` changes a LoRA's rank"
        )
    return factors
