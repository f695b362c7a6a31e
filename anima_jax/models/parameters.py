"""A model's parameters as a flat dictionary: `{"blocks.self_attn.q_proj.kernel": array}`.

This is the one form that checkpoints, optimizers, EMA and sharding rules see. The module itself holds nothing else:
`split` takes a model apart at a jit boundary, `merge` puts it together inside.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]
"""Parameter path → array (or anything that stands for one: a shape, a gradient, a moment, a sharding)."""

MATRICES = (
    ".kernel",
    ".embedding",
    *(".lora_a", ".lora_b"),
    *(".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
)
"""How the paths of parameters end that take part in matrix products."""


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static structure and the parameters of `model`."""
    graphdef, state = nnx.split(model)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef, params: Params) -> Any:
    """The model with these parameters: the inverse of `split`. `params` may hold arrays or tracers."""
    flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, Params]:
    """`split(build(rngs))` with `jax.ShapeDtypeStruct`s for parameters: nothing is computed or allocated."""
    return split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def initial(
    build: Callable[[nnx.Rngs], nnx.Module], seed: int, shardings: Params | None = None
) -> tuple[nnx.GraphDef, Params]:
    """`split(build(rngs))` of a fresh model, drawn from `seed` in one compiled program, where `shardings` say."""
    return abstract(build)[0], quick_jit(lambda: split(build(nnx.Rngs(seed)))[1], shardings)()


def quick_jit(function: Callable[..., Any], shardings: Any = None) -> Callable[..., Any]:
    """`function` as a program that runs once, for whose sake the compiler makes little effort.

    `shardings` say where its results lie.
    """
    # On a CPU its full effort would take longer than what is run.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quick if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, out_shardings=shardings)


def cast_to_compute(params: Params, dtype: Any) -> Params:
    """Matrices in the compute dtype; norm scales and biases as they are."""
    return {path: value.astype(dtype) if path.endswith(MATRICES) else value for path, value in params.items()}


def count(params: Params) -> int:
    """Number of scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
