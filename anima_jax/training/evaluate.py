"""Losses on held-out examples at nine fixed times with fixed noise.

As in diffusion-pipe (train.py, `evaluate`): the times are quantiles of the distribution that training draws from. An
example's noise depends only on its id, so the losses of different evaluations are comparable, whatever the seed, batch
size and devices of the runs. Axes: q quantiles, b batch, l image tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from anima_jax.compiler import compiler_options
from anima_jax.diffusion.randomness import Purpose, example_keys, normal
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel.mesh import current_mesh, replicated
from anima_jax.training.step import StepConfig, TrainBatch, example_losses

Item = TypeVar("Item")

QUANTILES = tuple(n / 10 for n in range(1, 10))

NOISE_SEED = 0


def padded_batches(count: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers below `count` in batches (b,), with their weights (b,): 0 for the padding of the last batch."""
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        yield np.minimum(rows, count - 1), (rows < count).astype(np.float32)


class Evaluation:
    """A jitted function of the losses at all nine times; it is compiled for each new batch shape."""

    def __init__(self, graphdef: nnx.GraphDef[Any], config: StepConfig):
        def losses_of(params: Params, batch: TrainBatch) -> Array:
            """Return the loss of each example at the time of each quantile, (q, b)."""
            model = merge(graphdef, cast_to_compute(params, config.compute_dtype))
            first_epoch_b = jnp.zeros(batch.ids_b2.shape[0], jnp.int32)
            keys_b = example_keys(NOISE_SEED, first_epoch_b, batch.ids_b2, Purpose.EVALUATION_NOISE)
            noise_blc = normal(keys_b, batch.latents_blc.shape[1:])

            def at(quantile: Array) -> Array:
                times_b = config.times.times(jnp.broadcast_to(quantile, keys_b.shape), batch.grid_b3)
                return example_losses(model, batch, noise_blc, times_b, config)

            return jax.lax.map(at, jnp.array(QUANTILES, jnp.float32))

        mesh = current_mesh()
        self._losses = jax.jit(losses_of, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))

    def __call__(self, params: Params, batches: Iterable[tuple[TrainBatch, np.ndarray]]) -> dict[str, float]:
        """Return `loss_quantile_0.10` … `loss_quantile_0.90`, each a mean over the examples, and their mean, `loss`.

        `params` are all parameters, trained and frozen. Each batch comes with example weights (b,): 0 for padding.
        Raises ValueError if no example has a weight above 0.
        """
        total_q, weight = np.zeros(len(QUANTILES)), 0.0
        for losses_qb, weights_b in _one_behind((self._losses(params, batch), weights) for batch, weights in batches):
            real_b = weights_b > 0
            total_q += np.asarray(losses_qb, np.float64)[:, real_b] @ weights_b[real_b].astype(np.float64)
            weight += float(weights_b.sum(dtype=np.float64))
        if not weight:
            raise ValueError("an evaluation needs examples of a weight above 0")
        means = (total_q / weight).tolist()
        figures = {f"loss_quantile_{q:.2f}": loss for q, loss in zip(QUANTILES, means, strict=True)}
        return figures | {"loss": sum(means) / len(means)}


def _one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next one has started, so that the device computes while the host reads."""
    waiting: list[Item] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting
