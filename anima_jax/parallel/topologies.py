"""Devices to compile for that this machine lacks: a TPU slice ("v5p:8x8x4") or NVIDIA GPUs ("H100", "RTX 4090:2").

libtpu and JAX's CUDA plugin compile for such devices; nothing can run on them.
"""

import contextlib
import dataclasses
import fnmatch
import importlib.metadata
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

from anima_jax.errors import UserError
from anima_jax.parallel.devices import DeviceSpec, find_device_spec, near_names
from anima_jax.parallel.gpus import hardware_of, target_config
from anima_jax.platform import Hardware

CUDA_CAPABILITY = 7.5
"""The lowest compute capability for which CUDA 13 compiles."""

_VERSIONS: dict[str, tuple[str, int, int, int]] = {
    "TPU v2": ("v2", 2, 2, 256),
    "TPU v3": ("v3", 2, 2, 1024),
    "TPU v4": ("v4", 3, 1, 4096),
    "TPU v5e": ("v5e", 2, 1, 256),
    "TPU v5p": ("v5p", 3, 1, 6144),
    "TPU v6e": ("v6e", 2, 1, 256),
    "TPU7x": ("tpu7x", 3, 2, 9216),
}
"""Name of a device's row → libtpu's name, axes of the torus, JAX devices per chip, and chips of the largest slice."""

_MEGACORE = {"TPU v4", "TPU v5p"}
"""Chips whose two cores are one JAX device."""

