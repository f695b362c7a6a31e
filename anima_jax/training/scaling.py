"""Traffic between devices in a training step, and the step time, computed from sizes.

The model is simple on purpose (docs/scaling.md). A mesh axis has `intra_bandwidth` if it and the axes inside it fit
into a domain, else `inter_bandwidth`. In a ring of p devices, each sends n·(p − 1)/p bytes to all-gather or
reduce-scatter n bytes, twice that to all-reduce them, and n·(p − 1)/p of its own n bytes in an all-to-all.
Weight traffic can overlap with computation, activation traffic cannot, so the step time has two bounds.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.models.dit import DiTConfig
from anima_jax.models.parameters import Params
from anima_jax.models.quantised import Quantised
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DeviceSpec
from anima_jax.training.flops import RECOMPUTED, Flops, Workload

EFFICIENCY = 0.5
"""Fraction of a device's peak FLOPs per second that good programs of these shapes reach."""

IN_8_BITS = {"int8": 0.487 / 0.470, "fp8": 0.487 / 0.470}
"""`[model] compute` → time of a step's FLOPs relative to products in 16 bits.

By XLA's cycles for a v5e and a LoRA of rank 32 (tests/benchmarks/RESULTS.md): the MLPs' forward products take half as
long, and rounding their inputs takes what that saves. Products of float8 are assumed to behave alike.
"""

_ALL_REDUCES, _ALL_TO_ALLS = 3, 4
"""Per block: all-reduces over `tensor` (after self-attention, cross-attention, MLP), all-to-alls over `context`."""


class Traffic(NamedTuple):
    """Bytes that each device sends over each mesh axis in a step."""

    data: float
    fsdp: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        return sum(self)


def traffic(
    config: DiTConfig,
    params: Params,
    frozen: Params,
    sizes: Mapping[str, int],
    work: Workload,
    *,
    remat: str,
    remat_every: int = 1,
    itemsize: int,
) -> Traffic:
    """Return the traffic of a step of `work` on a mesh of these sizes; weights and activations have `itemsize` bytes.

    `params` are the trained parameters, `frozen` the others, which have no gradients and travel in the form in which
    they are stored; both may be shapes.
    """
    share = {axis: (n - 1) / n for axis, n in sizes.items()}
    data = fsdp = context = 0.0
    for path, leaf in {**frozen, **params}.items():
        axes = rules.partition_spec(path, leaf.shape, sizes)
        over = {name for entry in axes for name in (entry if isinstance(entry, tuple) else (entry,))}
        # Bytes on a device once gathered over fsdp.
        whole = leaf.nbytes if isinstance(leaf, Quantised) else itemsize * math.prod(leaf.shape)
        held = whole / math.prod(rules.parts(entry, sizes) for entry in axes)
        held *= sizes["fsdp"] if "fsdp" in over else 1
        if "fsdp" in over:
            fsdp += _gathers(path, params, remat_every) * held * share["fsdp"] * work.accumulation
        if path not in params:
            continue
        # The gradient of each micro-batch is reduced over the devices that have other examples or tokens.
        shard = held / sizes["fsdp"] if "fsdp" in over else held
        fsdp += (1 if "fsdp" in over else 2) * held * share["fsdp"] * work.accumulation
        data += 2 * shard * share["data"] * work.accumulation
        context += 2 * shard * share["context"] * work.accumulation
    replicas = sizes["data"] * sizes["fsdp"]
    examples = work.batch / replicas
    tokens = examples * work.tokens / sizes["context"] * config.width * itemsize
    # Forward, backward and recomputation, once more if blocks are recomputed together.
    passes = config.blocks * (2 + RECOMPUTED[remat][0] + (remat_every > 1))
    tensor = 2 * tokens * share["tensor"] * _ALL_REDUCES * passes
    context += tokens / sizes["tensor"] * share["context"] * _ALL_TO_ALLS * passes
    return Traffic(data, fsdp, tensor, context)


def _gathers(path: str, trained: Params, remat_every: int) -> int:
    """Return how often a micro-batch gathers the weights at `path` over `fsdp`.

    That is once in the forward pass and once in the backward pass of a block, which recomputes it with the same
    weights. Other weights are kept from the forward to the backward pass, and what nothing trained precedes has none.
    """
    if path.startswith("blocks."):
        return 2 + (remat_every > 1)
    adapts = any(other.startswith(("llm_adapter.", TEXT_ENCODER)) for other in trained)
    return 2 if adapts and re.search(r"\.(blocks|layers)\.", path) else 1


def bandwidths(device_spec: DeviceSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the bandwidth of a device over each axis, in bytes per second."""
    inside, found = 1, {}
    for axis in reversed(rules.AXES):
        inside *= sizes[axis]
        found[axis] = device_spec.intra_bandwidth if inside <= device_spec.domain_size else device_spec.inter_bandwidth
    return found


HOST_BANDWIDTH = 12e9
"""Bytes per second from host memory to a device and back, which PCI Express reaches in practice."""


class Seconds(NamedTuple):
    """Seconds of a step for computation, for the traffic over each mesh axis, and for weights and optimizer's state.

    `state` is the time to read and write these in the device's memory, `host` that for what is in the host's.
    """

    compute: float
    data: float
    fsdp: float
    tensor: float
    context: float
    state: float = 0.0
    host: float = 0.0

    @property
    def least(self) -> float:
        """Seconds of a step if all weight traffic overlaps with computation."""
        return max(self.compute, self.data + self.fsdp, self.host) + self.tensor + self.context + self.state

    @property
    def most(self) -> float:
        """Seconds of a step if nothing overlaps."""
        return sum(self)


def step_seconds(
    device_spec: DeviceSpec,
    sizes: Mapping[str, int],
    work: Workload,
    example: Flops,
    sent: Traffic,
    *,
    dtype: Any = jnp.bfloat16,
    in_8_bits: str | None = None,
    moved: float = 0.0,
    on_host: Mapping[str, int] = {},
) -> Seconds:
    """Return the time of a step; `example` contains the FLOPs of one example, in `dtype`.

    `in_8_bits` is a key of `IN_8_BITS` if products with the frozen base have such operands. `moved` are the bytes of
    weights and optimizer's state that a device reads and writes, `on_host` the bytes by purpose that it keeps in host
    memory: the optimizer's moments move once in a step, inputs of blocks in every micro-batch, both there and back.
    """
    bandwidth = bandwidths(device_spec, sizes)
    compute = work.batch * sum(example) / math.prod(sizes.values()) / (EFFICIENCY * device_spec.peak_flops(dtype))
    compute *= IN_8_BITS.get(in_8_bits or "", 1.0)
    times = {"optimizer": 1, "inputs of blocks": work.accumulation}
    host = sum(2 * size * times[name] for name, size in on_host.items()) / HOST_BANDWIDTH
    seconds = {axis: size / bandwidth[axis] for axis, size in sent._asdict().items()}
    return Seconds(compute, **seconds, state=moved / device_spec.memory_bandwidth, host=host)
