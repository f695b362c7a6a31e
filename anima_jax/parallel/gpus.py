"""What XLA's compiler must know of an NVIDIA GPU that is not in this machine: its target configuration.

Numbers of multiprocessors and sizes of level 2 caches are those of NVIDIA's data sheets and whitepapers; what a
multiprocessor has follows from its compute capability (CUDA C++ Programming Guide, "Compute Capabilities").
"""

from typing import NamedTuple

from anima_jax.parallel.devices import DeviceSpec
from anima_jax.platform import Hardware


class _Generation(NamedTuple):
    """What a multiprocessor has: float32 lanes, threads, and KiB of shared memory, in all and for one block."""

    lanes: int
    threads: int
    shared: int
    of_block: int


_GENERATIONS = {
    "7.0": _Generation(64, 2048, 96, 96),
    "7.5": _Generation(64, 1024, 64, 64),
    "8.0": _Generation(64, 2048, 164, 163),
    "8.6": _Generation(128, 1536, 100, 99),
    "8.9": _Generation(128, 1536, 100, 99),
    "9.0": _Generation(128, 2048, 228, 227),
    "10.0": _Generation(128, 2048, 228, 227),
    "10.3": _Generation(128, 2048, 228, 227),
    "12.0": _Generation(128, 1536, 100, 99),
}
"""By compute capability."""

_CHIPS = {
    "7.0": {"V100": (80, 6)},
    "7.5": {"T4": (40, 4), "TITAN RTX": (72, 6), "RTX 2080 Ti": (68, 5.5), "RTX 2060": (30, 3)},
    "8.0": {"A100": (108, 40), "A30": (56, 24)},
    "8.6": {
        **{"A40": (84, 6), "A10": (72, 6), "A10G": (80, 6)},
        **{"RTX A6000": (84, 6), "RTX A5000": (64, 6), "RTX A4000": (48, 4)},
        **{"RTX 3090 Ti": (84, 6), "RTX 3090": (82, 6), "RTX 3080 Ti": (80, 6), "RTX 3080": (68, 5)},
        **{"RTX 3070 Ti": (48, 4), "RTX 3070": (46, 4), "RTX 3060 Ti": (38, 4), "RTX 3060": (28, 3)},
    },
    "8.9": {
        **{"L40S": (142, 96), "L40": (142, 96), "L4": (58, 48), "RTX 6000 Ada": (142, 96), "RTX 4090": (128, 72)},
        **{"RTX 4080 SUPER": (80, 64), "RTX 4080": (76, 64), "RTX 4070 Ti SUPER": (66, 48), "RTX 4070 Ti": (60, 48)},
        **{"RTX 4070 SUPER": (56, 48), "RTX 4070": (46, 36), "RTX 4060 Ti": (34, 32), "RTX 4060": (24, 24)},
    },
    "9.0": {"H200": (132, 50), "H100": (132, 50), "H100 PCIe": (114, 50), "H100 NVL": (132, 50), "H20": (78, 60)},
    "10.0": {"B200": (148, 126)},
    "10.3": {"B300": (148, 126)},
    "12.0": {
        **{"RTX PRO 6000": (188, 128), "RTX 5090": (170, 96), "RTX 5080": (84, 64), "RTX 5070 Ti": (70, 48)},
        **{"RTX 5070": (48, 48), "RTX 5060 Ti": (36, 32), "RTX 5060": (30, 32)},
    },
}
"""Compute capability → name of a device's row → number of multiprocessors and MiB of level 2 cache."""


def hardware_of(spec: DeviceSpec) -> Hardware | None:
    """Return what programs for an NVIDIA GPU are built for; None if the row is of other hardware."""
    for capability, chips in _CHIPS.items():
        if spec.name in chips:
            return Hardware("gpu", spec.name, capability=capability, cores=chips[spec.name][0])
    return None


def target_config(spec: DeviceSpec, cudnn: tuple[int, int, int]) -> str:
    """Return the target configuration of an NVIDIA GPU, XLA's `GpuTargetConfigProto` as text.

    `cudnn` is the version of cuDNN that will run the program. Raises KeyError if `hardware_of` returns None.
    """
    hardware = hardware_of(spec)
    if hardware is None or hardware.capability is None or hardware.cores is None:
        raise KeyError(spec.name)
    own = _GENERATIONS[hardware.capability]
    cache = _CHIPS[hardware.capability][spec.name][1]
    major, minor = hardware.capability.split(".")
    # Instructions of one generation only, such as Hopper's wgmma, are compiled only if the target says so.
    extension = "" if int(major) < 9 else "feature_extension: ACCELERATED_FEATURES"
    cudnn_major, cudnn_minor, cudnn_patch = cudnn
    return f"""
gpu_device_info {{
  name: "{spec.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  core_count: {hardware.cores}
  fpus_per_core: {own.lanes}
  clock_rate_ghz: {spec.float32 / (2e9 * own.lanes * hardware.cores):.3f}
  memory_bandwidth: {spec.memory_bandwidth:.0f}
  device_memory_size: {spec.memory:.0f}
  l2_cache_size: {cache * 2**20:.0f}
  pcie_bandwidth: {32 * 2**30}
  threads_per_warp: 32
  threads_per_core_limit: {own.threads}
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  shared_memory_per_core: {own.shared * 2**10}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {own.of_block * 2**10}
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{cudnn_major}.{cudnn_minor}.{cudnn_patch}"
}}
platform_name: "CUDA"
runtime_version {{ major: 13 minor: 0 patch: 0 }}
dnn_version_info {{ major: {cudnn_major} minor: {cudnn_minor} patch: {cudnn_patch} }}
device_description_str: "{spec.name}"
"""
