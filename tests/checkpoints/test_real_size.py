"""The released model's sizes (4.2 GB of bfloat16): what loading, renaming and merging cost in private memory.

Linux only: private memory is `RssAnon`, sampled every 5 ms in the process that does the work.
"""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from anima_jax.adapters.dialects import COMFYUI
from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo, write
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from tests.ports import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="private memory is read from /proc"),
]

MEASURE = """
import re, sys, threading, time
import jax
from anima_jax.checkpoints import models
from anima_jax.parallel import hosts, rules
from anima_jax.parallel.mesh import make_mesh
from convert.__main__ import main

def private():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s+(\\d+)", status.read())[1]) * 1024

def watch():
    while not done.wait(0.005):
        peaks.append(private())

if len(sys.argv) > 3:
    hosts.join(sys.argv[3], 2, int(sys.argv[4]))
jax.devices()
done, peaks = threading.Event(), [private()]
threading.Thread(target=watch, daemon=True).start()
def run(source, target):
    {body}
run(*sys.argv[1:3])
done.set()
print(max(peaks))
"""


def start(body, *arguments):
    """A fresh process that runs `body` with `source` and `target`; what follows them joins it to another one."""
    command = [sys.executable, "-c", MEASURE.replace("{body}", body), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak_of(process):
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return int(out.splitlines()[-1])


def peak_private_memory(body, source, target):
    """Bytes, of a fresh process that runs `body`."""
    return peak_of(start(body, source, target))


@pytest.fixture(scope="module")
def full_size_file(tmp_path_factory):
    """Random finite bfloat16 numbers under the released names; removed afterwards."""
    _, params = parameters.abstract(lambda rngs: AnimaDiT(DiTConfig(), rngs=rngs))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {f"net.{t.name}": TensorInfo(f"net.{t.name}", bfloat16, t.shape) for t in file_tensors(dit.RULES, params)}
    rng = np.random.default_rng(0)
    # Without the exponent's highest bit every pattern is a finite number below 2. Each tensor starts somewhere else.
    bits = np.frombuffer(rng.bytes(2**27), np.uint16) & 0xBFFF

    def array_of(name):
        shape, size = tensors[name].shape, tensors[name].nbytes // 2
        start = rng.integers(bits.size - size)
        return bits[start : start + size].view(bfloat16).reshape(shape)

    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    write(path, tensors.values(), array_of, {"format": "pt"})
    yield path
    path.unlink()


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
    size = full_size_file.stat().st_size
    assert 4.1e9 < size < 4.3e9
    body = "with models.open_dit(source) as c: models.save_dit(target, c.load(), metadata=c.metadata)"
    assert size < peak_private_memory(body, full_size_file, target) < 1.5 * size
    assert_same_bytes(full_size_file, target)


def test_of_two_processes_that_share_it_out_neither_holds_the_whole_model(full_size_file, tmp_path):
    target = tmp_path / "copy.safetensors"
    body = """
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 1, "context": 1})
    with models.open_dit(source) as c:
        params = c.load(None, rules.shardings(c.abstract, c.abstract, mesh))
        models.save_dit(target, params, metadata=c.metadata)
    """
    address = f"localhost:{free_port()}"
    processes = [start(body, full_size_file, target, address, number) for number in range(2)]
    # Half of the model, and half of the largest stacked parameter (0.94 GB) while it is put in place.
    assert max(map(peak_of, processes)) < 0.75 * full_size_file.stat().st_size
    assert_same_bytes(full_size_file, target)


def test_merging_needs_less_than_one_and_a_half_gigabytes(full_size_file, tmp_path):
    adapter, target, rank = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors", 32
    with SafetensorsFile(full_size_file) as file:
        blocks = {name: tensor.shape for name, tensor in file.tensors.items() if name.startswith("net.blocks.")}
    weights = {name: shape for name, shape in blocks.items() if len(shape) == 2}
    factors = {}
    for name, (out, inside) in weights.items():
        spelled = COMFYUI.module(name.removeprefix("net.").removesuffix(".weight"))
        factors[f"{spelled}.lora_A.weight"] = (rank, inside)
        factors[f"{spelled}.lora_B.weight"] = (out, rank)
    rng = np.random.default_rng(1)
    listed = [TensorInfo(key, np.dtype(np.float32), shape) for key, shape in factors.items()]
    write(adapter, listed, lambda key: rng.normal(size=factors[key]).astype(np.float32))
    body = 'main(["merge", source, target.replace("merged", "lora") + ":0.5", target])'
    assert peak_private_memory(body, full_size_file, target) < 1.5e9
    with SafetensorsFile(full_size_file) as before, SafetensorsFile(target) as after, SafetensorsFile(adapter) as lora:
        changed = [name for name in before.tensors if after.read(name).tobytes() != before.read(name).tobytes()]
        assert changed == list(weights)
        name = changed[-1]
        module = COMFYUI.module(name.removeprefix("net.").removesuffix(".weight"))
        a, b = (lora.read(f"{module}.lora_{side}.weight").astype(float) for side in "AB")
        expected = before.read(name).astype(float) + 0.5 * b @ a
        # Float32 sums, and one rounding to 8 bits.
        np.testing.assert_allclose(after.read(name).astype(float), expected, rtol=2**-8, atol=1e-4)
    target.unlink()


def assert_same_bytes(source, target):
    """Of two files; the second one is removed."""
    with open(source, "rb") as before, open(target, "rb") as after:
        while chunk := before.read(2**24):
            assert after.read(2**24) == chunk
        assert not after.read(1)
    target.unlink()
