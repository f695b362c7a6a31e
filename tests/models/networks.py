"""Random networks for tests, ours and the peers', and compiled calls of ours."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from anima_jax.models import parameters
from anima_jax.models.parameters import Params

# Without it most of these tests' time is LLVM's; the smallest effort is enough for networks this small.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


@quick_jit
def velocity(model, latents_btyxc, times_b, context_bnd):
    return model(latents_btyxc, times_b, context_bnd)


@quick_jit
def adapter_context(model, source_bnd, target_ids_bm, source_mask_bn=None, target_mask_bm=None):
    return model.llm_adapter(source_bnd, target_ids_bm, source_mask_bn, target_mask_bm)


@functools.cache
def random_model(module: Callable[..., nnx.Module], config: Any, seed: int = 0) -> Any:
    """A network in which every parameter counts: what a fresh one has as zeros or ones is random too."""
    graphdef, shapes = parameters.abstract(lambda rngs: module(config, rngs=rngs))
    return parameters.merge(graphdef, random_params(shapes, seed))


def random_params(shapes: Params, seed: int = 0) -> Params:
    """Values for parameters of these shapes, such that activations stay of order one."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, leaf in shapes.items():
        values = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith(".kernel"):
            values /= math.sqrt(leaf.shape[-2])
        elif path.endswith((".scale", ".bias")):
            values = 0.1 * values + path.endswith(".scale")
        params[path] = jnp.asarray(values)
    return params


def randomise(peer, seed: int = 0):
    """The torch module `peer`, every parameter drawn as `random_params` draws ours, for inference."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                values = 0.1 * values + (not name.endswith("bias"))
            elif "embed" not in name.split(".")[-2]:
                values /= math.sqrt(parameter.shape[-1])
            parameter.copy_(values)
    return peer.requires_grad_(False).eval()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal values, float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
