"""Background threads that work ahead: on the batches of the next steps (grain) and on the files of a data set."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


def prefetched(
    load: Callable[[int], T], start: int, stop: int, *, threads: int, ahead: int | None = None
) -> Generator[T, None, None]:
    """Yield load(start), …, load(stop − 1) in order, computed in up to `threads` threads.

    At most `ahead` (default: `threads`) results are ready or in progress, in addition to the one that the caller has or
    waits for. Exceptions of `load` are raised here in place of its result. Closing the generator, as an error in the
    caller's loop does, cancels tasks that have not started and waits for nothing.
    """
    # Imported here, because only training needs it: grain takes seconds to import, and imports jax if it is installed.
    import grain

    steps = grain.MapDataset.range(start, stop).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if ahead is None else ahead)
    results = iter(steps.to_iter_dataset(options, allow_nones=True))
    try:
        yield from results  # a loop variable would keep a batch alive while waiting for the next one
    finally:
        results.close()


def map_ahead(
    function: Callable[[Item], T], items: Iterable[Item], *, threads: int, ahead: int | None = None
) -> Iterator[T]:
    """Yield function(item) for each item in order; at most `ahead` (default: `threads`) are queued or finished."""
    pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > (threads if ahead is None else ahead):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
