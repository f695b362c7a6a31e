"""The table of kinds agrees with the networks' layers, with files and with the arithmetic on the host."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.adapters.dialects import COMFYUI, LAYOUTS
from anima_jax.adapters.kinds import FACTORS, KINDS, TRAINABLE, Operations, adapter_kind, kind_of, split_key
from anima_jax.adapters.patch import Part, Patch
from anima_jax.models import parameters
from tests.golden_files import relative_error
from tests.models.networks import normal
from tests.parallel.specs import NETWORKS

ON_HOST = Operations(np.matmul, lambda h: h, lambda h, _: h, lambda function: function)
"""The operations of a layer with s = 1 and without dropout, in NumPy."""

SIZES = [(4, 24, 36, -1), (30, 24, 36, -1), (2, 36, 24, 4)]
"""(rank, in, out, decompose_factor): factors of LoKr that are products, matrices, and of a chosen size."""


def random_factors(kind: str, sizes: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    return {name: normal(*shape, seed=n) for n, (name, shape) in enumerate(KINDS[kind].shapes(*sizes).items())}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [kind for kind in TRAINABLE if not KINDS[kind].magnitude])
def test_the_forward_of_a_layer_multiplies_by_the_update_of_a_file(kind, sizes):
    factors = random_factors(kind, sizes)
    patch = Patch({FACTORS[name].part: Part.of(LAYOUTS[name].to_file(array)) for name, array in factors.items()})
    assert patch.error((sizes[2], sizes[1])) is None
    found = KINDS[kind].forward(ON_HOST, np.eye(sizes[1], dtype=np.float32), factors)
    assert relative_error(found.T, patch.update()) < 1e-5


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_factor_of_a_layer_has_the_axes_that_the_table_says(kind, sizes):
    rank, features_in, features_out, _ = sizes
    known = {"in": features_in, "out": features_out, "rank": rank}
    for name, shape in KINDS[kind].shapes(*sizes).items():
        for axis, size in zip(FACTORS[name].axes, shape, strict=True):
            assert known.get(axis, size) == size, (name, axis)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_known_by_the_parts_of_its_files(kind):
    products = [{factor.part for factor in factors} or {matrix.part} for factors, matrix, *_ in KINDS[kind].products]
    others = [*KINDS[kind].on_weight.factors] if KINDS[kind].on_weight else [KINDS[kind].magnitude]
    parts = set().union(*products, {factor.part for factor in others if factor})
    dims = {factor.part: factor.dims for factor in others if factor}
    assert kind_of(parts, dims) is KINDS[kind]
    assert kind_of({*parts, "alpha", "diff_b"}, dims) is KINDS[kind]
    keys = [f"diffusion_model.blocks.0.mlp.layer1{COMFYUI.parts[part]}" for part in parts]
    assert {split_key(key)[1] for key in keys} == parts
    assert adapter_kind(keys) is KINDS["oft" if kind == "boft" else kind]  # their keys are the same


def test_a_scale_for_each_output_makes_a_dora_of_a_lora_only():
    assert kind_of(["hada_w1_a", "dora_scale"]).name == "loha"
    assert kind_of(["lokr_w1", "dora_scale"]).name == "lokr"
    assert kind_of(["dora_scale", "alpha"]) is None


@pytest.mark.parametrize("network", NETWORKS)
def test_matrices_are_cast_to_the_compute_dtype_and_vectors_stay_float32(network):
    shapes = parameters.abstract(NETWORKS[network])[1]
    cast = jax.eval_shape(functools.partial(parameters.cast_to_compute, dtype=jnp.bfloat16), shapes)
    matrices = {name for name, factor in FACTORS.items() if len(factor.axes) == 2} | {"kernel", "embedding"}
    for path, leaf in cast.items():
        assert (leaf.dtype == jnp.bfloat16) == (path.rpartition(".")[2] in matrices), path


def test_the_table_needs_no_jax():
    code = "import sys, anima_jax.adapters.kinds; print({'jax', 'flax'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
