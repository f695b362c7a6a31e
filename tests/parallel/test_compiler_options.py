"""Compiler options of programs on several devices: the user's own flags win, and unknown options are left out."""

import os
import re
from unittest import mock

import jax
import jax.numpy as jnp

from anima_jax import compiler
from anima_jax.parallel.mesh import make_mesh, replicated
from tests.parallel.meshes import MESHES

# A CPU's compiler takes the first two. Of the others it refuses a name and a value.
KNOWN = {"xla_cpu_enable_fast_min_max": True, "xla_cpu_enable_fast_math": False}
REFUSED = {"xla_no_such_option": True, "xla_cpu_fast_math_honor_nans": "perhaps"}


def options_on(sizes, flags="", kind="cpu .*"):
    """Return the options of a mesh if those of `kind` are the ones above, and that a program compiles with them."""
    compiler._known.cache_clear()
    table = ((r"gpu .*", 1, {"xla_other": 1}), (kind, 2, KNOWN | REFUSED))
    with mock.patch.multiple(compiler, OPTIONS={"network": table}), mock.patch.dict(os.environ, XLA_FLAGS=flags):
        mesh = make_mesh(sizes, jax.devices()[: 1 if set(sizes.values()) == {1} else 8])
        options = compiler.compiler_options(mesh)
        jax.jit(jnp.sum, out_shardings=replicated(mesh), compiler_options=options)(jnp.ones(8))
        return options


def test_options_that_the_compiler_refuses_are_left_out(on_eight):
    assert on_eight(options_on, MESHES[0]) == KNOWN


def test_the_users_own_flags_win_one_by_one(on_eight):
    flags = "--xla_cpu_enable_fast_math=true --xla_cpu_enable_fast_min_max_of_another_kind"
    assert on_eight(options_on, MESHES[0], flags) == {"xla_cpu_enable_fast_min_max": True}


def test_one_device_and_hardware_without_a_row_have_no_options(on_eight):
    assert on_eight(options_on, dict.fromkeys(MESHES[0], 1)) is None
    assert on_eight(options_on, MESHES[0], "", "tpu .*") is None


def test_a_pod_of_any_kind_has_options():
    kinds = ("tpu TPU v4", "tpu TPU v5 lite", "tpu TPU v5", "tpu TPU v6 lite", "gpu NVIDIA H100 80GB HBM3")
    for kind in kinds:
        assert any(
            re.fullmatch(pattern, kind) and options
            for pattern, least, options in compiler.OPTIONS["network"]
            if least <= 8
        )
