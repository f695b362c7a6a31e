"""Reading ahead. Oracle: the plain loop over the steps, the clock, and the interpreter's own count of threads."""

import contextlib
import itertools
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.data.loader import prefetched
from anima_jax.errors import UserError


def wait_until(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**10), st.integers(0, 40), st.integers(1, 4), st.none() | st.integers(1, 9))
def test_results_come_in_order_and_none_is_dropped(start, count, threads, ahead):
    def load(step):
        time.sleep(0.001 * (step % 3))  # later steps overtake
        return step if step % 4 else None

    results = prefetched(load, start, start + count, threads=threads, ahead=ahead)
    assert list(results) == [step if step % 4 else None for step in range(start, start + count)]


def test_threads_load_at_the_same_time():
    together = threading.Barrier(3)  # nobody passes until three loads are under way
    assert list(prefetched(lambda step: together.wait(timeout=20) * 0 + step, 0, 9, threads=3)) == list(range(9))


def test_an_error_in_load_arrives_unchanged_after_the_results_before_it():
    error = UserError("cache: part 7 is damaged")

    def load(step):
        if step == 3:
            raise error
        return step

    results = prefetched(load, 0, 10**9, threads=2)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(UserError) as caught:
        next(results)
    assert caught.value is error
    assert str(caught.value) == "cache: part 7 is damaged"
    assert wait_until(lambda: not loader_threads())


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def test_closing_stops_the_threads_and_waits_for_nothing():
    begun, release = [], threading.Event()

    def load(step):
        begun.append(step)
        if step:
            release.wait(timeout=20)
        return step

    results = prefetched(load, 0, 10**9, threads=2, ahead=8)
    with contextlib.closing(results):
        assert next(results) == 0
        assert wait_until(lambda: len(begun) == 3)  # 0, and one in each thread
        closing = time.monotonic()
    assert time.monotonic() - closing < 10  # the loads under way would take 20
    release.set()
    assert wait_until(lambda: not loader_threads())
    assert len(begun) == 3


def test_no_more_than_a_few_results_are_alive():
    ahead, alive = 3, weakref.WeakSet()

    class Batch:
        def __init__(self):
            self.pixels = np.zeros(10)
            alive.add(self)

    most = 0
    for taken, batch in enumerate(prefetched(lambda step: Batch(), 0, 30, threads=2, ahead=ahead)):
        if not taken:
            wait_until(lambda: len(alive) > ahead)
        time.sleep(0.01)  # the threads could run far ahead
        most = max(most, len(alive))
        assert batch in alive, taken
        del batch
    assert most == ahead + 1  # and the one in our hands


def test_a_process_ends_after_an_error_in_load_or_in_the_loop():
    script = """
import sys, time
from anima_jax.data.loader import prefetched

def load(step):
    if step == 2 and sys.argv[1] == "load":
        raise RuntimeError("in load")
    time.sleep(0.05)
    return step

for step in prefetched(load, 0, 10**9, threads=4, ahead=8):
    if step == 1 and sys.argv[1] == "loop":
        raise RuntimeError("in loop")
"""
    for where in ("load", "loop"):
        ended = subprocess.run([sys.executable, "-c", script, where], capture_output=True, timeout=120, check=False)
        assert ended.returncode == 1
        assert f"RuntimeError: in {where}".encode() in ended.stderr


def test_planning_and_the_loader_import_neither_jax_nor_grain():
    code = "import sys, anima_jax.data.batch_plan, anima_jax.data.loader; print({'jax', 'grain'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "set()"
