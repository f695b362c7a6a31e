"""Settings for every test: CPU only, no network, no deadlines, and a compilation cache shared by the session."""

import atexit
import os
import shutil
import signal
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# An example's duration says nothing about the code: other programs may be using the machine.
settings.register_profile("untimed", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# A background job ignores these signals, and so would all processes that tests start. A handler is not inherited.
for name in ("SIGINT", "SIGHUP"):
    if (ignored := getattr(signal, name, None)) and signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, lambda *_: None)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="anima_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Small networks' programs, too: workers and the processes that tests start share them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.fixture(scope="module")
def compiled_quickly():
    """Compile this module's programs, and those of processes that it starts, without most of LLVM's work."""
    from tests.compilation import quick_compilation  # which imports JAX: after the settings above

    with quick_compilation():
        yield
