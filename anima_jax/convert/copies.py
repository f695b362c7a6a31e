"""Tensors written under other names: quantised weights with their codes and scales as they are, or their values."""

import collections
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.quantised.view import MARKER
from anima_jax.checkpoints.safetensors import TensorInfo
from anima_jax.errors import counted, plural


def write(
    target: str,
    stored: Mapping[str, StoredTensor],
    prefix: str,
    dtype: np.dtype[Any] | None,
    metadata: Mapping[str, str],
    *,
    keep_codes: bool,
) -> Iterator[str]:
    """Write tensors (by name without `prefix`) one at a time, in their own dtypes or in `dtype`; yield what to print.

    Without a `dtype` quantised weights keep their codes and scales if `keep_codes` is set and a safetensors file can
    have them; else their values are written in bfloat16.
    """
    arrays: dict[str, Callable[[], np.ndarray]] = {}
    infos: list[TensorInfo] = []
    kept, dequantised = collections.Counter[str](), collections.Counter[str]()
    for name, tensor in stored.items():
        if tensor.storage and keep_codes and dtype is None and "weight" in tensor.file.parts(tensor.key):
            kept[tensor.storage] += 1
            for part, info in tensor.file.parts(tensor.key).items():
                key = _part_name(name, prefix, tensor, part, info)
                if key not in arrays:
                    infos.append(dataclasses.replace(info, name=key))
                arrays[key] = functools.partial(tensor.file.read_part, tensor.key, part)
            continue
        if tensor.storage:
            dequantised[tensor.storage] += 1
        wanted = dtype or tensor.written_dtype
        infos.append(TensorInfo(prefix + name, wanted, tensor.info.shape))
        arrays[prefix + name] = functools.partial(values, tensor, wanted)
    safetensors.write(target, infos, lambda key: arrays[key](), metadata)
    yield from summary(kept, "kept as they are")
    yield from summary(dequantised, f"dequantised to {dtype or 'bfloat16'}")


def summary(formats: Mapping[str, int], what: str) -> Iterator[str]:
    """Yield a line about quantised tensors (format → number), unless there are none: "3 quantised tensors WHAT: …"."""
    if formats:
        yield f"{plural(sum(formats.values()), 'quantised tensor')} {what}: {counted(formats)}"


def _part_name(name: str, prefix: str, tensor: StoredTensor, part: str, info: TensorInfo) -> str:
    """Return the new name of a part of the weight that is written as `prefix` + `name`."""
    if part != MARKER:
        return f"{prefix}{name}".removesuffix("weight") + info.name.removeprefix(tensor.key.removesuffix("weight"))
    # Beside the network, or beside the model that contains it, as in the file.
    between = tensor.key.removesuffix(name).removeprefix(info.name.removesuffix(MARKER))
    return (prefix.removesuffix(between) if tensor.key.endswith(name) else prefix) + MARKER


def values(tensor: StoredTensor, dtype: np.dtype[Any]) -> np.ndarray:
    """Return a tensor's values in `dtype`. Warns of NaN and infinite values; raises UserError if one overflows."""
    found = tensor.read_as(dtype)
    count = found.size - int(np.count_nonzero(np.isfinite(found))) if dtype != tensor.info.dtype else 0
    if count:
        print(f"warning: {tensor.key}: {plural(count, 'NaN or infinite value')}, as in the input", file=sys.stderr)
    return found
