"""The optimizer of a configuration. Groups, learning rates and weight decay work the same for every optimizer."""

import collections
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.names.groups import groups_by_path, is_decayed
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.parameters import Params
from anima_jax.platform import hardware
from anima_jax.training.optimizers.apply import SeparateOptimizer
from anima_jax.training.optimizers.layers import by_tensor, in_float32, in_host_memory, scale_layers, together
from anima_jax.training.optimizers.prodigy_plus import PlusState, TensorState
from anima_jax.training.optimizers.rates import LearningRates
from anima_jax.training.optimizers.row import Parameter, Row
from anima_jax.training.optimizers.schedule_free import FreeState
from anima_jax.training.optimizers.table import find

IGNORED = (
    *("fused", "foreach", "capturable", "differentiable", "triton", "use_triton", "compile"),
    *("is_paged", "block_wise", "fsdp_in_use", "kahan_buffer_offload", "skip_invalid_grads"),
)
"""Arguments in other libraries that choose an implementation and do not change the results."""

OFF = {
    "amsgrad": "use type = 'amsgrad'",
    "maximize": "losses are minimised here",
    "decouple_lr": "weight decay is multiplied by the learning rate",
    "dampening": "leave it at 0",
    "cpu_offload": "use type = 'offload'",
    "relative_step": "the learning rate is lr, shaped by lr_scheduler",
    "warmup_init": "use warmup_steps",
}
"""Arguments in other libraries that must be off → what to do instead."""

ON = ("decouple", "weight_decouple")
"""Arguments in other libraries that must be on, except with optimizers whose weight decay is part of the gradient."""

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", tuple: "a list"}
"""Type of an argument's default → the expected type in error messages."""


def check(config: OptimizerConfig) -> None:
    """Raise UserError if the optimizer is not known or has invalid arguments; the error names them all."""
    _options(config, find(config.type))


def on_host(config: OptimizerConfig) -> bool:
    """Return whether the optimizer keeps its moments in host memory."""
    row = find(config.type)
    return row.on_host or (row.offloads and bool(config.options.get("cpu_offload")))


