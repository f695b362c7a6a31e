"""Merging of adapters into weights: a checkpoint's tensors or a model's parameters.

As in ComfyUI, each weight is computed in float32 from the base's value and rounded once to the base's dtype. A merged
file therefore has the same numbers as the base with its adapters loaded.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from anima_jax.adapters.base_model import base_mismatch
from anima_jax.adapters.file import Adapter, adapter_in, fit_to_weights
from anima_jax.adapters.opening import open_adapter_file
from anima_jax.adapters.patch import BIAS_PARTS, FLOAT32, Patch
from anima_jax.checkpoints import copying, gathered
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import FileTensor, dit, file_tensors, qwen3
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.errors import UserError, plural, shorten
from anima_jax.models.parameters import Params
from anima_jax.models.quantised import Quantised
from anima_jax.parallel.mesh import replicate

COMFYUI_DORA = "DoRA by output as in ComfyUI: W + ΔW divided by the norm of W (default: by its own, as it was trained)"
"""Help of the flag --comfyui_dora."""

Weight = float | Mapping[str, float]
"""An adapter's weight: one number, or one number per part of the network, with prefixes of module names as keys.

`blocks.0-9` are ten blocks, `blocks.3.mlp` is a part of one block, `llm_adapter` and `text_encoder` are whole networks.
A module has the weight of the longest matching prefix; if none matches, it has the weight of `""`, or else 1.
"""

MODEL_AND_TEXT_ENCODER: tuple[str, str] = ("", TEXT_ENCODER.rstrip("."))
"""The parts of the two weights that ComfyUI's LoraLoader has."""

Changes = Mapping[str, Sequence[tuple[Patch, float]]]
"""Tensor name → the patches that change it, in this order, each with its strength."""


def strengths(adapter: Adapter, weight: Weight) -> dict[str, float]:
    """Return module → strength.

    Raises UserError for a weight that is not finite, and for a part that matches no module of the adapter, except for
    the text encoder: the same two weights may be given to adapters with and without it, as in ComfyUI.
    """
    for value in weight.values() if isinstance(weight, Mapping) else [weight]:
        if not math.isfinite(value):
            raise UserError(f"{adapter.path}: weight {value}, expected a finite number")
    if not isinstance(weight, Mapping):
        return dict.fromkeys(adapter.patches, float(weight))
    parts = sorted(weight, key=lambda part: part.count(".") if part else -1)
    for part in parts:
        if f"{part}." not in (".", TEXT_ENCODER) and not any(_within(part, module) for module in adapter.patches):
            raise UserError(f"{adapter.path}: weight of '{part}': the adapter has no such module, as in 'blocks.0-9'")
    found = {}
    for module in adapter.patches:
        fitting = [weight[part] for part in parts if not part or _within(part, module)]
        found[module] = float(fitting[-1]) if fitting else 1.0
    return found


def _within(part: str, module: str) -> bool:
    """Return whether `module` begins with `part`, in which numbers may be ranges."""
    wanted, names = part.split("."), module.split(".")
    return len(wanted) <= len(names) and all(map(_same, wanted, names))


def _same(wanted: str, name: str) -> bool:
    if span := re.fullmatch(r"(\d+)-(\d+)", wanted):
        return name.isdigit() and int(span[1]) <= int(name) <= int(span[2])
    return wanted == name


def match_adapters(
    files: Sequence[TensorFile],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    base: PathLike | None = None,
    allow_unused: bool = False,
    extend: bool = False,
) -> list[Adapter]:
    """Return the adapters in open files, reduced to the patches of the tensors in `shapes`.

    Tensors have their names in the original files, with the prefix `text_encoder.` for the text encoder's. Prints how
    many modules matched, and warns about an adapter that was trained on another model than the file `base`. With
    `extend`, an adapter may extend weights with zeros (`reshape_weight`), and the next ones have to fit the new shapes.
    Raises UserError as `open_adapter` and `fit_to_weights` do, and for an extended weight without `extend`.
    """
    adapters = []
    for file in files:
        adapter = fit_to_weights(adapter_in(file, allow_unused=allow_unused), shapes, allow_unused=allow_unused)
        adapters.append(adapter)
        new = {weight: patch.reshaped(shapes[weight]) for weight, patch in _weights_of(adapter)}
        for weight, shape in () if extend else new.items():
            if shape != shapes[weight]:
                raise UserError(f"{adapter.path}: extends {weight} to {shape}; the network takes {shapes[weight]}")
        shapes = {**shapes, **new}
        if base is not None and (warning := base_mismatch(adapter.path, adapter.metadata, base)):
            print(warning, file=sys.stderr)
    return adapters


