"""Reading and writing of whole networks.

`load_…` returns a model, `save_…` writes parameters under the original names. The functions `open_…` below them check a
file against the model that its shapes describe and return a `Checkpoint`, which streams the parameters to their devices
one at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from anima_jax.adapters.kinds import SCALE
from anima_jax.checkpoints import accounting, copying, gathered, safetensors
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.device_codes import abstract, stack
from anima_jax.checkpoints.folders import TRANSFORMER
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import FileTensor, dit, file_tensors
from anima_jax.checkpoints.names.networks import ADAPTER, DIT, QWEN3, WAN_VAE, Network, NetworkKeys
from anima_jax.checkpoints.stored import Storage, placed
from anima_jax.errors import UserError, plural, shorten, suggests_names
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.parameters import Params
from anima_jax.models.quantised import storage_of
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel import rules
from anima_jax.parallel.hosts import is_process_0
from anima_jax.parallel.mesh import current_mesh
from anima_jax.platform import hardware

DTypes = DTypeLike | Mapping[str, DTypeLike] | None
"""One dtype for all parameters, or one per parameter path; None (or a path without an entry) keeps the file's."""

Bounds = tuple[tuple[int, int], ...]
"""Start and stop index of a shard on each axis."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open file (or a transformer's and an LLM adapter's) that fits the model `graphdef`; no tensor is read yet.

    `abstract` has a `jax.ShapeDtypeStruct` for each parameter, in the dtype stored in the file. `tensors` lists the
    file's tensors in the order of the parameters; `sources` maps their names to the stored tensors. `metadata` is the
    file's; `located` contains the network's keys in the file and the file's other keys; `unused` are keys that belong
    to no network. `label` names the file in messages.
    """

    config: Any
    graphdef: nnx.GraphDef[Any]
    abstract: Params
    tensors: tuple[FileTensor, ...]
    sources: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    located: NetworkKeys
    label: str = ""
    unused: Sequence[str] = ()

    @property
    def messages(self) -> list[str]:
        """What a user should know about the tensors of the file that are not loaded; empty for an ordinary file."""
        connector = [key for key in self.located.elsewhere if dit.CONNECTOR in key]
        found = []
        if connector:
            found.append(
                f"{self.label}: a bundle of Anima-3.8B v1.1: its base transformer is used alone, without the semantic "
                f"connector for Qwen3.5-4B ({plural(len(connector), 'tensor')}: {shorten(connector, 1)})"
            )
        for what, keys in (("harmless extra", self.located.skipped), ("unknown", self.unused)):
            if keys:
                found.append(f"{self.label}: skipped {plural(len(keys), f'{what} tensor')}: {shorten(keys, 20)}")
        return found

    def stored(self, prefix: str = "") -> dict[str, StoredTensor]:
        """Return `prefix` + original name → stored tensor for all tensors of the model."""
        return {prefix + tensor.name: self.sources[tensor.name] for tensor in self.tensors}

    def load(self, dtype: DTypes = None, shardings: Mapping[str, Sharding] | None = None) -> Params:
        """Read the parameters, each converted and placed on its devices before the next one is read.

        `shardings` has parameter paths as keys; a parameter without an entry goes to the default device. The host holds
        one parameter at a time. Raises UserError if a value overflows in `dtype` or the file has been cut off since.
        """
        return {
            path: self._load_parameter(path, list(tensors), dtype, (shardings or {}).get(path))
            for path, tensors in itertools.groupby(self.tensors, key=lambda tensor: tensor.path)
        }

    def parameters(
        self, storage: Storage, shardings: Mapping[str, Sharding], *, wide: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, Any]]:
        """Yield path and value of each parameter, before `Storage.stored`: never all are on the devices before it.

        Those in `wide` are float32. Others that the file has quantised are so here, unless `storage` is another. Prints
        which formats were rounded to other ones. Errors are those of `load`.
        """
        if storage.compute and storage.compute not in hardware().narrow_products and is_process_0():
            print(f"compute = '{storage.compute}': this device has no such products; wider ones have the same values")
        rounded: dict[str, list[str]] = {}
        for path, group in itertools.groupby(self.tensors, key=lambda tensor: tensor.path):
            tensors, stored = list(group), None
            dtype = "float32" if path in wide else storage.dtype_of(path)
            if path not in wide and storage.keeps(path):
                sources = [self.sources[tensor.name] for tensor in tensors]
                values = self.abstract[path].dtype if dtype is None else dtype
                whole = storage.compute is not None
                stored = stack(tensors, sources, values, storage.codes, whole_channels=whole, exact=storage.exact)
            if stored is None:
                yield path, self._load_parameter(path, tensors, dtype, shardings.get(path))
                continue
            value, formats = stored
            if formats:
                rounded.setdefault(f"{' and '.join(sorted(formats))} to {storage_of(value.codes.dtype)}", []).append(
                    path
                )
            yield path, placed(value, path, shardings.get(path))
        for what, paths in rounded.items() if is_process_0() else ():
            stacks = f"{plural(len(paths), 'parameter')}, {shorten(paths, 2)}"
            print(f"{self.label}: rounded {what} on the devices: {stacks}; transformer_dtype bfloat16 does not round")

    def kept(self, storage: Storage, trained: Container[str] = ()) -> Params:
        """Return the shapes of the frozen parameters that `parameters` yields quantised, as the file has them."""
        found: Params = {}
        for path, group in itertools.groupby(self.tensors, key=lambda tensor: tensor.path):
            if path not in trained and storage.keeps(path):
                tensors, dtype = list(group), storage.dtype_of(path)
                sources = [self.sources[tensor.name] for tensor in tensors]
                dtype, whole = self.abstract[path].dtype if dtype is None else dtype, storage.compute is not None
                if (value := abstract(tensors, sources, dtype, storage.codes, whole_channels=whole)) is not None:
                    found[path] = value
        return found

    def _load_parameter(
        self, path: str, tensors: Sequence[FileTensor], dtype: DTypes, sharding: Sharding | None
    ) -> jax.Array:
        """Load one parameter onto its devices, leaving no copy on the host.

        Each process reads only the rows of each layer's tensor that its own devices need.
        """
        shape = self.abstract[path].shape
        wanted = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        stored = self.abstract[path].dtype if wanted is None else np.dtype(wanted)
        indices = (sharding or SingleDeviceSharding(jax.local_devices()[0])).addressable_devices_indices_map(shape)
        # Zeros: a control network need not have a module in every block.
        shards = {bounds: np.zeros(_sizes(bounds), stored) for bounds in (_bounds(i, shape) for i in indices.values())}
        layered = tensors[0].layer is not None
        rows = _rows_of(tensors[0], [bounds[1:] if layered else bounds for bounds in shards])
        for tensor in tensors:
            values = self._read(tensor, rows, stored)
            for bounds, shard in shards.items():
                inside = _slices(bounds[1:] if layered else bounds)
                copying.copy_into(shard[tensor.layer] if layered else shard, values[inside])
            del values
        if sharding is None:
            placed = jax.device_put(*shards.values())
        else:
            placed = jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index, shape)])
        return placed.block_until_ready()

    def _read(self, tensor: FileTensor, rows: slice | None, dtype: np.dtype[Any]) -> np.ndarray:
        """Read one tensor in the model's layout; values outside the file's `rows` (None: all rows) are undefined."""
        source = self.sources[tensor.name]
        values = source.read_as(dtype, rows)
        if rows is not None:
            full = np.empty(tensor.shape, dtype)  # pages that are never written cost no memory
            full[rows] = values
            values = full
        return tensor.layout.to_model(values)


