"""A model's parameters as a flat dictionary: `{"blocks.self_attn.q_proj.kernel": array}`.

Checkpoints, optimizers, EMA and sharding rules all use this form. Modules have no other state: `split` separates a
model's structure from its parameters before a jit boundary, and `merge` combines them again inside.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.core import Tracer

from anima_jax.compiler import compiler_options
from anima_jax.platform import platform

Params = dict[str, Any]
"""Parameter path → array, or what takes its place: a shape, gradient, moment or sharding."""

VECTORS = ("scale", "bias", "magnitude")
"""Path endings of the parameters that are added or multiplied elementwise; all others are matrices."""


def split(model: nnx.Module) -> tuple[nnx.GraphDef[Any], Params]:
    """Return the static structure and the parameters of `model`."""
    graphdef, state = nnx.split(model)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef[Any], params: Params) -> Any:
    """Return the model with these parameters, which may be arrays or tracers: the inverse of `split`."""
    flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef[Any], Params]:
    """Return `split(build(rngs))` with a `jax.ShapeDtypeStruct` per parameter; nothing is computed or allocated."""
    return split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def initial(
    build: Callable[[nnx.Rngs], nnx.Module], seed: int, shardings: Params | None = None
) -> tuple[nnx.GraphDef[Any], Params]:
    """Return `split(build(rngs))` of a model initialised from `seed` by one compiled program, with `shardings`."""
    return abstract(build)[0], quick_jit(lambda: split(build(nnx.Rngs(seed)))[1], shardings)()


def jit_network(function: Callable[..., Any], program: str = "network", **options: Any) -> Callable[..., Any]:
    """`jax.jit` with the `compiler_options` of a program, for module level: the first call asks for the hardware."""

    @functools.cache
    def jitted(platform: str) -> Callable[..., Any]:
        del platform  # a key of the cache
        return jax.jit(function, compiler_options=compiler_options(program=program), **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return jitted(platform())(*args, **kwargs)

    return call


def quick_jit(function: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """Jit a `function` that runs only once; on CPUs, compile it with little optimisation.

    `shardings` are those of its results.
    """
    # On a CPU full optimisation takes longer than running the program.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if platform() == "cpu" else None
    return jax.jit(function, compiler_options=options, out_shardings=shardings)


def cast_to_compute(params: Params, dtype: Any) -> Params:
    """Return `params` with matrices cast to the compute dtype; scales, biases and magnitudes are unchanged."""
    return {path: value if path.endswith(VECTORS) else value.astype(dtype) for path, value in params.items()}


def count(params: Params) -> int:
    """Return the number of scalars in `params`; quantised weights count as their dequantised values."""
    return sum(value.size for value in params.values())


def describe(model: nnx.Module) -> str:
    """Return the number of parameters, the dtypes and the devices, for `repr`. `model` may be abstract or traced."""
    params = split(model)[1]
    dtypes = sorted({str(value.dtype) for value in params.values()})
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, Tracer) for leaf in arrays):
        where = "traced"
    elif arrays:
        devices = sorted({device for leaf in arrays for device in leaf.devices()}, key=lambda device: device.id)
        where = f"on {devices[0]}" if len(devices) == 1 else f"on {len(devices)} devices, {devices[0]} to {devices[-1]}"
    else:
        where = "abstract"
    return f"{count(params):,} parameters, {' and '.join(dtypes)}, {where}"
