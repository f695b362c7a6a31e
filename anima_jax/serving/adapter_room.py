"""Room on the devices for adapters: a store of pages for those chosen by row, and sets of merged parameters."""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from anima_jax.adapters.rows import empty_store, with_page
from anima_jax.models.parameters import Params
from anima_jax.parallel.mesh import current_mesh, replicate, replicated

MERGED = 1
"""Sets of merged parameters of the transformer on the devices, besides its own."""


class RowStore:
    """The store of pages (adapters/rows.py) for layers with kernels of the `shapes`, (n, i, o).

    It has `size` pages for adapters and one of zeros, page 0. `pages` are those of each adapter in it, by a key. An
    adapter stays until others need the room; `unwritten` are those whose values are still missing. For the thread that
    uses the devices, with its mesh set.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]], size: int, dtype: Any):
        self._shapes, self.size, self._dtype = shapes, size, dtype
        self.pages: collections.OrderedDict[Hashable, list[int]] = collections.OrderedDict()
        self.unwritten: set[Hashable] = set()
        self._free = list(range(1, size + 1))
        self._users: collections.Counter[Hashable] = collections.Counter()
        self._params: Params = {}

    @property
    def used(self) -> int:
        """The number of pages of adapters that images use."""
        return sum(len(own) for key, own in self.pages.items() if self._users[key])

    @property
    def params(self) -> Params:
        """The store as parameters. It is made at the first call, and replaced by `write`."""
        if not self._params:
            zeros = partial(empty_store, self._shapes, 1 + self.size, self._dtype)
            self._params = jax.jit(zeros, out_shardings=replicated(current_mesh()))()
            self._write_page(0, {f: np.zeros((x.shape[0], *x.shape[2:]), x.dtype) for f, x in self._params.items()})
        return self._params

    def take(self, wanted: Mapping[Hashable, int]) -> bool:
        """Keep these adapters, each with its number of pages, until `release`. Return False if there is no room."""
        missing = {key: count for key, count in wanted.items() if key not in self.pages}
        idle = [key for key in self.pages if not self._users[key] and key not in wanted]
        while idle and sum(missing.values()) > len(self._free):
            self._free += self.pages.pop(idle.pop(0))
        if sum(missing.values()) > len(self._free):
            return False
        for key, count in missing.items():
            self.pages[key], self._free = self._free[:count], self._free[count:]
        self.unwritten = (self.unwritten | missing.keys()) & self.pages.keys()
        for key in wanted:
            self.pages.move_to_end(key)
            self._users[key] += 1
        return True

    def release(self, keys: Sequence[Hashable]) -> None:
        """Undo a `take` of these adapters."""
        for key in set(keys):
            self._users[key] -= 1

    def write(self, key: Hashable, values: Sequence[Params]) -> None:
        """Set the values of an adapter's pages."""
        for page, own in zip(self.pages[key], values, strict=True):
            self._write_page(page, own)
        self.unwritten.discard(key)

    def _write_page(self, page: int, values: Params) -> None:
        params = self._params or self.params
        self._params = _with_page(params, *replicate((np.int32(page), values)))


_with_page = partial(jax.jit, donate_argnums=0)(with_page)


class MergedSets:
    """Sets of merged parameters, of which `MERGED` are on the devices at a time. A thread of its own computes them.

    `merge` computes one, and `wake` is called when it is ready. The methods are for one thread.
    """

    def __init__(self, merge: Callable[[Any], Params], wake: Callable[[], None]):
        self._merge, self._wake = merge, wake
        self._thread = ThreadPoolExecutor(1, "anima merging")
        self._sets: dict[Hashable, Future[Params]] = {}
        self._users: collections.Counter[Hashable] = collections.Counter()

    def __len__(self) -> int:
        return len(self._sets)

    def take(self, key: Hashable, source: Any) -> bool:
        """Keep the set of a key, `merge(source)`, until `release`. Return False if there is no room or it is not ready.

        Raises what `merge` raised.
        """
        if key not in self._sets:
            idle = [other for other in self._sets if not self._users[other]]
            if len(self._sets) - len(idle) >= MERGED:
                return False
            for other in idle[: len(self._sets) - MERGED + 1]:
                del self._sets[other]
            self._sets[key] = self._thread.submit(self._merge, source)
            self._sets[key].add_done_callback(lambda _: self._wake())
        found = self._sets[key]
        if not found.done():
            return False
        if error := found.exception():
            del self._sets[key]
            raise error
        self._users[key] += 1
        return True

    def params(self, key: Hashable) -> Params:
        """Return a set that was taken."""
        return self._sets[key].result()

    def release(self, key: Hashable) -> None:
        """Undo a `take`."""
        self._users[key] -= 1

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
