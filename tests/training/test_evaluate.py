"""Evaluation at the quantiles of the training times with fixed noise, whatever the batches."""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_jax.diffusion.objective import TimeDistribution
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, split_ids
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import Text
from anima_jax.training.evaluate import QUANTILES, Evaluation, padded_batches
from anima_jax.training.step import StepConfig, TrainBatch
from tests.models.networks import quick_jit, random_params
from tests.small_run import CONFIG

GRIDS = np.array([[1, 2, 3], [1, 3, 2], [1, 1, 6], [1, 2, 2], [1, 4, 1]], np.int32)
SHIFTED = StepConfig(compute_dtype=jnp.float32, times=TimeDistribution(sigmoid_scale=1.3, shift=3.0))
BY_SIZE = StepConfig(compute_dtype=jnp.float32, times=TimeDistribution(flux_shift=True))


@functools.cache
def model():
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    return graphdef, random_params(shapes)


@functools.cache
def evaluation(config):
    return Evaluation(model()[0], config)


@functools.cache
def examples():
    rng, count = np.random.default_rng(0), len(GRIDS)
    text = Text(
        rng.normal(size=(count, 3, CONFIG.adapter.source_width)).astype(np.float32),
        np.ones((count, 3), np.int32),
        rng.integers(0, 512, (count, 4)).astype(np.int32),
        np.ones((count, 4), np.int32),
    )
    latents = rng.normal(size=(count, 6, 64)).astype(np.float32)
    return TrainBatch(latents, GRIDS, split_ids(rng.integers(0, 2**62, count)), np.zeros(count, np.int32), text)


def evaluate(config, batch_size, change=lambda batch: batch):
    batches = [
        (change(jax.tree.map(lambda x, rows=rows: x[rows], examples())), weights)
        for rows, weights in padded_batches(len(GRIDS), batch_size)
    ]
    return evaluation(config)(model()[1], batches)


@quick_jit
def velocity(params, x_blc, times_b, text, grid_b3):
    net = parameters.merge(model()[0], params)
    # 512 rows of context, as diffusion-pipe has.
    context = jnp.pad(net.llm_adapter(text.source_bnd, text.target_ids_bm), ((0, 0), (0, 508), (0, 0)))
    return net.velocity(x_blc, grid_b3, times_b, context)


def losses_by_hand(times_qb):
    """Return the mean squared error of the velocity of each example at each time, (q, b)."""
    data, nine = examples(), len(QUANTILES)
    keys = example_keys(0, jnp.zeros(len(GRIDS), jnp.int32), data.ids_b2, Purpose.EVALUATION_NOISE)
    noise = np.asarray(normal(keys, data.latents_blc.shape[1:]))
    times = times_qb[..., None, None]
    x_t = (1 - times) * data.latents_blc + times * noise
    text, grids = jax.tree.map(lambda x: np.concatenate([x] * nine), (data.text, GRIDS))
    v = velocity(model()[1], x_t.reshape(-1, 6, 64).astype(np.float32), times_qb.ravel(), text, grids)
    errors = (np.asarray(v).reshape(x_t.shape) - (noise - data.latents_blc)) ** 2
    real = np.prod(GRIDS, 1)
    return np.stack([errors[:, row, : real[row]].mean((1, 2)) for row in range(len(GRIDS))], 1)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def test_losses_are_at_the_quantiles_of_the_training_times():
    normal_quantile = statistics.NormalDist().inv_cdf
    times = np.array([logistic(1.3 * normal_quantile(q)) for q in QUANTILES])
    times = 3 * times / (1 + 2 * times)
    expected = losses_by_hand(np.repeat(times[:, None], len(GRIDS), 1)).mean(1)
    found = evaluate(SHIFTED, 5)
    assert list(found) == [f"loss_quantile_0.{n}0" for n in range(1, 10)] + ["loss"]
    # 1e-4: the two programs sum float32 in another order.
    np.testing.assert_allclose(list(found.values())[:-1], expected, rtol=1e-4)
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-4)


def test_times_shifted_by_size_differ_between_examples():
    tokens = np.prod(GRIDS[:, 1:], 1)
    e_mu = np.exp(0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256))
    times = np.array([logistic(statistics.NormalDist().inv_cdf(q)) for q in QUANTILES])
    times_qb = e_mu / (e_mu + 1 / times[:, None] - 1)
    found = evaluate(BY_SIZE, 5)
    np.testing.assert_allclose(list(found.values())[:-1], losses_by_hand(times_qb).mean(1), rtol=1e-4)


def test_losses_do_not_depend_on_the_batch_size():
    whole, other = evaluate(SHIFTED, 5), evaluate(SHIFTED, 2)  # the last batch is padded
    assert other == pytest.approx(whole, rel=1e-5)  # float32 sums in another order


def test_noise_depends_only_on_the_example():
    first = evaluate(SHIFTED, 5)
    later = evaluate(SHIFTED, 5, lambda batch: batch._replace(epochs_b=batch.epochs_b + 3))
    assert later == first
    assert evaluation(SHIFTED)(model()[1], [(examples(), np.ones(5, np.float32))]) == first
    others = evaluate(SHIFTED, 5, lambda batch: batch._replace(ids_b2=batch.ids_b2 + 1))
    assert others["loss"] != pytest.approx(first["loss"], rel=1e-4)


def test_padding_does_not_count_even_if_it_is_not_finite():
    def spoiled(batch):
        latents = batch.latents_blc.copy()
        latents[3:] = np.nan
        return batch._replace(latents_blc=latents)

    weights = np.array([1, 1, 1, 0, 0], np.float32)
    clean = evaluation(SHIFTED)(model()[1], [(examples(), weights)])
    assert evaluation(SHIFTED)(model()[1], [(spoiled(examples()), weights)]) == clean
    with pytest.raises(ValueError, match="above 0"):
        evaluation(SHIFTED)(model()[1], [(examples(), 0 * weights)])


@given(st.integers(1, 50), st.integers(1, 20))
def test_padded_batches_contain_every_number_once(count, size):
    batches = list(padded_batches(count, size))
    assert all(len(rows) == len(weights) == size for rows, weights in batches)
    counted = np.concatenate([rows[weights == 1] for rows, weights in batches])
    np.testing.assert_array_equal(counted, np.arange(count))
    assert sum(weights.sum() for _, weights in batches) == count
    assert all(rows.max() < count for rows, _ in batches)
