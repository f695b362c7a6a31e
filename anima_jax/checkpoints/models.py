"""Whole networks, from files and into files.

`load_…` gives a model and `save_…` writes parameters under the original names. Below them, `open_…` checks a file
against the model that its shapes describe and gives a `Checkpoint`, whose parameters can then be streamed to wherever
they should be, one at a time.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from anima_jax.checkpoints import accounting, copying, safetensors
from anima_jax.checkpoints.accounting import Source
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import FileTensor, Rule, dit, file_tensors, prefixes, qwen3, wan_vae
from anima_jax.checkpoints.names.prefixes import Location, Network
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import AdapterConfig, LLMAdapter
from anima_jax.models.parameters import Params
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig

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
    sources: Mapping[str, Source]
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
            path: _place(self._read(path, list(tensors), dtype), (shardings or {}).get(path))
            for path, tensors in itertools.groupby(self.tensors, key=lambda tensor: tensor.path)
        }

    def _read(self, path: str, tensors: Sequence[FileTensor], dtype: DTypes) -> np.ndarray:
        wanted = dtype.get(path) if isinstance(dtype, Mapping) else dtype
        host = np.empty(self.abstract[path].shape, self.abstract[path].dtype if wanted is None else np.dtype(wanted))
        for tensor in tensors:
            source = self.sources[tensor.name]
            values = copying.cast(source.read(), host.dtype, source.key)
            copying.copy_into(host if tensor.layer is None else host[tensor.layer], tensor.layout.to_model(values))
        return host


def load_dit(
    path: PathLike,
    dtype: DTypes = None,
    *,
    adapter_path: PathLike | None = None,
    shardings: Mapping[str, Sharding] | None = None,
) -> AnimaDiT:
    """The transformer in a file of any known dialect, with its text adapter if the file or `adapter_path` has one.

    `dtype` None keeps the stored dtypes; sizes are read from the file. UserError for whatever does not fit.
    """
    with open_dit(path, adapter_path=adapter_path) as checkpoint:
        return parameters.merge(checkpoint.graphdef, checkpoint.load(dtype, shardings))


def load_text_encoder(
    path: PathLike, dtype: DTypes = None, *, shardings: Mapping[str, Sharding] | None = None
) -> Qwen3:
    """The Qwen3 text encoder in a file of Hugging Face's names or an all-in-one file. As `load_dit`."""
    with open_text_encoder(path) as checkpoint:
        return parameters.merge(checkpoint.graphdef, checkpoint.load(dtype, shardings))


def load_vae(path: PathLike, dtype: DTypes = None, *, shardings: Mapping[str, Sharding] | None = None) -> WanVAE:
    """The Wan 2.1 VAE in a file of the original names or an all-in-one file. As `load_dit`."""
    with open_vae(path) as checkpoint:
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
        location = accounting.find(prefixes.DIT, file)
        sources = {name: Source(file, key) for name, key in location.keys.items()}
        unknown, label = list(location.unknown), file.path
        if adapter_path is not None:
            adapter_file = stack.enter_context(SafetensorsFile(adapter_path))
            adapter = accounting.find(prefixes.ADAPTER, adapter_file)
            sources = {name: source for name, source in sources.items() if not name.startswith(dit.ADAPTER)}
            sources |= {name: Source(adapter_file, key) for name, key in adapter.keys.items()}
            unknown += adapter.unknown
            label = f"{file.path} with {adapter_file.path}"
        yield fit(prefixes.DIT, label, file, location, sources, unknown)


@contextlib.contextmanager
def open_adapter(path: PathLike) -> Iterator[Checkpoint]:
    """The text adapter alone, in a file of its own or inside a transformer's; its paths begin `llm_adapter.`."""
    with SafetensorsFile(path) as file:
        yield _open(prefixes.ADAPTER, file)


@contextlib.contextmanager
def open_text_encoder(path: PathLike) -> Iterator[Checkpoint]:
    """The Qwen3 text encoder in a file."""
    with SafetensorsFile(path) as file:
        yield _open(prefixes.QWEN3, file)


@contextlib.contextmanager
def open_vae(path: PathLike) -> Iterator[Checkpoint]:
    """The Wan VAE in a file."""
    with SafetensorsFile(path) as file:
        yield _open(prefixes.WAN_VAE, file)


OPENERS = {
    prefixes.DIT: open_dit,
    prefixes.ADAPTER: open_adapter,
    prefixes.QWEN3: open_text_encoder,
    prefixes.WAN_VAE: open_vae,
}


class _AdapterAlone(nnx.Module):
    """The adapter under the paths that it has inside a transformer."""

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        self.llm_adapter = LLMAdapter(config, rngs=rngs)


MODULES = {prefixes.DIT: AnimaDiT, prefixes.ADAPTER: _AdapterAlone, prefixes.QWEN3: Qwen3, prefixes.WAN_VAE: WanVAE}


@functools.lru_cache(maxsize=8)
def _abstract(module: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, Params]:
    """`parameters.abstract` of a module, which traces all of it, once for a config."""
    return parameters.abstract(lambda rngs: module(config, rngs=rngs))


def _open(network: Network, file: SafetensorsFile) -> Checkpoint:
    location = accounting.find(network, file)
    sources = {name: Source(file, key) for name, key in location.keys.items()}
    return fit(network, file.path, file, location, sources, location.unknown)


def fit(
    network: Network,
    label: str,
    file: SafetensorsFile,
    location: Location,
    sources: Mapping[str, Source],
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


def _place(host: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """`host` on its devices; when this returns it is not needed any more.

    With several processes each hands over only what its own devices hold.
    """
    if sharding is None:
        placed = jax.device_put(host)
    else:
        placed = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    return placed.block_until_ready()


def _save(
    path: PathLike,
    params: Params,
    rules: Sequence[Rule],
    dtype: DTypeLike | None,
    prefix: str,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write every tensor of `params` that the rules name, one layer at a time."""
    tensors = {prefix + tensor.name: tensor for tensor in file_tensors(rules, params)}

    def stored_dtype(tensor: FileTensor) -> np.dtype:
        return np.dtype(params[tensor.path].dtype if dtype is None else dtype)

    def array_of(key: str) -> np.ndarray:
        tensor = tensors[key]
        leaf = params[tensor.path]
        values = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        return copying.contiguous(tensor.layout.to_file(copying.cast(values, stored_dtype(tensor), key)))

    listed = [safetensors.Tensor(key, stored_dtype(tensor), tensor.shape) for key, tensor in tensors.items()]
    safetensors.write(path, listed, array_of, {"format": "pt"} if metadata is None else metadata)
