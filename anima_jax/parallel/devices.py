"""Devices: their speed, memory and bandwidth by name, from vendors' data sheets, and the memory of those that are here.

Sources: NVIDIA's data sheets of each data centre GPU and the appendices of its GA102, Ada and Blackwell whitepapers
(GeForce), AMD's CDNA and RDNA data sheets, Google Cloud's pages of TPU versions, Apple's technical specifications.
"""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from anima_jax.errors import UserError

GB = 1e9
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class DeviceSpec:
    """The specification of a type of device: FLOP/s, bytes of memory, and bytes/s of bandwidth in one direction.

    `flops` is the dense 16-bit peak with float32 accumulation, `float32` that of float32. `memory` is the vendor's
    figure in units of 10⁹ bytes; most chips have the same number of GiB, and the 7 % between the two are about what
    the driver and the display take. `memories` are the sizes with which the device is sold, the usual one first, and
    `memory_bandwidth` is that of its own memory. A device sends at `intra_bandwidth` to the `domain_size` devices of
    its domain (for GPUs a server; for TPUs the slice, along one axis of its torus, both ways round), and at
    `inter_bandwidth` to devices outside it, over the network. `note` is for the user.
    """

    name: str
    flops: float
    float32: float
    memory: float
    memory_bandwidth: float
    intra_bandwidth: float
    domain_size: int
    inter_bandwidth: float
    memories: tuple[float, ...] = ()
    aliases: tuple[str, ...] = ()
    platform: str = "gpu"
    bfloat16: bool = True
    note: str = ""

    def peak_flops(self, dtype: Any) -> float:
        """Return the peak FLOP/s in this dtype; where there is no bfloat16, it is computed in float32."""
        if jnp.dtype(dtype).itemsize > 2 or (jnp.dtype(dtype) == jnp.bfloat16 and not self.bfloat16):
            return self.float32
        return self.flops

    def with_memory(self, memory: float) -> "DeviceSpec":
        """Return the same device with `memory` bytes."""
        return self if memory == self.memory else dataclasses.replace(self, memory=memory)


NO_BFLOAT16 = "has no bfloat16, which it emulates in float32: use dtype = 'float16'"
ON_CPU = "JAX runs on a Mac's processor cores, not on its GPU: this is their speed"

# Server or workstation: links inside it, devices in it, network.
_NVLINK5, _NVLINK4, _NVLINK3 = (900 * GB, 8, 50 * GB), (450 * GB, 8, 50 * GB), (300 * GB, 8, 25 * GB)
_NVLINK2, _PCIE5, _PCIE4, _PCIE3 = (
    (150 * GB, 8, 12.5 * GB),
    (64 * GB, 8, 25 * GB),
    (32 * GB, 8, 12.5 * GB),
    (16 * GB, 4, 6.25 * GB),
)
_DESK5, _DESK4, _DESK3 = (64 * GB, 4, 1.25 * GB), (32 * GB, 4, 1.25 * GB), (16 * GB, 4, 1.25 * GB)
_XGMI, _ALONE = (448 * GB, 8, 50 * GB), (10 * GB, 1, 1.25 * GB)


def _gpu(
    name: str,
    flops: float,
    float32: float,
    memories: tuple[float, ...],
    bandwidth: float,
    links: tuple[float, int, float],
    *aliases: str,
    **more: Any,
) -> DeviceSpec:
    """Return a row from its figures in TFLOP/s, GB and GB/s."""
    sizes = tuple(size * GB for size in memories)
    return DeviceSpec(
        name, flops * TERA, float32 * TERA, sizes[0], bandwidth * GB, *links, memories=sizes, aliases=aliases, **more
    )


def _tpu(
    name: str, flops: float, memory: float, bandwidth: float, links: Any, *aliases: str, **more: Any
) -> DeviceSpec:
    """Return a row of a TPU, which makes products of float32 from several of bfloat16."""
    return _gpu(name, flops, flops / 3, (memory,), bandwidth, links, *aliases, platform="tpu", **more)


