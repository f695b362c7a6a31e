"""What tests observe of XLA's compilation, and what they leave out of it."""

import contextlib
import os

import jax


@contextlib.contextmanager
def compilations():
    """The functions whose programs are compiled in the block."""
    names = []

    def listen(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def quick_compilation():
    """Leave out most of LLVM's work, which is most of the time of tests that compile much and compute little.

    Processes that are started in the block do so, too.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
