"""Adapters that differ between the rows of a batch: low-rank changes of linear layers, chosen by each row for itself.

The factors of all adapters in use are in a store of pages, each of `PAGE` ranks. A row has a list of pages, in its own
order, and a weight for each. Its result depends on nothing else: on no other row, and not on where in the store its
pages are, so that an image is bit-equal in any company. Page 0 is zero and fills the ends of lists. A single row counts
for a batch of any size.

All of this is arguments of a program: neither another adapter in the store nor another row compiles one.
Axes: n layers, b rows, l tokens, i features in, o features out, g pages of the store, p pages of a row, r ranks of a
page, k ranks of a row.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from anima_jax.adapters.low_rank import LowRank
from anima_jax.adapters.modules import target_modules
from anima_jax.models.constraints import constrain
from anima_jax.models.layers import Linear, linear
from anima_jax.models.parameters import Params, merge, split

PAGE = 8
"""Ranks of a page."""

DOWN, UP, CHOSEN, WEIGHTS = "rows_down", "rows_up", "rows_pages", "rows_scale"
"""Last components of the paths of an adapted layer's store, (n, g, r, i) and (n, g, r, o), and of rows, (n, b, p)."""


class RowAdaptedLinear(nnx.Module):
    """A linear layer of stacked blocks with a store of factors, and with the pages and weights of each row.

    Its parameters have to be given: they start empty.
    """

    def __init__(self, base: Linear):
        self.kernel, self.bias, self.kernel_axes = base.kernel, base.bias, base.kernel_axes
        for name in (DOWN, UP, CHOSEN, WEIGHTS):
            setattr(self, name, nnx.Param(jnp.zeros(0)))

    def __call__(self, x: Array, *, out_dtype: DTypeLike | None = None) -> Array:
        bias_o = None if self.bias is None else self.bias[...]
        # The sum is rounded once, as it is where the change is merged into the weights.
        out = linear(x, self.kernel[...], bias_o, out_dtype=jnp.float32, kernel_axes=self.kernel_axes)
        return (out + self._update(x).reshape(out.shape)).astype(out_dtype or x.dtype)

    def _update(self, x: Array) -> Array:
        """Return what the rows' adapters add, (b, l, o), float32."""
        pages_bp, scale_bp = getattr(self, CHOSEN)[...], getattr(self, WEIGHTS)[...]
        if len(pages_bp) not in (1, len(x)):
            raise ValueError(f"{len(x)} rows for a layer with the adapters of {len(pages_bp)}")

        def of_rows(name: str) -> Array:
            pages_bprf = jnp.take(getattr(self, name)[...], pages_bp, axis=0, mode="clip")
            return constrain(pages_bprf.reshape(len(pages_bp), -1, pages_bprf.shape[-1]).astype(x.dtype), "bnn")

        down_bki, up_bko = of_rows(DOWN), of_rows(UP)
        scale_b1k = jnp.repeat(scale_bp, down_bki.shape[1] // scale_bp.shape[1], axis=1)[:, None]
        low_blk = _batched(x.reshape(len(pages_bp), -1, x.shape[-1]), down_bki, 2)
        return _batched((low_blk * scale_b1k).astype(x.dtype), up_bko, 1)


def _batched(x_blf: Array, kernel_bfk: Array, axis: int) -> Array:
    """Return each row times its own matrix, whose `axis` is summed over, in float32."""
    dimensions = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(x_blf, kernel_bfk, dimensions, preferred_element_type=jnp.float32)


STACK = "blocks."
"""Path prefix of the layers: those of the transformer's blocks. What images attend to is computed once for each."""


def attached(graphdef: nnx.GraphDef[Any], params: Params) -> nnx.GraphDef[Any]:
    """Return the structure of a transformer in which the linear layers of the blocks choose by row.

    `params` are those of `graphdef`, arrays or shapes.
    """
    model = merge(graphdef, params)
    for path, base in target_modules(model).items():
        if path.startswith(STACK):
            *parents, name = path.split(".")
            setattr(functools.reduce(getattr, parents, model), name, RowAdaptedLinear(base))
    return split(model)[0]


def target_shapes(params: Params) -> dict[str, tuple[int, int, int]]:
    """Return path → kernel shape (n, i, o) of every layer that `attached` adapts."""
    kernels = {path.removesuffix(".kernel"): value.shape for path, value in params.items() if path.endswith(".kernel")}
    return {path: shape for path, shape in kernels.items() if path.startswith(STACK)}


def with_rows(model: Any, row_r: Array) -> Any:
    """Return a transformer for a batch that has the adapters of these rows, or itself if it has no adapters by row."""
    graphdef, params = split(model)
    own = {
        path: jnp.take(value, row_r, axis=1, mode="clip")
        for path, value in params.items()
        if path.endswith((f".{CHOSEN}", f".{WEIGHTS}"))
    }
    return merge(graphdef, {**params, **own}) if own else model


def empty_store(shapes: Mapping[str, tuple[int, int, int]], pages: int, dtype: DTypeLike) -> Params:
    """Return a store of zeros for layers of these shapes. Call it in a program: it is large."""
    down = {f"{path}.{DOWN}": jnp.zeros((n, pages, PAGE, i), dtype) for path, (n, i, _) in shapes.items()}
    return down | {f"{path}.{UP}": jnp.zeros((n, pages, PAGE, o), dtype) for path, (n, _, o) in shapes.items()}


def with_page(store: Params, page: Array, values: Params) -> Params:
    """Return the store with other values (n, r, i or o), of the same paths, in one page."""
    return {
        path: constrain(jax.lax.dynamic_update_index_in_dim(own, values[path].astype(own.dtype), page, 1), "nnnn")
        for path, own in store.items()
    }


def pages_of(
    changes: Mapping[tuple[str, int], LowRank], shapes: Mapping[str, tuple[int, int, int]], dtype: Any
) -> list[Params]:
    """Return the pages of an adapter: the values for `with_page`, on the host. Smaller ranks end in zeros."""
    rank = max((len(one.down_ri) for one in changes.values()), default=0)
    pages: list[Params] = []
    for first in range(0, rank, PAGE):
        page = {
            f"{path}.{name}": np.zeros((n, PAGE, size), dtype)
            for path, (n, i, o) in shapes.items()
            for name, size in ((DOWN, i), (UP, o))
        }
        for (path, layer), change in changes.items():
            for name, values in ((DOWN, change.down_ri), (UP, change.up_ro)):
                own = values[first : first + PAGE]
                page[f"{path}.{name}"][layer, : len(own)] = own
        pages.append(page)
    return pages
