"""Files of control networks: ControlNet-LLLite for Anima, "v2", as sd-scripts writes and ComfyUI reads them.

A file of a model with fewer blocks is used on a deeper one by the table of checkpoints/depths.py.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.checkpoints import accounting
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.depths import DEPTHS, depth_map
from anima_jax.checkpoints.locations import PathLike, files_in
from anima_jax.checkpoints.models import Checkpoint, stored_dtypes, write_parameters
from anima_jax.checkpoints.names import FileTensor, file_tensors
from anima_jax.checkpoints.names.control import (
    MODULES,
    TRUNK,
    blocks_in,
    config_from_shapes,
    metadata_of,
    present,
    rules,
)
from anima_jax.checkpoints.names.networks import NetworkKeys
from anima_jax.checkpoints.tensor_files import TensorFile, open_tensors
from anima_jax.checkpoints.values import check_values
from anima_jax.errors import UserError, did_you_mean, shorten, suggests_names
from anima_jax.models import parameters
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import DiTConfig
from anima_jax.models.parameters import Params
from anima_jax.parallel.hosts import is_process_0
from anima_jax.parallel.mesh import current_mesh
from anima_jax.parallel.rules import shardings

TITLE = "control network"

_OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (r"lllite_modules\.", "an older ControlNet-LLLite of another architecture (lllite_modules.N)"),
    (r"lllite_unet_", "a ControlNet-LLLite for SDXL"),
    (rf"{TRUNK}(proj_in|ln_in|t_proj)\.", "a ControlNet-LLLite with lllite.trunk = semantic"),
    (rf"{TRUNK}(lat_conv|mask_conv)", "a ControlNet-LLLite with lllite.cond_input_space = latent"),
    (rf"{MODULES}\w+\.gate\.", "a ControlNet-LLLite with lllite.gate"),
)
"""Patterns of names → the control networks of other architectures that have them."""

_ORDINARY = {"lllite.trunk": "stem", "lllite.gate": "none", "lllite.cond_input_space": "pixel", "lllite.version": "2"}
"""Metadata keys of sd-scripts and its forks → the value of the architecture that is supported, which is the default."""


def is_control(names: Iterable[str]) -> bool:
    """Return whether a file with these names has a control network for Anima, of this or another architecture."""
    return any(name.startswith((TRUNK, MODULES, "lllite_modules.")) for name in names)


def holds_control(path: PathLike) -> bool:
    """Return whether a file, or the only one in a folder, `is_control`; False if it cannot be read."""
    try:
        with open_tensors(_file_in(path)) as file:
            return is_control(file.tensors)
    except UserError:
        return False


@suggests_names
def load_control(
    path: PathLike, dtype: DTypeLike | None = None, *, blocks: int | None = None, width: int | None = None
) -> ControlNetwork:
    """Load a control network (ControlNet-LLLite for Anima, "v2"), for `controls` of `AnimaDiT.velocity`.

    `path` is a .safetensors file, local, `gs://…` or `hf://owner/repo/file`, or a folder with one. The shapes in it
    determine all sizes. `dtype` None keeps the stored one. `blocks` and `width` are those of the transformer that it is
    used on: the modules of a network for 28 blocks take their places in a transformer of 40 or 52. Without `blocks` it
    is for as many as the file says, or else for the shallowest Anima model that has all blocks with a module.
    Parameters are sharded over the current mesh (`jax.set_mesh`), or placed on the default device. Raises UserError if
    the file cannot be read, has another kind of network or is for another transformer, and if tensors are missing,
    unknown, of another shape or not finite.
    """
    with open_control(path, blocks=blocks, width=width) as checkpoint:
        mesh = None if jax.sharding.get_mesh().empty else current_mesh()
        placed = shardings(checkpoint.abstract, checkpoint.abstract, mesh) if mesh else {}
        return parameters.merge(checkpoint.graphdef, checkpoint.load(dtype, placed))


@contextlib.contextmanager
def open_control(path: PathLike, *, blocks: int | None = None, width: int | None = None) -> Iterator[Checkpoint]:
    """Open the file of a control network. Arguments and errors are those of `load_control`."""
    with open_tensors(_file_in(path)) as file:
        checkpoint = fit_control(file, blocks=blocks, width=width)
        if problem := check_values(file).problem:
            raise UserError(f"{file.path}: {problem}")
        yield checkpoint


def network_for(checkpoint: Checkpoint, *, blocks: int, width: int) -> Checkpoint:
    """Return an opened control network's checkpoint for a transformer of these sizes. Errors are `load_control`'s.

    The file need not be open any more.
    """
    return fit_control(next(iter(checkpoint.sources.values())).file, blocks=blocks, width=width)


def fit_control(file: TensorFile, *, blocks: int | None = None, width: int | None = None) -> Checkpoint:
    """Return the checkpoint of the control network in an open file. No tensor is read yet.

    Arguments and errors are those of `load_control`.
    """
    try:
        _check_kind(file)
        found = config_from_shapes({name: info.shape for name, info in file.tensors.items()}, file.metadata)
        if width not in (None, found.width):
            raise UserError(f"is a {TITLE} for a transformer of width {found.width}, the model's is {width}")
        places, blocks = _places(found, blocks_in(file.metadata, found.blocks), blocks)
    except KeyError as error:
        name = str(error.args[0])
        near = did_you_mean(name, file.tensors)
        raise UserError(f"{file.path}: missing for the {TITLE}: {name}{near}") from error
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    tensors = _tensors(found)
    sources = {name: StoredTensor(file, name) for name in file.tensors}
    accounting.require_match(file.path, TITLE, tensors, sources, (), allow_unused=None)
    if integers := [name for name, info in file.tensors.items() if info.dtype.kind in "iub"]:
        raise UserError(f"{file.path}: {shorten(integers)}: integers, expected floating-point weights")
    config = _moved(found, places, blocks)
    if any(block != place for block, place in places.items()) and is_process_0():
        _say(f"{file.path}: made for {len(places)} blocks, used on {blocks}: each module is at its block's new place")
    tensors = [
        tensor if tensor.layer is None else dataclasses.replace(tensor, layer=places[tensor.layer])
        for tensor in tensors
    ]
    graphdef, abstract = abstract_control(config)
    keys = NetworkKeys(keys={name: name for name in sources})
    abstract = stored_dtypes(abstract, tensors, sources)
    return Checkpoint(config, graphdef, abstract, tuple(tensors), sources, file.metadata, keys, file.path)


@functools.cache
def _say(line: str) -> None:
    """Print a line to stderr, once: a file may be opened several times."""
    print(line, file=sys.stderr)


def save_control(
    path: PathLike,
    network: ControlNetwork,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a control network to the file that sd-scripts would write and ComfyUI reads.

    `dtype` None keeps each parameter's dtype. `metadata` are added to those of the sizes, and replace them. The file
    appears only when it is complete. All processes must call this; they gather the arrays, and process 0 writes. Raises
    UserError if the file cannot be written or a value overflows in `dtype`.
    """
    tensors = {tensor.name: tensor for tensor in _tensors(network.config)}
    write_parameters(
        path, tensors, parameters.split(network)[1], dtype, {**metadata_of(network.config), **(metadata or {})}
    )


