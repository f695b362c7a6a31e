"""Hashes by which managers of adapters know a file (`sshs_…`), as sd-scripts computes them.

Source: `precalculate_safetensors_hashes` in sd-scripts' `library/model_io`. The file that is hashed has only the
metadata that begins with `ss_`, which users do not edit.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from anima_jax.checkpoints import safetensors_header
from anima_jax.checkpoints.safetensors import TensorInfo, in_file_order

KEYS = ("sshs_model_hash", "sshs_legacy_hash")

_LEGACY = range(0x100000, 0x110000)
"""Bytes of the file that the old hash covers."""


def sd_scripts_hashes(
    tensors: Iterable[TensorInfo], array_of: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Return `KEYS` → hash for a file with these tensors: SHA-256 of all values, and of 64 kB at a fixed place.

    `array_of` is called once for each tensor, in the order of the file.
    """
    ordered = in_file_order(tensors)
    header = safetensors_header.build(ordered, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    values, legacy, at = hashlib.sha256(), hashlib.sha256(_part(header, 0)), len(header)
    for tensor in ordered:
        data = np.ascontiguousarray(array_of(tensor.name)).tobytes()
        values.update(data)
        legacy.update(_part(data, at))
        at += len(data)
    return dict(zip(KEYS, (values.hexdigest(), legacy.hexdigest()[:8]), strict=True))


def _part(data: bytes, at: int) -> bytes:
    """Return the part of `data`, which begins at byte `at` of the file, that the old hash covers."""
    return data[max(0, _LEGACY.start - at) : max(0, _LEGACY.stop - at)]
