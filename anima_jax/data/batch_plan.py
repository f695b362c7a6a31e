"""The examples of each batch and the batch of each step: a pure function of the seed and the step number.

A tier is the input of one compiled program: the examples of one resolution and number of frames, of any aspect ratio.
It is an endless stream, shuffled in each epoch and cut into batches. Examples that do not fill a batch at the end of an
epoch begin the next epoch's first batch, so none is dropped. With n examples and batches of b, epoch e (0, 1, …) is the
tier's batches from ⌈e·n/b⌉ to ⌈(e+1)·n/b⌉: it ends with the batch that uses its last example. An epoch runs these
batches of every tier in a random order.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucket

_MIN_FILL = 0.94  # explicit size buckets share a program if each fills this share of the token budget


@dataclasses.dataclass(frozen=True, eq=False)
class Tier:
    """The examples of one compiled program, `batch_size` at a time (over all processes; may exceed their number)."""

    name: str  # seeds the order, so that other tiers do not change it
    indices: np.ndarray  # the examples' numbers, int64 (n,)
    tokens: int  # token budget of an example: the largest bucket's tokens, rounded up to 16
    batch_size: int

    def __post_init__(self):
        if len(self.indices) < 1 or self.batch_size < 1:
            sizes = f"{len(self.indices)} and {self.batch_size}"
            raise ValueError(f"tier {self.name!r}: expected examples and a batch size, found {sizes}")

    def batches(self, epochs: int) -> int:
        """Return the number of batches that contain every example of the first `epochs` epochs."""
        return -(-epochs * len(self.indices) // self.batch_size)


class PlannedBatch(NamedTuple):
    """The examples of one step: their indices and the epoch of each (a batch may span epochs), int64 (b,)."""

    step: int
    tier: int
    indices: np.ndarray
    epochs: np.ndarray

    def take(self, rows: np.ndarray) -> "PlannedBatch":
        """Return these rows of the batch, those of one process."""
        return self._replace(indices=self.indices[rows], epochs=self.epochs[rows])


class _Epoch(NamedTuple):
    """The steps of one epoch: each one's tier, batch number within that tier and epoch, and examples before it."""

    tiers: np.ndarray  # (s,)
    numbers: np.ndarray  # (s,)
    consumed: np.ndarray  # (s + 1,), counted from the epoch's first step


