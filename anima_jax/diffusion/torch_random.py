"""Torch's streams of normal numbers without torch: `torch.randn` on a CPU and on a CUDA device.

ComfyUI draws the initial noise of every image from the CPU stream and step noise from the stream of the device it runs
on, so the same seed must give the same numbers here. Sources: at::normal_fill and at::CPUGeneratorImpl; ATen's
native/cuda/DistributionTemplates.h with cuRAND's Philox generator. Torch's vectorised sine, cosine and logarithm round
differently, so the numbers agree to about 5e-7.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

_BLOCK = 16
"""Torch fills CPU tensors of at least 16 elements in blocks of 16: Box-Muller pairs element i with i + 8."""


class RandomStream(Protocol):
    """A random stream: it is seeded once, and every call continues where the last one ended."""

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the stream's next standard normal numbers, float32."""
        ...


class CPUStream:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int):
        # Like torch's Mersenne Twister, this one uses only the low 32 bits of the seed.
        self._generator = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the stream's next standard normal numbers, float32."""
        size = math.prod(shape)
        if size < _BLOCK:
            return np.array([self._next() for _ in range(size)], np.float32).reshape(shape)
        uniforms = self._uniform24(size)
        full = size - size % _BLOCK
        normals = np.empty(size, np.float32)
        normals[:full] = _box_muller_blocks(uniforms[:full])
        if full < size:
            # If the tail is not a full block, torch draws the last 16 numbers again.
            normals[-_BLOCK:] = _box_muller_blocks(self._uniform24(_BLOCK))
        return normals.reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self._generator.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform24(self, count: int) -> np.ndarray:
        return (self._words(count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    def _next(self) -> float:
        """Return one number, computed in float64, for small tensors: first the cosine, in the next call the sine."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        words = self._words(4).astype(np.uint64).reshape(2, 2)
        first, second = ((words[:, 0] << np.uint64(32) | words[:, 1]) & np.uint64(2**53 - 1)) * 2.0**-53
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller_blocks(uniforms: np.ndarray) -> np.ndarray:
    first, second = np.split(uniforms.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


@dataclasses.dataclass(frozen=True)
class CUDADevice:
    """The part of an NVIDIA GPU's specification that determines the order of the numbers `torch.randn` draws on it.

    The order depends on the number of threads that can be resident at once.
    """

    multiprocessors: int
    threads_per_multiprocessor: int


CUDA_DEVICES = {
    "rtx2080ti": CUDADevice(68, 1024),
    "rtx3060": CUDADevice(28, 1536),
    "rtx3070": CUDADevice(46, 1536),
    "rtx3080": CUDADevice(68, 1536),
    "rtx3090": CUDADevice(82, 1536),
    "rtx4060ti": CUDADevice(34, 1536),
    "rtx4070": CUDADevice(46, 1536),
    "rtx4080": CUDADevice(76, 1536),
    "rtx4090": CUDADevice(128, 1536),
    "rtx5070ti": CUDADevice(70, 1536),
    "rtx5080": CUDADevice(84, 1536),
    "rtx5090": CUDADevice(170, 1536),
    "t4": CUDADevice(40, 1024),
    "v100": CUDADevice(80, 2048),
    "a100": CUDADevice(108, 2048),
    "h100": CUDADevice(132, 2048),
}
"""GPU name → size, from NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities."""

_THREADS_PER_BLOCK = 256
_NUMBERS_PER_CALL = 4
"""Numbers that one Philox call returns; a thread writes them one grid apart."""


class CUDAStream:
    """The stream of `torch.Generator("cuda").manual_seed(seed)` on `device`.

    The high half of the Philox counter is the thread's index in the grid, its low half counts the calls. If a tensor
    has more elements than the device has threads, each thread fills several, so their order depends on the device.
    """

    def __init__(self, seed: int, device: CUDADevice):
        self._key = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
        self._device = device
        self._calls = 0

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the stream's next standard normal numbers, float32."""
        size = math.prod(shape)
        if size == 0:
            return np.empty(shape, np.float32)
        device = self._device
        resident = device.multiprocessors * (device.threads_per_multiprocessor // _THREADS_PER_BLOCK)
        threads = min(resident, -(-size // _THREADS_PER_BLOCK)) * _THREADS_PER_BLOCK
        rounds = -(-size // (threads * _NUMBERS_PER_CALL))
        normals = np.empty((rounds, _NUMBERS_PER_CALL, threads), np.float32)
        for index in range(rounds):
            counter = np.zeros((4, threads), np.uint32)
            counter[0], counter[1] = self._calls & 0xFFFFFFFF, self._calls >> 32
            counter[2] = np.arange(threads)
            normals[index] = _box_muller_pairs(philox4x32(counter, self._key))
            self._calls += 1
        return normals.ravel()[:size].reshape(shape)


def philox4x32(counter_4n: np.ndarray, key_2: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Return four uint32 per counter, by Philox 4×32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    a, b, c, d = (word.astype(np.uint64) for word in counter_4n)
    key_0, key_1 = (int(word) for word in key_2)
    low = np.uint64(0xFFFFFFFF)
    for _ in range(rounds):
        product_a, product_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = product_c >> np.uint64(32) ^ b ^ np.uint64(key_0), product_a >> np.uint64(32) ^ d ^ np.uint64(key_1)
        b, d = product_c & low, product_a & low
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([a, b, c, d]).astype(np.uint32)


def _box_muller_pairs(words_4n: np.ndarray) -> np.ndarray:
    """Return numbers 0 and 1 made from words 0 and 1, numbers 2 and 3 from words 2 and 3; sine first."""
    unit, turn = np.float32(2.0**-32), np.float32(2.0**-32 * 2.0 * math.pi)
    radius = np.sqrt(np.float32(-2) * np.log(words_4n[::2].astype(np.float32) * unit + unit / 2))
    angle = words_4n[1::2].astype(np.float32) * turn + turn / 2
    return np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1).reshape(4, -1)
