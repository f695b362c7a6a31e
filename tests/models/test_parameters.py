"""Compiler options of CPU programs: what they save, and versions of XLA that do not know them."""

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax import compiler
from anima_jax.compiler import compiler_options
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.layers import linear
from tests.golden_files import relative_error
from tests.models.networks import normal

TINY = DiTConfig(width=128, blocks=3, heads=1, mlp_width=256, context_width=64, adaln_rank=16, adapter=None)


def test_bfloat16_weights_are_never_copied_to_float32_for_all_blocks_at_once():
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(TINY, rngs=rngs))
    params = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in shapes.items()}
    latents, context = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 1, 8, 8, 16), (1, 8, 64)))
    times = jax.ShapeDtypeStruct((1,), jnp.float32)

    def loss(params, *inputs):
        return jnp.sum(parameters.merge(graphdef, params)(*inputs))

    program = jax.jit(jax.grad(loss)).lower(params, latents, times, context)
    by_default, ours = (program.compile(options).as_text() for options in (None, compiler_options()))
    assert any("f32[3,128,256]" in line for line in by_default.splitlines() if " while(" in line)
    assert not any("f32[3,128,256]" in line for line in ours.splitlines() if " while(" in line)


def test_the_gradients_of_a_linear_map_are_those_of_the_product():
    x, kernel, weights = normal(2, 5, 24), normal(24, 40, seed=1), normal(2, 5, 40, seed=2)
    loss = jax.grad(lambda x, kernel: jnp.sum(linear(x, kernel) * weights), (0, 1))
    grad_x, grad_kernel = loss(jnp.asarray(x), jnp.asarray(kernel))
    assert relative_error(grad_x, weights @ kernel.T) < 1e-6
    assert relative_error(grad_kernel, np.einsum("bli,blo->io", x, weights)) < 1e-6


def test_a_version_of_xla_without_the_options_compiles_without_them(monkeypatch):
    monkeypatch.setattr(compiler, "OPTIONS", {"network": ((r"cpu .*", 1, {"xla_cpu_of_another_version": True}),)})
    monkeypatch.setattr(compiler, "_known", compiler._known.__wrapped__)
    assert compiler_options() is None
    assert parameters.jit_network(lambda x: x + 1)(1) == 2
