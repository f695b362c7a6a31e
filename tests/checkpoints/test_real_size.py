"""The released model's sizes (4.2 GB of bfloat16): what loading and renaming cost in private memory.

Linux only: private memory is `RssAnon`, sampled every 5 ms in the process that does the work.
"""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.checkpoints.safetensors import SafetensorsFile, Tensor, write
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="private memory is read from /proc"),
]

MEASURE = """
import re, sys, threading, time
import jax
from anima_jax.checkpoints import models
from convert.__main__ import main

def private():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

def watch():
    while not done.wait(0.005):
        peaks.append(private())

jax.devices()
done, peaks = threading.Event(), [private()]
threading.Thread(target=watch, daemon=True).start()
def run(source, target):
    {body}
run(*sys.argv[1:])
done.set()
print(max(peaks))
"""


def peak_private_memory(body, *arguments):
    """Bytes, of a fresh process that runs `body` with `source` and `target`."""
    command = [sys.executable, "-c", MEASURE.replace("{body}", body), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return int(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def full_size_file(tmp_path_factory):
    """Random finite bfloat16 numbers under the released names; removed afterwards."""
    _, params = parameters.abstract(lambda rngs: AnimaDiT(DiTConfig(), rngs=rngs))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {f"net.{t.name}": Tensor(f"net.{t.name}", bfloat16, t.shape) for t in file_tensors(dit.RULES, params)}
    rng = np.random.default_rng(0)

    def array_of(name):
        # Without the exponent's highest bit every pattern is a finite number below 2.
        bits = np.frombuffer(rng.bytes(tensors[name].nbytes), np.uint16) & 0xBFFF
        return bits.view(bfloat16).reshape(tensors[name].shape)

    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    write(path, tensors.values(), array_of, {"format": "pt"})
    yield path
    path.unlink()


def test_loading_needs_less_than_one_and_a_half_times_the_file(full_size_file, tmp_path):
    size = full_size_file.stat().st_size
    assert 4.1e9 < size < 4.3e9
    peak = peak_private_memory("model = models.load_dit(source)", full_size_file, tmp_path)
    assert size < peak < 1.5 * size


def test_renaming_needs_less_than_a_gigabyte_and_keeps_every_byte(full_size_file, tmp_path):
    target = tmp_path / "renamed.safetensors"
    body = 'main(["checkpoint", source, target, "--prefix", "none"])'
    assert peak_private_memory(body, full_size_file, target) < 1e9
    with SafetensorsFile(full_size_file) as before, SafetensorsFile(target) as after:
        assert len(before.tensors) == len(after.tensors)
        for name in before.tensors:
            assert after.read(name.removeprefix("net.")).tobytes() == before.read(name).tobytes()
    target.unlink()


def test_file_to_parameters_to_file_keeps_every_byte(full_size_file, tmp_path):
    target = tmp_path / "copy.safetensors"
    body = "with models.open_dit(source) as c: models.save_dit(target, c.load(), metadata=c.metadata)"
    assert peak_private_memory(body, full_size_file, target) < 1.5 * full_size_file.stat().st_size
    with open(full_size_file, "rb") as before, open(target, "rb") as after:
        while chunk := before.read(2**24):
            assert after.read(2**24) == chunk
        assert not after.read(1)
    target.unlink()
