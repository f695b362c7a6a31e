"""Quantised weights of files as devices store them: with the file's own codes where these are of a storage of ours.

`stack` makes a parameter (models/quantised.py) from the tensors of its layers. A file's weights (o, i) have codes of 8
bits with scales (o, 1), or (o, i / n) for blocks of n inputs; bitsandbytes' nf4 is in blocks of 64, as ours is. Other
formats, and layers that are stored differently from the others of their stack, are rounded again.
Axes: o outputs, i inputs.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Codes(NamedTuple):
    """Codes (o, i), their scales (o, i / n) and the size of the groups of inputs that are rotated (0: none are)."""

    codes: np.ndarray
    scales: np.ndarray
    rotation: int = 0

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the layers of a stack must have in common: dtype, number of scales per output, and rotation."""
        return self.codes.dtype, self.scales.shape[1], self.rotation

    @property
    def in_blocks(self) -> bool:
        """Whether an output has several scales."""
        return self.scales.shape[1] > 1


def _scaled(source: StoredTensor) -> Codes:
    codes, scales = (source.file.read_part(source.key, part) for part in ("weight", SCALE))
    rotation = 0
    if source.storage == "int8_convrot":
        rotation = comfyui.group_size(json.loads(source.file.read_part(source.key, SETTINGS).tobytes()))
    return Codes(codes, np.broadcast_to(checked_scale(SCALE, scales).reshape(-1, 1), (len(codes), 1)), rotation)


def _llm_int8(source: StoredTensor) -> Codes:
    codes, peaks = (source.file.read_part(source.key, part) for part in ("weight", ROW_PEAKS))
    return Codes(codes, checked_scale(ROW_PEAKS, peaks).reshape(-1, 1) / np.float32(127))


def _squares(source: StoredTensor) -> Codes | None:
    codes, scales = (source.file.read_part(source.key, part) for part in ("weight", SCALE_OF_SQUARES))
    return (
        None
        if codes.shape[1] % SQUARE
        else Codes(codes, checked_scale(SCALE_OF_SQUARES, scales).repeat(SQUARE, 0)[: len(codes)])
    )


