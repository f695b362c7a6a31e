"""Whole networks, from files and into files.

`load_…` gives a model and `save_…` writes parameters under the original names. Below them, `open_…` checks a file
against the model that its shapes describe and gives a `Checkpoint`, whose parameters can then be streamed to wherever
they should be, one at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from anima_jax.checkpoints import accounting, copying, gathered, safetensors
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import FileTensor, Rule, dit, file_tensors, networks, qwen3, wan_vae
from anima_jax.checkpoints.names.networks import Network, NetworkKeys
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import LLMAdapter, LLMAdapterConfig
from anima_jax.models.parameters import Params
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig
from anima_jax.parallel import rules

DTypes = DTypeLike | Mapping[str, DTypeLike] | None
"""One dtype for all parameters, or one a parameter path; None (or a path not named) keeps the file's."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file (or a transformer's and an adapter's) that fits the model `graphdef`, open and not yet read.

    `abstract` holds a `jax.ShapeDtypeStruct` for each parameter, in the dtype that the file stores. `metadata` is the
    file's; `prefix` what its names begin with; `skipped` its known extra buffers, `elsewhere` its tensors of other
    networks.
    """

    config: Any
    graphdef: nnx.GraphDef
    abstract: Params
    tensors: tuple[FileTensor, ...]
    sources: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    prefix: str
    skipped: tuple[str, ...]
    elsewhere: tuple[str, ...]

    def load(self, dtype: DTypes = None, shardings: Mapping[str, Sharding] | None = None) -> Params:
        """The parameters, each read, converted and put in place before the next is begun.

        `shardings` (by parameter path) says where; without, everything goes to the default device. On the host there is
        one parameter at a time. UserError if a value overflows in `dtype` or the file is cut off meanwhile.
        """
        return {
            path: self._place(path, list(tensors), dtype, (shardings or {}).get(path))
            for path, tensors in itertools.groupby(self.tensors, key=lambda tensor: tensor.path)
        }

    def _place(self, path: str, tensors: Sequence[FileTensor], dtype: DTypes, sharding: Sharding | None) -> jax.Array:
        """One parameter on its devices; when this returns nothing of it is left on the host.

        Of each layer's tensor a process reads the rows that its own devices need, and keeps their parts alone.
        """
        shape = self.abstract[path].shape
        wanted = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        stored = self.abstract[path].dtype if wanted is None else np.dtype(wanted)
        place = sharding or SingleDeviceSharding(jax.local_devices()[0])
        indices = place.addressable_devices_indices_map(shape).values()
        parts = {_bounds(index, shape): np.empty(_size(index, shape), stored) for index in indices}
        layered = tensors[0].layer is not None
        rows = _rows_of(tensors[0], [bounds[1:] if layered else bounds for bounds in parts])
        for tensor in tensors:
            layer = self._read(tensor, rows, stored)
            for bounds, part in parts.items():
                inside = tuple(slice(*each) for each in (bounds[1:] if layered else bounds))
                copying.copy_into(part[tensor.layer] if layered else part, layer[inside])
            del layer
        if sharding is None:
            placed = jax.device_put(*parts.values())
        else:
            placed = jax.make_array_from_callback(shape, sharding, lambda index: parts[_bounds(index, shape)])
        return placed.block_until_ready()

    def _read(self, tensor: FileTensor, rows: slice | None, dtype: np.dtype) -> np.ndarray:
        """One tensor as the model has it; `rows` alone of the file's are filled in."""
        source = self.sources[tensor.name]
        values = copying.cast(source.read(rows), dtype, source.key)
        if rows is not None:
            whole = np.empty(tensor.shape, dtype)  # memory that is not written to is not taken
            whole[rows] = values
            values = whole
        return tensor.layout.to_model(values)


def load_dit(
    path: PathLike,
    dtype: DTypes = None,
    *,
    adapter_path: PathLike | None = None,
) -> AnimaDiT:
    """The transformer in a file of any known dialect, with its text adapter if the file or `adapter_path` has one.

    `dtype` None keeps the stored dtypes; sizes are read from the file. On the mesh that is set (`jax.set_mesh`) the
    parameters lie as its rules say (parallel/rules.py). UserError for whatever does not fit.
    """
    with open_dit(path, adapter_path=adapter_path) as checkpoint:
        return _load(checkpoint, dtype)