@suggests_names
def load_dit(
    path: PathLike,
    dtype: DTypes = None,
    *,
    adapter_path: PathLike | None = None,
    variant: str | None = None,
    allow_unused: bool = False,
    transformer_dtype: str | None = None,
    compute: str | None = None,
) -> AnimaDiT:
    """Load Anima's transformer, with its LLM adapter if the file or `adapter_path` contains one.

    `path` is a .safetensors or .gguf file, local, `gs://…` or `hf://owner/repo/file`, with the names and prefix of any
    known tool; its tensors determine the sizes. It may be a folder, too: a diffusers folder, the network's own, or a
    repository, in which `variant`, such as "fp16", chooses between files (checkpoints/folders.py). An adapter in
    `adapter_path` replaces one in `path`. `dtype` is one dtype, or one per parameter path; None keeps the stored
    dtypes, and float32 for the values of quantised matrices, which stay quantised. Parameters are sharded over the
    current mesh (`jax.set_mesh`) by the rules in parallel/rules.py, or placed on the default device if there is none.
    `transformer_dtype` is the storage of the matrices of its blocks and LLM adapter, "int8", "float8", "float8_e5m2" or
    "nf4", for a transformer that is not trained itself, or a dtype. `compute` "int8" or "fp8" multiplies the blocks'
    codes as they are. Harmless extra buffers are skipped, with `allow_unused` all tensors that belong to no network;
    both are printed. Raises UserError if a file cannot be read or does not contain the network, if tensors are missing,
    unknown or of another shape, and for a storage that does not fit `compute`.
    """
    with open_dit(path, adapter_path=adapter_path, variant=variant, allow_unused=allow_unused) as checkpoint:
        return _load(checkpoint, Storage(dtype, transformer_dtype, compute))


