"""What a run was, as its checkpoints know it, and in what another one differs: model, data set and configuration."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.checkpoints.orbax import layout_differences, layout_of
from anima_jax.data.batch_plan import BatchPlan, data_fingerprint
from anima_jax.data.examples import CONTENTS
from anima_jax.errors import shorten, show_value
from anima_jax.models.parameters import Params

# Keys of the configuration that do not change what is trained.
_SILENT = re.compile(
    r"path|messages|seed|output_dir|dataset|monitoring|sample|(save|checkpoint|eval|reset)_\w+|resume_from_checkpoint"
    r"|max_checkpoints|cache_dir|cache_local_dir|regenerate_cache|trust_cache|caching_batch_size|compilation_cache_dir"
    r"|map_num_proc|strict_data|steps_per_print|logging_steps|x_axis_examples"
)

# Keys whose values each host may have for itself. Of what lies at paths, data and encoders are compared by their bytes.
_OF_A_HOST = re.compile(
    r"(\w+\.)*(\w*path|dataset|config)|messages|cache_local_dir|compilation_cache_dir|map_num_proc"
    r"|monitoring\.\w+"
)

_MOST_SETTINGS = 12
"""No more changed keys than these are named."""


def facts_of(
    params: Params,
    groups: Mapping[str, str],
    plan: BatchPlan,
    ids: np.ndarray,
    settings: Mapping[str, Any],
    *,
    contents: Mapping[str, np.ndarray] = {},
    files: Mapping[str, str] = {},
    replicas: int = 1,
) -> dict[str, Any]:
    """What a checkpoint knows of a run besides its state, for `resume.Resume`.

    `contents` as in `data_fingerprint`, `settings` from `settings_of`. `files` are fingerprints of what the run was
    made with and does not train, by the words that tell a person what it is. `replicas` are those that its batches were
    made for.
    """
    return {
        "replicas": replicas,
        "model": model_fingerprint(params, groups),
        "files": dict(files),
        "data": data_fingerprint(plan, ids, contents),
        "settings": dict(settings),
        "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
    }


def model_fingerprint(params: Params, groups: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Path → group and array ("float32[28,10]") of each parameter that is trained. `params` may be abstract."""
    return {path: {"group": groups[path], "array": array} for path, array in layout_of(params).items()}


def frozen_fingerprint(frozen: Params) -> dict[str, str]:
    """A checksum of frozen weights, bit for bit as they are stored, on whatever devices they are; none of none."""
    return {"the frozen weights": f"{int(_sum_of_bits(frozen)):x}"} if frozen else {}


@jax.jit
def _sum_of_bits(params: Params) -> jax.Array:
    def bits(leaf: jax.Array) -> jax.Array:
        whole = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(whole.astype(jnp.uint32), dtype=jnp.uint32)

    return sum(map(bits, jax.tree.leaves(params)), jnp.uint32(0))


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of what matters to training in a configuration's table (`model_dump(mode="json")`)."""
    return _dotted({key: value for key, value in config.items() if not _SILENT.fullmatch(key)})


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key → value of what the processes of a run have in common, as `settings_of`."""
    return {key: value for key, value in _dotted(config).items() if not _OF_A_HOST.fullmatch(key)}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for everything in which two runs' facts (or a checkpoint's metadata and a run's facts) differ."""
    lines = [*_model_changes(old["model"], new["model"]), *_data_changes(old["data"], new["data"])]
    lines += [f"{what} changed" for what, own in new["files"].items() if old["files"].get(what, own) != own]
    settings, now = old["settings"], new["settings"]
    different = [key for key in sorted(settings.keys() | now.keys()) if settings.get(key) != now.get(key)]
    lines += [
        f"{key} was {show_value(settings.get(key))}, now {show_value(now.get(key))}"
        for key in different[:_MOST_SETTINGS]
    ]
    if len(different) > _MOST_SETTINGS:
        lines.append(f"{len(different) - _MOST_SETTINGS} more keys of the configuration differ")
    before, after = (" on ".join((f"jax {each['versions']['jax']}", each["versions"]["device"])) for each in (old, new))
    if before != after:
        lines.append(f"the checkpoint was written by {before}, this is {after}: results may differ in their last bits")
    return lines