def load_text_encoder(path: PathLike, dtype: DTypes = None) -> Qwen3:
    """The Qwen3 text encoder in a file of Hugging Face's names or an all-in-one file. As `load_dit`."""
    with open_text_encoder(path) as checkpoint:
        return _load(checkpoint, dtype)


def load_vae(path: PathLike, dtype: DTypes = None) -> WanVAE:
    """The Wan 2.1 VAE in a file of the original names or an all-in-one file. As `load_dit`."""
    with open_vae(path) as checkpoint:
        return _load(checkpoint, dtype)


def _load(checkpoint: Checkpoint, dtype: DTypes) -> Any:
    mesh = jax.sharding.get_mesh()
    shardings = None if mesh.empty else rules.shardings(checkpoint.abstract, checkpoint.abstract, mesh)
    return parameters.merge(checkpoint.graphdef, checkpoint.load(dtype, shardings))


def save_dit(
    path: PathLike,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    prefix: str = "net.",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a transformer, its adapter inside, as the trainer does. `dtype` None keeps each parameter's.

    The file appears whole or not at all. UserError if it cannot be written or a value overflows in `dtype`.
    """
    _save(path, params, dit.RULES, dtype, prefix, metadata)


def save_text_encoder(
    path: PathLike, params: Params, *, dtype: DTypeLike | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a Qwen3 under Hugging Face's names. As `save_dit`."""
    _save(path, params, qwen3.RULES, dtype, "model.", metadata)


def save_vae(
    path: PathLike,
    params: Params,
    config: WanVAEConfig,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a Wan VAE under its original names, which depend on the `config`. As `save_dit`."""
    _save(path, params, wan_vae.rules(config), dtype, "", metadata)


@contextlib.contextmanager
def open_dit(path: PathLike, *, adapter_path: PathLike | None = None) -> Iterator[Checkpoint]:
    """The transformer in a file; an adapter in `adapter_path` takes the place of one inside the file."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(SafetensorsFile(path))
        location = accounting.find(networks.DIT, file)
        sources = {name: StoredTensor(file, key) for name, key in location.keys.items()}
        unknown, label = list(location.unknown), file.path
        if adapter_path is not None:
            adapter_file = stack.enter_context(SafetensorsFile(adapter_path))
            adapter = accounting.find(networks.ADAPTER, adapter_file)
            sources = {name: source for name, source in sources.items() if not name.startswith(dit.ADAPTER)}
            sources |= {name: StoredTensor(adapter_file, key) for name, key in adapter.keys.items()}
            unknown += adapter.unknown
            label = f"{file.path} with {adapter_file.path}"
        yield fit(networks.DIT, label, file, location, sources, unknown)


@contextlib.contextmanager
def open_llm_adapter(path: PathLike) -> Iterator[Checkpoint]:
    """The text adapter alone, in a file of its own or inside a transformer's; its paths begin `llm_adapter.`."""
    with SafetensorsFile(path) as file:
        yield _open(networks.ADAPTER, file)


@contextlib.contextmanager
def open_text_encoder(path: PathLike) -> Iterator[Checkpoint]:
    """The Qwen3 text encoder in a file."""
    with SafetensorsFile(path) as file:
        yield _open(networks.QWEN3, file)


@contextlib.contextmanager
def open_vae(path: PathLike) -> Iterator[Checkpoint]:
    """The Wan VAE in a file."""
    with SafetensorsFile(path) as file:
        yield _open(networks.WAN_VAE, file)


OPENERS = {
    networks.DIT: open_dit,
    networks.ADAPTER: open_llm_adapter,
    networks.QWEN3: open_text_encoder,
    networks.WAN_VAE: open_vae,
}


class _AdapterAlone(nnx.Module):
    """The adapter under the paths that it has inside a transformer."""

    def __init__(self, config: LLMAdapterConfig, *, rngs: nnx.Rngs):
        self.llm_adapter = LLMAdapter(config, rngs=rngs)


MODULES = {networks.DIT: AnimaDiT, networks.ADAPTER: _AdapterAlone, networks.QWEN3: Qwen3, networks.WAN_VAE: WanVAE}


@functools.lru_cache(maxsize=8)
def _abstract(module: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, Params]:
    """`parameters.abstract` of a module, which traces all of it, once for a config."""
    return parameters.abstract(lambda rngs: module(config, rngs=rngs))


def _open(network: Network, file: SafetensorsFile) -> Checkpoint:
    location = accounting.find(network, file)
    sources = {name: StoredTensor(file, key) for name, key in location.keys.items()}
    return fit(network, file.path, file, location, sources, location.unknown)


def fit(
    network: Network,
    label: str,
    file: SafetensorsFile,
    location: NetworkKeys,
    sources: Mapping[str, StoredTensor],
    unknown: Sequence[str],
) -> Checkpoint:
    """The checkpoint, once every tensor of the file and every parameter of the model has found the other."""
    config = accounting.sizes(network, label, {name: source.tensor.shape for name, source in sources.items()})
    try:
        graphdef, abstract = _abstract(MODULES[network], config)
        tensors = tuple(file_tensors(network.rules(config), abstract))
    except (ValueError, TypeError, IndexError, ArithmeticError, OverflowError) as error:
        raise UserError(f"{label}: no {network.title} has sizes {config}: {error}") from error
    accounting.require_match(label, network.title, tensors, sources, unknown)
    stored: dict[str, np.dtype] = {}
    for tensor in tensors:
        dtype = sources[tensor.name].tensor.dtype
        stored[tensor.path] = _wider(stored.get(tensor.path, dtype), dtype)
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(stored[path]))
        for path, leaf in abstract.items()
    }
    return Checkpoint(
        config=config,
        graphdef=graphdef,
        abstract=abstract,
        tensors=tensors,
        sources=sources,
        metadata=file.metadata,
        prefix=location.prefix,
        skipped=location.skipped,
        elsewhere=location.elsewhere,
    )


