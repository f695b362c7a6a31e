"""When something that happens every so many steps or epochs is due."""

import pytest

from anima_jax.training.intervals import Every, RunPoint, crosses_multiple


def test_a_multiple_of_an_interval_is_reached_once():
    assert [n for n in range(1, 10) if crosses_multiple(3, n - 1, n)] == [3, 6, 9]
    assert crosses_multiple(3, 1, 7)
    assert not crosses_multiple(3, 3, 5)
    assert not crosses_multiple(None, 0, 100)


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (Every(), []),
        (Every(steps=4), [4, 8]),
        (Every(epochs=2), [6]),
        (Every(steps=4, at_start=True, at_end=True), [0, 4, 8, 10]),
        (Every(steps=4, epochs=2), [4, 6, 8]),
    ],
)
def test_steps_epochs_start_and_end_each_make_it_due(every, due):
    # An epoch ends after every third of ten steps.
    points = [RunPoint(n, 10, (max(0, n - 1) // 3, n // 3)) for n in range(11)]
    assert [point.step for point in points if every.due(point)] == due