def _weights_of(adapter: Adapter) -> Iterator[tuple[str, Patch]]:
    """Yield the name of each weight that an adapter changes, with its patch."""
    for module, patch in adapter.patches.items():
        if patch.update_shape is not None:
            yield f"{module}.weight", patch


def changes(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> Changes:
    """Return the changes that the adapters make at these weights, one weight per adapter.

    An adapter whose weight is 0 everywhere makes none, as in ComfyUI's LoraLoader.
    """
    found: dict[str, list[tuple[Patch, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        own = strengths(adapter, weight)
        for module, strength in own.items() if any(own.values()) else ():
            patch = adapter.patches[module]
            if patch.update_shape is not None:
                found.setdefault(f"{module}.weight", []).append((patch, strength))
            if patch.parts.keys() & BIAS_PARTS:
                found.setdefault(f"{module}.bias", []).append((patch, strength))
    return found


def changed_shape(shape: tuple[int, ...], patches: Sequence[tuple[Patch, float]]) -> tuple[int, ...]:
    """Return the shape of a weight after the patches."""
    return functools.reduce(lambda before, one: one[0].reshaped(before), patches, shape)


def merged(
    name: str,
    values: np.ndarray,
    patches: Sequence[tuple[Patch, float]],
    dtype: np.dtype | None = None,
    *,
    comfyui_dora: bool = False,
) -> np.ndarray:
    """Return `values`, the tensor `name` of a file, with all `patches` applied in order.

    `dtype` None keeps the tensor's. With `comfyui_dora`, DoRAs count as in ComfyUI (`Patch.applied`).
    """
    weight = copying.contiguous(values).astype(FLOAT32)
    with np.errstate(invalid="ignore", over="ignore"):  # callers look at the result
        for patch, strength in patches:
            if name.endswith(".bias"):
                weight = patch.applied_to_bias(weight, strength)
            elif strength or patch.kind.replaces:
                weight = patch.applied(weight, strength, comfyui_dora=comfyui_dora)
    return copying.cast(weight, values.dtype if dtype is None else dtype, name)


class AdapterStack:
    """Adapters on the parameters of a transformer and a text encoder, with weights that can be changed.

    Host memory keeps the parameters' values without adapters, from which every change starts. Quantised parameters
    stay as they are, and the factors of LoRAs become their `update`: merged, small changes would be rounded away. A
    quantised parameter that another kind of adapter changes is dequantised, which is printed. The files stay open.
    Adapters that are given as such have to fit the parameters.
    """

    def __init__(
        self,
        adapters: Sequence[PathLike | Adapter],
        transformer: Params,
        text_encoder: Params,
        *,
        base: PathLike | None = None,
        allow_unused: bool = False,
        comfyui_dora: bool = False,
    ):
        params = transformer | {TEXT_ENCODER + path: value for path, value in text_encoder.items()}
        tensors = [*file_tensors(dit.RULES, transformer)]
        for tensor in file_tensors(qwen3.RULES, text_encoder):
            tensors.append(
                dataclasses.replace(tensor, name=TEXT_ENCODER + tensor.name, path=TEXT_ENCODER + tensor.path)
            )
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        self._comfyui_dora = comfyui_dora
        options = {"base": base, "allow_unused": allow_unused}
        self._adapters: list[Adapter] = []
        for one in adapters:
            fitting = [one] if isinstance(one, Adapter) else match_adapters([open_adapter_file(one)], shapes, **options)
            self._adapters += fitting
        touched = changes(self._adapters, [1.0] * len(adapters))
        self._tensors: dict[str, list[FileTensor]] = {}
        for tensor in tensors:
            if tensor.name in touched:
                self._tensors.setdefault(tensor.path, []).append(tensor)
        self._quantised = {
            path: value
            for path in self._tensors
            if isinstance(value := params[path], Quantised) and self._are_loras(path, touched)
        }
        self._ranks = {
            path: max(sum(patch.rank or 0 for patch, _ in touched[tensor.name]) for tensor in self._tensors[path])
            for path in self._quantised
        }
        merging = {path: params[path] for path in self._tensors if path not in self._quantised}
        if dequantised := [path for path, value in merging.items() if isinstance(value, Quantised)]:
            what = f"{plural(len(dequantised), 'quantised stack')} of matrices"
            print(f"{what} changed by adapters other than LoRAs: dequantised ({shorten(dequantised)})", file=sys.stderr)
        self._base = {path: _values_on_host(value) for path, value in merging.items()}
        self._shardings = {
            path: getattr(value.codes if isinstance(value, Quantised) else value, "sharding", None)
            for path, value in merging.items()
        }

    def params_for(self, weights: Sequence[Weight]) -> tuple[Params, Params]:
        """Return the changed parameters of the transformer and of the text encoder, given one weight per adapter.

        Raises UserError for a wrong number of weights, or for a part of the network that an adapter does not change.
        """
        if len(weights) != len(self._adapters):
            raise UserError(f"found {len(weights)} weights, expected one for each of {len(self._adapters)} LoRAs")
        found = changes(self._adapters, weights)
        params: Params = {path: self._placed(path, self._merged(path, found)) for path in self._base}
        params |= {path: self._updated(path, found) for path in self._quantised}
        own = {path for path in params if path.startswith(TEXT_ENCODER)}
        return (
            {path: value for path, value in params.items() if path not in own},
            {path.removeprefix(TEXT_ENCODER): params[path] for path in own},
        )

    def _placed(self, path: str, values: np.ndarray) -> Any:
        """Return the values with the parameter's sharding, or in host memory if the parameter has none."""
        sharding = self._shardings[path]
        if sharding is None:
            return values
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def _are_loras(self, path: str, touched: Changes) -> bool:
        patches = (patch for tensor in self._tensors[path] for patch, _ in touched[tensor.name])
        return path.endswith(".kernel") and all(map(_is_plain_lora, patches))

    def _updated(self, path: str, found: Changes) -> Quantised:
        """Return the quantised parameter with the factors of all LoRAs, zero where a layer has fewer."""
        base, tensors = self._quantised[path], self._tensors[path]
        rank = self._ranks[path]
        *stack, features_in, features_out = base.shape
        a, b = (np.zeros((*stack, *own), base.dtype) for own in ((features_in, rank), (rank, features_out)))
        for tensor in tensors:
            own_a, own_b = (whole if tensor.layer is None else whole[tensor.layer] for whole in (a, b))
            first = 0
            for patch, strength in found.get(tensor.name, ()):
                last = first + (patch.rank or 0)
                down, up = (patch.parts[part].matrix.float32() for part in ("lora_A", "lora_B"))
                own_a[:, first:last] = down.T
                own_b[first:last] = up.T * np.float32(strength * patch.scale)
                first = last
        sharding: Any = getattr(base.codes, "sharding", None)
        if (mesh := getattr(sharding, "mesh", None)) is not None:
            return dataclasses.replace(base, update=replicate((a, b), mesh))
        return dataclasses.replace(base, update=(a, b) if sharding is None else jax.device_put((a, b), sharding))

    def _merged(self, path: str, found: Changes) -> np.ndarray:
        out = self._base[path].copy()
        for tensor in self._tensors[path]:
            own = out if tensor.layer is None else out[tensor.layer]
            patches, values = found.get(tensor.name, ()), tensor.layout.to_file(own)
            values = merged(tensor.name, values, patches, comfyui_dora=self._comfyui_dora)
            copying.copy_into(own, tensor.layout.to_model(values))
        return out


def _is_plain_lora(patch: Patch) -> bool:
    """Return whether the patch is a LoRA of two matrices, without what changes their product."""
    used = patch.parts.keys() - set(patch.idle)
    return used >= {"lora_A", "lora_B"} and used <= {"lora_A", "lora_B", "alpha"}


def _values_on_host(value: Any) -> np.ndarray:
    """Return a parameter's values; those of quantised stacks are dequantised a layer at a time."""
    if not isinstance(value, Quantised):
        return gathered.on_host(value)
    value = jax.tree.map(gathered.on_host, value)
    return np.stack([np.asarray(value[layer]) for layer in range(len(value.codes))])


def parse_lora_argument(text: str) -> tuple[str, Weight]:
    """Split `FILE`, `FILE:WEIGHT` or `FILE:MODEL:TEXT_ENCODER` into path and weight (default 1).

    The colons of `C:\\file` and `hf://…` belong to the path. Raises UserError unless the weights are finite numbers.
    """
    path, weights = text, list[float]()
    while len(weights) < 2 and not os.path.exists(path):
        head, colon, word = path.rpartition(":")
        is_drive = len(head) == 1 and head.isalpha() and _number(word) is None
        if not colon or re.search(r"[/\\]", word) or is_drive:
            break
        number = _number(word)
        if not head or number is None:
            expected = "FILE, FILE:WEIGHT or FILE:MODEL:TEXT_ENCODER with numbers"
            raise UserError(f"{text}: expected {expected}, found '{word}'")
        path, weights = head, [number, *weights]
    if len(weights) == 2:
        return path, dict(zip(MODEL_AND_TEXT_ENCODER, weights, strict=True))
    return path, weights[0] if weights else 1.0


def _number(text: str) -> float | None:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    return None
