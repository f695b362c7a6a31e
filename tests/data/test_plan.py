"""The order of examples. Oracle: what a shuffled stream cut into batches is, said without the plan's arithmetic."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.data.plan import BatchPlan

plans = st.builds(BatchPlan, st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**63 - 1))


def stream(plan: BatchPlan, batches: int) -> list[tuple[int, int]]:
    """(epoch, example) of the first batches, one after the other."""
    pairs = []
    for step in range(batches):
        indices, epochs = plan.indices(step * plan.batch_size)
        assert len(indices) == len(epochs) == plan.batch_size
        pairs += zip(epochs.tolist(), indices.tolist(), strict=True)
    return pairs


@settings(deadline=None)  # busy machines are slow, not wrong
@given(plans, st.integers(1, 4))
def test_every_epoch_uses_every_example_once_and_epochs_follow_each_other(plan, epochs):
    drawn = stream(plan, plan.steps_for(epochs))[: epochs * plan.num_examples]
    for epoch, group in itertools.groupby(drawn, key=lambda pair: pair[0]):
        assert sorted(index for _, index in group) == list(range(plan.num_examples)), epoch
    assert [epoch for epoch, _ in drawn] == sorted(np.repeat(range(epochs), plan.num_examples))


@settings(deadline=None)
@given(plans, st.integers(0, 500))
def test_a_batch_begun_anywhere_is_the_streams_own(plan, position):
    batches = -(-(position + plan.batch_size) // plan.batch_size)
    indices, epochs = plan.indices(position)
    expected = stream(plan, batches)[position : position + plan.batch_size]
    assert list(zip(epochs.tolist(), indices.tolist(), strict=True)) == expected


@settings(deadline=None)
@given(plans, st.integers(1, 90), st.integers(0, 200))
def test_the_order_does_not_depend_on_the_batch_size(plan, other_size, position):
    other = BatchPlan(plan.num_examples, other_size, plan.seed)
    shared = min(plan.batch_size, other_size)
    np.testing.assert_array_equal(plan.indices(position)[0][:shared], other.indices(position)[0][:shared])


@settings(deadline=None)
@given(plans, st.integers(1, 5))
def test_an_epoch_ends_with_the_step_that_uses_its_last_example(plan, epochs):
    steps = plan.steps_for(epochs)
    assert plan.epochs_finished(steps * plan.batch_size) >= epochs
    assert plan.epochs_finished((steps - 1) * plan.batch_size) < epochs


def test_order_differs_between_epochs_and_between_seeds():
    orders = {
        tuple(BatchPlan(100, 100, seed).indices(100 * epoch)[0].tolist()) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_places_are_uniform_over_epochs():
    plan = BatchPlan(10, 10, seed=3)
    counts = np.zeros((10, 10))
    for epoch in range(2000):
        counts[plan.indices(10 * epoch)[0], np.arange(10)] += 1
    # Each count is binomial(2000, 0.1): deviation 13.4. Five of them in 100 cells are a 1 in 17,000 event.
    assert np.abs(counts - 200).max() < 67


def test_the_order_never_changes():
    # Written down once: with another order a resumed run would repeat some examples and skip others.
    indices, epochs = BatchPlan(7, 5, seed=11).indices(5)
    assert indices.tolist() == [6, 3, 3, 0, 5]
    assert epochs.tolist() == [0, 0, 1, 1, 1]


def test_a_plan_without_examples_or_batches_is_refused():
    for sizes in [(0, 4), (4, 0)]:
        with pytest.raises(ValueError, match="needs examples"):
            BatchPlan(*sizes, seed=0)
