"""Files written from arrays that lie on the devices of several processes: all of them gather, the first one writes."""

import contextlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.errors import UserError


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array in host memory. All processes must ask for it if none has all of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def write(
    path: PathLike,
    tensors: Iterable[safetensors.TensorInfo],
    array_of: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`safetensors.write` by the first process; the others take part in what `array_of` gathers.

    If the first one cannot write it gathers all the same, so that they stay in step, and raises UserError then.
    """
    tensors = safetensors.in_file_order(tensors)
    left = [tensor.name for tensor in tensors]

    def gathered(name: str) -> np.ndarray:
        left.remove(name)
        return array_of(name)

    try:
        if jax.process_index() == 0:
            safetensors.write(path, tensors, gathered, metadata)
    finally:
        for name in left if jax.process_count() > 1 else ():
            with contextlib.suppress(UserError):  # a value that overflows, which the first one reports
                array_of(name)