def _file_in(path: PathLike) -> PathLike:
    """Return the control network's file: `path`, or the only .safetensors file of that folder."""
    names = files_in(path)
    if names is None:
        return path
    found = [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1:
        listed = f": {shorten(found, 20)}" if found else ""
        raise UserError(f"{path}: holds {len(found)} .safetensors files, expected one {TITLE}{listed}")
    return f"{os.fspath(path).rstrip('/')}/{found[0]}"


def _check_kind(file: TensorFile) -> None:
    """Raise UserError, without the path, unless the file has a control network of the supported architecture."""
    kinds = [kind for pattern, kind in _OTHER_KINDS if any(re.match(pattern, name) for name in file.tensors)]
    kinds += [
        f"a ControlNet-LLLite with {key} = {shorten([file.metadata[key]])}"
        for key, ordinary in _ORDINARY.items()
        if file.metadata.get(key, ordinary).lower() != ordinary
    ]
    if kinds:
        raise UserError(f"is {kinds[0]}, which is not supported; only version 2 with a trunk that reads pixels is")
    if not is_control(file.tensors):
        raise UserError(f"is no {TITLE} for Anima; {accounting.looks_like(file.tensors, file.metadata)}")


def _places(config: ControlConfig, made_for: int | None, blocks: int | None) -> tuple[dict[int, int], int]:
    """Return block of the file → block of a transformer of `blocks`, and the latter's number, chosen if it is None.

    `made_for` are the blocks of the transformer that the file was made for, if it says so.
    """
    depth = made_for or next((depth for depth in DEPTHS if depth >= config.blocks), config.blocks)
    if blocks is None:
        # A network of another width is for no released model.
        blocks = depth if made_for or config.width == DiTConfig().width else config.blocks
    if not (depth in DEPTHS and blocks in DEPTHS):
        depth = blocks
    places = depth_map(depth, blocks) if depth != blocks else {block: block for block in range(blocks)}
    lost = sorted({block for block, _ in present(config)} - places.keys())
    if lost:
        raise UserError(
            f"is a {TITLE} for {max(depth, config.blocks)} blocks, the model has {blocks}: "
            f"nothing corresponds to block {shorten([str(block) for block in lost])}"
        )
    return places, blocks


def _moved(config: ControlConfig, places: Mapping[int, int], blocks: int) -> ControlConfig:
    """Return the config with each module at its block's new place, for a transformer of `blocks`."""
    there = {(places[block], layer) for block, layer in present(config)}
    every = [(block, layer) for block in range(blocks) for layer in config.layers]
    absent = tuple(f"{block}.{layer}" for block, layer in every if (block, layer) not in there)
    return dataclasses.replace(config, blocks=blocks, absent=absent)


def _tensors(config: ControlConfig) -> list[FileTensor]:
    """Return the tensors of a network's file, without modules that it does not have."""
    there = present(config)
    return [
        tensor
        for tensor in file_tensors(rules(config), abstract_control(config)[1])
        if tensor.layer is None or (tensor.layer, tensor.path.split(".")[1]) in there
    ]


@functools.lru_cache(maxsize=8)
def abstract_control(config: ControlConfig) -> tuple[nnx.GraphDef[Any], Params]:
    """Return the abstract network, cached because tracing takes a while."""
    return parameters.abstract(lambda rngs: ControlNetwork(config, rngs=rngs))
