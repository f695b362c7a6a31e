"""Devices: their memory, and from vendors' data sheets their speed, memory and bandwidth."""

import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

GB = 1e9


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """The specification of a type of device: FLOP/s, bytes of memory, and bytes/s of bandwidth in one direction.

    `flops` is the dense 16-bit peak with float32 accumulation. A device sends at `intra_bandwidth` to the `domain_size`
    devices of its domain (for GPUs a server; for TPUs the slice, along one axis of its torus, both ways round), and at
    `inter_bandwidth` to devices outside it, over the network.
    """

    name: str
    pattern: str
    flops: float
    memory: float
    intra_bandwidth: float
    domain_size: int
    inter_bandwidth: float


DEVICE_SPECS = (
    DeviceSpec("B200", r"B200|GB200", 2250e12, 180 * GB, 900 * GB, 8, 50 * GB),
    DeviceSpec("H100 PCIe", r"H100 PCIe", 756e12, 80 * GB, 64 * GB, 8, 25 * GB),
    DeviceSpec("H200", r"H200|GH200", 989e12, 141 * GB, 450 * GB, 8, 50 * GB),
    DeviceSpec("H100", r"H100", 989e12, 80 * GB, 450 * GB, 8, 50 * GB),
    DeviceSpec("A100", r"A100|A800", 312e12, 80 * GB, 300 * GB, 8, 25 * GB),
    DeviceSpec("L40S", r"L40S", 362e12, 48 * GB, 32 * GB, 8, 12.5 * GB),
    DeviceSpec("L4", r"\bL4\b", 121e12, 24 * GB, 32 * GB, 8, 12.5 * GB),
    DeviceSpec("RTX 5090", r"RTX 5090", 209.5e12, 32 * GB, 64 * GB, 4, 1.25 * GB),
    DeviceSpec("RTX 4090", r"RTX 4090", 165.2e12, 24 * GB, 32 * GB, 4, 1.25 * GB),
    DeviceSpec("RTX 3090", r"RTX 3090", 71e12, 24 * GB, 32 * GB, 4, 1.25 * GB),
    DeviceSpec("TPU7x", r"TPU7x", 2307e12, 192 * GB, 200 * GB, 9216, 12.5 * GB),
    DeviceSpec("TPU v6e", r"TPU v6", 918e12, 32 * GB, 180 * GB, 256, 6.25 * GB),
    DeviceSpec("TPU v5p", r"TPU v5p|TPU v5$", 459e12, 95 * GB, 180 * GB, 8960, 6.25 * GB),
    DeviceSpec("TPU v5e", r"TPU v5", 197e12, 16 * GB, 90 * GB, 256, 6.25 * GB),
    DeviceSpec("TPU v4", r"TPU v4", 275e12, 32 * GB, 90 * GB, 4096, 6.25 * GB),
    # For these, one JAX device is one core, half a chip.
    DeviceSpec("TPU v3", r"TPU v3", 61.5e12, 16 * GB, 70 * GB, 1024, 3 * GB),
    DeviceSpec("TPU v2", r"TPU v2", 22.5e12, 8 * GB, 62 * GB, 256, 3 * GB),
)
"""The first row whose pattern is found in JAX's `device_kind` applies."""


def device_spec(device_kind: str) -> DeviceSpec | None:
    """Return the row for a JAX `device_kind`, or None if it is unknown."""
    return next((spec for spec in DEVICE_SPECS if re.search(spec.pattern, device_kind)), None)


def find_device_spec(name: str) -> DeviceSpec | None:
    """Return the row with this name, in any case and with or without "TPU", or None if it is unknown."""
    return next((spec for spec in DEVICE_SPECS if _plain(spec.name) == _plain(name)), None)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").removeprefix("tpu")


def local_device_spec(device: Any) -> DeviceSpec | None:
    """Return the row for a JAX device, or None if it is unknown."""
    return device_spec(device.device_kind)


def device_bytes(device: Any) -> int | None:
    """Return the bytes that a program may use (on a CPU, the memory of the machine or container); None: unknown."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = [_container_limit()]
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min((limit for limit in limits if limit is not None), default=None)


def free_bytes(device: Any) -> int | None:
    """Return the bytes that a JAX device has left, None if that is unknown. A host's CPU devices share its memory."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    free = []
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text()):
            free.append(int(found[1]) * 1024)
    if (limit := _container_limit()) is not None:
        free.append(limit - _container_use())
    return max(0, min(free)) // len(device.client.local_devices()) if free else None


_CGROUP = pathlib.Path("/sys/fs/cgroup")


def _container_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):
            return int((_CGROUP / name).read_text())
    return None


def _container_use() -> int:
    """Return the bytes that the container's processes hold, without the pages that files leave in memory."""
    for name, row in (("memory.stat", r"^anon (\d+)"), ("memory/memory.stat", r"^total_rss (\d+)")):
        with contextlib.suppress(OSError):
            if found := re.search(row, (_CGROUP / name).read_text(), re.MULTILINE):
                return int(found[1])
    return 0