def _turing(*row: Any) -> DeviceSpec:
    return _gpu(*row, bfloat16=False, note=NO_BFLOAT16)


def _mac(name: str, cores: int, gigahertz: float, memories: tuple[float, ...], bandwidth: float) -> DeviceSpec:
    """Return a row of an Apple chip: each performance core has four 128-bit multiply-add units for float32."""
    teraflops = cores * gigahertz * 32 / 1000
    row = (f"Apple {name}", teraflops, teraflops, memories, bandwidth, _ALONE)
    return _gpu(*row, platform="cpu", bfloat16=False, note=ON_CPU)


DEVICE_SPECS = (
    # NVIDIA, data centre
    _gpu("B300", 2250, 75, (288, 270), 8000, _NVLINK5, "GB300"),
    _gpu("B200", 2250, 75, (180, 192), 8000, _NVLINK5, "GB200"),
    _gpu("H100 PCIe", 756, 51, (80,), 2000, _PCIE5),
    _gpu("H100 NVL", 835, 60, (94,), 3900, _PCIE5),
    _gpu("H200", 989, 67, (141,), 4800, _NVLINK4, "GH200", "H200 NVL"),
    _gpu("H100", 989, 67, (80, 96, 64), 3350, _NVLINK4, "H800"),
    _gpu("H20", 148, 44, (96, 141), 4000, _NVLINK4),
    _gpu("A100", 312, 19.5, (80, 40), 1935, _NVLINK3, "A800"),
    _gpu("A30", 165, 10.3, (24,), 933, _PCIE4),
    _gpu("A40", 149.7, 37.4, (48,), 696, _PCIE4),
    _gpu("A10", 125, 31.2, (24,), 600, _PCIE4),
    _gpu("A10G", 70, 35, (24,), 600, _PCIE4),
    _gpu("L40S", 362, 91.6, (48,), 864, _PCIE4),
    _gpu("L40", 181, 90.5, (48,), 864, _PCIE4),
    _gpu("L4", 121, 30.3, (24,), 300, _PCIE4),
    _turing("V100", 125, 15.7, (16, 32), 900, _NVLINK2),
    _turing("T4", 65, 8.1, (16, 15), 320, _PCIE3),
    # NVIDIA, workstation and GeForce: 16-bit products with float32 sums at half the advertised rate
    _gpu("RTX PRO 6000", 503.8, 126, (96,), 1792, _DESK5, "RTX PRO 6000 Blackwell", "RTX PRO 6000 Blackwell Server"),
    _gpu("RTX 6000 Ada", 364.2, 91.1, (48,), 960, _DESK4),
    _gpu("RTX A6000", 154.8, 38.7, (48,), 768, _DESK4),
    _gpu("RTX A5000", 111.1, 27.8, (24,), 768, _DESK4),
    _gpu("RTX A4000", 76.7, 19.2, (16,), 448, _DESK4),
    _gpu("RTX 5090", 209.5, 104.8, (32,), 1792, _DESK5),
    _gpu("RTX 5080", 112.6, 56.3, (16,), 960, _DESK5),
    _gpu("RTX 5070 Ti", 87.9, 43.9, (16,), 896, _DESK5),
    _gpu("RTX 5070", 61.7, 30.9, (12,), 672, _DESK5),
    _gpu("RTX 5060 Ti", 47.4, 23.7, (16, 8), 448, _DESK5),
    _gpu("RTX 5060", 38.4, 19.2, (8,), 448, _DESK5),
    _gpu("RTX 4090", 165.2, 82.6, (24, 48), 1008, _DESK4, "4090 D"),
    _gpu("RTX 4080 SUPER", 104.4, 52.2, (16,), 736, _DESK4),
    _gpu("RTX 4080", 97.5, 48.7, (16,), 717, _DESK4),
    _gpu("RTX 4070 Ti SUPER", 88.2, 44.1, (16,), 672, _DESK4),
    _gpu("RTX 4070 Ti", 80.2, 40.1, (12,), 504, _DESK4),
    _gpu("RTX 4070 SUPER", 71, 35.5, (12,), 504, _DESK4),
    _gpu("RTX 4070", 58.3, 29.1, (12,), 504, _DESK4),
    _gpu("RTX 4060 Ti", 44.1, 22.1, (16, 8), 288, _DESK4),
    _gpu("RTX 4060", 30.2, 15.1, (8,), 272, _DESK4),
    _gpu("RTX 3090 Ti", 80, 40, (24,), 1008, _DESK4),
    _gpu("RTX 3090", 71, 35.6, (24,), 936, _DESK4),
    _gpu("RTX 3080 Ti", 68.2, 34.1, (12,), 912, _DESK4),
    _gpu("RTX 3080", 59.5, 29.8, (10, 12), 760, _DESK4),
    _gpu("RTX 3070 Ti", 43.5, 21.7, (8,), 608, _DESK4),
    _gpu("RTX 3070", 40.6, 20.3, (8,), 448, _DESK4),
    _gpu("RTX 3060 Ti", 32.4, 16.2, (8,), 448, _DESK4),
    _gpu("RTX 3060", 25.5, 12.7, (12, 8), 360, _DESK4),
    _turing("TITAN RTX", 65.2, 16.3, (24,), 672, _DESK3),
    _turing("RTX 2080 Ti", 53.8, 13.4, (11, 22), 616, _DESK3),
    _turing("RTX 2060", 25.8, 6.5, (6, 12), 336, _DESK3),
    # AMD
    _gpu("MI325X", 1307.4, 163.4, (256,), 6000, _XGMI),
    _gpu("MI300X", 1307.4, 163.4, (192,), 5300, _XGMI),
    _gpu("MI250X", 191.5, 47.9, (64,), 1600, _XGMI, "MI250", note="one JAX device is half of a card"),
    _gpu("RX 7900 XTX", 122.8, 61.4, (24,), 960, _DESK4, "7900 XTX"),
    # Google
    _tpu("TPU7x", 2307, 192, 7380, (200 * GB, 9216, 12.5 * GB), "v7x", "v7", "ironwood"),
    _tpu("TPU v6e", 918, 32, 1640, (180 * GB, 256, 6.25 * GB), "v6 lite", "v6", "trillium"),
    _tpu("TPU v5p", 459, 95, 2765, (180 * GB, 8960, 6.25 * GB), "v5"),
    _tpu("TPU v5e", 197, 16, 819, (90 * GB, 256, 6.25 * GB), "v5 lite", "v5litepod"),
    _tpu("TPU v4", 275, 32, 1228, (90 * GB, 4096, 6.25 * GB)),
    _tpu("TPU v3", 61.5, 16, 450, (70 * GB, 1024, 3 * GB), note="one JAX device is half of a chip"),
    _tpu("TPU v2", 22.5, 8, 300, (62 * GB, 256, 3 * GB), note="one JAX device is half of a chip"),
    # Apple
    *(
        _mac(*row)
        for row in (
            ("M1", 4, 3.2, (16, 8), 68),
            ("M1 Pro", 8, 3.2, (32, 16), 200),
            ("M1 Max", 8, 3.2, (32, 64), 400),
            ("M1 Ultra", 16, 3.2, (64, 128), 800),
            ("M2", 4, 3.5, (16, 8, 24), 100),
            ("M2 Pro", 8, 3.5, (16, 32), 200),
            ("M2 Max", 8, 3.7, (32, 64, 96), 400),
            ("M2 Ultra", 16, 3.7, (64, 128, 192), 800),
            ("M3", 4, 4.05, (16, 8, 24), 100),
            ("M3 Pro", 6, 4.05, (18, 36), 150),
            ("M3 Max", 12, 4.05, (48, 36, 64, 96, 128), 400),
            ("M3 Ultra", 24, 4.05, (96, 256, 512), 819),
            ("M4", 4, 4.4, (16, 24, 32), 120),
            ("M4 Pro", 10, 4.5, (24, 48, 64), 273),
            ("M4 Max", 12, 4.5, (36, 48, 64, 128), 546),
            ("M5", 4, 4.6, (16, 24, 32), 153),
        )
    ),
)

