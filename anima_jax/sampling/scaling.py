"""Scaling of pictures as ComfyUI's `common_upscale` (comfy/utils.py) does it with crop "center".

The picture is cropped to the aspect ratio of the target, then each axis is interpolated as PyTorch's
`F.interpolate` does: without antialiasing, pixel centres at half-integers, edges repeated.
Axes: y rows, x columns, c channels; i target pixels, t taps of the filter.
"""

import numbers
from typing import Any

import numpy as np

CUBIC = -0.75
"""The parameter a of PyTorch's cubic convolution (Keys 1981)."""


def centre_crop(pixels_yxc: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Return the largest centred part with the aspect ratio of `size_wh`, with ComfyUI's rounding; never nothing."""
    (rows, columns), (width, height) = pixels_yxc.shape[:2], size_wh
    own, target = columns / rows, width / height
    x = round((columns - columns * (target / own)) / 2) if own > target else 0
    y = round((rows - rows * (own / target)) / 2) if own < target else 0
    y, x = min(y, (rows - 1) // 2), min(x, (columns - 1) // 2)
    return pixels_yxc[y : rows - y, x : columns - x]


def scaled_bicubic(pixels_yxc: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Return pixels that cover `size_wh`, cropped and interpolated ("bicubic"), float32. They may overshoot."""
    cropped_yxc = centre_crop(pixels_yxc, size_wh).astype(np.float32)
    for axis, size in ((0, size_wh[1]), (1, size_wh[0])):
        index_it, weight_it = cubic_taps(cropped_yxc.shape[axis], size)
        taken = np.moveaxis(cropped_yxc, axis, 0)
        mixed = sum(weight_it[:, tap, None, None] * taken[index_it[:, tap]] for tap in range(4))
        cropped_yxc = np.moveaxis(np.asarray(mixed, np.float32), 0, axis)
    return cropped_yxc


def scaled_nearest(pixels_yxc: np.ndarray, size_wh: tuple[int, int]) -> np.ndarray:
    """Return pixels that cover `size_wh`, cropped; each is the nearest one ("nearest-exact")."""
    cropped_yxc = centre_crop(pixels_yxc, size_wh)
    y, x = (
        np.minimum(((np.arange(size, dtype=np.float32) + np.float32(0.5)) * step(own, size)).astype(np.int64), own - 1)
        for own, size in zip(cropped_yxc.shape[:2], size_wh[::-1], strict=True)
    )
    return cropped_yxc[y][:, x]


def step(own: int, size: int) -> np.float32:
    """Return how many of `own` pixels one of `size` pixels covers."""
    return np.float32(own) / np.float32(size)


def cubic_taps(own: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the four pixels (i, 4) of `own` that each of `size` pixels is mixed from, and their weights, float32."""
    # Rounded once, as by a fused multiply-add.
    centre_i = (np.float64(step(own, size)) * (np.arange(size) + 0.5) - 0.5).astype(np.float32)
    first_i = np.floor(centre_i)
    distance_it = np.abs((centre_i - first_i)[:, None] - np.arange(-1, 3, dtype=np.float32))
    near = ((CUBIC + 2) * distance_it - (CUBIC + 3)) * distance_it * distance_it + 1
    far = ((CUBIC * distance_it - 5 * CUBIC) * distance_it + 8 * CUBIC) * distance_it - 4 * CUBIC
    index_it = first_i[:, None].astype(np.int64) + np.arange(-1, 3)
    return np.clip(index_it, 0, own - 1), np.where(distance_it <= 1, near, far).astype(np.float32)


def is_number(value: Any) -> bool:
    """Return whether a setting is a real number, and not True or False."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real)
