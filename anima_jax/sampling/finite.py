"""NaN and infinite values while sampling: the file that has them, or else where the computation overflowed."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.checkpoints.gathered import on_host
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.values import first_problem
from anima_jax.errors import NotFiniteError
from anima_jax.models.parameters import Params


@jax.jit
def all_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


def are_finite(arrays: Iterable[np.ndarray]) -> bool:
    """Return whether no value of these arrays on the host is NaN or infinite."""
    return all(np.isfinite(array).all() for array in arrays)


def not_finite(
    where: str, files: Iterable[PathLike], networks: Mapping[str, Params], dtype: np.dtype
) -> NotFiniteError:
    """Return the error for values that are not finite, found at `where`.

    It names the first of `files` that has such values, with their tensors; else the first of the `networks` whose
    parameters do, which come from files that are fine; else it says that `dtype` is too small.
    """
    if problem := first_problem(files):
        return NotFiniteError(problem)
    for name, params in networks.items():
        for path, value in params.items():
            if jnp.issubdtype(value.dtype, jnp.floating) and not np.isfinite(on_host(value)).all():
                reason = f"in {dtype} or after its adapters were merged; their weights may be too large"
                return NotFiniteError(f"{name}: NaN or infinite values in {path}, {reason}")
    advice = "float32 or bfloat16 has a larger range" if dtype == jnp.float16 else "a smaller guidance may help"
    if dtype == jnp.bfloat16:
        advice = "float32 is more exact"
    return NotFiniteError(f"{where}: NaN or infinite values, but none in the files: {dtype} overflowed; {advice}")
