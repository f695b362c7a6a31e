"""Safetensors files with quantised weights, seen as files of float32 weights.

ComfyUI and bitsandbytes store the scales of a weight in tensors beside it (`SIDECARS`), and its settings in a tensor
with JSON, `comfy_quant`, or for all weights in the header's metadata. `recognise` finds them; `QuantisedFile` hides
them and computes the weights when they are read.
"""

import collections
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from anima_jax.checkpoints.quantised import bitsandbytes, comfyui
from anima_jax.checkpoints.quantised.comfyui import BYTE_SCALES, FLOAT8, SCALE, SETTINGS, TILE
from anima_jax.checkpoints.quantised.formats import FORMATS
from anima_jax.checkpoints.quantised.parts import PartLayout, Parts, QuantisationError, checked_scale
from anima_jax.checkpoints.safetensors import OpenFile, SafetensorsFile
from anima_jax.checkpoints.safetensors_header import TensorInfo
from anima_jax.errors import did_you_mean, first_line

METADATA = "_quantization_metadata"
"""Key of the metadata in which ComfyUI's files of 2025 have the settings of all weights."""

MARKER = "scaled_fp8"
"""Last name of the tensor in ComfyUI's older files that says that float8 weights have scales."""

_OLD_NAMES = {"scale_weight": SCALE, "scale_input": "input_scale"}

SIDECARS = re.compile(
    r"(?P<module>.+)\.(?P<part>scale_weight|scale_input|weight_scale(_2|_inv)?|input_scale|pre_quant_scale|comfy_quant"
    r"|weight_format|SCB|weight\.(nested_)?(absmax|quant_map)|weight\.quant_state)(\.bitsandbytes__(?P<kind>\w+))?"
)
"""Pattern for the tensors that belong to the weight of a module."""

_UNSUPPORTED = {
    "qweight": "as SVDQuant, GPTQ or AWQ",
    "weight_s_rel": "as W4A8",
    "weight_packed": "by compressed-tensors",
    "weight_zeros": "as AWQ",
}
"""Last name of a tensor that only a file of an unsupported format has → the format."""

_BY_PART = {
    comfyui.SCALE_2: "nvfp4",
    comfyui.SCALE_OF_SQUARES: "fp8_blocks",
    bitsandbytes.ROW_PEAKS: "llm_int8",
}
"""Part that only one format has → the format."""

SMOOTHING = "pre_quant_scale"
"""Part that multiplies the inputs of a layer, or the columns of its weight (ModelOpt's AWQ)."""

