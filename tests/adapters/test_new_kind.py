"""A kind of adapter is one row of the table: MoSLoRA, added in a process of its own, against its formula in NumPy.

The row is in new_kind.py. In this process the package does not know the kind.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.adapters.new_kind import ALPHA, BLOCK_RANKS, STACK_RANKS, TOKENS
from tests.golden_files import VALUE_TOLERANCE, relative_error
from tests.small_run import CONFIG

MODULE = "blocks.mlp.layer1"
IN, OUT, RANK = CONFIG.width, CONFIG.mlp_width, max(BLOCK_RANKS)


class Found(NamedTuple):
    """What the process wrote: named arrays, results, and the keys and values of the adapter's file."""

    arrays: dict[str, np.ndarray]
    results: dict[str, Any]
    file: dict[str, np.ndarray]

    def of(self, what: str) -> dict[str, np.ndarray]:
        """The parameters of one kind of result, by path."""
        return {name.partition("/")[2]: value for name, value in self.arrays.items() if name.startswith(f"{what}/")}

    def factor(self, what: str, name: str) -> np.ndarray:
        return self.arrays[f"{what}/{MODULE}.{name}"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    folder = tmp_path_factory.mktemp("new_kind")
    command = [sys.executable, "-m", "tests.adapters.new_kind", str(folder)]
    subprocess.run(command, check=True, cwd=pathlib.Path(__file__).parents[2])
    with np.load(folder / "arrays.npz") as arrays:
        return Found(
            dict(arrays),
            json.loads((folder / "results.json").read_text()),
            load_file(folder / "export" / "adapter_model.safetensors"),
        )


def test_the_configuration_accepts_the_new_type(found):
    assert found.results["kinds"] == ["moslora"]


def test_the_trained_parameters_are_the_factors_of_the_row(found):
    assert {path: value.shape for path, value in found.of("fresh").items()} == {
        f"{MODULE}.lora_a": (2, IN, RANK),
        f"{MODULE}.lora_mixer": (2, RANK, RANK),
        f"{MODULE}.lora_b": (2, RANK, OUT),
    }


def test_a_fresh_b_is_zero_so_that_nothing_changes_yet(found):
    assert not np.any(found.factor("fresh", "lora_b"))


@pytest.mark.parametrize("block", [0, 1])
def test_fresh_a_and_mixer_are_uniform_within_kaimings_bound(found, block):
    rank = BLOCK_RANKS[block]
    for name, size, fan_in in (("lora_a", IN, IN), ("lora_mixer", rank, rank)):
        values = found.factor("fresh", name)[block][:size, :rank]
        assert 0.5 / np.sqrt(fan_in) < np.abs(values).max() <= 1 / np.sqrt(fan_in), name


def test_a_fresh_mixer_is_zero_beyond_its_layers_rank_on_both_axes(found):
    mixer, rank = found.factor("fresh", "lora_mixer")[0], BLOCK_RANKS[0]
    assert not np.any(mixer[rank:])
    assert not np.any(mixer[:, rank:])


@pytest.mark.parametrize("layer", range(len(STACK_RANKS)))
def test_a_layer_adds_s_b_m_a_x(found, layer):
    stack = found.of("stack")
    w, bias, a, m, b = (
        stack[f"blocks.one.{name}"][layer].astype(np.float64)
        for name in ("kernel", "bias", "lora_a", "lora_mixer", "lora_b")
    )
    scale = ALPHA / STACK_RANKS[layer] if STACK_RANKS[layer] else 0.0
    expected = stack["x"] @ w + bias + scale * stack["x"] @ a @ m @ b
    assert relative_error(stack["y"][layer], expected) < VALUE_TOLERANCE


@pytest.mark.parametrize("block", [0, 1])
def test_merging_adds_s_b_m_a_to_the_weight(found, block):
    a, m, b = (found.factor("trained", name)[block].astype(np.float64) for name in ("lora_a", "lora_mixer", "lora_b"))
    expected = found.factor("base", "kernel")[block] + ALPHA / BLOCK_RANKS[block] * a @ m @ b
    assert relative_error(found.factor("merged", "kernel")[block], expected) < VALUE_TOLERANCE


def test_merging_changes_no_other_weight(found):
    assert [*found.of("merged")] == [f"{MODULE}.kernel"]


def test_a_file_has_the_transposed_factors_of_each_block_and_alpha(found):
    expected = {}
    for block, rank in enumerate(BLOCK_RANKS):
        module = f"diffusion_model.blocks.{block}.mlp.layer1"
        a, m, b = (found.factor("trained", name)[block].T for name in ("lora_a", "lora_mixer", "lora_b"))
        expected |= {f"{module}.lora_A.weight": a[:rank], f"{module}.lora_B.weight": b[:, :rank]}
        expected |= {f"{module}.lora_mixer.weight": m[:rank, :rank], f"{module}.alpha": np.float32(ALPHA)}
    assert found.file.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found.file[key], value, err_msg=key)


def test_a_run_that_starts_from_the_file_has_the_same_values(found):
    assert found.of("read back").keys() == found.of("trained").keys()
    for path, value in found.of("trained").items():
        np.testing.assert_array_equal(found.arrays[f"read back/{path}"], value, err_msg=path)


def test_every_parameter_matches_exactly_one_sharding_rule(found):
    matches = found.results["matching rules"]
    assert f"{MODULE}.lora_mixer" in matches
    assert {path: count for path, count in matches.items() if count != 1} == {}


def test_flops_count_the_three_products_of_each_block(found):
    without, with_adapter = found.results["flops"]
    products = IN * RANK + RANK * RANK + RANK * OUT
    assert with_adapter - without == 2 * TOKENS * CONFIG.blocks * products
