"""Every kind of adapter that ComfyUI reads changes weights as ComfyUI's `load_lora` and `calculate_weight` do."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest

from anima_jax.adapters.merge import changes, match_adapters, merged
from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.safetensors import SafetensorsFile
from tests.golden_files import GOLDEN, relative_error

STRENGTHS = (1.0, 0.7, -0.5)

TOLERANCE = 1e-6
"""Both compute in float32, with products in another order."""


@functools.cache
def golden() -> tuple[dict[str, np.ndarray], dict[str, list]]:
    """The arrays by their names in the file, and the adapters and strengths of each stack."""
    with SafetensorsFile(GOLDEN / "adapter_kinds.safetensors") as file:
        return {key: np.array(file.read(key)) for key in file.tensors}, json.loads(file.metadata["stacks"])


def of(*what: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with these parts, by the rest of their names."""
    prefix = "|".join(what) + "|"
    return {key.removeprefix(prefix): array for key, array in golden()[0].items() if key.startswith(prefix)}


CASES = list(dict.fromkeys(key.split("|")[1] for key in golden()[0] if key.startswith("adapter|")))


def written(folder, case: str):
    tensors, path = of("adapter", case), folder / f"{case}.safetensors"
    infos = [safetensors.TensorInfo(key, array.dtype, array.shape) for key, array in tensors.items()]
    safetensors.write(path, infos, tensors.__getitem__, {})
    return path


def merge(folder, cases, strengths) -> dict[str, np.ndarray]:
    """The changed weights, as `convert merge` computes them, with ComfyUI's DoRA."""
    weights = of("weight")
    files = [SafetensorsFile(written(folder, case)) for case in cases]
    adapters = match_adapters(files, {name: array.shape for name, array in weights.items()}, extend=True)
    found = changes(adapters, strengths)
    return {name: merged(name, weights[name], patches, comfyui_dora=True) for name, patches in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_changes_weights_as_in_comfyui(tmp_path, case):
    expected = of("merged", case)
    assert merge(tmp_path, [case], [0.0]) == {}  # ComfyUI's LoraLoader does not apply it, not even a `set_weight`
    for number, strength in enumerate(STRENGTHS):
        found = merge(tmp_path, [case], [strength])
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.shape == expected[name][number].shape
            assert relative_error(array, expected[name][number]) < TOLERANCE, (name, strength)


@pytest.mark.parametrize("stack", golden()[1])
def test_several_adapters_are_applied_one_after_the_other(tmp_path, stack):
    found, expected = merge(tmp_path, *zip(*golden()[1][stack], strict=True)), of("stack", stack)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert relative_error(array, expected[name]) < TOLERANCE, name


def test_the_golden_adapters_have_the_dtypes_of_their_names():
    dtypes = {case: next(iter(of("adapter", case).values())).dtype for case in CASES}
    assert dtypes["lora of float8"] == ml_dtypes.float8_e4m3fn
    assert dtypes["lora of int8"] == np.int8
