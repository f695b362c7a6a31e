"""torch's noise streams: as recorded from torch (golden), torch itself, Philox's published answers and XLA's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion.torch_random import CUDA_DEVICES, CPUStream, CUDADevice, CUDAStream, philox4x32
from tests.golden_files import golden

DATA = golden("torch_cpu_randn")


@pytest.mark.parametrize("key", DATA)
def test_noise_equals_torchs(key):
    seed, _, shape = key.partition("|")
    # 1e-6: torch's vectorised sine, cosine and logarithm differ from numpy's in the last bits.
    noise = CPUStream(int(seed)).randn(tuple(map(int, shape.split("x"))))
    np.testing.assert_allclose(noise, DATA[key], atol=1e-6)


def test_a_stream_continues_where_the_last_call_ended():
    torch = pytest.importorskip("torch")
    seed = 2**63 + 9
    generator, stream = torch.Generator().manual_seed(seed), CPUStream(seed)
    for shape in ((3,), (20,), (5,), (1, 16, 2, 3), (2,), (33,), (1,), (1,), ()):
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(stream.randn(shape), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # The known answers that come with Random123, the authors' library.
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter, key, expected):
    words = philox4x32(np.array(counter, np.uint32)[:, None], np.array(key, np.uint32))
    assert words.ravel().tolist() == expected


def test_philox_equals_xlas():
    key, low, high = (1234, 987654321), 2**32 - 3, 5
    # XLA's state is the key and the counter's low half, which counts up; the key is the counter's high half too.
    state = jnp.array([*key, low, high], jnp.uint32)
    _, expected = jax.lax.rng_bit_generator(state, (6, 4), jnp.uint32, algorithm=jax.lax.RandomAlgorithm.RNG_PHILOX)
    counts = [low + index for index in range(6)]
    counters = np.array([[count % 2**32, high + count // 2**32, *key] for count in counts], np.uint32)
    np.testing.assert_array_equal(philox4x32(counters.T, np.array(key, np.uint32)).T, expected)


def test_the_cuda_stream_starts_like_torchs():
    # What `torch.manual_seed(0); torch.randn(12, device="cuda")` prints on any GPU.
    expected = [
        -0.9247,
        -0.4253,
        -2.6438,
        0.1452,
        -0.1209,
        -0.5797,
        -0.6229,
        -0.3284,
        -1.0745,
        -0.3631,
        -1.6711,
        2.2655,
    ]
    for device in CUDA_DEVICES.values():
        np.testing.assert_allclose(CUDAStream(0, device).randn((3, 4)).ravel(), expected, atol=6e-5)


def test_the_cuda_stream_writes_a_threads_numbers_one_grid_apart_and_counts_its_calls():
    threads, seed = 512, (7 << 32) + 3

    def number(thread: int, call: int, place: int) -> float:
        counter = np.array([[call], [0], [thread], [0]], np.uint32)
        words = philox4x32(counter, np.array([3, 7], np.uint32)).ravel().astype(np.float64)
        first, second = words[2 * (place // 2) :][:2]
        wave = math.cos if place % 2 else math.sin
        return math.sqrt(-2 * math.log((first + 0.5) / 2**32)) * wave(2 * math.pi * (second + 0.5) / 2**32)

    stream = CUDAStream(seed, CUDADevice(1, 600))  # two blocks of 256 fit
    first, second, third = stream.randn((5000,)), stream.randn((2, 3)), stream.randn((1,))
    for index in (0, 511, 512, 1023, 1700, 2047, 2048, 4095, 4096, 4999):
        rest, thread = divmod(index, threads)
        assert first[index] == pytest.approx(number(thread, *divmod(rest, 4)), abs=2e-6)
    assert second.ravel()[5] == pytest.approx(number(5, 3, 0), abs=2e-6)  # 5000 numbers took three calls
    assert third[0] == pytest.approx(number(0, 4, 0), abs=2e-6)


def test_the_cuda_streams_numbers_are_normal():
    normals = CUDAStream(1, CUDA_DEVICES["rtx3060"]).randn((400_000,)).astype(np.float64)
    # Five standard errors of each moment.
    assert abs(normals.mean()) < 0.008
    assert abs(normals.var() - 1.0) < 0.012
    assert abs((normals**4).mean() - 3.0) < 0.08
    assert abs((normals[1:] * normals[:-1]).mean()) < 0.008
