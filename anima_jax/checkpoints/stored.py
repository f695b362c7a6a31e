"""How devices store a transformer: which of its frozen parameters are quantised, and how they are multiplied."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from anima_jax.errors import UserError, did_you_mean
from anima_jax.models import quantised
from anima_jax.models.quantised import COMPUTED, STORED, Quantised
from anima_jax.parallel import rules

PLAIN = ("bfloat16", "float16", "float32")
TRANSFORMER_DTYPES = (*STORED, *PLAIN)
"""What `transformer_dtype` may be: storages, and plain dtypes."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How the frozen parameters of a transformer are stored and multiplied.

    `transformer_dtype` is a key of `STORED` or one of `PLAIN`, for the matrices that it applies to
    (`in_transformer_dtype`); None keeps those that a file has quantised, and `dtype` for the others. `compute` is a key
    of `COMPUTED` or None. `dtype` is that of other matrices and of the values of quantised ones, or one per path; None
    is the file's. `exact`: what a file has quantised is kept only if no value is rounded. Raises UserError for other
    names, and if the storage's codes cannot be multiplied as `compute` says.
    """

    dtype: Any
    transformer_dtype: str | None = None
    compute: str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("transformer_dtype", self.transformer_dtype, TRANSFORMER_DTYPES),
            ("compute", self.compute, tuple(COMPUTED)),
        ):
            if value is not None and value not in valid:
                raise UserError(f"{name} '{value}', expected one of {', '.join(valid)}{did_you_mean(value, valid)}")
        quantised.storage_for(self.transformer_dtype, self.compute)

    @property
    def codes(self) -> str | None:
        """The storage, a key of `STORED`, to which all matrices are quantised; None: none is."""
        name = quantised.storage_for(self.transformer_dtype, self.compute)
        return name if name in STORED else None

    def dtype_of(self, path: str) -> Any:
        """Return the dtype of a parameter, or of its values before it is quantised; None: the file's."""
        plain = self.transformer_dtype in PLAIN and quantised.in_transformer_dtype(path)
        own = self.dtype.get(path) if isinstance(self.dtype, Mapping) else self.dtype
        return self.transformer_dtype if plain else own

    def keeps(self, path: str) -> bool:
        """Return whether a parameter may stay as a file has it quantised."""
        return quantised.in_transformer_dtype(path) and self.transformer_dtype not in PLAIN

    def stored(self, path: str, value: Any, mesh: Mesh | None) -> Any:
        """Return a frozen parameter as it is stored, with its sharding on the mesh (None: on its device)."""
        if isinstance(value, Quantised):
            return quantised.with_compute(path, value, self.compute)
        value = value if (dtype := self.dtype_of(path)) is None else value.astype(dtype)
        if self.codes is None:
            return value
        stored = quantised.quantise_transformer(path, value, self.codes, self.compute)
        if mesh is None:
            return stored
        return jax.device_put(stored, rules.shardings({path: stored}, {path: value}, mesh)[path])


def placed(value: Quantised, path: str, sharding: Sharding | None) -> Quantised:
    """Return a quantised parameter of NumPy arrays on the devices, each with its part."""
    mesh: Any = getattr(sharding, "mesh", None)
    if mesh is None:
        return jax.device_put(value)
    own = rules.shardings({path: value}, {path: value}, mesh)[path]
    return jax.tree.map(
        lambda leaf, one: jax.make_array_from_callback(leaf.shape, one, lambda index: leaf[index]), value, own
    )