class BatchPlan:
    """The batches of all tiers, step by step from 0. A run's only state is the number of examples consumed."""

    def __init__(self, tiers: Sequence[Tier], seed: int):
        if len({tier.name for tier in tiers}) != len(tiers) or not tiers:
            raise ValueError(f"expected tiers of different names, found {[tier.name for tier in tiers]}")
        self.tiers, self.seed = tuple(tiers), seed
        self._examples = sum(len(tier.indices) for tier in tiers)
        self._epoch = functools.lru_cache(maxsize=2)(self._order_epoch)
        # One cache per tier: a small tier, of which a batch may span many epochs, must not evict a large one's order.
        self._orders = [
            functools.lru_cache(maxsize=2)(functools.partial(_shuffled, len(tier.indices), seed, tier.name))
            for tier in tiers
        ]
        self._lock = threading.Lock()  # so that threads that reach a new epoch together shuffle it once

    def steps_for(self, epochs: int) -> int:
        """Return the number of steps until the last example of the last of `epochs` epochs is used."""
        return sum(tier.batches(epochs) for tier in self.tiers)

    def epochs_finished(self, step: int) -> int:
        """Return the number of epochs of which all examples are in the steps before `step`."""
        bound = min(step * tier.batch_size // len(tier.indices) for tier in self.tiers)
        return bisect.bisect_right(range(bound + 1), step, key=self.steps_for) - 1

    def batch(self, step: int) -> PlannedBatch:
        """Return the batch of `step` (0, 1, …), of all processes together. Safe to call from several threads."""
        with self._lock:
            number, at = self._find(step)
            epoch = self._epoch(number)
            which = int(epoch.tiers[at])
            tier, order = self.tiers[which], self._orders[which]
            start = (tier.batches(number) + int(epoch.numbers[at])) * tier.batch_size
            epochs, offsets = np.divmod(np.arange(start, start + tier.batch_size), len(tier.indices))
            rows = np.empty_like(offsets)
            for each in np.unique(epochs):
                here = epochs == each
                rows[here] = order(int(each))[offsets[here]]
            return PlannedBatch(step, which, tier.indices[rows], epochs)

    def position(self, step: int) -> int:
        """Return the number of examples that the steps before `step` consume."""
        with self._lock:
            number, at = self._find(step)
            return self._consumed(number) + int(self._epoch(number).consumed[at])

    def step_at(self, position: int) -> int:
        """Return the step that begins after `position` consumed examples. Raises ValueError if none does."""
        if position < 0:
            raise ValueError(f"a position in the data must be 0 or more examples, not {position}")
        # Every epoch consumes at least its own examples, so the search is bounded.
        epochs = range(position // self._examples + 1)
        number = bisect.bisect_right(epochs, position, key=self._consumed) - 1
        start = self._consumed(number)
        with self._lock:
            consumed = self._epoch(number).consumed
        at = int(np.searchsorted(consumed, position - start))
        if start + int(consumed[at]) != position:
            before, after = (start + int(consumed[near]) for near in (at - 1, at))
            raise ValueError(
                f"no step of these tiers begins after {position} examples; the nearest begin after {before} and {after}"
            )
        return self.steps_for(number) + at

    def _find(self, step: int) -> tuple[int, int]:
        """Return the epoch of `step` and the step's number within it."""
        if step < 0:
            raise ValueError(f"a step must be 0 or more, not {step}")
        epoch = self.epochs_finished(step)
        return epoch, step - self.steps_for(epoch)

    def _consumed(self, epochs: int) -> int:
        """Return the number of examples that the steps of the first `epochs` epochs consume."""
        return sum(tier.batches(epochs) * tier.batch_size for tier in self.tiers)

    def _order_epoch(self, epoch: int) -> _Epoch:
        counts = [tier.batches(epoch + 1) - tier.batches(epoch) for tier in self.tiers]
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[_shuffled(len(labels), self.seed, "steps", epoch)]
        numbers = np.empty_like(labels)
        for label, count in enumerate(counts):  # a tier's batches stay in the order of its stream
            numbers[labels == label] = np.arange(count)
        sizes = np.array([tier.batch_size for tier in self.tiers])
        return _Epoch(labels, numbers, np.concatenate([[0], np.cumsum(sizes[labels])]))


def _shuffled(count: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """Return the numbers below `count` in an order that the other arguments determine.

    Sorted raw draws: NumPy guarantees a bit generator's raw stream, but not `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch, *name.encode()]))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


def data_fingerprint(plan: BatchPlan, ids: np.ndarray, contents: Mapping[str, np.ndarray] = {}) -> dict[str, Any]:
    """Return the seed and, for each tier, its size, batch size and hashes of its examples and their order.

    `ids[i]` is example i's id; `contents` (name → uint64 (n,), from `examples.contents_of`) is hashed likewise.
    """
    tiers = {}
    for tier in plan.tiers:
        own = np.asarray(ids)[tier.indices].astype("<u8")
        arrays = {"set": np.sort(own), "order": own}
        for name, values in contents.items():
            arrays[name] = values[tier.indices][np.lexsort((values[tier.indices], own))]
        digests = {name: hashlib.sha256(array.tobytes()) for name, array in arrays.items()}
        tiers[tier.name] = {
            "examples": len(own),
            "batch": tier.batch_size,
            **{name: digest.hexdigest()[:16] for name, digest in digests.items()},
        }
    return {"seed": plan.seed, "tiers": tiers}


def make_tiers(buckets: Sequence[Bucket], batch_size_of: Callable[[Size], int]) -> list[Tier]:
    """Return the tiers of examples with these buckets, smallest resolution first, explicit size buckets last.

    Each resolution and number of frames is a tier. Size buckets of equal frames share one while the smallest fills 94 %
    of the token budget. The largest bucket that occurs sets the budget and, by `batch_size_of`, the batch size.
    """
    examples: dict[Bucket, list[int]] = defaultdict(list)
    for index, bucket in enumerate(buckets):
        examples[bucket].append(index)
    groups: list[list[Bucket]] = []
    for bucket in sorted(examples, key=_tier_order):
        if groups and _one_tier(groups[-1][0], bucket):
            groups[-1].append(bucket)
        else:
            groups.append([bucket])
    return [
        Tier(
            name=_tier_name(group[0]),
            indices=np.sort(np.concatenate([np.asarray(examples[bucket], np.int64) for bucket in group])),
            tokens=_budget(group[0].size),
            batch_size=batch_size_of(group[0].size),
        )
        for group in groups
    ]


def _tier_order(bucket: Bucket) -> tuple[Any, ...]:
    size, resolution = bucket.size, bucket.resolution
    return resolution is None, resolution or 0.0, size.frames, -size.tokens, size


def _one_tier(largest: Bucket, bucket: Bucket) -> bool:
    if (largest.resolution, largest.size.frames) != (bucket.resolution, bucket.size.frames):
        return False
    return bucket.resolution is not None or bucket.size.tokens >= _MIN_FILL * _budget(largest.size)


def _budget(size: Size) -> int:
    return -(-size.tokens // 16) * 16


def _tier_name(largest: Bucket) -> str:
    size, resolution = largest
    side = f"size{math.sqrt(size.width * size.height):.0f}" if resolution is None else f"{resolution:.10g}"
    return side if size.frames == 1 else f"{side}x{size.frames}f"


def padding(tiers: Sequence[Tier], tokens: np.ndarray) -> float:
    """Return the share of an epoch's tokens that is padding, 0 to 1, if example i has `tokens[i]` real ones."""
    budget = sum(tier.tokens * len(tier.indices) for tier in tiers)
    return 1.0 - sum(int(tokens[tier.indices].sum()) for tier in tiers) / budget


def describe(tiers: Sequence[Tier], buckets: Sequence[Bucket]) -> list[str]:
    """Return a table of tiers with their sizes, padding and buckets, and the number of compiled programs, as lines.

    `buckets[i]` is example i's. Steps per epoch are a mean over epochs, since a batch may span two.
    """
    tokens = np.array([bucket.size.tokens for bucket in buckets])
    lines = [f"{'tier':<16} {'examples':>9} {'tokens':>7} {'padding':>8} {'batch':>6} {'steps/epoch':>12}"]

    def row(name: str, examples: int, budget: str, share: float, batch: str, steps: float) -> str:
        return f"{name:<16} {examples:>9,} {budget:>7} {share:>8.1%} {batch:>6} {steps:>12,.1f}"

    for tier in tiers:
        examples = len(tier.indices)
        steps = examples / tier.batch_size
        share = padding([tier], tokens)
        lines.append(row(tier.name, examples, f"{tier.tokens:,}", share, f"{tier.batch_size:,}", steps))
        counts: dict[Size, int] = defaultdict(int)
        for index in tier.indices.tolist():
            counts[buckets[index].size] += 1
        sizes = (f"{size.width}×{size.height}: {counts[size]:,}" for size in sorted(counts))
        lines += textwrap.wrap(", ".join(sizes), 100, initial_indent="    ", subsequent_indent="    ")
    if len(tiers) > 1:
        steps = sum(len(tier.indices) / tier.batch_size for tier in tiers)
        lines.append(row("all", sum(len(tier.indices) for tier in tiers), "", padding(tiers, tokens), "", steps))
    lines.append(f"compiled programs: {len({(tier.tokens, tier.batch_size) for tier in tiers})}")
    return lines
