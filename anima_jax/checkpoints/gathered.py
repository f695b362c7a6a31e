"""Writing files from arrays sharded over several processes: all processes gather, process 0 writes."""

import contextlib
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.errors import UserError


def on_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return the full array in host memory. If it is sharded over several processes, all of them must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def write(
    path: PathLike,
    tensors: Iterable[safetensors.TensorInfo],
    array_of: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Call `safetensors.write` in process 0, while the other processes join the gathering in `array_of`.

    All processes must call this. If process 0 fails, it still joins the gathering of the remaining tensors, so that no
    process waits for it, and then raises.
    """
    tensors = safetensors.in_file_order(tensors)
    remaining = [tensor.name for tensor in tensors]

    def gather(name: str) -> np.ndarray:
        remaining.remove(name)
        return array_of(name)

    try:
        if jax.process_index() == 0:
            safetensors.write(path, tensors, gather, metadata)
    finally:
        for name in remaining if jax.process_count() > 1 else ():
            with contextlib.suppress(UserError):  # for an overflow, which process 0 reports
                array_of(name)
