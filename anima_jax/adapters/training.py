"""`[adapter]` on a particular network: which modules get one, of which rank and at which rate, and where they begin."""

import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from anima_jax.adapters import modules
from anima_jax.adapters.base_model import another_base
from anima_jax.adapters.file import factors_of, module_names, open_adapter
from anima_jax.adapters.kinds import TITLES
from anima_jax.config.main import MainConfig
from anima_jax.config.optimizer import AdapterConfig
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.parameters import Params
from anima_jax.training.optimizers import group_of


def plan(
    config: MainConfig, targets: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, modules.AdapterSpec], dict[str, tuple[float, ...]]]:
    """Adapters by module path, and the rates of their parameters, relative to their group's, where they have their own.

    `targets` are the shapes (layers, in, out) of the blocks' linear layers. Raises UserError for a pattern that fits
    none of their names, and if nothing would be trained.
    """
    adapter = config.adapter
    assert adapter is not None
    names = module_names({path: shape[0] for path, shape in targets.items()})
    rates = {name: config.learning_rates[group_of(name)] for name in names}
    open_names = [name for name, rate in rates.items() if rate > 0]
    if not open_names:
        raise UserError(f"{config.path}: every learning rate is 0, so nothing would be trained")
    _require_patterns_fit(config, adapter, open_names)
    ranks = {path: [0] * shape[0] for path, shape in targets.items()}
    own_rates = {path: [1.0] * shape[0] for path, shape in targets.items()}
    for name in open_names:
        path, layer = names[name]
        rate = _first(adapter.lr_pattern, name, rates[name])
        wanted = not adapter.target_modules or _any(adapter.target_modules, name)
        if wanted and rate and not _any(adapter.exclude_modules, name):
            ranks[path][layer] = int(_first(adapter.rank_pattern, name, adapter.rank))
            own_rates[path][layer] = rate / rates[name]
    slots = {
        path: modules.adapter_spec(adapter.type, targets[path], ranks[path], adapter.decompose_factor)
        for path in targets
        if any(ranks[path])
    }
    if not slots:
        raise UserError(f"{config.path}: [adapter] leaves every module out, so nothing would be trained")
    return slots, {
        f"{path}.{factor}": tuple(own_rates[path])
        for path, slot in slots.items()
        for factor in slot.shapes
        if set(own_rates[path]) != {1.0}
    }


def idle_exclusions(config: MainConfig, targets: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is to be said of `exclude_modules` that exclude nothing: it may be a slip, or other models' modules."""
    assert config.adapter is not None
    names = list(module_names({path: shape[0] for path, shape in targets.items()}))
    idle = [one for one in config.adapter.exclude_modules if not any(_any([one], name) for name in names)]
    return [
        f"warning: {config.path}: adapter.exclude_modules: '{one}' fits no module{_near(one, names)}" for one in idle
    ]


def scales(config: MainConfig, slots: Mapping[str, modules.AdapterSpec]) -> Params:
    """The adapters' scales by parameter path: alpha / rank in each layer, 0 where there is no adapter.

    A LoKr of two whole factors has no rank, and the scale 1: in its files an alpha has no meaning.
    """
    assert config.adapter is not None
    alpha, found = config.adapter.alpha, {}
    for path, slot in slots.items():
        values = [(alpha / rank if alpha and slot.ranked else 1.0) if rank else 0.0 for rank in slot.ranks]
        found[f"{path}.{modules.SCALE}"] = np.asarray(values, np.float32)
    return found


def existing(
    config: MainConfig, slots: Mapping[str, modules.AdapterSpec], own_scales: Params, fresh: Params
) -> tuple[Params, list[str]]:
    """The factors of `init_from_existing`, in place of fresh ones, and what is to be said of it.

    Modules that its file leaves out begin fresh. Where the file's scale is another than the run's, the factor that
    would start at zero makes up for it. Raises UserError for a file of another kind or rank, or one that changes
    modules that are not trained.
    """
    adapter = config.adapter
    assert adapter is not None
    assert adapter.init_from_existing is not None
    names = module_names({path: len(slot.ranks) for path, slot in slots.items()})
    trained = {name for name, (path, layer) in names.items() if slots[path].ranks[layer]}
    with open_adapter(adapter.init_from_existing) as found:
        label = f"{config.path}: init_from_existing: {found.path}"
        if strangers := [name for name in found.patches if name not in trained]:
            raise UserError(
                f"{label} changes {len(strangers)} modules that get no adapter in this run, as {strangers[0]}"
            )
        if kinds := {patch.kind for patch in found.patches.values()} - {adapter.type}:
            raise UserError(f"{label} is a {TITLES[kinds.pop()]}, and type is '{adapter.type}'")
        notes = [f"{len(found.patches)} of {len(trained)} modules begin from {found.path} ({found.summary})"]
        base = config.model.transformer_path
        if base is not None and (warning := another_base(found.path, found.metadata, base)):
            notes.append(warning)
        theirs, values = factors_of(found, {name: (*place, ()) for name, place in names.items()})
    result: Params = {}
    for path, slot in theirs.items():
        if not _begins(slots[path], slot):
            raise UserError(
                f"{label}: {path} has rank {max(slot.ranks)}, expected {max(slots[path].ranks)}; its factors are "
                f"{slot.shapes}, this run's {slots[path].shapes}; `python -m convert resize` changes a LoRA's rank"
            )
        layers, own = np.flatnonzero(slot.ranks), own_scales[f"{path}.{modules.SCALE}"]
        ratio = values[f"{path}.{modules.SCALE}"] / np.where(own == 0, np.float32(1.0), own)
        for factor, shape in slot.shapes.items():
            value = values[f"{path}.{factor}"].astype(np.float32)
            if modules.FACTORS[factor].zero:
                value = value * ratio[:, None, None]
            rows = (layers, *map(slice, shape))
            result[f"{path}.{factor}"] = fresh[f"{path}.{factor}"].at[rows].set(value[layers])
    return result, notes


def _begins(mine: modules.AdapterSpec, theirs: modules.AdapterSpec) -> bool:
    """Whether the factors of a file can be the beginning of a run's: of the same sizes, and ranks where it has any."""
    if mine.shapes.keys() != theirs.shapes.keys():
        return False
    for factor, shape in theirs.shapes.items():
        rank_axis = modules.FACTORS[factor].rank_axis
        if any(a != b for axis, (a, b) in enumerate(zip(shape, mine.shapes[factor], strict=True)) if axis != rank_axis):
            return False
    return not mine.ranked or all(rank in {0, own} for rank, own in zip(theirs.ranks, mine.ranks, strict=True))


def _require_patterns_fit(config: MainConfig, adapter: AdapterConfig, names: Iterable[str]) -> None:
    names = list(names)
    for key in ("target_modules", "rank_pattern", "lr_pattern"):
        for pattern in getattr(adapter, key):
            if not any(_any([pattern], name) for name in names):
                raise UserError(
                    f"{config.path}: adapter.{key}: '{pattern}' fits none of the {len(names)} modules, as "
                    f"{names[0]}{_near(pattern, names)}"
                )


def _near(pattern: str, names: Iterable[str]) -> str:
    """The name, or the part of one from one dot to another, that a pattern may mean."""
    words = [name.split(".") for name in names]
    parts = {".".join(w[i:j]) for w in words for i, j in itertools.combinations(range(len(w) + 1), 2)}
    return did_you_mean(pattern, sorted(parts))


def _any(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the patterns fits the name, or a part of it from one dot to another."""
    return any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})(?:\..*)?", name) for pattern in patterns)


def _first(values: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in values.items() if _any([pattern], name)), default)
