"""Times and losses against what diffusion-pipe computes (golden/objective) and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from anima_jax.diffusion import randomness
from anima_jax.diffusion.objective import ELEMENT_LOSSES, Loss, TimeDistribution, batch_mean, interpolate
from anima_jax.diffusion.randomness import Purpose
from anima_jax.models.dit import patchify
from tests.golden_files import channel_last, golden

DATA = golden("objective")
TOLERANCE = 2e-6  # a few roundings of float32


def grid(batch, height, width):
    return jnp.tile(jnp.array([[1, height // 2, width // 2]]), (batch, 1))


@pytest.mark.parametrize(
    ("distribution", "size", "key"),
    [
        (TimeDistribution(), (64, 64), "t.logit_normal"),
        (TimeDistribution(sigmoid_scale=1.3), (64, 64), "t.logit_normal.sigmoid_scale1.3"),
        (TimeDistribution(shift=3.0), (64, 64), "t.logit_normal.shift3"),
        (TimeDistribution(flux_shift=True), (64, 64), "t.logit_normal.flux_shift.64x64"),
        (TimeDistribution(flux_shift=True), (128, 96), "t.logit_normal.flux_shift.128x96"),
        (TimeDistribution(shift=3.0, flux_shift=True), (64, 64), "t.shift_wins"),
        (TimeDistribution(method="uniform", shift=2.5), (64, 64), "t.uniform.shift2.5"),
    ],
)
def test_times_equal_the_reference(distribution, size, key):
    grid_b3 = grid(64, *size)
    if distribution.method == "uniform":
        times = distribution.times(DATA["uniform"], grid_b3)
    else:
        times = distribution.times_of_normal(DATA["normal"], grid_b3)
    np.testing.assert_allclose(times, DATA[key], rtol=TOLERANCE)


def test_logit_normal_times_of_quantiles_are_the_sigmoid_of_the_normal_quantiles():
    quantiles = np.linspace(0.1, 0.9, 9)
    expected = 1 / (1 + np.exp(-1.3 * scipy.stats.norm.ppf(quantiles)))
    times = TimeDistribution(sigmoid_scale=1.3).times(jnp.asarray(quantiles, jnp.float32), grid(9, 64, 64))
    np.testing.assert_allclose(times, expected, rtol=1e-5)


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("loss.") and "multiscale" not in key])
def test_losses_equal_the_reference(key):
    kind, _, parameter = key.removeprefix("loss.").partition(".")
    masked = kind.endswith("_mask")
    loss = Loss(kind.removesuffix("_mask"), float(parameter or 0))
    out, target = (patchify(channel_last(DATA[name])) for name in ("out", "target"))
    mask = patchify(channel_last(DATA["mask"])) if masked else None
    assert batch_mean(loss(out, target, grid(2, 40, 48), mask)) == pytest.approx(DATA[key][0], rel=TOLERANCE)


def test_multiscale_term_is_off_below_its_threshold():
    out, target = (patchify(channel_last(DATA[name])) for name in ("out", "target"))
    losses = Loss(multiscale_weight=0.5)(out, target, grid(2, 40, 48))
    assert batch_mean(losses) == pytest.approx(DATA["loss.multiscale_small.0.5"][0], rel=TOLERANCE)


def test_multiscale_term_compares_two_by_two_averages_of_large_images():
    rng = np.random.default_rng(0)
    out, target = rng.normal(size=(2, 1, 1, 116, 116, 16)).astype(np.float32)
    error = (out - target).astype(np.float64)
    pooled = error.reshape(1, 1, 58, 2, 58, 2, 16).mean((3, 5))
    expected = (np.mean(error**2) + 0.5 * np.mean(pooled**2)) / 1.5
    losses = Loss(multiscale_weight=0.5)(patchify(out), patchify(target), grid(1, 116, 116))
    assert float(losses[0]) == pytest.approx(expected, rel=TOLERANCE)
    # The reference's own result for a pair that is not shipped, from its plain and pooled errors.
    combined = (DATA["big.mse"][0] + 0.5 * DATA["big.pooled_mse"][0]) / 1.5
    assert combined == pytest.approx(DATA["loss.multiscale_big.0.5"][0], rel=TOLERANCE)


@pytest.mark.parametrize("kind", ELEMENT_LOSSES)
def test_padding_tokens_change_no_loss(kind):
    rng = np.random.default_rng(0)
    out, target = rng.normal(size=(2, 1, 12, 64)).astype(np.float32)
    alone = Loss(kind, 0.5, 0.5)(out[:, :6], target[:, :6], jnp.array([[1, 2, 3]]))
    padded = Loss(kind, 0.5, 0.5)(out, target, jnp.array([[1, 2, 3]]))
    np.testing.assert_allclose(padded, alone, rtol=TOLERANCE)


def test_examples_of_weight_zero_do_not_count():
    assert float(batch_mean(jnp.array([1.0, 3.0, 100.0]), jnp.array([1.0, 1.0, 0.0]))) == 2.0


def test_interpolation_runs_from_data_to_noise_with_velocity_noise_minus_data():
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype(np.float32)
    np.testing.assert_array_equal(interpolate(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(interpolate(x0, noise, jnp.ones(3)), noise)
    slope = jax.jvp(lambda t: interpolate(x0, noise, t), (jnp.full(3, 0.3),), (jnp.ones(3),))[1]
    np.testing.assert_allclose(slope, noise - x0, atol=1e-6)


def test_random_numbers_depend_on_seed_epoch_id_and_purpose_and_on_nothing_else():
    ids = randomness.split_ids(np.array([5, 2**62 + 9, 5 + 2**32]))
    epochs = jnp.array([0, 0, 0])

    def draw(seed=1, epochs=epochs, ids=ids, purpose=Purpose.NOISE, length=6):
        return np.asarray(randomness.normal(randomness.example_keys(seed, epochs, ids, purpose), (length, 64)))

    base = draw()
    np.testing.assert_array_equal(draw(length=11)[:, :6], base)
    np.testing.assert_array_equal(draw(ids=ids[::-1])[::-1], base)
    np.testing.assert_array_equal(draw(epochs=epochs[:1], ids=ids[1:2])[0], base[1])
    others = [draw(seed=2), draw(epochs=epochs + 1), draw(ids=ids + np.uint32(1)), draw(purpose=Purpose.TIME), base]
    flat = np.concatenate([other.reshape(3, -1) for other in others])
    assert len(np.unique(flat[:, 0])) == len(flat)
    np.testing.assert_allclose([base.mean(), base.std()], [0, 1], atol=0.1)