_NAMED = re.compile(r"\s*(.+?)\s*(?:(:)\s*(\d+(?:\s*[x×]\s*\d+)*)|-(\d+))?\s*", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for: `count` of the kind `spec`. `shape` are the chips along each axis of a TPU's torus."""

    spec: DeviceSpec
    count: int
    shape: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its name, as `parse_topology` reads it."""
        if self.shape:
            return f"{_VERSIONS[self.spec.name][0]}:{_by_x(self.shape)}"
        return self.spec.name if self.count == 1 else f"{self.spec.name}:{self.count}"

    @property
    def hardware(self) -> Hardware:
        """What its programs are built for (`platform.compiling_for`)."""
        return hardware_of(self.spec) or Hardware("tpu", self.spec.name)

    def devices(self) -> list[Any]:
        """Return its devices, for which JAX compiles.

        Raises UserError if the compiler is not installed or does not know them.
        """
        return self._tpu_devices() if self.shape else self._gpu_devices()

    def _tpu_devices(self) -> list[Any]:
        _check_installed(self.name, "libtpu", "aot-tpu")
        options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(self.shape) == 1 else {}
        if self.spec.name in _MEGACORE:
            options["chip_config_name"] = "megacore"
        with _compiler_errors(self.name, "libtpu"):
            found = topologies.get_topology_desc(self.name, "tpu", **options).devices
        return list(found)

    def _gpu_devices(self) -> list[Any]:
        _check_installed(self.name, "jax-cuda13-plugin", "aot-gpu")
        from jax._src.lib import cuda_versions

        version = cuda_versions.cudnn_get_version() if cuda_versions else 90000  # 91200 is 9.12.0
        cudnn = (version // 10000, version // 100 % 100, version % 100)
        size = min(self.count, self.spec.domain_size)
        with _compiler_errors(self.name, "jax-cuda13-plugin"):
            found = topologies.get_topology_desc(
                "", "cuda", target_config=target_config(self.spec, cudnn), topology=f"1x{self.count // size}x{size}"
            ).devices
        return list(found)


def _check_installed(name: str, package: str, extra: str) -> None:
    """Raise UserError unless a compiler's package is installed, in the version that jax's own extra asks for."""
    found, install = _version(package), f"pip install 'anima_jax[{extra}]'"
    if found is None:
        raise UserError(f"--compile {name}: {package} is not installed: {install}")
    needed = [match[1] for line in importlib.metadata.requires("jax") or () if (match := _needed(package, line))]
    if needed and not any(fnmatch.fnmatchcase(found, pattern) for pattern in needed):
        raise UserError(
            f"--compile {name}: found {package} {found}, but jax {jax.__version__} needs {needed[0]}: {install}"
        )


def _needed(package: str, requirement: str) -> re.Match[str] | None:
    """Return a match whose first group is the version, such as "0.0.42.*", if the requirement is of this package."""
    return re.match(rf"{re.escape(package)}(?:\[[^]]*\])?(?:==|<=)([\w.*]+)", requirement)


@contextlib.contextmanager
def _compiler_errors(name: str, package: str) -> Iterator[None]:
    """Raise the block's errors as one UserError with the versions that may not match."""
    try:
        yield
    except Exception as error:  # of many kinds: a plugin of another version fails where it likes
        reason = " ".join(str(error).split())[:300]
        versions = ", ".join(f"{one} {_version(one)}" for one in ("jax", package))
        raise UserError(f"--compile {name}: {reason} ({versions})") from error


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def use_compilers() -> None:
    """Let this process compile for devices that it lacks. Only before JAX finds its devices.

    Programs run on the CPU. What the environment already says is kept.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs of absent devices could not be read back
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu waits for the metadata server of a TPU's host
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it need not be alone: it has no device to lock
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_autotune_level" not in flags:  # tuning would run kernels
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()


def parse_topology(text: str) -> Topology:
    """Return the devices that `text` names. No compiler is needed.

    A TPU slice is a version and its chips, "v5e:4x4" or "v5e:16", or Google's name, "v5litepod-16" and "v5p-8" (cores).
    GPUs are a name as `find_device_spec` reads it, with their number after a colon if it is not 1.
    Raises UserError with the nearest valid names if there are no such devices or if no compiler knows them.
    """
    found = _NAMED.fullmatch(text)
    kind, number = (found[1], found[3] or found[4]) if found else (text, None)
    spec = find_device_spec(kind) if found else None
    if spec is None or (spec.platform == "gpu" and found and found[4]):  # "a100-80"
        spec, number = find_device_spec(text), None
    if spec is None:
        near = near_names(kind) or ["TPU v5e", "TPU v5p", "TPU v6e", "H100", "RTX 4090"]
        raise UserError(f"--compile {text}: not a known device; the nearest are {', '.join(near)}")
    if spec.platform == "tpu":
        return _slice(text, spec, number, cores=bool(found and found[4]))
    hardware = hardware_of(spec)
    if hardware is None or not hardware.has_capability(CUDA_CAPABILITY):
        raise UserError(
            f"--compile {text}: there is no compiler for {spec.name}; expected a TPU or an NVIDIA GPU of compute "
            f"capability {CUDA_CAPABILITY} (Turing) or later"
        )
    count = math.prod(_sizes(number or "1"))
    size = min(count, spec.domain_size)
    if count < 1 or count % size:
        valid = [one for one in (count // size * size, (count // size + 1) * size) if one] if size else [1]
        raise UserError(f"--compile {text}: {spec.domain_size} are in a server; expected a number such as {valid[0]}")
    return Topology(spec, count)


def _slice(text: str, spec: DeviceSpec, number: str | None, *, cores: bool) -> Topology:
    """Return the slice of this version of TPU with so many chips (or cores), or with chips AxB or AxBxC."""
    name, axes, per_chip, _ = _VERSIONS[spec.name]
    shapes = _shapes(spec)
    sizes = _sizes(number or "1")
    if len(sizes) == 1:
        chips = sizes[0] // 2 if cores and name not in {"v5e", "v6e"} else sizes[0]
        shape = next((one for one in shapes if math.prod(one) == chips), None)
    else:
        chips = math.prod(sizes)
        shape = sizes if tuple(sorted(sizes + (1,) * (axes - len(sizes)))) in map(_sorted, shapes) else None
        shape = shape and (*shape, *(1,) * (axes - len(shape)))
    if shape is None:
        near = sorted(shapes, key=lambda one: (abs(math.log(math.prod(one) / max(chips, 1))), one))[:4]
        names = ", ".join(f"{name}:{_by_x(one)}" for one in sorted(near, key=math.prod))
        raise UserError(f"--compile {text}: {spec.name} has no such slice; the nearest are {names}")
    return Topology(spec, math.prod(shape) * per_chip, shape)


def _sorted(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(shape))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def _by_x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _shapes(spec: DeviceSpec) -> list[tuple[int, ...]]:
    """Return the slices that Google has of a version, smallest first.

    Besides a single chip those of two axes are n × n and n × 2n chips with n a power of two; those of three axes are
    parts of a cube of 4 × 4 × 4, or multiples of 4 along each axis.
    """
    _, axes, _, largest = _VERSIONS[spec.name]
    if axes == 2:
        powers = [2**n for n in range(1, 6)]
        shapes = [(1, 1)] + [shape for n in powers for shape in ((n, n), (n, 2 * n))]
    else:
        fours = range(4, 33, 4)
        cubes = itertools.combinations_with_replacement(fours, 3)
        # The small ones are written as Google does, with the longest axis last or an axis of 1 last.
        shapes = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes]
    found = [shape for shape in shapes if math.prod(shape) <= largest]
    return sorted(found, key=lambda shape: (math.prod(shape), max(shape)))
