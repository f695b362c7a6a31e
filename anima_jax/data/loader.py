"""What a step needs, prepared by threads some steps ahead of the device (grain)."""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


def prefetched(
    load: Callable[[int], T], start: int, stop: int, *, threads: int, ahead: int | None = None
) -> Generator[T, None, None]:
    """load(start), …, load(stop − 1), in order; up to `threads` of them are made at a time.

    At most `ahead` (unset: `threads`) results are ready or being made, besides the one that is waited for or in the
    caller's hands. What `load` raises is raised here, where its result would have come. Closing the generator (an error
    that leaves the caller's loop does) cancels what has not begun and waits for nothing.
    """
    # Here, because only training reads ahead: grain takes seconds to import, and imports jax if it finds it.
    import grain

    steps = grain.MapDataset.range(start, stop).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if ahead is None else ahead)
    results = iter(steps.to_iter_dataset(options, allow_nones=True))
    try:
        yield from results  # not a loop, whose variable would keep a batch alive while the next one is waited for
    finally:
        results.close()
