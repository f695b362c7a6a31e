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
from anima_jax.models.llm_adapter import LLMAdapterConfig, Text
from anima_jax.training.selfcheck import self_check
from anima_jax.training.step import (
    StepConfig,
    TrainBatch,
    apply_gradients,
    compile_step,
    init_state,
    loss_fn,
    train_step,
    update_ema,
)
from tests.models.networks import quick_jit, random_params

CONFIG = DiTConfig(32, 2, 2, 64, 16, 4, adapter=LLMAdapterConfig(16, 1, 2, 32, 12, 16, 30))
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
    return TrainBatch(latents, np.tile([[1, 2, 3]], (size, 1)), ids, np.zeros(size, np.int32), text)


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


@functools.partial(quick_jit, static_argnames="config")
def _loss_and_gradients(params, batch, unconditional, config):
    graphdef, _ = model()
    return jax.value_and_grad(lambda p: loss_fn(parameters.merge(graphdef, p), batch, unconditional, config))(params)


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


A, B = "x_embedder.kernel", "t_embedding_norm.scale"
TOY = {A: jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), B: jnp.array([0.25, 2.0])}
"""Parameters on which the update alone is tried: no network, no compiler to wait for."""


@functools.partial(jax.jit, static_argnames=("optimizer", "config"))
def updated(state, loss, grads, optimizer, config):
    return apply_gradients(state, loss, grads, optimizer=optimizer, config=config)


def assert_equal_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("loss", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", [1.0, float("nan"), float("-inf")])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing_but_the_counters(loss, gradient):
    config, optimizer = StepConfig(ema_decay=0.9), optax.adamw(1e-2)
    ones = jax.tree.map(jnp.ones_like, TOY)
    state, _ = updated(init_state(TOY, optimizer, config), 1.0, ones, optimizer, config)
    after, metrics = updated(state, loss, ones | {B: jnp.array([1.0, gradient])}, optimizer, config)
    good = bool(np.isfinite(loss) and np.isfinite(gradient))
    kept = (state.params, state.opt_state, state.ema)
    if good:
        assert all(np.any(after.params[path] != state.params[path]) for path in TOY)
    else:
        assert_equal_trees((after.params, after.opt_state, after.ema), kept)
    assert bool(metrics.finite) == good
    assert (int(after.step), int(after.skipped), int(after.total_skipped)) == (2, int(not good), int(not good))


def test_skipped_updates_are_counted_in_a_row_and_in_all():
    config, optimizer = StepConfig(), optax.sgd(1e-2)
    state, ones = init_state(TOY, optimizer, config), jax.tree.map(jnp.ones_like, TOY)
    counts = []
    for loss in (1.0, jnp.nan, jnp.nan, 1.0, jnp.inf):
        state, metrics = updated(state, loss, ones, optimizer, config)
        assert int(metrics.skipped) == int(state.skipped)
        counts.append((int(state.step), int(state.skipped), int(state.total_skipped)))
    assert counts == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 0, 2), (5, 1, 3)]


def test_one_broken_example_costs_one_update_and_training_goes_on():
    graphdef, params = model()
    config, optimizer = StepConfig(compute_dtype=jnp.float32, seed=3, remat="none"), optax.adam(1e-3)
    step = quick_jit(functools.partial(train_step, graphdef=graphdef, optimizer=optimizer, config=config))
    broken = batch()._replace(latents_blc=batch().latents_blc.copy())
    broken.latents_blc[1, 0, 0] = np.nan
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, config)
    losses, skipped = [], []
    for data in (batch(), broken, batch()):
        state, metrics = step(state, {}, data, None)
        losses.append(float(metrics.loss))
        skipped.append(int(metrics.skipped))
    assert skipped == [0, 1, 0]
    assert np.isnan(losses[1])
    assert losses[2] < losses[0]
    assert all(np.all(np.isfinite(value)) for value in state.params.values())


def test_bfloat16_parameters_move_on_average_as_float32_ones_by_steps_far_below_their_spacing():
    config = StepConfig(param_dtype=jnp.bfloat16, ema_decay=0.5)
    optimizer, steps, rate = optax.sgd(1.0, momentum=0.0), 100, 1e-4
    state = init_state({A: jnp.ones(20_000), B: jnp.ones(20_000)}, optimizer, config)
    grads = {path: jnp.full_like(value, rate, jnp.float32) for path, value in state.params.items()}

    def step(state, _):
        return apply_gradients(state, 1.0, grads, optimizer=optimizer, config=config)[0], None

    state = jax.jit(lambda state: jax.lax.scan(step, state, length=steps)[0])(state)
    assert {value.dtype for value in state.params.values()} == {jnp.dtype(jnp.bfloat16)}
    averages = [leaf for leaf in jax.tree.leaves((state.opt_state, state.ema)) if leaf.ndim]
    assert {leaf.dtype for leaf in averages} == {jnp.dtype(jnp.float32)}
    # Below 1 the spacing is 2^-8: to nearest, nothing would ever move. A step's variance is at most rate · spacing.
    deviation = np.sqrt(steps * rate * 2**-8 / 20_000)
    means = [float(jnp.mean(value.astype(jnp.float32))) for value in state.params.values()]
    np.testing.assert_allclose(means, 1.0 - steps * rate, atol=5 * deviation)
    assert means[0] != means[1]  # each parameter rounds by numbers of its own


