"""Which examples make up which batch, and which batch is which step's: a pure function of the seed and the step number.

A tier is what one compiled program takes: the examples of one resolution and number of frames, whatever their aspect
ratio. It is an endless stream, shuffled anew each epoch and cut into batches; what does not fill a batch at the end of
an epoch opens the next one's first batch, so nothing is dropped. With n examples and batches of b, epoch e (0, 1, …) is
the tier's batches from ⌈e·n/b⌉ to ⌈(e+1)·n/b⌉: it ends with the one that uses its last example. Each epoch runs those
batches of every tier, shuffled among each other.
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

_FULLNESS = 0.94  # explicit size buckets share a program if each fills this much of its token budget


@dataclasses.dataclass(frozen=True, eq=False)
class Tier:
    """Examples that one compiled program takes, `batch_size` (over all processes; may exceed them) at a time."""

    name: str  # seeds the order, so that other tiers never change it
    indices: np.ndarray  # the examples' numbers, int64 (n,)
    tokens: int  # an example's token budget: the largest bucket's, rounded up to 16
    batch_size: int

    def __post_init__(self):
        if len(self.indices) < 1 or self.batch_size < 1:
            sizes = f"{len(self.indices)} and {self.batch_size}"
            raise ValueError(f"tier {self.name!r} needs examples and a batch size, not {sizes}")

    def batches(self, epochs: int) -> int:
        """Number of batches that hold every example of the first `epochs` epochs."""
        return -(-epochs * len(self.indices) // self.batch_size)


class PlannedBatch(NamedTuple):
    """The examples of one step: their numbers and the epoch of each (a batch may straddle epochs), int64 (b,)."""

    step: int
    tier: int
    indices: np.ndarray
    epochs: np.ndarray

    def take(self, rows: np.ndarray) -> "PlannedBatch":
        """These rows of the batch alone, as one of several processes reads them."""
        return self._replace(indices=self.indices[rows], epochs=self.epochs[rows])


class _Epoch(NamedTuple):
    """Steps of one epoch: the tier of each, its place among the tier's batches of the epoch, examples before it."""

    tiers: np.ndarray  # (s,)
    places: np.ndarray  # (s,)
    consumed: np.ndarray  # (s + 1,), counted from the epoch's first step


