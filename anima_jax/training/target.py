"""The devices that a run is judged for: those of this machine, or those that the flags of a dry run describe."""

import argparse
import dataclasses
import re
from collections.abc import Sequence

import jax

from anima_jax.errors import UserError
from anima_jax.parallel import hosts
from anima_jax.parallel.devices import (
    DEVICE_SPECS,
    DeviceSpec,
    device_bytes,
    find_device_spec,
    local_device_spec,
    near_names,
    parse_bytes,
)
from anima_jax.parallel.topologies import Topology
from anima_jax.platform import hardware

COMMON = [
    spec
    for spec in DEVICE_SPECS
    if re.fullmatch(
        r"RTX (3060|4060 Ti|4070|4080|5080|3090|4090|5090)|T4|V100|L4|L40S|A100|H100|H200|B200|MI300X|TPU v([456].|4)"
        r"|Apple M4 Max",
        spec.name,
    )
]
"""Kinds to compare if none is named."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a run is judged for: how many, of which possible kinds, and the bytes of each (None: unknown).

    `named` says whether the command line describes them; `name` is for the user.
    """

    devices: int | None
    specs: Sequence[DeviceSpec]
    memory: float | None
    name: str
    named: bool

    @property
    def spec(self) -> DeviceSpec | None:
        """The kind of the devices, None if it is unknown or if several are possible."""
        return self.specs[0] if len(self.specs) == 1 else None

    @property
    def platform(self) -> str:
        """The platform of their kind, else "gpu" if flags describe the devices, else that of this machine."""
        if self.spec:
            return self.spec.platform
        return "gpu" if self.named or self.devices else hardware().platform

    @property
    def lacks_bfloat16(self) -> bool:
        """Whether they compute bfloat16 in float32, so that float16 is faster."""
        return self.spec is not None and self.spec.platform == "gpu" and not self.spec.bfloat16


def target_of(arguments: argparse.Namespace, topology: Topology | None = None) -> Target:
    """Return the devices that the flags (or the `topology` of one) describe, by default those of this machine.

    If a number of devices is given without a kind on a machine that has only a CPU, every known kind is possible.
    Raises UserError if the kind is not known or the memory is not an amount of memory.
    """
    devices, kind, amount = arguments.devices, arguments.device_kind, arguments.device_memory
    memory = None
    if amount is not None:
        try:
            memory = parse_bytes(amount)
        except UserError as error:
            raise UserError(f"--device_memory: {error}") from None
    if topology:
        return Target(topology.count, [topology.spec], memory or topology.spec.memory, topology.name, True)
    if kind:
        spec = find_device_spec(kind)
        if spec is None:
            near = near_names(kind)
            names = " or ".join(near) or ", ".join(spec.name for spec in DEVICE_SPECS)
            found = (
                f"--device_kind {kind}: not a known device; {'the nearest are' if near else 'expected one of'} {names}"
            )
            raise UserError(f"{found}; --device_memory, as in 12GiB, is enough to know whether a run fits")
        return Target(devices, [spec], memory or spec.memory, spec.name, True)
    device = jax.local_devices()[0]
    local = local_device_spec(device)
    if memory or (devices and device.platform == "cpu"):
        of_kind = [local] if local else DEVICE_SPECS if devices else COMMON
        specs = [spec for spec in of_kind if spec.memory >= (memory or 0) and (spec.platform != "cpu" or not devices)]
        name = local.name if local else "such a device" if memory else "of any kind; --device_kind names one"
        return Target(devices, specs, memory, name, bool(memory))
    return Target(devices, [local] if local else [], local_bytes(), device.device_kind, False)


def local_bytes() -> int | None:
    """Return the bytes of the smallest device of all processes, None if that is unknown."""
    return hosts.smallest(min(filter(None, map(device_bytes, jax.local_devices())), default=None))
