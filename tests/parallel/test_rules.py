"""The table of sharding rules: complete, without overlaps, and as last reviewed."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.quantised import quantise
from anima_jax.parallel import rules
from anima_jax.training import optimizers
from tests.parallel import specs
from tests.parallel.meshes import MESHES


def test_the_table_for_review_is_up_to_date():
    text = (pathlib.Path(__file__).parent / "specs.txt").read_text("utf-8")
    assert text == specs.table(), "stale: run python -m tests.parallel.specs > tests/parallel/specs.txt"


@pytest.mark.parametrize("network", specs.NETWORKS)
def test_every_parameter_matches_one_rule_and_no_layer_axis_is_sharded(network):
    for path, leaf in parameters.abstract(specs.NETWORKS[network])[1].items():
        assert sum(bool(re.fullmatch(pattern, path)) for pattern, _ in rules.RULES) == 1, path
        if re.match(r"(llm_adapter\.)?(blocks|layers)\.", path):
            spec = rules.partition_spec(path, leaf.shape, {"fsdp": 2, "tensor": 2})
            assert not spec or spec[0] is None, path


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match=r"blocks\.new_thing\.kernel matches 0 sharding rules"):
        rules.partition_spec("blocks.new_thing.kernel", (2, 4, 4), MESHES[0])


def test_a_dimension_that_an_axis_does_not_divide_is_replicated():
    sizes = {"fsdp": 8, "tensor": 3}
    assert rules.partition_spec("blocks.mlp.layer1.kernel", (2, 64, 96), sizes) == P(None, "fsdp", "tensor")
    assert rules.partition_spec("blocks.mlp.layer1.kernel", (2, 60, 96), sizes) == P(None, None, "tensor")
    assert rules.partition_spec("blocks.mlp.layer1.kernel", (2, 64, 95), sizes) == P(None, "fsdp", None)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "muon", "adafactor", "prodigy", "schedule_free_adamw"])
def test_optimizer_states_are_sharded_like_their_parameters(kind):
    config = DiTConfig(64, 2, 8, 128, 32, 16, adapter=None)
    params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
    rates = dict.fromkeys((group for group, _ in optimizers.GROUPS), 1e-3)
    rates = optimizers.LearningRates(rates)
    build = optimizers.build(OptimizerConfig(type=kind, lr=1e-3), rates, file_tensors(dit.RULES, params))
    state = jax.eval_shape(build.init, params)
    sizes = {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}
    found = jax.tree.leaves_with_path(
        rules.partition_specs(state, params, sizes), is_leaf=lambda leaf: isinstance(leaf, P)
    )
    leaves = dict(jax.tree.leaves_with_path(state))
    kept = 0
    for keys, spec in found:
        path = next((key.key for key in keys if getattr(key, "key", None) in params), None)
        if path and leaves[keys].shape == params[path].shape:
            assert spec == rules.partition_spec(path, params[path].shape, sizes)
            kept += 1
        elif path is None or leaves[keys].ndim != params[path].ndim:
            assert spec == P()
    assert kept >= (0 if kind == "adafactor" else len(params)) - 10


def test_quantised_weights_are_sharded_like_the_weights():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 128, 64)), jnp.float32)
    path, sizes = "blocks.mlp.layer1.kernel", {"fsdp": 4, "tensor": 2}
    for storage, scales in (("int8", P(None, None, "tensor")), ("nf4", P(None, None, "tensor"))):
        stored = {path: quantise(kernel, storage)}
        found = rules.partition_specs(stored, {path: kernel}, sizes)[path]
        assert found.codes == P(None, "fsdp", "tensor")
        assert found.scales == scales  # one row, or two blocks of 64: four devices do not divide them
