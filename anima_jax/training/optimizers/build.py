"""From the configuration to the optimizer: whatever its name, groups, rates and weight decay are the same."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.names.groups import group_of, groups_by_path, is_decayed
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.parameters import Params
from anima_jax.training.optimizers.layers import by_tensor, in_float32, in_host_memory, scale_layers, together
from anima_jax.training.optimizers.rates import LearningRates
from anima_jax.training.optimizers.table import Parameter, Row, decay_strength, find

WITHOUT_EFFECT = (
    *("fused", "foreach", "capturable", "differentiable", "triton", "use_triton", "kahan_sum", "compile"),
    *("is_paged", "block_wise", "fsdp_in_use"),
)
"""Other libraries' arguments that choose an implementation, not the numbers (weights are not rounded here)."""

UNAVAILABLE = {
    "amsgrad": "take type = 'amsgrad'",
    "maximize": "losses are made small here",
    "gradient_release": "gradients and updates are one program already; 'adafactor' or 'adamw8bit' save memory",
    "decouple_lr": "weight decay is multiplied by the learning rate",
    "dampening": "leave it at 0",
    "cpu_offload": "take type = 'offload'",
    "relative_step": "the learning rate is lr's, shaped by lr_scheduler",
    "warmup_init": "warmup_steps is the warmup",
}
"""Arguments that are accepted only if they are off, and what to do instead."""

ALWAYS = ("decouple", "weight_decouple")
"""Arguments that are accepted only if they are on: no weight decay but sgd's is part of the gradient."""


def check(config: OptimizerConfig) -> None:
    """Raise UserError if the name is not known, or with every argument that the optimizer does not have."""
    _options(config, *find(config.type))


def build(
    config: OptimizerConfig,
    rates: LearningRates,
    tensors: Sequence[FileTensor],
    *,
    clip_norm: float = 1.0,
    global_batch: int = 1,
    layer_rates: Mapping[str, Sequence[float]] | None = None,
) -> optax.GradientTransformation:
    """Build the optimizer of the parameters in `tensors`.

    It first clips the gradients' global norm to `clip_norm` (0: no clipping). `global_batch` (examples in a step) turns
    `beta2_half_life` into β₂ = 0.5^(global_batch / beta2_half_life). `layer_rates` are factors of the learning rate,
    one for each layer, of the stacked parameters that have their own.
    Raises UserError if the optimizer or one of its arguments is not known or not valid.
    """
    name, row = find(config.type)
    options = _options(config, name, row, global_batch)
    if row.fixed_rate and (rates.schedule != "constant" or rates.warmup_steps):
        raise UserError(f"[optimizer] type = '{name}' takes one learning rate: no lr_scheduler, no warmup_steps")
    first = {tensor.path: tensor for tensor in reversed(tensors)}
    groups = groups_by_path(tensors)
    decay = row.weight_decay if config.weight_decay is None else config.weight_decay
    parameters = {
        path: Parameter(
            rates.by_group[groups[path]] if row.fixed_rate else rates.of(groups[path]),
            decay if is_decayed(tensor) else 0.0,
            tensor,
        )
        for path, tensor in first.items()
    }
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    try:
        main = _shared(rates, name, row, parameters, options) if row.shared else _separate(row, parameters, options)
        steps = [clip, _on_host(main) if row.on_host else main]
        if layer_rates:
            if name.startswith("schedule_free"):
                raise UserError(f"[optimizer] type = '{name}' averages over all of its steps: no [adapter] lr_pattern")
            steps.append(scale_layers(layer_rates))
        optimizer = in_float32(optax.chain(*steps))
        # Some arguments are looked at only in a step: trace one.
        params = _abstract(tensors)
        jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"[optimizer] type = '{name}': {error}") from error
    return optimizer


def _abstract(tensors: Sequence[FileTensor]) -> Params:
    """Shapes of the parameters that `tensors` hold."""
    layers = collections.Counter(tensor.path for tensor in tensors if tensor.layer is not None)
    shapes = {t.path: t.layout.to_model(np.broadcast_to(np.uint8(0), t.shape)).shape for t in tensors}
    return {
        path: jax.ShapeDtypeStruct((layers[path], *shape) if layers[path] else shape, jnp.float32)
        for path, shape in shapes.items()
    }


def averaged(opt_state: Any, params: Params) -> Params | None:
    """Schedule-free's averaged weights, float32, which are to be evaluated and saved; None for all other optimizers."""
    states = opt_state[1]
    if not isinstance(states, dict) or not all(
        isinstance(state, optax.contrib.ScheduleFreeState) for state in states.values()
    ):
        return None
    wide = {path: value.astype(jnp.float32) for path, value in params.items()}
    return {path: optax.contrib.schedule_free_eval_params(states[path], value) for path, value in wide.items()}


