"""The noise of an image: the initial noise, and the noise that a sampler adds at its steps.

As in ComfyUI, the initial noise always comes from torch's CPU stream for the seed, drawn for the whole batch at once.
Step noise comes from the device that samples: on a GPU from the CUDA stream for the seed, on a CPU from the CPU stream
for seed + 1 (`default_noise_sampler` in comfy/k_diffusion/sampling.py). The dpmpp SDE samplers use a Brownian path
instead. Arrays have torch's layout, (b, c, t, y, x).
"""

import dataclasses
import functools

import numpy as np

from anima_jax.diffusion.brownian_tree import BrownianTree
from anima_jax.diffusion.samplers import Sampler
from anima_jax.diffusion.samplers.plan import Draw
from anima_jax.diffusion.torch_random import CUDA_DEVICES, CPUStream, CUDADevice, CUDAStream
from anima_jax.errors import UserError, did_you_mean
from anima_jax.platform import hardware

KINDS = ("torch-cpu", "torch-cuda", "jax")

_LIKELY_GPU = "rtx4090"
"""The GPU whose number order `torch-cuda` uses if no GPU is named or found."""

_FEWER_THREADS = {"7.5": 1024, "8.6": 1536, "8.7": 1536, "8.9": 1536, "12.0": 1536, "12.1": 1536}
"""Compute capability → threads per multiprocessor, where it is not 2048."""


@dataclasses.dataclass(frozen=True)
class NoiseKind:
    """A source of step noise: one of `KINDS` and, for `torch-cuda`, the GPU whose number order it reproduces."""

    kind: str
    gpu: CUDADevice | None = None

    @classmethod
    def parse(cls, text: str) -> "NoiseKind":
        """Parse `torch-cpu`, `torch-cuda`, `torch-cuda:GPU` or `jax`. Raises UserError for anything else."""
        kind, colon, gpu = text.partition(":")
        if kind not in KINDS or (colon and kind != "torch-cuda"):
            raise UserError(f"noise '{text}', expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
        if colon and gpu not in CUDA_DEVICES:
            raise UserError(f"noise '{text}', expected torch-cuda:GPU with one of {', '.join(CUDA_DEVICES)}")
        if kind != "torch-cuda":
            return cls(kind)
        return cls(kind, CUDA_DEVICES[gpu] if colon else local_gpu() or CUDA_DEVICES[_LIKELY_GPU])


def local_gpu() -> CUDADevice | None:
    """Return the device that programs are compiled for if it is an NVIDIA GPU, else None."""
    device = hardware()
    if device.capability is None or device.cores is None:
        return None
    return CUDADevice(device.cores, _FEWER_THREADS.get(device.capability, 2048))


def initial_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the noise from which sampling starts for a batch of this shape, float32."""
    return CPUStream(seed).randn(shape)


class StepNoise:
    """The step noise of a batch from torch's streams, in the order in which `sampler` uses it.

    Each noise array is float32 of `shape`. `sigmas` are the noise levels of the sampling. `kind` must not be "jax":
    that noise is drawn on the device.
    """

    def __init__(self, kind: NoiseKind, seed: int, shape: tuple[int, ...], sampler: Sampler, sigmas: np.ndarray):
        self._shape, self._path = shape, None
        on_gpu = functools.partial(CUDAStream, device=kind.gpu) if kind.gpu else None
        if sampler.brownian_path_on:
            stream = CPUStream if on_gpu is None or sampler.brownian_path_on == "cpu" else on_gpu
            first, last = float(np.max(sigmas)), float(np.min(sigmas[sigmas > 0]))
            self._path = BrownianTree(seed, last, first, shape, stream)
        else:
            self._stream = on_gpu(seed) if on_gpu else CPUStream(seed + 1)

    def next(self, draw: Draw) -> np.ndarray:
        """Return the next noise; for samplers with a Brownian path, its increment between the levels of `draw`."""
        noise = self._path(*draw[:2]) if self._path else self._stream.randn(self._shape)
        limit = draw.clip_std * np.std(noise, ddof=1)
        return np.clip(noise, -limit, limit) if limit else noise
