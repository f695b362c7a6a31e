"""DoRA with a magnitude for each output: by which norm it divides, and the magnitudes for the other one.

PEFT, LyCORIS and anima_jax train W + ΔW divided by its own norm. ComfyUI (comfy/weight_adapter/base.py,
weight_decompose) divides by the norm of W, so a file for it needs magnitudes that are multiplied by ‖W‖ / ‖W + ΔW‖.
"""

import dataclasses
import math

import numpy as np

from anima_jax.adapters.patch import Part, Patch, norms


def is_by_output(patch: Patch) -> bool:
    """Return whether a patch has a magnitude for each output that counts."""
    if "dora_scale" not in patch.parts or "dora_scale" in patch.idle or patch.kind.replaces or patch.error():
        return False
    shape, outputs = patch.parts["dora_scale"].shape, (patch.update_shape or (0,))[0]
    return shape[:1] == (outputs,) and math.prod(shape) == outputs


def normed(patch: Patch, weight: np.ndarray, *, of_base: bool) -> Patch:
    """Return a DoRA by output with the magnitudes that have the same result on `weight`, at strength 1, by other norms.

    They are for the norms of W if `of_base`, as in ComfyUI, otherwise for those of W + ΔW. `weight` is float32 in the
    layout of files, and the new magnitudes are float32 (out, 1).
    """
    if of_base == patch.norm_of_base:
        return patch
    weight = patch.extended(weight)
    trained, base = norms(weight + patch.update(weight).reshape(weight.shape), 1), norms(weight, 1)
    ratio = base / trained if of_base else trained / base
    magnitudes = Part.of(patch.parts["dora_scale"].float32().reshape(-1, 1) * ratio)
    return dataclasses.replace(patch, parts={**patch.parts, "dora_scale": magnitudes}, norm_of_base=of_base)
