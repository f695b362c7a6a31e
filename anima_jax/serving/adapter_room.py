"""Room on the devices for adapters: a store of pages for those chosen by row, and sets of merged parameters."""

import collections
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from anima_jax.adapters.rows import empty_store, with_page
from anima_jax.models.parameters import Params
from anima_jax.parallel.mesh import current_mesh, replicate, replicated

MERGED_SETS = 1
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
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """The number of pages of adapters that images use."""
        return sum(len(own) for key, own in list(self.pages.items()) if self._users[key])

    @property
    def params(self) -> Params:
        """The store as parameters, for any thread. It is made at the first call, and replaced by `write`."""
        with self._lock:
            if not self._params:
                zeros = partial(empty_store, self._shapes, 1 + self.size, self._dtype)
                self._params = jax.jit(zeros, out_shardings=replicated(current_mesh()))()
                page = {path: np.zeros((x.shape[0], *x.shape[2:]), x.dtype) for path, x in self._params.items()}
                self._params = _with_page(self._params, *replicate((np.int32(0), page)))  # to compile it
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
            _one_less(self._users, key)

    def write(self, key: Hashable, values: Sequence[Params]) -> None:
        """Set the values of an adapter's pages."""
        for page, own in zip(self.pages[key], values, strict=True):
            self._params = _with_page(self.params, *replicate((np.int32(page), own)))
        self.unwritten.discard(key)


def _one_less(users: collections.Counter[Hashable], key: Hashable) -> None:
    """Count one user less, and forget a key without any: clients choose weights, and so keys."""
    users[key] -= 1
    if not users[key]:
        del users[key]


_with_page = jax.jit(with_page)  # Other threads may be using the store as it was.


class MergedSets:
    """Sets of merged parameters, of which `MERGED_SETS` are on the devices at a time. Another thread computes them.

    `merge` computes one, and `wake` is called when it is ready. The methods are for one thread.
    """

    def __init__(self, merge: Callable[[Any], Params], wake: Callable[[], None]):
        self._merge, self._wake = merge, wake
        self._thread = ThreadPoolExecutor(1, "anima-engine-merge")
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
            if len(self._sets) - len(idle) >= MERGED_SETS:
                return False
            for other in idle[: len(self._sets) - MERGED_SETS + 1]:
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
        _one_less(self._users, key)

    def forget(self) -> None:
        """Forget all sets, which no image uses."""
        self._sets.clear()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