def build(
    config: OptimizerConfig,
    rates: LearningRates,
    tensors: Sequence[FileTensor],
    *,
    clip_norm: float = 1.0,
    global_batch: int = 1,
    layer_rates: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Build the optimizer of the parameters in `tensors`.

    It first clips the global norm of the gradients to `clip_norm` (0: no clipping). `global_batch` (examples per step)
    turns `beta2_half_life` into β₂ = 0.5^(global_batch / beta2_half_life). `layer_rates` maps the paths of stacked
    parameters to factors of the learning rate, one per layer. Random numbers of the update follow from `seed`.
    Raises UserError if the optimizer or one of its arguments is unknown or invalid.
    """
    row = find(config.type)
    options = _options(config, row, global_batch)
    if row.fixed_rate and (rates.schedule != "constant" or rates.warmup_steps):
        raise UserError(
            f"[optimizer] type = '{row.name}' needs a constant learning rate: no lr_scheduler or warmup_steps"
        )
    if layer_rates and row.averages_weights:
        raise UserError(f"[optimizer] type = '{row.name}' averages over all of its steps: no [adapter] lr_pattern")
    parameters = _parameters(tensors, row, rates, config, seed)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity()
    try:
        transforms = {} if row.shared else {path: row.make(one, **options) for path, one in parameters.items()}
        main = _shared(row, rates, parameters, options) if row.shared else _separate(row, parameters, transforms)
        main = _on_host(main) if on_host(config) else main
        steps = [clip, main, *([scale_layers(layer_rates)] if layer_rates else [])]
        optimizer = in_float32(optax.chain(*steps))
        if not row.shared:
            stacked = {path for path, one in parameters.items() if one.tensor.layer is not None}
            own_rates = layer_rates or {}
            optimizer = SeparateOptimizer.of(optimizer, transforms, stacked, clip_norm, own_rates, row.elementwise)
        # Trace one step, because optax checks some arguments only then.
        params = _abstract(tensors)
        jax.eval_shape(optimizer.update, params, jax.eval_shape(optimizer.init, params), params)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"[optimizer] type = '{row.name}': {error}") from error
    return optimizer


def averaged(opt_state: Any, params: Params) -> Params | None:
    """Return the averaged weights of a schedule-free optimizer in float32; None for all other optimizers."""
    states = opt_state[1].own if isinstance(opt_state[1], PlusState) else opt_state[1]
    if not isinstance(states, dict) or not all(isinstance(state, FreeState | TensorState) for state in states.values()):
        return None
    return {path: states[path].average(value) for path, value in params.items()}


def _separate(
    row: Row, parameters: Mapping[str, Parameter], transforms: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Return an optimizer with one transformation per parameter, at the rate of its group."""
    stacked = {path for path, one in parameters.items() if one.tensor.layer is not None and not row.elementwise}
    return by_tensor(transforms, stacked)


def _shared(
    row: Row, rates: LearningRates, parameters: Mapping[str, Parameter], options: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Return one transformation at the highest rate of a group; updates of other groups are scaled down to theirs."""
    groups = {path: one.group for path, one in parameters.items()}
    if row.own_rates:
        return row.make(parameters, None, **options)
    fastest = max(groups.values(), key=rates.by_group.__getitem__)
    rate = rates.of(fastest)
    relative = {path: rates.by_group[group] / rates.by_group[fastest] for path, group in groups.items()}
    main = row.make(parameters, rate, **options)
    if row.decay_factor is None:
        return together(main, relative)
    own_decay, factor = {path: one.weight_decay for path, one in parameters.items()}, row.decay_factor
    return together(main, relative, own_decay, lambda state: factor(state, rate, options))


def _parameters(
    tensors: Sequence[FileTensor], row: Row, rates: LearningRates, config: OptimizerConfig, seed: int
) -> dict[str, Parameter]:
    """Return what an optimizer knows of each parameter, by path."""
    decay = row.weight_decay if config.weight_decay is None else config.weight_decay
    groups = groups_by_path(tensors)
    first = {tensor.path: tensor for tensor in reversed(tensors)}
    rate_of = rates.by_group.__getitem__ if row.fixed_rate else rates.of
    return {
        path: Parameter(
            rate_of(groups[path]),
            decay if is_decayed(tensor) else 0.0,
            tensor,
            config.lr,
            groups[path],
            _seed(seed, path),
        )
        for path, tensor in first.items()
    }


def _seed(seed: int, path: str) -> int:
    """Return the seed of a parameter's random numbers."""
    return zlib.crc32(f"{seed} {path}".encode())


def _abstract(tensors: Sequence[FileTensor]) -> Params:
    """Return the shapes of the parameters in `tensors`."""
    layers = collections.Counter(tensor.path for tensor in tensors if tensor.layer is not None)
    shapes = {t.path: t.layout.to_model(np.broadcast_to(np.uint8(0), t.shape)).shape for t in tensors}
    return {
        path: jax.ShapeDtypeStruct((layers[path], *shape) if layers[path] else shape, jnp.float32)
        for path, shape in shapes.items()
    }


def _on_host(main: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `main` with its moments in host memory, or on a CPU `main` itself.

    Raises UserError if the device has no memory of kind pinned_host.
    """
    target = hardware()
    if target.platform == "cpu":
        return main
    if not target.host_memory:
        raise UserError(
            f"[optimizer] type = 'offload' needs memory of kind pinned_host, which {target.kind} does not have; "
            "'adamw8bit' saves memory on every device"
        )
    return in_host_memory(main)


# arguments --------------------------------------------------------------------------------------------------------


def _options(config: OptimizerConfig, row: Row, global_batch: int = 1) -> dict[str, Any]:
    """Return all arguments of the row's `make`, configured or default. Raises UserError that lists every error."""
    errors = [error for key, value in config.options.items() if (error := _error(row, key, value))]
    given = {row.aliases.get(key, key): value for key, value in config.options.items()}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    if row.undecayed and config.weight_decay:
        errors.append(f"weight_decay: not an argument of '{row.name}'")
    if config.eps is not None:
        given["eps"] = config.eps
        if "eps" not in row.options:
            errors.append(f"eps: not an argument of '{row.name}'")
        elif isinstance(config.eps, tuple) and not isinstance(row.options["eps"], tuple):
            errors.append(f"eps = {list(config.eps)!r}: '{row.name}' has one")
    if config.betas is not None or config.beta2_half_life is not None:
        given |= _betas(config, row, global_batch, errors)
    if errors:
        raise UserError(*(f"[optimizer] {error}" for error in errors))
    return {key: given.get(key, default) for key, default in row.options.items()}


def _error(row: Row, key: str, value: Any) -> str | None:
    """Return why the optimizer cannot have this argument; None if it can, or if the argument has no effect."""
    own = row.aliases.get(key, key)
    if own in row.options:
        return _type_error(key, value, row.options[own], row.choices.get(own))
    if key == "cpu_offload" and row.offloads:
        return _type_error(key, value, False)
    if key in OFF:
        return f"{key} = {value!r}: not available with '{row.name}'; {OFF[key]}" if value else None
    if key in ON and not row.decay_in_gradient:
        return None if value is True else f"{key} = {value!r}: weight decay is always decoupled with '{row.name}'"
    if key in IGNORED:
        return None
    near = did_you_mean(key, [*row.options, *row.aliases, *(set(OptimizerConfig.model_fields) - {"type"})])
    arguments = ", ".join(sorted(row.options)) or "none but lr and weight_decay"
    return f"{key}: not an argument of '{row.name}'{near}; expected one of {arguments}"


def _type_error(key: str, value: Any, default: Any, choices: Sequence[str] | None = None) -> str | None:
    """Return an error if `value` has the wrong type, else None. A whole number is accepted as a number."""
    if choices and value not in choices:
        expected = " or ".join(map(repr, choices))
        return f"{key} = {value!r}: expected {expected}{did_you_mean(str(value), choices)}"
    allowed = {float: (int, float), tuple: (list, tuple)}.get(type(default), (type(default),))
    fits = isinstance(value, allowed) and isinstance(value, bool) == isinstance(default, bool)
    return None if default is None or fits else f"{key} = {value!r}: expected {TYPES[type(default)]}"


def _betas(config: OptimizerConfig, row: Row, global_batch: int, errors: list[str]) -> dict[str, Any]:
    """Return torch's `betas` under the row's argument names; `beta2_half_life`, if given, sets the second."""
    betas = list(row.betas if config.betas is None else config.betas)
    if not row.betas or len(betas) > len(row.betas):
        errors.append(f"betas (or beta2_half_life): '{row.name}' has {len(row.betas) or 'none'}")
        return {}
    if "betas" in row.options and len(betas) != len(row.betas):
        errors.append(f"betas = {betas!r}: '{row.name}' has {len(row.betas)}, by default {list(row.betas)!r}")
        return {}
    if 1.0 in (betas[:1] if row.sums else betas):
        errors.append(f"betas = {betas!r}: expected numbers below 1")
        return {}
    if config.beta2_half_life is not None:
        if len(betas) < 2:
            errors.append(f"beta2_half_life: '{row.name}' has no second beta")
            return {}
        betas[1] = 0.5 ** (global_batch / config.beta2_half_life)
    return {"betas": tuple(betas)} if "betas" in row.options else dict(zip(row.beta_names, betas, strict=False))
