"""Work that is done ahead in threads: the batches of the next steps (grain), and the files of a data set."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


def prefetched(
    load: Callable[[int], T], start: int, stop: int, *, threads: int, ahead: int | None = None
) -> Generator[T, None, None]:
    """Yield load(start), …, load(stop − 1), in order, with up to `threads` of them computed at a time.

    At most `ahead` (default: `threads`) results are ready or in progress, besides the one that is waited for or that
    the caller has. What `load` raises is raised here, in place of its result. Closing the generator, as an error in the
    caller's loop does, cancels what has not started and waits for nothing.
    """
    # Imported here, because only training needs it: grain takes seconds to import, and imports jax if it is installed.
    import grain

    steps = grain.MapDataset.range(start, stop).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if ahead is None else ahead)
    results = iter(steps.to_iter_dataset(options, allow_nones=True))
    try:
        yield from results  # not a loop, whose variable would keep a batch alive while the next one is waited for
    finally:
        results.close()


def map_ahead(
    function: Callable[[Item], T], items: Iterable[Item], *, threads: int, ahead: int | None = None
) -> Iterator[T]:
    """Yield `function` of each item, in order, with at most `ahead` (default: `threads`) items queued or finished."""
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