def model_faults(old: Mapping[str, Any], new: Mapping[str, Any], reset_optimizer: bool) -> list[str]:
    """Changes of what is trained that leave no way to go on, each with what to do."""
    start = "or start a new run from the model that this one saved"
    faults = [f"{line}; expected the model as it was, {start}" for line in _array_changes(old, new)]
    gone, added = ([path for path in one if path not in other] for one, other in ((old, new), (new, old)))
    if gone:
        faults.append(
            f"{_parameters(old, gone)} were trained and now are not, which would lose what they learned; expected a "
            f"rate above 0 for them, {start}"
        )
    if added and not reset_optimizer:
        faults.append(
            f"{_parameters(new, added)} were not trained and now are; expected a rate of 0 for them, or "
            "--reset_optimizer"
        )
    return faults


def optimizer_faults(
    layout: Mapping[str, str], opt_state: Any, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    """Why the saved state of the optimizer, whose layout is given, cannot become `opt_state`, with what to do."""
    different = layout_differences(layout, layout_of(opt_state))
    if not different:
        return []
    types = [show_value(facts["settings"].get("optimizer.type")) for facts in (old, new)]
    what = f" (it was {types[0]}, now {types[1]})" if types[0] != types[1] else ""
    return [f"the optimizer keeps another state{what}: {shorten(different)}; --reset_optimizer begins it anew"]


def data_faults(old: Mapping[str, Any], new: Mapping[str, Any], plan: BatchPlan) -> list[str]:
    """Why the position of a checkpoint (`old` is its metadata) is none of this plan's, each with what to do."""
    tiers, again = old["data"]["tiers"], f"or --reset_dataloader to begin epoch {old['epoch'] + 1} anew"
    faults = [
        f"a step of tier {name} took {tiers[name]['batch']} examples, now {tier['batch']}; expected global_batch_size, "
        f"or micro_batch_size_per_gpu × gradient_accumulation_steps, = {tiers[name]['batch']}, {again}"
        for name, tier in new["data"]["tiers"].items()
        if name in tiers and tiers[name]["batch"] != tier["batch"]
    ]
    if faults:
        return faults
    try:
        plan.step_at(old["position"])
    except ValueError as error:
        what = "; ".join(_data_changes(old["data"], new["data"]))
        return [f"{what}: {error}; expected the data set as it was, {again}"]
    return []


def _model_changes(old: Mapping[str, Mapping[str, str]], new: Mapping[str, Mapping[str, str]]) -> list[str]:
    gone, added = ([path for path in one if path not in other] for one, other in ((old, new), (new, old)))
    lines = [f"{_parameters(old, gone)} were trained and now are not"] if gone else []
    lines += [f"{_parameters(new, added)} were not trained and now are"] if added else []
    return lines + _array_changes(old, new)


def _array_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    pairs = {path: (old[path]["array"], new[path]["array"]) for path in new if path in old}
    changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
    ranks = {
        tuple(re.findall(r"\d+", array)[-1] for array in pair)
        for path, pair in changed.items()
        if path.endswith(".lora_a")
    }
    if len(ranks) == 1 and all(path.endswith((".lora_a", ".lora_b")) for path in changed):
        ((before, now),) = ranks
        if before != now:
            return [f"the adapter's rank was {before}, now {now}"]
    words = [f"{path} was {before}, now {now}" for path, (before, now) in changed.items()]
    return [shorten(words)] if words else []


def _parameters(table: Mapping[str, Mapping[str, str]], paths: list[str]) -> str:
    groups = sorted({table[path]["group"] for path in paths})
    return f"{', '.join(groups)}: {len(paths)} parameters ({shorten(paths)})"


def _data_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    lines = [f"seed was {old['seed']}, now {new['seed']}"] if old["seed"] != new["seed"] else []
    for name in [*old["tiers"], *(name for name in new["tiers"] if name not in old["tiers"])]:
        tier, now = old["tiers"].get(name), new["tiers"].get(name)
        before_after = [each["examples"] if each else 0 for each in (tier, now)]
        if before_after[0] != before_after[1]:
            lines.append(f"the data set had {before_after[0]} examples in tier {name}, now {before_after[1]}")
        elif tier["set"] != now["set"]:
            lines.append(f"the {before_after[0]} examples of tier {name} are not those that they were")
        elif tier["order"] != now["order"]:
            lines.append(f"the examples of tier {name} are the same in another order")
        if tier and now and tier["set"] == now["set"]:
            lines += [f"{what} of tier {name} changed" for what in CONTENTS if tier.get(what) != now.get(what)]
        if tier and now and tier["batch"] != now["batch"]:
            lines.append(f"a step of tier {name} took {tier['batch']} examples, now {now['batch']}")
    return lines


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, and lists of tables, as one; keys without a value are left out."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))  # noqa: PLW2901 - the same value in another form
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _dotted(value).items()}
        elif value is not None:
            found[key] = value
    return found