def _separate(row: Row, parameters: Mapping[str, Parameter], options: Mapping[str, Any]):
    stacked = {path for path, one in parameters.items() if one.tensor.layer is not None and not row.elementwise}
    return by_tensor({path: row.make(one, **options) for path, one in parameters.items()}, stacked)


def _shared(rates: LearningRates, name: str, row: Row, parameters: Mapping[str, Parameter], options: Mapping[str, Any]):
    """One transformation at the rate of the fastest group; the other groups' updates are smaller in proportion."""
    groups = {path: group_of(one.tensor.name) for path, one in parameters.items()}
    fastest = max(groups.values(), key=rates.by_group.__getitem__)
    rate = rates.of(fastest)
    relative = {path: rates.by_group[group] / rates.by_group[fastest] for path, group in groups.items()}
    decay = {path: one.weight_decay for path, one in parameters.items()}
    return together(row.make(parameters, rate, **options), relative, decay, decay_strength(name, rate, options))


def _on_host(main: optax.GradientTransformation) -> optax.GradientTransformation:
    """`main` with its moments in the host's memory. On a CPU they are there already."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return main
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise UserError(
            f"[optimizer] type = 'offload' needs memory of kind pinned_host, which {device.device_kind} has not "
            f"(it has {', '.join(kinds)}); 'adamw8bit' saves memory everywhere"
        )
    return in_host_memory(main)


def _options(config: OptimizerConfig, name: str, row: Row, global_batch: int = 1) -> dict[str, Any]:
    """The arguments of the row's `make`, under its names and checked. Raises UserError, all faults at once."""
    found, faults = {}, []
    for key, value in config.options.items():
        own = row.renamed.get(key, key)
        if own in row.options:
            found[own] = _checked(key, value, row.options[own], faults)
        elif key in UNAVAILABLE and key not in row.options:
            if value:
                faults.append(f"[optimizer] {key} = {value!r}: not with '{name}'; {UNAVAILABLE[key]}")
        elif key in ALWAYS and name != "sgd":
            if value is not True:
                faults.append(f"[optimizer] {key} = {value!r}: not with '{name}'; weight decay is decoupled here")
        elif key not in WITHOUT_EFFECT:
            near = did_you_mean(
                key, [*row.options, *row.renamed, *(key for key in OptimizerConfig.model_fields if key != "type")]
            )
            arguments = ", ".join(sorted(row.options)) or "none but lr and weight_decay"
            faults.append(f"[optimizer] {key}: not an argument of '{name}'{near}; it takes {arguments}")
    if config.eps is not None:
        if "eps" in row.options:
            found["eps"] = config.eps
        else:
            faults.append(f"[optimizer] eps: not an argument of '{name}'")
    found |= _betas(config, name, row, global_batch, faults)
    if faults:
        raise UserError(*faults)
    return found


def _checked(key: str, value: Any, default: Any, faults: list[str]) -> Any:
    """`value` if it is of the default's kind."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", tuple: "a list"}
    allowed = {float: (int, float), tuple: (list, tuple)}.get(type(default), (type(default),))
    boolean = isinstance(value, bool)
    if default is not None and (not isinstance(value, allowed) or boolean != isinstance(default, bool)):
        faults.append(f"[optimizer] {key} = {value!r}: {kinds[type(default)]} is expected")
    return tuple(value) if isinstance(value, list) else value


def _betas(config: OptimizerConfig, name: str, row: Row, global_batch: int, faults: list[str]) -> dict[str, Any]:
    """torch's `betas` as b1, b2, …, with the second from its half-life if that is given."""
    own = ["betas"] if "betas" in row.options else [key for key in ("b1", "b2", "b3") if key in row.options]
    defaults = row.options["betas"] if own == ["betas"] else tuple(row.options[key] for key in own)
    betas = list(config.betas if config.betas is not None else defaults)
    if config.betas is None and config.beta2_half_life is None:
        return {}
    if not own or len(betas) > len(defaults):
        count = f"takes {len(defaults)}" if own else "takes none"
        faults.append(f"[optimizer] betas (or beta2_half_life): '{name}' {count}")
        return {}
    if config.beta2_half_life is not None:
        if len(betas) < 2:
            faults.append(f"[optimizer] beta2_half_life: '{name}' has no second beta")
            return {}
        betas[1] = 0.5 ** (global_batch / config.beta2_half_life)
    return {"betas": tuple(betas)} if own == ["betas"] else dict(zip(own, betas, strict=False))