def test_rounding_is_a_function_of_seed_step_and_parameter():
    config, optimizer = StepConfig(param_dtype=jnp.bfloat16), optax.sgd(1.0)
    start = init_state({A: jnp.ones(500)}, optimizer, config)
    grads = {A: jnp.full(500, 1e-3)}

    def after(state=start, config=config):
        return np.asarray(updated(state, 1.0, grads, optimizer, config)[0].params[A])

    assert np.array_equal(after(), after())
    assert not np.array_equal(after(), after(config=dataclasses.replace(config, seed=1)))
    assert not np.array_equal(after(), after(start._replace(step=jnp.array(1))))


# Each policy by itself is tried in tests/models/test_dit.py.
@pytest.mark.parametrize(("remat", "every", "unroll"), [("full", 1, 2), ("offload", 2, 1), ("none", 2, 2)])
def test_what_is_computed_again_changes_neither_loss_nor_gradients(remat, every, unroll):
    plain = dataclasses.replace(FLOAT32, remat="none")
    other = dataclasses.replace(FLOAT32, remat=remat, remat_every=every, scan_unroll=unroll)
    (loss, grads), (found, found_grads) = (loss_and_gradients(batch(), config=config) for config in (plain, other))
    assert float(found) == pytest.approx(float(loss), rel=1e-6)
    for path, grad in grads.items():
        # The same sums, in another order where the compiler joins them otherwise.
        np.testing.assert_allclose(found_grads[path], grad, rtol=1e-4, atol=1e-6, err_msg=path)


def test_each_policy_keeps_less_for_the_backward_than_the_one_before():
    deep = dataclasses.replace(CONFIG, blocks=64, adapter=None)
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(deep, rngs=rngs))
    tokens, times, context = jnp.ones((2, 256, 64)), jnp.array([0.2, 0.7]), jnp.ones((2, 5, 16))

    def temporary_bytes(remat, every=1):
        def loss_of(params):
            net = parameters.merge(graphdef, params)
            return jnp.sum(net.velocity(tokens, (1, 16, 16), times, context, remat=remat, remat_every=every) ** 2)

        return quick_jit(jax.grad(loss_of)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    kept = [temporary_bytes(*policy) for policy in (("none",), ("dots",), ("attention",), ("full",), ("full", 4))]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 2 * kept[3] > 2 * kept[4]


def test_a_group_size_that_does_not_divide_the_blocks_is_refused():
    with pytest.raises(ValueError, match="remat_every is 3, expected a divisor of 2"):
        jax.eval_shape(lambda: loss_and_gradients(batch(), config=dataclasses.replace(FLOAT32, remat_every=3)))


PARTS = ("blocks", "llm_adapter", "final_layer", "t_embedd", "x_embedder")
"""Groups for the self-check, as the beginnings of parameters' paths."""


@functools.cache
def measuring_step():
    graphdef, params = model()
    groups = {path: next(part for part in PARTS if path.startswith(part)) for path in params}
    step = functools.partial(
        train_step, graphdef=graphdef, optimizer=optax.sgd(0.5), config=FLOAT32, groups=groups, accumulation=1
    )
    return quick_jit(step), groups


def test_a_step_measures_every_group_if_it_is_asked_to():
    (step, groups), params = measuring_step(), model()[1]
    state, metrics = step(init_state(params, optax.sgd(0.5), FLOAT32), {}, batch(), None)
    norms, (loss, grads) = metrics.norms, loss_and_gradients(batch())
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-6)
    for part in PARTS:
        own = np.linalg.norm(np.concatenate([np.ravel(grads[path]) for path in params if groups[path] == part]))
        assert float(norms.gradient[part]) == pytest.approx(own, rel=1e-5)
        # What rounding leaves of the difference of two sums of order one.
        assert float(norms.update[part]) == pytest.approx(0.5 * own, rel=1e-3)
    assert float(metrics.grad_norm) == pytest.approx(np.linalg.norm(list(norms.gradient.values())), rel=1e-5)
    for path, value in params.items():
        np.testing.assert_allclose(state.params[path], value - 0.5 * grads[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_a_fresh_network_is_seen_to_learn_in_its_second_step():
    _, params = parameters.initial(lambda rngs: AnimaDiT(CONFIG, rngs=rngs), seed=0)
    step, _ = measuring_step()
    state, verdicts = init_state(params, optax.sgd(0.5), FLOAT32), []
    for number in (1, 2):
        state, metrics = step(state, {}, batch(), None)
        rates = dict.fromkeys(PARTS, 0.5)
        verdicts.append(
            self_check(metrics.norms, rates, step=number, attempt=number, loss=float(metrics.loss), adapter=False)
        )
    assert verdicts == [False, True]
