"""Noise of a sampler's steps. Oracles: torchsde's Brownian trees (golden) and ComfyUI's choice of streams."""

import numpy as np
import pytest

from anima_jax.diffusion.brownian_tree import BrownianTree
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.samplers.plan import Draw
from anima_jax.diffusion.step_noise import NoiseKind, StepNoise, initial_noise
from anima_jax.diffusion.torch_random import CUDA_DEVICES, CPUStream, CUDADevice, CUDAStream
from anima_jax.errors import UserError
from tests.golden_files import golden

# Recorded with torchsde 0.2.6: seed, ends of the tree, and the levels between which the noise is taken.
TREES = golden("brownian_tree")
SHAPE = (2, 16, 1, 2, 2)
LEVELS = np.array([1.0, 0.75, 0.5, 0.25, 0.0], np.float32)


@pytest.mark.parametrize("key", TREES)
def test_a_brownian_path_equals_torchsdes(key):
    seed, *places = key.split("|")
    start, end, sigma, next_sigma = (float(np.float32(place)) for place in places)
    tree = BrownianTree(int(seed), start, end, (2, 3, 4), CPUStream)
    # Divided by the square root of the interval, torch's float32 rounding is up to 5e-6.
    np.testing.assert_allclose(tree(sigma, next_sigma), TREES[key], atol=1e-5)


def test_a_brownian_path_does_not_depend_on_the_order_of_evaluation():
    places = [0.9, 0.1, 0.5, 0.50001, 0.3]
    tree = BrownianTree(5, 0.05, 1.0, (4,), CPUStream)
    for place in places:
        alone = BrownianTree(5, 0.05, 1.0, (4,), CPUStream)(1.0, place)
        np.testing.assert_allclose(tree(1.0, place), alone, rtol=1e-6)
    parts = [tree(a, b) * np.sqrt(a - b) for a, b in ((1.0, 0.7), (0.7, 0.3))]
    np.testing.assert_allclose(sum(parts), tree(1.0, 0.3) * np.sqrt(0.7), rtol=1e-5)


def test_a_brownian_path_stays_between_equal_levels_and_runs_in_both_directions():
    tree = BrownianTree(5, 0.05, 1.0, (4,), CPUStream)
    np.testing.assert_array_equal(tree(0.5, 0.5), np.zeros(4))
    np.testing.assert_array_equal(tree(0.5, 0.7), -tree(0.7, 0.5))


def noises(kind, seed, sampler, count=2):
    stream = StepNoise(NoiseKind.parse(kind), seed, SHAPE, SAMPLERS[sampler], LEVELS)
    return [stream.next(Draw(float(LEVELS[i]), float(LEVELS[i + 1]))) for i in range(count)]


def test_steps_use_the_next_seeds_stream_on_a_cpu_and_the_seeds_own_on_a_gpu():
    stream = CPUStream(8)
    for noise in noises("torch-cpu", 7, "euler_ancestral"):
        np.testing.assert_array_equal(noise, stream.randn(SHAPE))
    stream = CUDAStream(7, CUDA_DEVICES["rtx3060"])
    for noise in noises("torch-cuda:rtx3060", 7, "euler_ancestral"):
        np.testing.assert_array_equal(noise, stream.randn(SHAPE))
    np.testing.assert_array_equal(initial_noise(7, SHAPE), CPUStream(7).randn(SHAPE))


def test_dpmpp_sde_uses_a_path_from_the_cpu_and_its_gpu_form_one_from_the_sampling_device():
    tree = BrownianTree(7, 0.25, 1.0, SHAPE, CPUStream)
    expected = [tree(1.0, 0.75), tree(0.75, 0.5)]
    for kind in ("torch-cpu", "torch-cuda:a100"):
        np.testing.assert_array_equal(noises(kind, 7, "dpmpp_2m_sde"), expected)
    np.testing.assert_array_equal(noises("torch-cpu", 7, "dpmpp_2m_sde_gpu"), expected)
    assert not np.allclose(noises("torch-cuda:a100", 7, "dpmpp_2m_sde_gpu"), expected)


def test_noise_kinds_are_parsed_and_unknown_ones_are_an_error():
    assert NoiseKind.parse("torch-cuda:h100").gpu == CUDADevice(132, 2048)
    assert NoiseKind.parse("torch-cuda").gpu is not None
    for wrong in ("torch", "torch-cpu:h100", "torch-cuda:", "torch-cuda:abacus", "jax:a100", ""):
        with pytest.raises(UserError, match=f"noise '{wrong}'"):
            NoiseKind.parse(wrong)


def test_noise_is_clipped_to_standard_deviations_of_the_whole_draw():
    kind, levels = NoiseKind.parse("torch-cpu"), np.array([1.0, 0.5, 0.0], np.float32)
    plain, clipped = (
        StepNoise(kind, 3, (2, 4, 1, 5, 6), SAMPLERS["lcm"], levels).next(Draw(1.0, 0.5, clip)) for clip in (0.0, 1.5)
    )
    std = np.sqrt(np.sum((plain - plain.mean()) ** 2, dtype=np.float64) / (plain.size - 1))  # torch's std
    np.testing.assert_allclose(clipped, np.clip(plain, -1.5 * std, 1.5 * std), rtol=1e-6)
