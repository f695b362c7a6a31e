"""Which examples make up which batch: an endless stream, shuffled anew each epoch and cut into batches.

The stream is a pure function of the seed, and the number of examples consumed is the whole state: a run resumes from
that number. Nothing is dropped: what does not fill a batch at the end of an epoch opens the next one's first batch.
"""

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Order of `num_examples` examples in batches of `batch_size` (which may exceed `num_examples`)."""

    num_examples: int
    batch_size: int
    seed: int

    def __post_init__(self):
        if self.num_examples < 1 or self.batch_size < 1:
            raise ValueError(f"a plan needs examples and a batch size, not {self.num_examples} and {self.batch_size}")

    def indices(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """The batch that begins after `position` examples were consumed: example indices and epochs, int64 (b,).

        The epoch (0, 1, …) is that of each example: a batch may straddle two or more.
        """
        epochs, places = np.divmod(np.arange(position, position + self.batch_size), self.num_examples)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = _permutation(self.num_examples, self.seed, int(epoch))[places[here]]
        return indices, epochs

    def steps_for(self, epochs: int) -> int:
        """Number of steps from the start of the stream through the one that uses the last example of the last epoch."""
        return -(-epochs * self.num_examples // self.batch_size)

    def epochs_finished(self, position: int) -> int:
        """Number of epochs whose last example is among the first `position` examples."""
        return position // self.num_examples


@functools.lru_cache(maxsize=4)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the examples in one epoch.

    Sorted raw draws: NumPy promises that a bit generator's raw stream stays as it is, but not `Generator.permutation`.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed % 2**64, epoch]))
    order = np.argsort(bits.random_raw(num_examples), kind="stable")
    order.setflags(write=False)
    return order
