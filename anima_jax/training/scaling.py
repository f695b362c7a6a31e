"""What a training step sends from device to device, and how long it should take, from sizes alone.

The model of the links is simple on purpose (docs/scaling.md). A mesh axis has the rate `near` of its devices' kind
while it and the axes inside it stay among neighbours, else `far`. Rings: to gather, or to reduce and scatter, n bytes
over p devices each sends n·(p − 1)/p; to reduce them for all, twice that; to exchange its own n bytes, n·(p − 1)/p.
The traffic of weights can hide behind the computation, that of activations cannot: so a step's time has two bounds.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from anima_jax.models.dit import DiTConfig
from anima_jax.models.parameters import Params
from anima_jax.parallel.devices import DeviceSpec
from anima_jax.parallel.rules import AXES, parts, spec
from anima_jax.training.flops import RECOMPUTED, Flops, Workload

EFFICIENCY = 0.5
"""Share of a device's peak at which the products run: what good programs of this shape reach."""

_ROW_PARALLEL, _EXCHANGES = 3, 4
"""A block's sums over `tensor` (after self-attention, cross-attention, MLP), and its exchanges over `context`."""


class Traffic(NamedTuple):
    """Bytes that a device sends in one step over each mesh axis."""

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
    itemsize: int,
) -> Traffic:
    """The traffic of a step of `work` on a mesh of these sizes; weights and activations have `itemsize` bytes.

    `params` are trained, `frozen` not (arrays or shapes); a frozen weight's gradient is not sent.
    """
    share = {axis: (n - 1) / n for axis, n in sizes.items()}
    data = fsdp = context = 0.0
    for path, leaf in {**frozen, **params}.items():
        axes = spec(path, leaf.shape, sizes)
        over = {name for entry in axes for name in (entry if isinstance(entry, tuple) else (entry,))}
        # What a device holds of it once it is gathered over fsdp.
        held = itemsize * math.prod(leaf.shape) / math.prod(parts(entry, sizes) for entry in axes)
        held *= sizes["fsdp"] if "fsdp" in over else 1
        if "fsdp" in over:
            fsdp += 2 * held * share["fsdp"] * work.accumulation  # forward and backward
        if path not in params:
            continue
        # Each micro-batch's gradient, reduced over all that saw other examples or other tokens.
        shard = held / sizes["fsdp"] if "fsdp" in over else held
        fsdp += (1 if "fsdp" in over else 2) * held * share["fsdp"] * work.accumulation
        data += 2 * shard * share["data"] * work.accumulation
        context += 2 * shard * share["context"] * work.accumulation
    replicas = sizes["data"] * sizes["fsdp"]
    examples = work.batch / replicas
    tokens = examples * work.tokens / sizes["context"] * config.width * itemsize
    passes = config.blocks * (2 + RECOMPUTED[remat][0])  # forward, backward, and what is computed again
    tensor = 2 * tokens * share["tensor"] * _ROW_PARALLEL * passes
    context += tokens / sizes["tensor"] * share["context"] * _EXCHANGES * passes
    return Traffic(data, fsdp, tensor, context)


def rates(kind: DeviceSpec, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes a second that a device sends over each axis: near while it stays among neighbours, else far."""
    inside, found = 1, {}
    for axis in reversed(AXES):
        inside *= sizes[axis]
        found[axis] = kind.intra_bandwidth if inside <= kind.domain_size else kind.inter_bandwidth
    return found


class Seconds(NamedTuple):
    """Seconds of a step by what takes them."""

    compute: float
    data: float
    fsdp: float
    tensor: float
    context: float

    @property
    def least(self) -> float:
        """Of the step if all that can hides behind the computation."""
        return max(self.compute, self.data + self.fsdp) + self.tensor + self.context

    @property
    def most(self) -> float:
        """Of the step if nothing does."""
        return sum(self)


def step_seconds(kind: DeviceSpec, sizes: Mapping[str, int], work: Workload, one: Flops, sent: Traffic) -> Seconds:
    """How long a step takes; `one` are the FLOPs of one example."""
    rate = rates(kind, sizes)
    compute = work.batch * sum(one) / math.prod(sizes.values()) / (EFFICIENCY * kind.flops)
    return Seconds(compute, **{axis: size / rate[axis] for axis, size in sent._asdict().items()})