class BatchPlan:
    """The batches of all tiers, step by step from 0. The number of examples consumed is the whole state of a run."""

    def __init__(self, tiers: Sequence[Tier], seed: int):
        if len({tier.name for tier in tiers}) != len(tiers) or not tiers:
            raise ValueError(f"a plan needs tiers of different names, not {[tier.name for tier in tiers]}")
        self.tiers, self.seed = tuple(tiers), seed
        self._examples = sum(len(tier.indices) for tier in tiers)
        self._epoch = functools.lru_cache(maxsize=2)(self._order_epoch)
        # A cache of its own for each tier: a small one that runs through many epochs in a batch evicts no large one's.
        self._orders = [
            functools.lru_cache(maxsize=2)(functools.partial(_shuffled, len(tier.indices), seed, tier.name))
            for tier in tiers
        ]
        self._lock = threading.Lock()  # threads that reach a new epoch at once shuffle it once

    def steps_for(self, epochs: int) -> int:
        """Number of steps from the start through the one that uses the last example of the last of `epochs` epochs."""
        return sum(tier.batches(epochs) for tier in self.tiers)

    def epochs_finished(self, step: int) -> int:
        """Number of epochs whose every example is in the steps before `step`."""
        bound = min(step * tier.batch_size // len(tier.indices) for tier in self.tiers)
        return bisect.bisect_right(range(bound + 1), step, key=self.steps_for) - 1

    def batch(self, step: int) -> PlannedBatch:
        """The batch of `step` (0, 1, …), of all processes together. Threads may call it at once."""
        with self._lock:
            number, place = self._find(step)
            epoch = self._epoch(number)
            which = int(epoch.tiers[place])
            tier, order = self.tiers[which], self._orders[which]
            start = (tier.batches(number) + int(epoch.places[place])) * tier.batch_size
            epochs, places = np.divmod(np.arange(start, start + tier.batch_size), len(tier.indices))
            rows = np.empty_like(places)
            for each in np.unique(epochs):
                here = epochs == each
                rows[here] = order(int(each))[places[here]]
            return PlannedBatch(step, which, tier.indices[rows], epochs)

    def position(self, step: int) -> int:
        """Number of examples that the steps before `step` consume."""
        with self._lock:
            number, place = self._find(step)
            return self._consumed(number) + int(self._epoch(number).consumed[place])

    def step_at(self, position: int) -> int:
        """The step that begins after `position` consumed examples; ValueError if none does."""
        if position < 0:
            raise ValueError(f"a position in the data is 0 or more examples, not {position}")
        # Every epoch consumes at least its own examples, which bounds the search.
        epochs = range(position // self._examples + 1)
        number = bisect.bisect_right(epochs, position, key=self._consumed) - 1
        start = self._consumed(number)
        with self._lock:
            consumed = self._epoch(number).consumed
        place = int(np.searchsorted(consumed, position - start))
        if start + int(consumed[place]) != position:
            before, after = (start + int(consumed[near]) for near in (place - 1, place))
            raise ValueError(
                f"no step of these tiers begins after {position} examples; the nearest begin after {before} and {after}"
            )
        return self.steps_for(number) + place

    def _find(self, step: int) -> tuple[int, int]:
        """The epoch that runs `step`, and the step's place in it."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        epoch = self.epochs_finished(step)
        return epoch, step - self.steps_for(epoch)

    def _consumed(self, epochs: int) -> int:
        """Number of examples that the steps of the first `epochs` epochs consume."""
        return sum(tier.batches(epochs) * tier.batch_size for tier in self.tiers)

    def _order_epoch(self, epoch: int) -> _Epoch:
        counts = [tier.batches(epoch + 1) - tier.batches(epoch) for tier in self.tiers]
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[_shuffled(len(labels), self.seed, "steps", epoch)]
        places = np.empty_like(labels)
        for label, count in enumerate(counts):  # a tier's batches keep the order of its stream
            places[labels == label] = np.arange(count)
        sizes = np.array([tier.batch_size for tier in self.tiers])
        return _Epoch(labels, places, np.concatenate([[0], np.cumsum(sizes[labels])]))


def _shuffled(count: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """The numbers below `count` in an order that the other arguments determine.

    Sorted raw draws: NumPy promises that a bit generator's raw stream stays as it is, but not `Generator.permutation`.
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
    """Tiers of the examples whose buckets are given, smallest resolution first, explicit size buckets last.

    A resolution and number of frames is a tier. Size buckets of equal frames share one as long as the smallest fills
    94 % of the token budget. The largest bucket that occurs decides the budget and, by `batch_size_of`, the batch size.
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


def _tier_order(bucket: Bucket) -> tuple:
    size, resolution = bucket.size, bucket.resolution
    return resolution is None, resolution or 0.0, size.frames, -size.tokens, size


def _one_tier(largest: Bucket, bucket: Bucket) -> bool:
    if (largest.resolution, largest.size.frames) != (bucket.resolution, bucket.size.frames):
        return False
    return bucket.resolution is not None or bucket.size.tokens >= _FULLNESS * _budget(largest.size)


def _budget(size: Size) -> int:
    return -(-size.tokens // 16) * 16


def _tier_name(largest: Bucket) -> str:
    size, resolution = largest
    side = f"size{math.sqrt(size.width * size.height):.0f}" if resolution is None else f"{resolution:.10g}"
    return side if size.frames == 1 else f"{side}x{size.frames}f"


def padding(tiers: Sequence[Tier], tokens: np.ndarray) -> float:
    """Share of an epoch's tokens that are padding, 0 to 1, if example i has `tokens[i]` of its own."""
    budget = sum(tier.tokens * len(tier.indices) for tier in tiers)
    return 1.0 - sum(int(tokens[tier.indices].sum()) for tier in tiers) / budget


def describe(tiers: Sequence[Tier], buckets: Sequence[Bucket]) -> list[str]:
    """Lines for a person: what each tier holds and costs, its buckets with counts, and how many programs are compiled.

    `buckets[i]` is example i's. Steps an epoch are the mean over epochs, since a batch may straddle two.
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
