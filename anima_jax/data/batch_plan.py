"""The data order: the examples of each batch and the batch of each step, a pure function of seed and step.

A tier contains the examples of one resolution, frame count and number of references, with any aspect ratio, for one
compiled program. Each tier is an endless stream that is reshuffled every epoch and cut into batches. Examples that do
not fill a batch at the end of an epoch go into the first batch of the next epoch, so no example is dropped. With n
examples and batch size b, epoch e (0, 1, …) consists of the tier's batches ⌈e·n/b⌉ up to, but not including,
⌈(e+1)·n/b⌉; it ends with the batch that uses its last example. Each epoch runs its batches of all tiers in random
order.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
import textwrap
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucket

_MIN_FILL = 0.94  # explicit size buckets share a tier if each fills this fraction of the token budget


@dataclasses.dataclass(frozen=True, eq=False)
class Tier:
    """A group of examples that share one compiled program. `batch_size` is global and may exceed their number."""

    name: str  # seeds the order, which therefore does not depend on other tiers
    indices: np.ndarray  # of the examples, int64 (n,)
    tokens: int  # token budget per example: tokens of the largest bucket, rounded up to a multiple of 16
    batch_size: int
    full: bool = False  # whether all examples have that many tokens, so that none is padded

    @property
    def program(self) -> tuple[int, int, bool]:
        """Tiers for which this is equal share a compiled program."""
        return self.tokens, self.batch_size, self.full

    def __post_init__(self):
        if len(self.indices) < 1 or self.batch_size < 1:
            sizes = f"{len(self.indices)} and {self.batch_size}"
            raise ValueError(f"tier {self.name!r}: expected examples and a batch size, found {sizes}")

    def batches(self, epochs: int) -> int:
        """Return the number of batches needed to use every example of the first `epochs` epochs."""
        return -(-epochs * len(self.indices) // self.batch_size)


class PlannedBatch(NamedTuple):
    """The examples of one step: their indices and their epochs (a batch may span epochs), both int64 (b,)."""

    step: int
    tier: int
    indices: np.ndarray
    epochs: np.ndarray

    def take(self, rows: np.ndarray) -> "PlannedBatch":
        """Return the given rows of the batch, such as those of one process."""
        return self._replace(indices=self.indices[rows], epochs=self.epochs[rows])


class _Epoch(NamedTuple):
    """The steps of one epoch: the tier of each, its batch number within tier and epoch, and the examples before it."""

    tiers: np.ndarray  # (s,)
    numbers: np.ndarray  # (s,)
    consumed: np.ndarray  # (s + 1,), counted from the epoch's first step


class BatchPlan:
    """The batch of every step from 0, over all tiers. A run's only data state is the number of examples consumed."""

    def __init__(self, tiers: Sequence[Tier], seed: int):
        if len({tier.name for tier in tiers}) != len(tiers) or not tiers:
            raise ValueError(f"expected tiers of different names, found {[tier.name for tier in tiers]}")
        self.tiers, self.seed = tuple(tiers), seed
        self._examples = sum(len(tier.indices) for tier in tiers)
        self._epoch = functools.lru_cache(maxsize=2)(self._order_epoch)
        # One cache per tier: a batch of a small tier may span many epochs and must not evict a large tier's order.
        self._orders = [
            functools.lru_cache(maxsize=2)(functools.partial(_shuffled, len(tier.indices), seed, tier.name))
            for tier in tiers
        ]
        self._lock = threading.Lock()  # threads that reach a new epoch at the same time shuffle it once

    def steps_for(self, epochs: int) -> int:
        """Return the number of steps needed to use every example of the first `epochs` epochs."""
        return sum(tier.batches(epochs) for tier in self.tiers)

    def epochs_finished(self, step: int) -> int:
        """Return the number of epochs whose examples have all been used before `step`."""
        bound = min(step * tier.batch_size // len(tier.indices) for tier in self.tiers)
        return bisect.bisect_right(range(bound + 1), step, key=self.steps_for) - 1

    def batch(self, step: int) -> PlannedBatch:
        """Return the batch of `step` (0, 1, …) over all processes. Thread-safe."""
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
        """Return the number of examples consumed before `step`."""
        with self._lock:
            number, at = self._find(step)
            return self._consumed(number) + int(self._epoch(number).consumed[at])

    def step_at(self, position: int) -> int:
        """Return the step that begins after `position` consumed examples. Raises ValueError if there is none."""
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
        """Return the epoch of `step` and the step's index within it."""
        if step < 0:
            raise ValueError(f"a step must be 0 or more, not {step}")
        epoch = self.epochs_finished(step)
        return epoch, step - self.steps_for(epoch)

    def _consumed(self, epochs: int) -> int:
        """Return the number of examples consumed by the steps of the first `epochs` epochs."""
        return sum(tier.batches(epochs) * tier.batch_size for tier in self.tiers)

    def _order_epoch(self, epoch: int) -> _Epoch:
        counts = [tier.batches(epoch + 1) - tier.batches(epoch) for tier in self.tiers]
        labels = np.repeat(np.arange(len(counts)), counts)
        labels = labels[_shuffled(len(labels), self.seed, "steps", epoch)]
        numbers = np.empty_like(labels)
        for label, count in enumerate(counts):  # each tier's batches keep the order of its stream
            numbers[labels == label] = np.arange(count)
        sizes = np.array([tier.batch_size for tier in self.tiers])
        return _Epoch(labels, numbers, np.concatenate([[0], np.cumsum(sizes[labels])]))


def _shuffled(count: int, seed: int, name: str, epoch: int) -> np.ndarray:
    """Return a permutation of range(count), a pure function of the arguments.

    It sorts raw draws, because NumPy guarantees the raw stream of a bit generator, but not `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch, *name.encode()]))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.setflags(write=False)
    return order


def data_fingerprint(plan: BatchPlan, ids: np.ndarray, contents: Mapping[str, np.ndarray] = {}) -> dict[str, Any]:
    """Return the seed and, for each tier, its size, batch size and hashes of its examples and their order.

    `ids[i]` is the id of example i. The arrays of `contents` (name → uint64 (n,), from `examples.contents_of`) are
    hashed too.
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
    """Group examples into tiers, smallest resolution first, explicit size buckets last.

    `buckets[i]` is the bucket of example i. Each combination of resolution, frame count and number of references is one
    tier. Explicit size buckets with the same numbers of frames and references share a tier as long as the smallest
    fills 94 % of the token budget. The largest bucket in a tier sets its token budget and, through `batch_size_of`, its
    batch size.
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
            tokens=_budget(group[0]),
            batch_size=batch_size_of(group[0].size),
            full=all(bucket.tokens == _budget(group[0]) for bucket in group),
        )
        for group in groups
    ]


def _tier_order(bucket: Bucket) -> tuple[Any, ...]:
    size, resolution, references = bucket
    return resolution is None, resolution or 0.0, size.frames, references, -size.tokens, size


def _one_tier(largest: Bucket, bucket: Bucket) -> bool:
    kinds = [(each.resolution, each.size.frames, each.references) for each in (largest, bucket)]
    return kinds[0] == kinds[1] and (bucket.resolution is not None or bucket.tokens >= _MIN_FILL * _budget(largest))


def _budget(bucket: Bucket) -> int:
    return -(-bucket.tokens // 16) * 16


def _tier_name(largest: Bucket) -> str:
    size, resolution, references = largest
    side = f"size{math.sqrt(size.width * size.height):.0f}" if resolution is None else f"{resolution:.10g}"
    return side + (f"x{size.frames}f" if size.frames > 1 else "") + (f"+{references}ref" if references else "")


def padding(tiers: Sequence[Tier], tokens: np.ndarray) -> float:
    """Return the fraction of an epoch's tokens that is padding, 0 to 1; example i has `tokens[i]` real tokens."""
    budget = sum(tier.tokens * len(tier.indices) for tier in tiers)
    return 1.0 - sum(int(tokens[tier.indices].sum()) for tier in tiers) / budget


def describe(tiers: Sequence[Tier], buckets: Sequence[Bucket]) -> list[str]:
    """Return the lines of a table of tiers (sizes, padding, buckets), followed by the number of compiled programs.

    `buckets[i]` is the bucket of example i. Steps per epoch are an average, because a batch may span epochs.
    """
    tokens = np.array([bucket.tokens for bucket in buckets])
    lines = [f"{'tier':<16} {'examples':>9} {'tokens':>7} {'padding':>8} {'batch':>6} {'steps/epoch':>12}"]

    def row(name: str, examples: int, budget: str, share: float, batch: str, steps: float) -> str:
        return f"{name:<16} {examples:>9,} {budget:>7} {share:>8.1%} {batch:>6} {steps:>12,.1f}"

    for tier in tiers:
        examples = len(tier.indices)
        steps = examples / tier.batch_size
        share = padding([tier], tokens)
        lines.append(row(tier.name, examples, f"{tier.tokens:,}", share, f"{tier.batch_size:,}", steps))
        counts = Counter((buckets[index].size, str(buckets[index])) for index in tier.indices.tolist())
        sizes = (f"{shown}: {count:,}" for (_, shown), count in sorted(counts.items()))
        lines += textwrap.wrap(", ".join(sizes), 100, initial_indent="    ", subsequent_indent="    ")
    if len(tiers) > 1:
        steps = sum(len(tier.indices) / tier.batch_size for tier in tiers)
        lines.append(row("all", sum(len(tier.indices) for tier in tiers), "", padding(tiers, tokens), "", steps))
    lines.append(f"compiled programs: {len({tier.program for tier in tiers})}")
    return lines
