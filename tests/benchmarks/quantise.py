"""Quantising a model of the released size, against plain torch: `python -m tests.benchmarks.quantise [FORMAT…]`.

A file of 4.2 GB of normal bfloat16 numbers under the released names is written to `--folder` and removed afterwards.
Ours is `convert checkpoint --dtype FORMAT` in a process of its own. The baseline reads the same file with safetensors,
quantises the same weights with comfy_kitchen's reference backend, measures the same errors, and writes the result with
safetensors. Both processes start anew, take turns, and find the file in the page cache; the best of the runs counts.
CPU-seconds (of all threads, with the system's) hardly depend on what else the machine does. Memory is the largest that
the system saw the process have; the baseline's includes the file, which it maps.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.checkpoints.safetensors import TensorInfo, write
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig

LAYOUTS = {
    "fp8_scaled": ("TensorCoreFP8Layout", {"scale": "recalculate"}),
    "int8": ("TensorWiseINT8Layout", {"per_channel": True}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}
"""Format → comfy_kitchen's layout and the options of its `quantize`."""


def main() -> None:
    arguments = argparse.ArgumentParser(description="Quantising a model of the released size.")
    arguments.add_argument("formats", nargs="*", default=list(LAYOUTS), metavar="FORMAT")
    arguments.add_argument("--runs", type=int, default=2)
    arguments.add_argument("--folder", default=None, help="where 7 GB are free")
    arguments.add_argument("--torch", nargs=3, metavar=("FORMAT", "IN", "OUT"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.torch:
        quantise_with_torch(*options.torch)
        return
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = pathlib.Path(folder) / "full.safetensors", pathlib.Path(folder) / "out.safetensors"
        write_full_size(source)
        for name in options.formats:
            ours = ["anima_jax.convert", "checkpoint", source, target, "--dtype", name, "--force"]
            commands = {"ours": ours}
            if name in LAYOUTS:
                commands["torch"] = ["tests.benchmarks.quantise", "--torch", name, source, target]
            best = {who: (float("inf"), 0.0, 0.0) for who in commands}
            for _ in range(options.runs):
                for who, command in commands.items():
                    best[who] = min(best[who], measured([str(word) for word in command]))
            for who, (cpu, wall, gigabytes) in best.items():
                print(f"{name:<13} {who:<6} {cpu:6.1f} CPU-seconds {wall:6.1f} s {gigabytes:5.2f} GB", flush=True)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Return the CPU-seconds, the seconds and the largest gigabytes of memory of `python -m COMMAND`."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e9


def write_full_size(path: pathlib.Path) -> None:
    _, params = parameters.abstract(lambda rngs: AnimaDiT(DiTConfig(), rngs=rngs))
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {f"net.{t.name}": TensorInfo(f"net.{t.name}", bfloat16, t.shape) for t in file_tensors(dit.RULES, params)}
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(2**26, np.float32) * 0.02).astype(bfloat16)

    def array_of(name: str) -> np.ndarray:
        """A part of the numbers that begins somewhere else for each tensor."""
        shape, size = tensors[name].shape, tensors[name].nbytes // 2
        start = rng.integers(numbers.size - size)
        return numbers[start : start + size].reshape(shape)

    write(path, tensors.values(), array_of, {"format": "pt"})


def quantise_with_torch(name: str, source: str, target: str) -> None:
    import torch
    from comfy_kitchen.tensor import QuantizedTensor
    from safetensors import safe_open
    from safetensors.torch import save_file

    from anima_jax.convert.quantise import KEEP

    layout, options = LAYOUTS[name]
    written: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    with safe_open(source, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            weight = file.get_tensor(key)
            if weight.ndim != 2 or any(text in key for text in KEEP):
                written[key] = weight
                continue
            values = weight.float()
            quantised = QuantizedTensor.from_float(values, layout, **options)
            written |= {
                k: t.view(torch.uint8) if "e8m0" in str(t.dtype) else t for k, t in quantised.state_dict(key).items()
            }
            errors[key] = float((quantised.dequantize() - values).norm() / values.norm())
    save_file(written, target)
    print(len(errors))


if __name__ == "__main__":
    main()