def _wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """A dtype that holds the values of both: layers stored differently share one stacked parameter."""
    if a == b:
        return a
    return max(a, b, key=lambda dtype: dtype.itemsize) if a.itemsize != b.itemsize else np.dtype(np.float32)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """First and last (exclusive) of a shard on each axis."""
    return tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))


def _size(index: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(last - first for first, last in _bounds(index, shape))


def _rows_of(tensor: FileTensor, parts: Sequence[tuple[tuple[int, int], ...]]) -> slice | None:
    """The rows of a tensor's first axis in the file that hold these parts of it in the model; None for all of them."""
    if not tensor.shape or all(
        math.prod(last - first for first, last in part) == math.prod(tensor.shape) for part in parts
    ):
        return None
    numbers = np.arange(tensor.shape[0], dtype=np.int32).reshape(-1, *[1] * (len(tensor.shape) - 1))
    of_element = tensor.layout.to_model(np.broadcast_to(numbers, tensor.shape))
    needed = [of_element[tuple(slice(*each) for each in part)] for part in parts]
    first, last = min(int(each.min()) for each in needed), max(int(each.max()) for each in needed) + 1
    return None if (first, last) == (0, tensor.shape[0]) else slice(first, last)


def _save(
    path: PathLike,
    params: Params,
    rules: Sequence[Rule],
    dtype: DTypeLike | None,
    prefix: str,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write every tensor of `params` that the rules name, one layer at a time.

    Of several processes, all of which must call this, the first one writes what they gather.
    """
    tensors = {prefix + tensor.name: tensor for tensor in file_tensors(rules, params)}

    def stored_dtype(tensor: FileTensor) -> np.dtype:
        return np.dtype(params[tensor.path].dtype if dtype is None else dtype)

    def array_of(key: str) -> np.ndarray:
        tensor = tensors[key]
        leaf = params[tensor.path]
        values = gathered.on_host(leaf if tensor.layer is None else leaf[tensor.layer])
        return copying.contiguous(tensor.layout.to_file(copying.cast(values, stored_dtype(tensor), key)))

    listed = [safetensors.TensorInfo(key, stored_dtype(tensor), tensor.shape) for key, tensor in tensors.items()]
    gathered.write(path, listed, array_of, {"format": "pt"} if metadata is None else metadata)
