"""Eight simulated devices, in a separate process: the devices of this one cannot change any more."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def _eight_devices() -> None:
    import jax

    jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def on_eight() -> Iterator[Callable[..., Any]]:
    """Return on_eight(function, *arguments), which calls a function of a test module on eight devices."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn, initializer=_eight_devices) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
