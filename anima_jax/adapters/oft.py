"""OFT and BOFT (arXiv 2306.07280, 2311.06243), as ComfyUI merges the files of LyCORIS and sd-scripts.

Source: comfy/weight_adapter/oft.py and boft.py. Where ComfyUI differs from LyCORIS, ComfyUI is followed: alpha limits
‖Q‖ itself and not alpha times the outputs, the strength counts twice, and the `rescale` of an OFT does not count.
Factors have the layout of files. The functions are what `kinds.OnWeight` asks for.
"""

import math
from collections.abc import Mapping

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def shape(shapes: Shapes) -> tuple[int | None, ...] | None:
    """Return the shape for rotations (blocks, n, n), or (stages, blocks, n, n), whose stages mix 2, 4, … blocks."""
    *stages, blocks, n, also_n = shapes["oft_blocks"]
    out = blocks * n
    mixed = 2 ** (stages[0] - 1) * n if stages and stages[0] and n % 2 == 0 else 0 if stages else 1
    fits = n == also_n and mixed and out % mixed == 0 and math.prod(shapes.get("rescale", (out,))) == out
    return (out, None) if fits else None


def _rotations(blocks: np.ndarray, alpha: float) -> np.ndarray:
    """Return Cayley's (1 + Q)(1 − Q)⁻¹ for Q = blocks − blocksᵀ, whose norm is limited to a positive alpha."""
    skew = blocks - blocks.swapaxes(-1, -2)
    norm = np.linalg.norm(skew) + np.float32(1e-8)
    if 0 < alpha < norm:
        skew *= np.float32(alpha) / norm
    one = np.eye(skew.shape[-1], dtype=skew.dtype)
    return (one + skew) @ np.linalg.inv(one - skew)


def change(factors: Mapping[str, np.ndarray], weight: np.ndarray, alpha: float, strength: float) -> np.ndarray:
    rotations = _rotations(factors["oft_blocks"], alpha)
    change = (rotations - np.eye(rotations.shape[-1], dtype=rotations.dtype)) * np.float32(strength)
    return (change.swapaxes(-1, -2) @ weight.reshape(*rotations.shape[:2], -1)).reshape(weight.shape)


def butterfly(factors: Mapping[str, np.ndarray], weight: np.ndarray, alpha: float, strength: float) -> np.ndarray:
    rotations, out = _rotations(factors["oft_blocks"], alpha), weight.reshape(len(weight), -1)
    columns, n = out.shape[1], rotations.shape[-1]
    one = np.eye(n, dtype=rotations.dtype)
    for stage, rotation in enumerate(rotations):
        half = 2**stage * n // 2
        own = rotation if strength == 1.0 else rotation * np.float32(strength) + np.float32(1 - strength) * one
        out = own @ out.reshape(-1, 2, half, columns).swapaxes(1, 2).reshape(-1, n, columns)
        out = out.reshape(-1, half, 2, columns).swapaxes(1, 2).reshape(-1, columns)
    out = out * factors["rescale"].reshape(-1, 1) if "rescale" in factors else out
    return out.reshape(weight.shape) - weight
