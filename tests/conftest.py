"""Settings for every test: CPU only, no network, no deadlines, and a compilation cache shared by the session."""

import atexit
import os
import pathlib
import shutil
import signal
import subprocess
import sys
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


@pytest.fixture(scope="session")
def quick_start(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """The folder of a run of configs/shapes.toml, which takes minutes, and its output; shared by the whole session.

    If `QUICK_START_RUN` is set, that folder is used and nothing is trained.
    """
    if "QUICK_START_RUN" in os.environ:
        run = pathlib.Path(os.environ["QUICK_START_RUN"])
        return run, f"--checkpoint {run}"
    folder = tmp_path_factory.mktemp("quick_start")
    config = pathlib.Path(__file__).parents[1] / "configs" / "shapes.toml"
    command = [sys.executable, "-m", "anima_jax.train", "--config", str(config), "--set", f"output_dir={folder}/runs"]
    environment = os.environ | {"TFDS_DATA_DIR": str(folder / "data")}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    (run,) = (folder / "runs").iterdir()
    return run, output