@suggests_names
def load_text_encoder(
    path: PathLike, dtype: DTypes = None, *, variant: str | None = None, allow_unused: bool = False
) -> Qwen3:
    """Load the Qwen3 text encoder from a file with Hugging Face's names or an all-in-one file.

    Quantised matrices stay so if no value changes; of others the values are loaded. Arguments, placement and errors are
    those of `load_dit`.
    """
    with open_network(QWEN3, path, variant=variant, allow_unused=allow_unused) as checkpoint:
        return _load(checkpoint, Storage(dtype, exact=True))


@suggests_names
def load_vae(path: PathLike, dtype: DTypes = None, *, variant: str | None = None, allow_unused: bool = False) -> WanVAE:
    """Load the Wan 2.1 VAE from a file with the original names or an all-in-one file.

    Arguments, placement and errors are those of `load_dit`.
    """
    with open_network(WAN_VAE, path, variant=variant, allow_unused=allow_unused) as checkpoint:
        return _load(checkpoint, Storage(dtype, exact=True))


def _load(checkpoint: Checkpoint, storage: Storage) -> Any:
    print_messages(checkpoint)
    mesh = None if jax.sharding.get_mesh().empty else current_mesh()
    shardings = rules.shardings(checkpoint.abstract, checkpoint.abstract, mesh) if mesh else {}
    params = {path: storage.stored(path, value, mesh) for path, value in checkpoint.parameters(storage, shardings)}
    return parameters.merge(checkpoint.graphdef, params)


def print_messages(checkpoint: Checkpoint) -> None:
    """Print a checkpoint's messages, in one of several processes."""
    for message in checkpoint.messages if is_process_0() else ():
        print(message)


@contextlib.contextmanager
def open_dit(
    path: PathLike, *, adapter_path: PathLike | None = None, variant: str | None = None, allow_unused: bool = False
) -> Iterator[Checkpoint]:
    """Open the transformer in a file or folder; an adapter in `adapter_path` replaces one in it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_model(path, TRANSFORMER, variant))
        located = accounting.find(DIT, file)
        sources = accounting.sources(located, file)
        unknown, label = list(located.unknown), file.path
        if adapter_path is not None:
            adapter_file = stack.enter_context(open_model(adapter_path, (ADAPTER.component,)))
            adapter = accounting.find(ADAPTER, adapter_file)
            sources = {name: source for name, source in sources.items() if not name.startswith(dit.ADAPTER)}
            sources |= accounting.sources(adapter, adapter_file)
            unknown += adapter.unknown
            label = f"{file.path} with {adapter_file.path}"
        yield fit(DIT, label, sources, file.metadata, located, unknown, allow_unused=allow_unused)


@contextlib.contextmanager
def open_network(
    network: Network, path: PathLike, *, variant: str | None = None, allow_unused: bool = False
) -> Iterator[Checkpoint]:
    """Open a network in a file or folder. An LLM adapter's parameter paths begin with `llm_adapter.`."""
    with open_model(path, TRANSFORMER if network is DIT else (network.component,), variant) as file:
        located = accounting.find(network, file)
        sources = accounting.sources(located, file)
        yield fit(network, file.path, sources, file.metadata, located, located.unknown, allow_unused=allow_unused)


def open_text_encoder(
    path: PathLike, *, variant: str | None = None, allow_unused: bool = False
) -> contextlib.AbstractContextManager[Checkpoint]:
    """Open the Qwen3 text encoder in a file or folder."""
    return open_network(QWEN3, path, variant=variant, allow_unused=allow_unused)


def fit(
    network: Network,
    label: str,
    sources: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    located: NetworkKeys,
    unknown: Sequence[str] = (),
    *,
    allow_unused: bool = False,
) -> Checkpoint:
    """Return the checkpoint of a network from its tensors (by original name); `label` names the file in errors.

    Raises UserError unless the tensors are those of the model that their shapes describe, and, unless `allow_unused`,
    no others.
    """
    try:
        config = accounting.sizes(network, label, {name: source.info.shape for name, source in sources.items()})
        try:
            graphdef, abstract = _abstract(network, config)
            tensors = tuple(file_tensors(network.rules(config), abstract))
        except (ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise UserError(f"{label}: no {network.title} can have the sizes {config!r}: {error}") from error
        unused = accounting.require_match(label, network.title, tensors, sources, unknown, allow_unused=allow_unused)
    except UserError as error:
        hint = accounting.foreign_hint({source.key: source.info for source in sources.values()}, network.title)
        raise UserError(*(f"{message}{hint}" for message in error.messages)) from error
    abstract = stored_dtypes(abstract, tensors, sources)
    return Checkpoint(config, graphdef, abstract, tensors, sources, metadata, located, label, unused)


def stored_dtypes(abstract: Params, tensors: Sequence[FileTensor], sources: Mapping[str, StoredTensor]) -> Params:
    """Return the shapes of parameters with the dtypes in which a file has their tensors."""
    stored: dict[str, np.dtype[Any]] = {}
    for tensor in tensors:
        dtype = sources[tensor.name].info.dtype
        stored[tensor.path] = _wider(stored.get(tensor.path, dtype), dtype)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(stored[path]))
        for path, leaf in abstract.items()
    }


