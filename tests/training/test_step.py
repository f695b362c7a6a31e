"""One step of training: the same whatever the padding, the micro-batches or the order of examples; EMA; dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.diffusion.objective import Loss, TimeDistribution
from anima_jax.diffusion.randomness import Purpose, example_keys, normal, split_ids, uniform
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import AdapterConfig, Text
from anima_jax.training.step import Batch, StepConfig, batch_loss, compile_step, init_state, train_step, update_ema
from tests.models.networks import quick_jit, random_params

CONFIG = DiTConfig(32, 2, 2, 64, 16, 4, adapter=AdapterConfig(16, 1, 2, 32, 12, 16, 30))
FLOAT32 = StepConfig(compute_dtype=jnp.float32, seed=3)


@functools.cache
def model():
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    return graphdef, random_params(shapes)


def batch(size=4, length=6):
    rng = np.random.default_rng(0)
    text = Text(
        rng.normal(size=(size, 5, 12)).astype(np.float32),
        np.ones((size, 5), np.int32),
        rng.integers(0, 30, (size, 4)).astype(np.int32),
        np.ones((size, 4), np.int32),
    )
    latents = rng.normal(size=(size, length, 64)).astype(np.float32)
    ids = split_ids(rng.integers(0, 2**62, size))
    return Batch(latents, np.tile([[1, 2, 3]], (size, 1)), ids, np.zeros(size, np.int32), text)


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


@functools.partial(quick_jit, static_argnames="config")
def _loss_and_gradients(params, batch, unconditional, config):
    graphdef, _ = model()
    return jax.value_and_grad(lambda p: batch_loss(parameters.merge(graphdef, p), batch, unconditional, config))(params)


def loss_and_gradients(batch, unconditional=None, *, config=FLOAT32):
    return _loss_and_gradients(model()[1], batch, unconditional, config)


def one_step_of_descent(config, accumulation=1):
    """Metrics of a step on `batch()`, and each parameter's gradient: what descent at rate 1 took away."""
    graphdef, params = model()
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optax.sgd(1.0), config=config, accumulation=accumulation
    )
    state, metrics = quick_jit(step)(init_state(params, optax.sgd(1.0), config), {}, batch(), None)
    assert all(value.dtype == jnp.float32 for value in state.params.values())
    return metrics, {path: np.asarray(params[path] - state.params[path]) for path in params}


def test_the_loss_is_the_mean_squared_error_of_the_velocity_at_the_drawn_times_and_noise():
    graphdef, params = model()
    data = batch()
    keys = functools.partial(example_keys, 3, data.epochs_b, data.ids_b2)
    noise = np.asarray(normal(keys(Purpose.NOISE), (6, 64)))
    times = np.asarray(TimeDistribution().times(uniform(keys(Purpose.TIME)), data.grid_b3))
    x_t = (1 - times[:, None, None]) * data.latents_blc + times[:, None, None] * noise

    @quick_jit
    def velocity_of(params, x_t, times):
        net = parameters.merge(graphdef, params)
        # 512 rows of context, stored: what diffusion-pipe feeds.
        context = jnp.pad(net.llm_adapter(data.text.source_bnd, data.text.target_ids_bm), ((0, 0), (0, 508), (0, 0)))
        return net.velocity(x_t, (1, 2, 3), times, context)

    velocity = velocity_of(params, x_t, times)
    expected = np.mean((np.asarray(velocity) - (noise - data.latents_blc)) ** 2)
    assert float(loss_and_gradients(data)[0]) == pytest.approx(expected, rel=1e-5)


def test_padding_the_token_budget_changes_neither_loss_nor_gradients():
    data = batch()
    padded = data._replace(latents_blc=np.pad(data.latents_blc, ((0, 0), (0, 10), (0, 0)), constant_values=7.0))
    (loss, grads), (loss_padded, grads_padded) = loss_and_gradients(data), loss_and_gradients(padded)
    assert float(loss_padded) == pytest.approx(float(loss), rel=1e-5)
    for path, grad in grads.items():
        np.testing.assert_allclose(grads_padded[path], grad, rtol=1e-3, atol=1e-5, err_msg=path)


def run(config, data, steps=1, unconditional=None):
    graphdef, params = model()
    optimizer = optax.adam(1e-3)
    step = compile_step(graphdef, optimizer, config)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, config)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, {}, data, unconditional)
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_give_the_full_batchs_loss_and_gradients(accumulation):
    whole, grads = one_step_of_descent(FLOAT32)
    split, split_grads = one_step_of_descent(FLOAT32, accumulation)
    # 1e-6: they differ in the order of float32 sums alone.
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert float(split.grad_norm) == pytest.approx(float(whole.grad_norm), rel=1e-6)
    largest = max(np.abs(grad).max() for grad in grads.values())
    for path, grad in grads.items():
        assert np.abs(split_grads[path] - grad).max() < 2e-6 * largest, path


