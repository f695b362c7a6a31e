"""A configuration with values that are known only at run time: the replicas of the mesh and of a resumed run."""

import dataclasses
import math

from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucketing
from anima_jax.data.dataset import TrainingData
from anima_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run: batch sizes and intervals that follow from its configuration and number of replicas.

    A replica is a device or group of devices that processes its own examples; the mesh has `data` × `fsdp` of them.
    `restored_replicas` is the number with which a resumed run first started; it still determines the examples per step.
    """

    config: MainConfig
    replicas: int
    restored_replicas: int | None = None

    @property
    def batch_replicas(self) -> int:
        """Number of replicas from which the examples per step are computed; checkpoints record it."""
        return self.restored_replicas or self.replicas

    def micro_batch(self, size: Size) -> int:
        """Return the number of examples of this size that one replica processes at once."""
        own = self.config.image_micro_batch_size_per_gpu if size.frames == 1 else None
        return _nearest(self.config.micro_batch_size_per_gpu if own is None else own, size)

    def eval_micro_batch(self, size: Size) -> int:
        """Return the number of examples of this size that one replica evaluates at once."""
        own = self.config.eval_image_micro_batch_size_per_gpu if size.frames == 1 else None
        entries = self.config.eval_micro_batch_size_per_gpu if own is None else own
        return self.micro_batch(size) if entries is None else _nearest(entries, size)

    def eval_batch(self, size: Size) -> int:
        """Return the number of examples of this size that all replicas together evaluate at once."""
        return self.eval_micro_batch(size) * self.replicas

    def global_batch(self, size: Size) -> int:
        """Return the number of examples in an optimizer step on examples of this size."""
        own = self.micro_batch(size) * self.config.gradient_accumulation_steps
        return self.config.global_batch_size or own * self.batch_replicas

    def accumulation_of(self, size: Size) -> int:
        """Return the number of micro-batches in an optimizer step on examples of this size.

        It is the smallest that keeps a replica's micro-batches to at most `micro_batch` examples, all equally large.
        Raises UserError if the number of replicas does not divide the examples of the step.
        """
        total, replicas = self.global_batch(size), self.replicas
        own, left = divmod(total, replicas)
        if left:
            fit = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            restored = self.restored_replicas and not self.config.global_batch_size
            origin = "the run began with it" if restored else "global_batch_size"
            raise UserError(
                f"[mesh] data × fsdp = {replicas} must divide the {total} examples of a step ({origin}); "
                f"expected data × fsdp = one of {fit}"
            )
        return next(n for n in range(1, own + 1) if own % n == 0 and own // n <= self.micro_batch(size))

    def accumulations(self, data: TrainingData) -> list[int]:
        """Return the number of micro-batches in a step of each tier. Raises UserError as `accumulation_of`."""
        return list(map(self.accumulation_of, data.largest_sizes))

    @property
    def save_every_steps(self) -> int | None:
        """Optimizer steps between two exports, from steps or examples; None: by epochs only."""
        return self._steps(self.config.save_every_n_steps, self.config.save_every_n_examples)

    @property
    def eval_every_steps(self) -> int | None:
        """Optimizer steps between two evaluations, from steps or examples; None: by epochs only."""
        return self._steps(self.config.eval_every_n_steps, self.config.eval_every_n_examples)

    def _steps(self, steps: int | None, examples: int | None) -> int | None:
        """Return `steps`, or `examples`, if set, divided by the largest batch that the data can have (at least 1)."""
        if examples is None:
            return steps
        sizes = [size for source in self.config.data.sources for size in Bucketing.of(source).sizes]
        return max(1, examples // max(map(self.global_batch, sizes)))


def _nearest(entries: int | tuple[tuple[int, int], ...], size: Size) -> int:
    """Return the batch size for examples of this size: of (side, batch size) entries, that of the nearest side."""
    if isinstance(entries, int):
        return entries
    side = math.sqrt(size.width * size.height)
    return min(entries, key=lambda entry: abs(entry[0] - side))[1]
