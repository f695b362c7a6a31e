"""Adapter files in the trainer's format.

`diffusion_model.<module>.lora_A.weight` is (rank, in), `….lora_B.weight` (out, rank).
There is no alpha tensor: alpha is the rank, the scale 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.checkpoints import accounting, copying, gathered, safetensors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import FileTensor, file_tensors
from anima_jax.checkpoints.names.adapters import LORA_RULES
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from anima_jax.models import lora, parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.parameters import Params

Ranks = Mapping[str, Sequence[int]]
"""Module path → rank of its adapter in each layer, 0 for none."""


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where one tensor of an adapter file belongs: a module's A or B in one layer."""

    module: str
    layer: int
    rank_axis: int
    other_size: int


def load_lora(path: PathLike, model: AnimaDiT, weight: float = 1.0) -> None:
    """Put the LoRA in a file on `model`, in place, times `weight`, in the file's dtype. Other modules stay bare.

    Raises UserError if a tensor of the file has no place in the model, or A and B do not belong together.
    """
    slots = _slots(model)
    with SafetensorsFile(path) as file:
        ranks = _ranks(file, slots, model)
        lora.attach(model, ranks, scale=weight)
        graphdef, params = parameters.split(model)
        tensors = [tensor for tensor in file_tensors(LORA_RULES, _adapter_only(params)) if tensor.name in file.tensors]
        dtype = np.result_type(*(file.tensors[tensor.name].dtype for tensor in tensors))
        filled = {path: np.zeros(leaf.shape, dtype) for path, leaf in _adapter_only(params).items()}
        for tensor in tensors:
            values = tensor.layout.to_model(copying.cast(file.read(tensor.name), dtype, tensor.name))
            filled[tensor.path][tensor.layer][tuple(slice(size) for size in values.shape)] = values
    nnx.update(model, nnx.state(parameters.merge(graphdef, params | jax.tree.map(jnp.asarray, filled))))


def save_lora(path: PathLike, params: Params, ranks: Ranks, *, dtype: DTypeLike | None = None) -> None:
    """Write the adapter's parameters among `params`; `dtype` None keeps theirs. The file appears whole or not at all.

    Layers of rank 0 are left out, and so is what lies beyond a layer's own rank.
    """
    entries: dict[str, tuple[FileTensor, tuple[int, ...]]] = {}
    for tensor in file_tensors(LORA_RULES, _adapter_only(params)):
        module, _, part = tensor.path.rpartition(".")
        assert tensor.layer is not None
        rank = ranks[module][tensor.layer]
        if rank:
            shape = (rank, tensor.shape[1]) if part == "lora_a" else (tensor.shape[0], rank)
            entries[tensor.name] = (tensor, shape)

    def stored_dtype(tensor: FileTensor) -> np.dtype:
        return np.dtype(params[tensor.path].dtype if dtype is None else dtype)

    def array_of(name: str) -> np.ndarray:
        tensor, shape = entries[name]
        values = copying.cast(gathered.on_host(params[tensor.path][tensor.layer]), stored_dtype(tensor), name)
        return copying.contiguous(tensor.layout.to_file(values)[tuple(map(slice, shape))])

    listed = [safetensors.Tensor(name, stored_dtype(tensor), shape) for name, (tensor, shape) in entries.items()]
    gathered.write(path, listed, array_of, {"format": "pt"})


def ranks_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The ranks of the adapters on `model` (abstract or not)."""
    modules = nnx.iter_modules(model)
    return {".".join(map(str, path)): module.ranks for path, module in modules if isinstance(module, lora.LoRALinear)}


def _adapter_only(params: Params) -> Params:
    return {path: leaf for path, leaf in params.items() if lora.is_lora(path)}


def _slots(model: AnimaDiT) -> dict[str, _Slot]:
    """Every tensor that an adapter file for `model` could have, by name."""
    slots = {}
    for module, base in lora.target_modules(model).items():
        layers, features_in, features_out = base.kernel.shape
        shapes = {
            f"{module}.lora_a": jax.ShapeDtypeStruct((layers, features_in, 1), np.float32),
            f"{module}.lora_b": jax.ShapeDtypeStruct((layers, 1, features_out), np.float32),
        }
        for tensor in file_tensors(LORA_RULES, shapes):
            assert tensor.layer is not None
            is_a = tensor.path.endswith("lora_a")
            slots[tensor.name] = _Slot(module, tensor.layer, 0 if is_a else 1, features_in if is_a else features_out)
    return slots


def _ranks(file: SafetensorsFile, slots: Mapping[str, _Slot], model: AnimaDiT) -> dict[str, list[int]]:
    unknown = [name for name in file.tensors if name not in slots]
    if unknown:
        raise UserError(
            f"{file.path}: {len(unknown)} of {len(file.tensors)} tensors have no place in the model as a LoRA in the "
            f"trainer's format (diffusion_model.<module>.lora_A.weight): {accounting.shorten(unknown)}"
        )
    if not file.tensors:
        raise UserError(f"{file.path}: holds no tensors, expected a LoRA")
    layers = {module: base.kernel.shape[0] for module, base in lora.target_modules(model).items()}
    found: dict[tuple[str, int], set[int]] = {}
    for name, tensor in file.tensors.items():
        slot = slots[name]
        if len(tensor.shape) != 2 or tensor.shape[1 - slot.rank_axis] != slot.other_size or 0 in tensor.shape:
            expected = ("rank", slot.other_size) if slot.rank_axis == 0 else (slot.other_size, "rank")
            raise UserError(f"{file.path}: {name} is {tensor.shape}, expected ({expected[0]}, {expected[1]})")
        partner = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.").replace(".lora_?.", ".lora_B.")
        if partner not in file.tensors:
            raise UserError(f"{file.path}: has {name} but not {partner}")
        found.setdefault((slot.module, slot.layer), set()).add(tensor.shape[slot.rank_axis])
    ranks: dict[str, list[int]] = {}
    for (module, layer), sizes in found.items():
        if len(sizes) > 1:
            raise UserError(
                f"{file.path}: A and B of {module}, block {layer}, have ranks {sorted(sizes)}, expected one"
            )
        ranks.setdefault(module, [0] * layers[module])[layer] = sizes.pop()
    return ranks