_NOISE = re.compile(
    r"nvidia|geforce|rtx|gtx|tesla|quadro|amd|instinct|radeon|apple|google|cloud|tpu|graphics|generation"
    r"|workstation|edition|oam|sxm\d?|hbm\d?e?|gpu"
)
_MEMORY_IN_NAME = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)[\s_-]*(?:gib|gb|g)\b")


def _key(name: str) -> str:
    """Return what tells a device's name from others': lower case, without makers, series, form factors and spaces."""
    return _NOISE.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))


def _keys() -> dict[str, DeviceSpec]:
    return {_key(name): spec for spec in reversed(DEVICE_SPECS) for name in (*spec.aliases, spec.name)}


def find_device_spec(name: str) -> DeviceSpec | None:
    """Return the row for a name as JAX or a person gives it, or None if it is unknown.

    Case, makers and series do not matter, and a size of memory selects it: "RTX 3060 12GB", "rtx3060", "4060 ti 16",
    "NVIDIA A100-SXM4-80GB", "TPU v5 lite", "v5p-128".
    """
    given = _MEMORY_IN_NAME.search(name.lower())
    plain = _key(_MEMORY_IN_NAME.sub(" ", name.lower()))
    rows = _keys()
    for key in (plain, plain.removesuffix("pcie")):
        if (spec := rows.get(key)) is not None:
            size = float(given[1]) * GB if given else spec.memory
            return spec.with_memory(size) if size <= 2 * max(spec.memories) else spec  # "GH200 480GB": the host's
    for key, spec in rows.items():
        rest = re.fullmatch(rf"{re.escape(key)}(\d+)(gib|gb|g)?", plain)
        if rest and spec.platform == "tpu":  # v5p-128: a number of cores or chips
            return spec
        if rest and float(rest[1]) * GB in spec.memories:
            return spec.with_memory(float(rest[1]) * GB)
    return None