_COMFYUI_FORMATS = {
    "float8_e4m3fn": "fp8_scaled",
    "float8_e5m2": "fp8_scaled",
    "int8_tensorwise": "int8",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
"""Name in `comfy_quant` → name of ours."""

_EMBEDDING = re.compile(r"(^|\.)(embed|embed_tokens|shared)\.weight$")
"""Pattern for tables of rows, whose float8 values ComfyUI's older files do not scale."""

_MOST_WORDS = 12  # of a module's name

_MOST_MARKERS = 64  # of a file; real ones have one for each network

_VALUES = 2**22  # that are computed at a time

_LONGEST, _LONGEST_METADATA = 4096, 2**22
"""Bytes of a weight's settings, of which real ones have fewer than 200, and of all settings in the metadata."""


_FILLED_UP = {"mxfp8": comfyui.MXFP8_BLOCK, "nvfp4": comfyui.NVFP4_BLOCK}
"""Format → the number of which comfy_kitchen makes rows and columns a multiple, with zeros."""

_NOT_OF_WEIGHTS = ("input_scale", MARKER, "weight_format", SETTINGS, bitsandbytes.STATE)
"""Parts that are not read for the values of a weight; the settings have been read."""

_IN_METADATA = -1
"""Position of settings that are in the header's metadata instead of a tensor."""


class Weight(NamedTuple):
    """A quantised weight: its format, a key of FORMATS, the descriptions of its parts, its settings and its layout.

    `shape` is that of the layout without the zeros to which comfy_kitchen fills up rows and columns.
    """

    storage: str
    parts: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    layout: PartLayout
    shape: tuple[int, ...]


class QuantisedFile(OpenFile):
    """A safetensors file with quantised weights, which `tensors` lists as float32 and `read` dequantises.

    The tensors with scales and settings are not listed.
    """

    def __init__(self, file: SafetensorsFile, weights: Mapping[str, Weight], hidden: set[str]):
        self.path, self.size = file.path, file.size
        self.metadata = {key: text for key, text in file.metadata.items() if key != METADATA}
        self.tensors = {
            key: TensorInfo(key, np.dtype(np.float32), weights[key].shape) if key in weights else info
            for key, info in file.tensors.items()
            if key not in hidden
        }
        self._file, self._weights = file, weights

    def storage(self, name: str) -> str | None:
        """Return the format of a quantised tensor, a key of FORMATS, or None."""
        return self._weights[name].storage if name in self._weights else None

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """Return the parts of a quantised tensor by their names in `FORMATS`, as they are in the file."""
        return self._weights[name].parts if name in self._weights else {}

    def read_part(self, name: str, part: str, rows: slice | None = None) -> np.ndarray:
        """Read a part of a quantised tensor, or these rows of the part's first axis, as stored."""
        weight = self._weights[name]
        if weight.parts[part].start == _IN_METADATA:
            return np.frombuffer(_as_json(weight.settings), np.uint8)
        return self._file.read(weight.parts[part].name, rows)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Read a tensor, or these rows of its first axis: in float32 if it is quantised, else as stored.

        Raises QuantisationError for scales that are not finite or negative.
        """
        if name not in self._weights:
            return self._file.read(name, rows)
        shape = self._weights[name].shape
        first, last, _ = (rows or slice(None)).indices(shape[0])
        step = max(TILE[0], _VALUES // max(1, math.prod(shape[1:])) // TILE[0] * TILE[0])
        if last - first <= step:
            return self._rows(name, first, last)
        out = np.empty((last - first, *shape[1:]), np.float32)
        for begin in range(first, last, step):
            out[begin - first : begin - first + step] = self._rows(name, begin, min(begin + step, last))
        return out

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        storage, parts, _, layout, shape = self._weights[name]
        whole = layout.whole_steps(slice(first, max(first, last)))
        arrays = {
            part: self.read_part(name, part, layout.part_rows(part, whole, info.shape[0] if info.shape else 1))
            for part, info in parts.items()
            if part not in _NOT_OF_WEIGHTS
        }
        values = self._dequantised(name, storage, arrays, (whole.stop - whole.start, *layout.shape[1:]))
        return values[(slice(first - whole.start, last - whole.start), *map(slice, shape[1:]))]

    def _dequantised(self, name: str, storage: str, arrays: Parts, shape: tuple[int, ...]) -> np.ndarray:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                values = FORMATS[storage].dequantise(arrays, shape, self._weights[name].settings)
                if SMOOTHING in arrays:
                    values *= checked_scale(SMOOTHING, arrays[SMOOTHING], negative=True)
                return values
        except ValueError as error:
            raise QuantisationError(f"{self.path}: {name}: {error}") from error


def recognise(file: SafetensorsFile) -> SafetensorsFile | QuantisedFile:
    """Return the file as one of plain tensors if it contains quantised weights, else unchanged.

    Raises QuantisationError for an unknown format, a missing scale, and parts that do not fit together.
    """
    try:
        _refuse_unsupported(file.tensors)
        groups = _groups(file.tensors)
        settings = _settings_from_metadata(file)
        for module, own in settings.items():
            description = TensorInfo(f"{module}.{SETTINGS}", np.dtype(np.uint8), (len(_as_json(own)),), _IN_METADATA)
            groups.setdefault(module, {})[SETTINGS] = description  # ComfyUI, too, prefers them to a tensor's
        markers = {key: info for key, info in file.tensors.items() if key.rpartition(".")[2] == MARKER}
        if len(markers) > _MOST_MARKERS:
            raise ValueError(f"has {len(markers)} tensors {MARKER}, expected one for each network")
        if not groups and not markers:
            return file
        found = (_weight(file, module, group, settings) for module, group in groups.items())
        weights = {weight.parts["weight"].name: weight for weight in found if weight}
        _require_settings(weights, METADATA if METADATA in file.metadata else None)
        _add_markers(file.tensors, weights, markers)
    except ValueError as error:
        raise QuantisationError(f"{file.path}: {error}") from error
    beside = {info.name for group in groups.values() for info in group.values()}
    return QuantisedFile(file, weights, beside | {*markers})


def _refuse_unsupported(tensors: Mapping[str, TensorInfo]) -> None:
    for key in tensors:
        if what := _UNSUPPORTED.get(key.rpartition(".")[2]):
            raise ValueError(f"{key}: quantised {what}, which is not supported; known: {', '.join(FORMATS)}")


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return module → name of a part → the tensor beside the module's weight."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        if match := SIDECARS.fullmatch(key):
            part = _OLD_NAMES.get(match["part"], match["part"])
            if groups.setdefault(match["module"], {}).setdefault(part, info) is not info:
                raise ValueError(f"{match['module']} has two tensors for its {part}: {key} and another")
    return groups


def _weight(
    file: SafetensorsFile, module: str, group: Mapping[str, TensorInfo], settings: Mapping[str, Mapping[str, Any]]
) -> Weight | None:
    """Return the weight that has the tensors of `group` beside it, or None if it is not quantised after all."""
    codes = file.tensors.get(f"{module}.weight")
    if codes is None:
        raise ValueError(f"{next(iter(group.values())).name} belongs to {module}.weight, which is missing")
    with_json = next((group[part] for part in (SETTINGS, bitsandbytes.STATE) if part in group), None)
    own = settings[module] if module in settings else _settings(file, with_json) if with_json else {}
    storage = _storage(codes, group, own)
    if storage is None:
        return None
    parts = {"weight": codes, **group}
    layout = FORMATS[storage].layout(parts, own)
    smoothing = parts.get(SMOOTHING)
    if smoothing and smoothing.shape != layout.shape[1:]:
        raise ValueError(f"{smoothing.name} is {smoothing.shape}, expected {layout.shape[1:]}")
    return Weight(storage, parts, own, layout, _unpadded(file, codes, layout.shape, _FILLED_UP.get(storage, 0)))


def _unpadded(file: SafetensorsFile, codes: TensorInfo, shape: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """Return the shape of a matrix without the last rows and columns that fill it up to multiples of `unit`.

    They have the code 0, which a row or column of real weights has not: negative ones are rounded to another zero. Only
    ComfyUI's model knows the shape otherwise. Columns are judged by the first rows.
    """
    if not unit or 0 in shape or any(size % unit for size in shape):
        return shape
    per_byte = shape[1] // codes.shape[1]
    top = file.read(codes.name, slice(0, 128)).view(np.uint8)[:, -(unit // per_byte) :]
    bottom = file.read(codes.name, slice(shape[0] - unit, shape[0])).view(np.uint8)
    if per_byte == 2:
        top = np.stack([top >> 4, top & 15], axis=-1).reshape(len(top), -1)
    trimmed = [_trailing_zeros(bottom.max(axis=1)), _trailing_zeros(top.max(axis=0))]
    return tuple(size - zeros % unit for size, zeros in zip(shape, trimmed, strict=True))


def _trailing_zeros(values: np.ndarray) -> int:
    return int(np.argmax(values[::-1] > 0)) if values.any() else len(values)


def _storage(codes: TensorInfo, group: Mapping[str, TensorInfo], settings: Mapping[str, Any]) -> str | None:
    """Return the format of a weight: what its settings say, or what the names and dtypes of its parts imply."""
    if SETTINGS in group:
        return _named(codes.name, settings)
    if any(part.startswith("weight.") for part in group):
        kind = settings.get("quant_type")
        if kind not in bitsandbytes.KINDS:
            if bitsandbytes.STATE not in group:
                state = f"{codes.name}.quant_state.bitsandbytes__nf4 (or __fp4)"
                raise ValueError(f"{codes.name} is quantised, but {state} is missing")
            raise ValueError(f"{codes.name}: quant_type is {kind!r:.40}, known: {', '.join(bitsandbytes.KINDS)}")
        return kind
    found = next((storage for part, storage in _BY_PART.items() if part in group), None)
    if found is None and SCALE in group and codes.dtype in FLOAT8 and group[SCALE].dtype in BYTE_SCALES:
        found = "mxfp8"
    if found in _FILLED_UP:  # other programs have other orders of codes and scales
        settings_key = f"{codes.name.removesuffix('weight')}{SETTINGS}"
        raise ValueError(f"{codes.name} is quantised as {found}, but {settings_key} is missing")
    if found is None and (SCALE in group or codes.dtype in FLOAT8):
        return "int8" if codes.dtype == np.int8 else "fp8_scaled"
    return found


def _named(codes: str, settings: Mapping[str, Any]) -> str:
    """Return the format that ComfyUI's settings name."""
    name = settings.get("format")
    if not isinstance(name, str) or name not in _COMFYUI_FORMATS:
        hint = did_you_mean(name, _COMFYUI_FORMATS) if isinstance(name, str) else ""
        known = ", ".join(_COMFYUI_FORMATS)
        raise ValueError(f"{codes} is quantised as {name!r:.80}{hint}, which is not supported; known: {known}")
    rotated = name == "int8_tensorwise" and comfyui.is_rotated(settings)
    return "int8_convrot" if rotated else _COMFYUI_FORMATS[name]


def _settings(file: SafetensorsFile, info: TensorInfo) -> dict[str, Any]:
    """Return the settings in a tensor with JSON."""
    if info.dtype != np.uint8 or not 0 < info.nbytes <= _LONGEST:
        raise ValueError(f"{info.name} is {info.code} {info.shape}, expected JSON of at most {_LONGEST} bytes in U8")
    try:
        found = json.loads(file.read(info.name).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{info.name} is not JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{info.name} is {found!r:.40}, expected a JSON object with a format")
    return found


def _settings_from_metadata(file: SafetensorsFile) -> dict[str, dict[str, Any]]:
    """Return module → settings from the header's metadata, which may name modules without the file's prefix."""
    if METADATA not in file.metadata:
        return {}
    try:
        if len(file.metadata[METADATA]) > _LONGEST_METADATA:
            raise ValueError(f"longer than {_LONGEST_METADATA} characters")
        layers = json.loads(file.metadata[METADATA])["layers"]
        layers = {name: {"format": one} if isinstance(one, str) else dict(one) for name, one in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"metadata {METADATA} is not JSON with settings of layers: {first_line(error)}") from error
    modules = {key.removesuffix(".weight") for key in file.tensors if key.endswith(".weight")}
    prefixes = collections.Counter(
        module.removesuffix(name) for module in modules for name in _endings(module) if name in layers
    )
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""
    return {prefix + name: one for name, one in layers.items() if prefix + name in modules}


def _endings(module: str) -> list[str]:
    """Return a module's name, and its last 1, 2, … words up to as many as Anima's longest names have."""
    words = module.split(".")[-_MOST_WORDS:]
    return [module, *(".".join(words[start:]) for start in range(1, len(words)))]


def _require_settings(weights: Mapping[str, Weight], metadata: str | None) -> None:
    """Raise ValueError for integers without settings in a file that has some, as in `metadata`: they may be rotated."""
    with_settings = next((name for name, weight in weights.items() if SETTINGS in weight.parts), metadata)
    for name, weight in weights.items():
        if with_settings and weight.storage == "int8" and SETTINGS not in weight.parts:
            missing = f"{name.removesuffix('weight')}{SETTINGS}"
            raise ValueError(f"{name} is quantised, but {missing} is missing, which {with_settings} has")


def _add_markers(
    tensors: Mapping[str, TensorInfo], weights: dict[str, Weight], markers: Mapping[str, TensorInfo]
) -> None:
    """Add the marker of ComfyUI's older files to the parts of the float8 weights that it is for.

    Raises ValueError for a float8 weight without a scale, if there is a marker for it or similar weights have scales.
    """
    alike = {_without_numbers(name): name for name, weight in weights.items() if weight.storage == "fp8_scaled"}
    for key, info in tensors.items():
        marker = next((one for name, one in markers.items() if key.startswith(name.removesuffix(MARKER))), None)
        if key in weights:
            if marker and SETTINGS not in weights[key].parts:
                weights[key] = weights[key]._replace(parts={**weights[key].parts, MARKER: marker})
        elif info.dtype in FLOAT8 and len(info.shape) > 1 and key.endswith(".weight"):
            module, like = key.removesuffix("weight"), alike.get(_without_numbers(key))
            if like:
                scale = weights[like].parts[SCALE].name.removeprefix(like.removesuffix("weight"))
                raise ValueError(f"{key} is {info.code}, but its scale {module}{scale} is missing, which {like} has")
            if marker and not _EMBEDDING.search(key):
                raise ValueError(f"{key} is {info.code}, but its scale {module}scale_weight is missing")


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _as_json(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings).encode()
