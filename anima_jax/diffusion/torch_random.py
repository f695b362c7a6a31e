"""The normal numbers of `torch.manual_seed(seed); torch.randn(shape)` on a CPU, without torch.

ComfyUI starts every picture from them, so the same seed must give them here. Source: at::normal_fill and
at::CPUGeneratorImpl. Torch's vectorised sine and cosine round differently, so numbers agree to about 5e-7.
"""

import math

import numpy as np

_BLOCK = 16
"""Torch fills tensors of at least this many elements in blocks: Box-Muller pairs element i with element i + 8."""


def randn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal numbers, float32, that a fresh torch generator of this seed (64 bits) gives first."""
    # The Mersenne Twister takes the low 32 bits of the seed, as torch's does.
    generator = np.random.RandomState(seed & 0xFFFFFFFF)
    size = math.prod(shape)
    if size < _BLOCK:
        return _pairs(generator, size).reshape(shape)
    uniforms = _uniform24(generator, size)
    whole = size - size % _BLOCK
    normals = np.empty(size, np.float32)
    normals[:whole] = _box_muller(uniforms[:whole])
    if whole < size:
        # A tail that is no whole block: the last sixteen numbers are drawn anew.
        normals[-_BLOCK:] = _box_muller(_uniform24(generator, _BLOCK))
    return normals.reshape(shape)


def _words(generator: np.random.RandomState, count: int) -> np.ndarray:
    return generator.randint(0, 2**32, count, dtype=np.uint32)


def _uniform24(generator: np.random.RandomState, count: int) -> np.ndarray:
    return (_words(generator, count) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    first, second = np.split(uniforms.reshape(-1, _BLOCK), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def _pairs(generator: np.random.RandomState, count: int) -> np.ndarray:
    """Small tensors: number by number in double precision, cosine first, its sine kept for the next."""
    words = _words(generator, 2 * (count + count % 2)).astype(np.uint64).reshape(-1, 2, 2)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    first, second = np.moveaxis(bits.astype(np.float64) * 2.0**-53, 1, 0)
    radius = np.sqrt(-2.0 * np.log1p(-second))
    angle = 2.0 * math.pi * first
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()[:count].astype(np.float32)
