"""Other parameters for the orders that are submitted from some moment on."""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Iterable, Sequence

from anima_jax.checkpoints.locations import PathLike
from anima_jax.models.parameters import Params
from anima_jax.sampling.pipeline import AnimaPipeline


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacement:
    """Parameters of the transformer for the orders from number `first` on."""

    first: int
    params: Params
    files: Sequence[PathLike]
    done: concurrent.futures.Future[None]


class Replacements:
    """The parameters that wait until all orders that were submitted before them are finished."""

    def __init__(self, pipeline: AnimaPipeline):
        self._pipeline = pipeline
        self._waiting: collections.deque[_Replacement] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def first(self) -> float:
        """The number of the first order that must wait."""
        return self._waiting[0].first if self._waiting else float("inf")

    def add(self, first: int, params: Params, files: Sequence[PathLike]) -> concurrent.futures.Future[None]:
        """Have orders from number `first` on drawn with `params`, which come from `files`.

        The future is done when they are in use.
        """
        replacement = _Replacement(first, params, files, concurrent.futures.Future())
        replacement.done.set_running_or_notify_cancel()  # From now on it cannot be cancelled.
        self._waiting.append(replacement)
        return replacement.done

    def apply(self, unfinished: Iterable[int]) -> bool:
        """Replace the parameters if no order before is unfinished. Return whether they were replaced."""
        oldest, replaced = min(unfinished, default=float("inf")), False
        while self.first < oldest:
            replacement = self._waiting.popleft()
            self._pipeline.use_transformer(replacement.params, replacement.files)
            replacement.done.set_result(None)
            replaced = True
        return replaced
