"""Quantised weights of files as devices store them: with the file's own codes where these are of a storage of ours.

`stack` makes a parameter (models/quantised.py) from the tensors of its layers. A file's weights (o, i) have codes of 8
bits with scales (o, 1), or (o, i / n) for blocks of n inputs; bitsandbytes' nf4 is in blocks of 64, as ours is. Other
formats, and layers that are stored differently from the others of their stack, are rounded again.
Axes: o outputs, i inputs.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.quantised import comfyui, ggml
from anima_jax.checkpoints.quantised.bitsandbytes import ROW_PEAKS
from anima_jax.checkpoints.quantised.comfyui import MXFP8_BLOCK, SCALE, SCALE_OF_SQUARES, SETTINGS, SQUARE
from anima_jax.checkpoints.quantised.parts import QuantisationError, checked_scale
from anima_jax.checkpoints.quantised.view import SMOOTHING
from anima_jax.models.quantised import STORED, Quantised, hadamard, quantise, storage_of


class CodeLayout(NamedTuple):
    """What the layers of a stack have in common: dtype of their codes, scales per output, and rotation.

    `rotation` is the size of the groups of inputs that are rotated, 0 if none are.
    """

    dtype: np.dtype[Any]
    blocks: int = 1
    rotation: int = 0


class Codes(NamedTuple):
    """Codes (o, i) and their scales (o, blocks)."""

    codes: np.ndarray
    scales: np.ndarray


def _scaled(source: StoredTensor) -> Codes:
    codes, scales = (source.file.read_part(source.key, part) for part in ("weight", SCALE))
    return Codes(codes, np.broadcast_to(checked_scale(SCALE, scales).reshape(-1, 1), (len(codes), 1)))


def _llm_int8(source: StoredTensor) -> Codes:
    codes, peaks = (source.file.read_part(source.key, part) for part in ("weight", ROW_PEAKS))
    return Codes(codes, checked_scale(ROW_PEAKS, peaks).reshape(-1, 1) / np.float32(127))


def _squares(source: StoredTensor) -> Codes:
    codes, scales = (source.file.read_part(source.key, part) for part in ("weight", SCALE_OF_SQUARES))
    return Codes(codes, checked_scale(SCALE_OF_SQUARES, scales).repeat(SQUARE, 0)[: len(codes)])


def _mxfp8(source: StoredTensor) -> Codes:
    rows, inputs = source.info.shape
    codes, exponents = (source.file.read_part(source.key, part) for part in ("weight", SCALE))
    scales = comfyui.mxfp8_scales(exponents, len(codes), codes.shape[1] // MXFP8_BLOCK)
    return Codes(codes[:rows, :inputs], scales[:rows, : inputs // MXFP8_BLOCK])


def _integers(source: StoredTensor) -> Codes:
    """Read a format of GGUF whose values are integers times a scale."""
    rows, inputs = source.info.shape
    form = ggml.BLOCK_FORMATS[source.storage or ""]
    fields = source.file.read_part(source.key, "blocks").reshape(-1, form.nbytes).view(form.layout)[:, 0]
    scales = fields["d"].astype(np.float32).reshape(-1, 1)
    if "scales" in (form.layout.names or ()):
        scales = scales * fields["scales"].astype(np.float32)
    scales = scales.reshape(rows, -1)
    values = source.read().reshape(*scales.shape, -1)
    divisors = np.where(scales == 0, 1, scales)[..., None]
    return Codes(np.rint(values / divisors).astype(np.int8).reshape(rows, inputs), scales)


class _Row(NamedTuple):
    """How the weights of a format are read, and how many inputs have one scale (0: all)."""

    read: Callable[[StoredTensor], Codes]
    inputs: int = 0


_READERS: dict[str, _Row] = {
    "fp8_scaled": _Row(_scaled),
    "int8": _Row(_scaled),
    "int8_convrot": _Row(_scaled),
    "llm_int8": _Row(_llm_int8),
    "fp8_blocks": _Row(_squares, SQUARE),
    "mxfp8": _Row(_mxfp8, MXFP8_BLOCK),
    **{name: _Row(_integers, 32) for name in ("q8_0", "q5_0", "q4_0", "iq4_nl")},
    "q6_k": _Row(_integers, 16),
}
"""Format → reader of its weights as codes of 8 bits."""


def kind_of(source: StoredTensor) -> CodeLayout | None:
    """Return the kind of 8-bit codes that a matrix of a file has, None if it has none. No codes are read."""
    row, parts = _READERS.get(source.storage or ""), source.file.parts(source.key)
    if row is None or len(source.info.shape) != 2 or SMOOTHING in parts:
        return None
    inputs, form = source.info.shape[1], ggml.BLOCK_FORMATS.get(source.storage or "")
    if inputs % (form.values if form else row.inputs or 1):
        return None
    rotation = 0
    if source.storage == "int8_convrot":
        with _located(source):
            rotation = comfyui.group_size(json.loads(source.file.read_part(source.key, SETTINGS).tobytes()))
    dtype = np.dtype(np.int8) if form else parts["weight"].dtype
    return CodeLayout(dtype, inputs // row.inputs if row.inputs else 1, rotation)


def codes_of(source: StoredTensor) -> Codes:
    """Return the codes of a matrix that has a `kind_of`. Raises UserError for a wrong scale."""
    with _located(source):
        return _READERS[source.storage or ""].read(source)


@contextlib.contextmanager
def _located(source: StoredTensor) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise QuantisationError(f"{source.file.path}: {source.key}: {error}") from error


class _Choice(NamedTuple):
    """The kind of each layer's codes (None: they do not count), the one that the parameter has, and whether it rounds.

    Without a `kind` the parameter is rounded to `storage`, or not quantised if that is None.
    """

    found: Sequence[CodeLayout | None]
    kind: CodeLayout | None
    storage: str | None
    table: bool


def _choice(
    tensors: Sequence[FileTensor], sources: Sequence[StoredTensor], storage: str | None, whole_channels: bool
) -> _Choice | None:
    """Return how a parameter is quantised, None if it is not. Arguments are those of `stack`."""
    if not any(source.storage for source in sources) or any(len(tensor.shape) != 2 for tensor in tensors):
        return None
    table = tensors[0].layout.to_model(np.empty((2, 1))).shape == (2, 1)
    wanted = storage and np.dtype(STORED[storage])

    def usable(source: StoredTensor) -> CodeLayout | None:
        kind = kind_of(source)
        if kind is None or wanted not in (None, kind.dtype):
            return None
        return None if (kind.blocks > 1 and (table or whole_channels)) or (kind.rotation and table) else kind

    found = [usable(source) for source in sources]
    kinds = Counter(kind for kind in found if kind is not None)
    if kinds:
        return _Choice(found, kinds.most_common(1)[0][0], None, table)
    four = not table and all(source.storage in _FOUR_BITS for source in sources)
    return None if storage else _Choice(found, None, "nf4" if four else "int8", table)


def abstract(
    tensors: Sequence[FileTensor],
    sources: Sequence[StoredTensor],
    dtype: Any,
    storage: str | None = None,
    *,
    whole_channels: bool = False,
) -> Quantised | None:
    """Return what `stack` does, with shapes in place of arrays, from the headers of files alone."""
    choice = _choice(tensors, sources, storage, whole_channels)
    if choice is None:
        return None
    own = tensors[0].layout.to_model(np.broadcast_to(np.float32(0), sources[0].info.shape)).shape
    layers = (len(tensors),) if tensors[0].layer is not None else ()
    if choice.kind is None:
        values = jax.ShapeDtypeStruct((*layers, *own), np.dtype(dtype))
        return jax.eval_shape(lambda values: quantise(values, choice.storage or "", table=choice.table), values)
    few = np.broadcast_to(np.float32(0), (sources[0].info.shape[0], choice.kind.blocks))
    codes: Any = jax.ShapeDtypeStruct((*layers, *own), choice.kind.dtype)
    scales: Any = jax.ShapeDtypeStruct((*layers, *tensors[0].layout.to_model(few).shape), np.dtype(np.float32))
    return Quantised(codes, scales, own[0], np.dtype(dtype), choice.kind.rotation)


def stack(
    tensors: Sequence[FileTensor],
    sources: Sequence[StoredTensor],
    dtype: Any,
    storage: str | None = None,
    *,
    whole_channels: bool = False,
    exact: bool = False,
) -> tuple[Quantised, set[str]] | None:
    """Return a parameter of NumPy arrays, quantised as its layers are, and the formats that were rounded again.

    `storage`, a key of `STORED`, is the only one whose codes count; None: all do. With `whole_channels` only codes
    without blocks count. If none do, None is returned, unless `storage` is None and a layer is quantised: then all
    layers are rounded, to nf4 if all have 4 bits, else to int8. `exact`: None is returned instead of rounded layers.
    `dtype` is that of the values.
    """
    choice = _choice(tensors, sources, storage, whole_channels)
    if choice is None:
        return None
    if choice.kind is None:
        return _rounded(tensors, sources, choice, dtype, exact)
    if exact and any(kind != choice.kind for kind in choice.found):
        return None
    return _with_codes(tensors, sources, choice.found, choice.kind, dtype)


def _with_codes(
    tensors: Sequence[FileTensor],
    sources: Sequence[StoredTensor],
    found: Sequence[CodeLayout | None],
    kind: CodeLayout,
    dtype: Any,
) -> tuple[Quantised, set[str]]:
    """Return the parameter with the codes of the layers of this kind, and the others rounded to it."""
    layers, rounded = list[tuple[np.ndarray, np.ndarray]](), set[str]()
    for tensor, source, own in zip(tensors, sources, found, strict=True):
        if own != kind:
            rounded.add(_stored_as(source))
        codes = codes_of(source) if own == kind else _quantised(source.read(), kind)
        layers.append((tensor.layout.to_model(codes.codes), tensor.layout.to_model(codes.scales)))
    return _joined(tensors, layers, layers[0][0].shape[0], dtype, kind.rotation), rounded


def _rounded(
    tensors: Sequence[FileTensor], sources: Sequence[StoredTensor], choice: _Choice, dtype: Any, exact: bool
) -> tuple[Quantised, set[str]] | None:
    """Return the parameter with all layers rounded to one storage, and the formats whose values that changes.

    `exact`: return None if there is one.
    """
    layers, rounded, rows = list[tuple[np.ndarray, np.ndarray]](), set[str](), 0
    for tensor, source in zip(tensors, sources, strict=True):
        values = np.ascontiguousarray(tensor.layout.to_model(source.read()), np.float32)
        stored, rows = quantise(jnp.asarray(values), choice.storage or "", table=choice.table), len(values)
        if not np.array_equal(np.asarray(stored), values):
            if exact:
                return None
            rounded.add(_stored_as(source))
        layers.append((np.asarray(stored.codes), np.asarray(stored.scales)))
    return _joined(tensors, layers, rows, dtype), rounded


def _quantised(values: np.ndarray, kind: CodeLayout) -> Codes:
    """Return the codes of a plain matrix (o, i), with one scale per output, as often as blocks have one."""
    values = values.astype(np.float32)
    if kind.rotation:
        values = (values.reshape(-1, kind.rotation) @ hadamard(kind.rotation)).reshape(values.shape)
    stored = quantise(jnp.asarray(values), storage_of(kind.dtype), table=True)
    return Codes(np.asarray(stored.codes), np.asarray(stored.scales).repeat(kind.blocks, 1))


def _joined(
    tensors: Sequence[FileTensor],
    layers: Sequence[tuple[np.ndarray, np.ndarray]],
    rows: int,
    dtype: Any,
    rotation: int = 0,
) -> Quantised:
    stacked = tensors[0].layer is not None
    codes, scales = (np.stack(parts) if stacked else parts[0] for parts in zip(*layers, strict=True))
    return Quantised(_array(codes), _array(scales), rows, np.dtype(dtype), rotation)


def _array(values: np.ndarray) -> Any:
    """Return the values for a `Quantised`, whose arrays are JAX's elsewhere."""
    return np.ascontiguousarray(values)


def _stored_as(source: StoredTensor) -> str:
    return source.storage or str(source.info.dtype)


_FOUR_BITS = ("nf4", "fp4", "nvfp4")