@functools.lru_cache(maxsize=8)
def _abstract(network: Network, config: Any) -> tuple[nnx.GraphDef[Any], Params]:
    """Return the abstract network for a config, cached because tracing takes a while."""
    return parameters.abstract(lambda rngs: network.module(config, rngs=rngs))


def _wider(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype for the values of both; layers stored in different dtypes share one stacked parameter."""
    if a == b:
        return a
    return max(a, b, key=lambda dtype: dtype.itemsize) if a.itemsize != b.itemsize else np.dtype(np.float32)


def _bounds(index: Any, shape: tuple[int, ...]) -> Bounds:
    """Return the bounds of a shard from its JAX index, which has one slice per axis."""
    return tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))


def _sizes(bounds: Bounds) -> tuple[int, ...]:
    return tuple(last - first for first, last in bounds)


def _slices(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(*each) for each in bounds)


def _rows_of(tensor: FileTensor, shards: Sequence[Bounds]) -> slice | None:
    """Return the range of file rows (first axis) that contains these shards of a tensor; None for all rows."""
    if not tensor.shape or all(math.prod(_sizes(bounds)) == math.prod(tensor.shape) for bounds in shards):
        return None
    numbers = np.arange(tensor.shape[0], dtype=np.int32).reshape(-1, *[1] * (len(tensor.shape) - 1))
    row_of_element = tensor.layout.to_model(np.broadcast_to(numbers, tensor.shape))
    needed = [row_of_element[_slices(bounds)] for bounds in shards]
    first, last = min(int(each.min()) for each in needed), max(int(each.max()) for each in needed) + 1
    return None if (first, last) == (0, tensor.shape[0]) else slice(first, last)


@suggests_names
def save_dit(
    path: PathLike, dit: AnimaDiT | Params, *, dtype: DTypeLike | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a transformer or its parameters, with the LLM adapter if it has one, under the names that the trainer uses.

    Arguments and errors are those of `save_network`. Raises UserError, too, for a transformer with a LoRA or the like.
    """
    params = parameters.split(dit)[1] if isinstance(dit, AnimaDiT) else dit
    if any(name.startswith("control.") for name in params):
        raise UserError(f"{path}: the transformer has a control network, which save_control writes")
    if any(name.endswith(f".{SCALE}") for name in params):
        raise UserError(f"{path}: the transformer has an adapter, which save_adapter writes")
    save_network(DIT, path, params, dtype=dtype, metadata=metadata)


def save_network(
    network: Network,
    path: PathLike,
    params: Params,
    *,
    config: Any = None,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a network's parameters under their original names, one layer at a time.

    `dtype` None keeps each parameter's dtype. The VAE's names depend on its `config`. The file appears only when it is
    complete. All processes must call this; they gather the arrays, and process 0 writes. Raises UserError if the file
    cannot be written or a value overflows in `dtype`.
    """
    tensors = {network.saved_prefix + tensor.name: tensor for tensor in file_tensors(network.rules(config), params)}
    write_parameters(path, tensors, params, dtype, {"format": "pt"} if metadata is None else metadata)


def write_parameters(
    path: PathLike,
    tensors: Mapping[str, FileTensor],
    params: Params,
    dtype: DTypeLike | None,
    metadata: Mapping[str, str],
) -> None:
    """Write the `tensors` (key → where in `params`) as `save_network` does."""

    def stored_dtype(tensor: FileTensor) -> np.dtype[Any]:
        return np.dtype(params[tensor.path].dtype if dtype is None else dtype)

    def array_of(key: str) -> np.ndarray:
        tensor = tensors[key]
        leaf = params[tensor.path]
        values = gathered.on_host(leaf if tensor.layer is None else leaf[tensor.layer])
        return copying.contiguous(tensor.layout.to_file(copying.cast(values, stored_dtype(tensor), key)))

    infos = [safetensors.TensorInfo(key, stored_dtype(tensor), tensor.shape) for key, tensor in tensors.items()]
    gathered.write(path, infos, array_of, metadata)
