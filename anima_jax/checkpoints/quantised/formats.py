"""The table of quantised formats: for each, what a file stores instead of a weight, and the weight that it stands for.

A weight (o, i) is stored in parts, NumPy arrays that have the names of ComfyUI and bitsandbytes: "weight" are the
codes, the others scales and settings. `FORMATS` says how to check the parts and how to compute the float32 values.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from anima_jax.checkpoints.quantised import bitsandbytes, comfyui
from anima_jax.checkpoints.quantised.parts import PartLayout, Parts
from anima_jax.checkpoints.safetensors_header import TensorInfo


class Format(NamedTuple):
    """One format of quantised weights.

    `layout(parts, settings)` returns the shape of the weight and how its parts are divided by rows, from the
    descriptions of the parts and the weight's JSON; it raises ValueError for parts that are missing or do not fit.
    `dequantise(parts, shape, settings)` returns the float32 weight from the arrays of the parts, or some of its rows
    from theirs; it raises ValueError for scales that are not finite or negative.
    """

    layout: Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], PartLayout]
    dequantise: Callable[[Parts, tuple[int, ...], Mapping[str, Any]], np.ndarray]


FORMATS: dict[str, Format] = {
    "fp8_scaled": Format(comfyui.fp8_layout, comfyui.dequantise_scaled),
    "fp8_blocks": Format(comfyui.fp8_blocks_layout, comfyui.dequantise_squares),
    "int8": Format(comfyui.int8_layout, comfyui.dequantise_scaled),
    "int8_convrot": Format(comfyui.int8_layout, comfyui.dequantise_rotated),
    "mxfp8": Format(comfyui.mxfp8_layout, comfyui.dequantise_mxfp8),
    "nvfp4": Format(comfyui.nvfp4_layout, comfyui.dequantise_nvfp4),
    "nf4": Format(bitsandbytes.layout, bitsandbytes.dequantise),
    "fp4": Format(bitsandbytes.layout, bitsandbytes.dequantise),
    "llm_int8": Format(bitsandbytes.int8_layout, bitsandbytes.dequantise_int8),
}
"""Name → format."""
