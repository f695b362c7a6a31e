"""The hardware that programs are compiled for. Code that builds a program differently for some hardware asks here.

That is this machine's first device, unless `compiling_for` says otherwise. jit's caches know the difference.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of device: `platform` is "cpu", "gpu" or "tpu", `kind` is its name as JAX gives it.

    `capability` is the compute capability of an NVIDIA GPU, such as "9.0", and `cores` its number of multiprocessors;
    None on other hardware. `host_memory` says whether a program for it can keep arrays in pinned memory of the host.
    """

    platform: str
    kind: str = ""
    capability: str | None = None
    cores: int | None = None
    host_memory: bool = True

    @property
    def narrow_products(self) -> tuple[str, ...]:
        """The products with 8-bit operands that it has: "int8", "fp8"."""
        if self.platform == "cpu":
            return ("int8",)
        if self.platform == "tpu":
            version = re.search(r"\d+", self.kind)
            return () if version is None else tuple(name for name, first in _TPU_PRODUCTS if int(version[0]) >= first)
        return tuple(name for name, capability in _GPU_PRODUCTS if self.has_capability(capability))

    def has_capability(self, at_least: float) -> bool:
        """Return whether it is an NVIDIA GPU of this compute capability or a later one."""
        return self.capability is not None and float(self.capability) >= at_least


_TPU_PRODUCTS = (("int8", 5), ("fp8", 7))
"""8-bit products of TPUs and the first version with them (Google Cloud's pages of TPU versions)."""

_GPU_PRODUCTS = (("int8", 7.5), ("fp8", 8.9))
"""8-bit products of NVIDIA's GPUs and the first compute capability with them (CUDA C++ Programming Guide)."""


_TARGET: Any = jax.make_user_context(None)


def hardware() -> Hardware:
    """Return the hardware that programs are compiled for."""
    target: Hardware | None = _TARGET.value
    return _local() if target is None else target


def platform() -> str:
    """Return the platform that programs are compiled for: "cpu", "gpu" or "tpu"."""
    target: Hardware | None = _TARGET.value
    return jax.default_backend() if target is None else target.platform


@contextlib.contextmanager
def compiling_for(target: Hardware | str) -> Iterator[None]:
    """Build the block's programs for `target`, a platform or hardware that need not be in this machine."""
    with _TARGET(Hardware(target) if isinstance(target, str) else target):
        yield


def lower(jitted: Any, *args: Any, **kwargs: Any) -> Any:
    """Return `jitted.lower(*args, **kwargs)`, for the hardware that programs are compiled for."""
    target: Hardware | None = _TARGET.value
    # By default JAX looks in this machine for the GPU's maker.
    platforms = ("cuda",) if target is not None and target.platform == "gpu" else None
    return jitted.trace(*args, **kwargs).lower(lowering_platforms=platforms)


def _local() -> Hardware:
    device: Any = jax.local_devices()[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return Hardware(
        device.platform,
        device.device_kind,
        capability=str(device.compute_capability) if cuda else None,
        cores=device.core_count if cuda else None,
        host_memory="pinned_host" in kinds,
    )