def test_what_an_example_contributes_does_not_depend_on_its_place_in_the_batch():
    data = batch()
    order = np.array([2, 0, 3, 1])
    assert float(loss_and_gradients(take(data, order))[0]) == pytest.approx(
        float(loss_and_gradients(data)[0]), rel=1e-6
    )


def test_a_mask_weights_the_loss_of_each_latent_pixel():
    data = batch()
    halves = np.full((*data.latents_blc.shape[:2], 4), 0.5, np.float32)
    assert float(loss_and_gradients(data._replace(mask_blp=halves))[0]) == pytest.approx(
        0.5 * float(loss_and_gradients(data)[0]), rel=1e-6
    )
    nothing = np.zeros_like(halves)
    assert float(loss_and_gradients(data._replace(mask_blp=nothing))[0]) == 0.0


def test_a_new_epoch_draws_new_noise():
    data = batch()
    later = data._replace(epochs_b=data.epochs_b + 1)
    assert float(loss_and_gradients(later)[0]) != pytest.approx(float(loss_and_gradients(data)[0]), rel=1e-3)


def test_dropped_captions_are_replaced_by_the_empty_one_and_kept_ones_are_not():
    data = batch(size=8)
    empty = Text(np.zeros((1, 5, 12), "f4"), np.zeros((1, 5), "i4"), np.array([[1, 0, 0, 0]]), np.array([[1, 0, 0, 0]]))
    draws = np.asarray(uniform(example_keys(3, data.epochs_b, data.ids_b2, Purpose.CAPTION_DROPOUT)))
    fraction = float(np.median(draws))
    by_hand = jax.tree.map(
        lambda e, g: np.where((draws < fraction).reshape(-1, *[1] * (g.ndim - 1)), e, g), empty, data.text
    )
    dropping = StepConfig(compute_dtype=jnp.float32, seed=3, uncond_fraction=fraction)
    expected = loss_and_gradients(data._replace(text=by_hand))[0]
    assert float(loss_and_gradients(data, empty, config=dropping)[0]) == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) != pytest.approx(float(loss_and_gradients(data)[0]), rel=1e-5)


def test_the_loss_falls_on_one_batch_and_the_average_follows_the_weights():
    config = StepConfig(compute_dtype=jnp.float32, seed=3, ema_decay=0.9, remat="none")
    state, losses = run(config, batch(), steps=30)
    assert losses[-1] < 0.7 * losses[0]
    _, start = model()
    for path in ("blocks.mlp.layer1.kernel", "final_layer.linear.kernel"):
        moved = float(jnp.linalg.norm(state.params[path] - start[path]))
        behind = float(jnp.linalg.norm(state.params[path] - state.ema[path]))
        assert 0 < behind < moved


def test_the_average_is_the_weighted_sum_of_its_definition():
    values = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    ema, expected = {"a": jnp.asarray(values[0])}, values[0].astype(np.float64)
    for step, value in enumerate(values):
        decay = min(0.8, (1 + step) / (10 + step))
        ema = update_ema(ema, {"a": jnp.asarray(value)}, jnp.array(step), 0.8)
        expected = decay * expected + (1 - decay) * value
    np.testing.assert_allclose(ema["a"], expected, rtol=1e-5)


def test_bfloat16_compute_trains_float32_weights_close_to_float32():
    loss, grads = loss_and_gradients(batch())
    metrics, rounded = one_step_of_descent(dataclasses.replace(FLOAT32, compute_dtype=jnp.bfloat16))
    assert float(metrics.loss) == pytest.approx(float(loss), rel=2e-2)
    difference = np.sqrt(sum(np.sum((rounded[path] - np.asarray(grads[path])) ** 2) for path in grads))
    assert difference < 5e-2 * np.sqrt(sum(np.sum(np.asarray(grad) ** 2) for grad in grads.values()))


def test_losses_are_chosen_by_the_configuration():
    assert StepConfig(loss=Loss("huber_delta", 0.1)) != StepConfig()
    huber = StepConfig(compute_dtype=jnp.float32, seed=3, loss=Loss("huber_delta", 0.1))
    assert float(loss_and_gradients(batch(), config=huber)[0]) < float(loss_and_gradients(batch())[0])