def near_names(name: str, count: int = 4) -> list[str]:
    """Return the names of the devices that are written most like `name`."""
    rows = _keys()
    near = difflib.get_close_matches(_key(_MEMORY_IN_NAME.sub(" ", name.lower())), rows, count, 0.5)
    return list(dict.fromkeys(rows[key].name for key in near))


_UNITS = ("", "k", "m", "g", "t")
"""A letter alone, and KiB, MiB and GiB, count by powers of 1024, as in `free -h`; KB, MB and GB by powers of 1000."""


def parse_bytes(text: str) -> int:
    """Return the bytes of an amount of memory: "12GiB", "12 GB", "12 G", or a plain number of bytes.

    Raises UserError for anything else, and for less than a megabyte, which is a forgotten unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:[.,]\d+)?|\d*\.\d+)\s*([kmgt]?)(ib?|b|bytes?)?\s*", text.lower())
    if not found or ((found[3] or "").startswith("i") and not found[2]):
        raise UserError(f"found {text!r}, expected an amount of memory, as 12GiB, 12GB or 12884901888")
    power = _UNITS.index(found[2])
    unit = 1000**power if found[3] == "b" else 1024**power
    size = float(found[1].replace(",", ".")) * unit
    if not 2**20 <= size < 2**60:
        near = "" if found[2] or not size else f" (did you mean '{found[1]}GiB'?)"
        raise UserError(f"found {text!r}, expected between 1 MiB and 1 EiB{near}")
    return int(size)


def local_device_spec(device: Any) -> DeviceSpec | None:
    """Return the row for a JAX device, or None if it is unknown."""
    return find_device_spec(device.device_kind)


def use_device_memory() -> None:
    """Let JAX use 93 % of a GPU's memory instead of 75 %, unless the environment says otherwise.

    That is about the vendor's figure in units of 10⁹ bytes, by which `DeviceSpec` counts. It has an effect only before
    JAX finds its devices.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")


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