def _mxfp8(source: StoredTensor) -> Codes:
    rows, inputs = source.info.shape
    codes, exponents = (source.file.read_part(source.key, part) for part in ("weight", SCALE))
    scales = comfyui.mxfp8_scales(exponents, len(codes), codes.shape[1] // MXFP8_BLOCK)
    return Codes(codes[:rows, :inputs], scales[:rows, : inputs // MXFP8_BLOCK])


def _integers(block: int) -> Callable[[StoredTensor], Codes | None]:
    """Return the reader of a format of GGUF whose values are integers times a scale per `block` inputs."""

    def read(source: StoredTensor) -> Codes | None:
        rows, inputs = source.info.shape
        form = ggml.BLOCK_FORMATS[source.storage or ""]
        if inputs % form.values:
            return None
        fields = source.file.read_part(source.key, "blocks").reshape(-1, form.nbytes).view(form.layout)[:, 0]
        scales = fields["d"].astype(np.float32).reshape(-1, 1)
        if "scales" in (form.layout.names or ()):
            scales = scales * fields["scales"].astype(np.float32)
        scales = scales.reshape(rows, -1)
        values = source.read().reshape(*scales.shape, block)
        divisors = np.where(scales == 0, 1, scales)[..., None]
        return Codes(np.rint(values / divisors).astype(np.int8).reshape(rows, inputs), scales)

    return read


_READERS: dict[str, Callable[[StoredTensor], Codes | None]] = {
    "fp8_scaled": _scaled,
    "int8": _scaled,
    "int8_convrot": _scaled,
    "llm_int8": _llm_int8,
    "fp8_blocks": _squares,
    "mxfp8": _mxfp8,
    **{name: _integers(32) for name in ("q8_0", "q5_0", "q4_0", "iq4_nl")},
    "q6_k": _integers(16),
}
"""Format → reader of its weights as codes of 8 bits. None is returned for shapes that its blocks do not divide."""


def codes_of(source: StoredTensor) -> Codes | None:
    """Return a matrix of a file as 8-bit codes, or None if it is not stored so. Raises UserError for a wrong scale."""
    reader = _READERS.get(source.storage or "")
    if reader is None or len(source.info.shape) != 2 or SMOOTHING in source.file.parts(source.key):
        return None
    try:
        return reader(source)
    except ValueError as error:
        raise QuantisationError(f"{source.file.path}: {source.key}: {error}") from error


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
    if not any(source.storage for source in sources) or any(len(tensor.shape) != 2 for tensor in tensors):
        return None
    table = tensors[0].layout.to_model(np.empty((2, 1))).shape == (2, 1)
    wanted = storage and np.dtype(STORED[storage])

    def usable(source: StoredTensor) -> Codes | None:
        codes = codes_of(source)
        if codes is None or wanted not in (None, codes.codes.dtype):
            return None
        return None if (codes.in_blocks and (table or whole_channels)) or (codes.rotation and table) else codes

    found = [usable(source) for source in sources]
    kinds = Counter(codes.kind for codes in found if codes is not None)
    if kinds:
        kind, count = kinds.most_common(1)[0]
        return None if exact and count < len(found) else _with_codes(tensors, sources, found, kind, dtype)
    return None if storage else _rounded(tensors, sources, table, dtype, exact)


def _with_codes(
    tensors: Sequence[FileTensor],
    sources: Sequence[StoredTensor],
    found: Sequence[Codes | None],
    kind: tuple[Any, ...],
    dtype: Any,
) -> tuple[Quantised, set[str]]:
    """Return the parameter with the codes of the layers of this kind, and the others rounded to it."""
    layers, rounded = list[tuple[np.ndarray, np.ndarray]](), set[str]()
    for tensor, source, codes in zip(tensors, sources, found, strict=True):
        if codes is None or codes.kind != kind:
            rounded.add(_stored_as(source))
        own = codes if codes is not None and codes.kind == kind else _quantised(source.read(), *kind)
        layers.append((tensor.layout.to_model(own.codes), tensor.layout.to_model(own.scales)))
    return _joined(tensors, layers, layers[0][0].shape[0], dtype, kind[2]), rounded


def _rounded(
    tensors: Sequence[FileTensor], sources: Sequence[StoredTensor], table: bool, dtype: Any, exact: bool
) -> tuple[Quantised, set[str]] | None:
    """Return the parameter with all layers rounded to nf4 or int8, and the formats whose values that changes.

    `exact`: return None if there is one.
    """
    storage = "nf4" if not table and all(source.storage in _FOUR_BITS for source in sources) else "int8"
    layers, rounded, rows = list[tuple[np.ndarray, np.ndarray]](), set[str](), 0
    for tensor, source in zip(tensors, sources, strict=True):
        values = np.ascontiguousarray(tensor.layout.to_model(source.read()), np.float32)
        stored, rows = quantise(jnp.asarray(values), storage, table=table), len(values)
        if not np.array_equal(np.asarray(stored), values):
            if exact:
                return None
            rounded.add(_stored_as(source))
        layers.append((np.asarray(stored.codes), np.asarray(stored.scales)))
    return _joined(tensors, layers, rows, dtype), rounded


def _quantised(values: np.ndarray, dtype: np.dtype[Any], blocks: int, rotation: int) -> Codes:
    """Return the codes of a plain matrix (o, i), with one scale per output, as often as blocks have one."""
    values = values.astype(np.float32)
    if rotation:
        values = (values.reshape(-1, rotation) @ hadamard(rotation)).reshape(values.shape)
    stored = quantise(jnp.asarray(values), storage_of(dtype), table=True)
    return Codes(np.asarray(stored.codes), np.asarray(stored.scales).repeat(blocks, 1), rotation)


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
