"""Options of XLA's compilers for the networks' programs: a table by hardware, without the flags that the user sets.

They are passed with each program, not in the environment, so that a program for hardware that is not in this machine
has them too, and that an option which the installed compiler does not know is left out instead of ending the process.
Sources: programs compiled for 8 to 256 chips (docs/scaling.md), MaxText's `benchmarks/xla_flags_library.py`.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from anima_jax.platform import platform

Options = Mapping[str, bool | str]

_CPU: Options = {
    # The first pass would convert the stacked 16-bit weights to float32 ahead of the scan over the blocks: a copy of
    # twice their size, which every block then converts back. The second would remove the barriers of `layers.linear`.
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,cse_barrier_expander",
    # YNNPACK computes products one by one and nothing else: its Σ a · b takes up to 40 times as long as XLA's own.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
}
_TPUS: Options = {
    # The sum of gradients over `data` runs while the layers before are computed.
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
    # Gathers run in parts, each beside a product.
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
_GPUS: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}

_QUICK_TPU: Options = {
    # The VAE takes a ninth of the time to compile and decodes 1024² in 0.27 instead of 0.20 s (v5e, by the compiler's
    # estimate), which pays for the few images of a command, not for the cache of a data set. The transformer would
    # take 2.6 times as long.
    "xla_optimization_level": "EFFORT_O1",
}

OPTIONS: Mapping[str, tuple[tuple[str, int, Options], ...]] = {
    "network": ((r"cpu .*", 1, _CPU), (r"gpu .*", 2, _GPUS), (r"tpu .*", 2, _TPUS)),
    "vae": ((r"tpu .*", 1, _QUICK_TPU),),
}
"""Program → rows of platform and kind of device as JAX gives them, fewest devices, options. The first match counts.

"network" are the programs of the transformer and the text encoder, "vae" those that draw.
"""

_USERS = {"cpu": ("XLA_FLAGS",), "gpu": ("XLA_FLAGS",), "tpu": ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}


def compiler_options(mesh: Mesh | None = None, program: str = "network") -> dict[str, Any] | None:
    """Return the `compiler_options` of `jax.jit` for a program, a key of `OPTIONS`, on `mesh`.

    Without a mesh it runs on one local device. None if there are no options. Flags that the user sets in
    LIBTPU_INIT_ARGS or XLA_FLAGS are left alone, as are options that the installed compiler does not know.
    """
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
    if mesh is None and platform() != devices[0].platform:
        return None
    own = [device for device in devices if device.process_index == jax.process_index()]  # others cannot be compiled for
    device = (own or devices)[0]
    given = " ".join(os.environ.get(name, "") for name in _USERS.get(device.platform, ()))
    return _known(program, device, len(devices), frozenset(re.findall(r"--(?:no)?(\w+)", given))) or None


@functools.lru_cache
def _known(program: str, device: Any, devices: int, given: frozenset[str]) -> dict[str, Any]:
    """Return the options of a device's row without those of `given`, the user's flags, and without unknown ones."""
    kind = f"{device.platform} {device.device_kind}"
    rows = (options for pattern, least, options in OPTIONS[program] if devices >= least and re.fullmatch(pattern, kind))
    row = next(rows, {})
    options = {name: value for name, value in row.items() if name not in given}
    while options and (refused := _refused(device, options)):
        options = {name: value for name, value in options.items() if name not in refused}
    return options


def _refused(device: Any, options: Options) -> set[str]:
    """Return which of the options the compiler refuses: it says so of one at a time, and if of none, all of them."""
    scalar = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    try:
        with jax.set_mesh(Mesh(np.array([device]), ("device",))):  # the caller's may have other devices
            jax.jit(lambda x: x).lower(scalar).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        return {name for name in options if re.search(rf"\b{name}\b", str(error))} or set(options)
    return set()
