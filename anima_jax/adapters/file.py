"""Adapter files of every dialect, into one form and out of it, and onto models.

`open_adapter` gives an `Adapter`: the name of each module that a file changes, and its `Patch`. `write_adapter` spells
it in the dialect that is asked for. `load_lora` puts a file's factors beside the weights of a model, `save_lora` writes
such factors as the trainer does: `diffusion_model.<module>.lora_A.weight` (rank, in), `….lora_B.weight` (out, rank),
and an alpha only where the scale is not 1.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.adapters import dialects, modules
from anima_jax.adapters.depths import another_depth
from anima_jax.adapters.dialects import COMFYUI, DIALECTS, Dialect
from anima_jax.adapters.kinds import TITLES, adapter_kind, split_key
from anima_jax.adapters.patch import FLOAT32, Part, Patch
from anima_jax.checkpoints import accounting, copying, gathered, locations, safetensors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import file_tensors
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError, shorten
from anima_jax.models import parameters
from anima_jax.models.parameters import Params

Ranks = Mapping[str, Sequence[int]]
"""Module path → rank of its adapter in each layer, 0 for none."""

UNUSED_SHOWN = 20

ALPHA_IS_RANK = "alpha_is_rank"
"""Key of the metadata of a file whose alphas were added because its dialect wants them, and say nothing."""

DIFFUSERS_SETTINGS = "lora_adapter_metadata"
"""Key of the metadata under which diffusers keeps PEFT's settings."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter file holds: module → patch, and the keys that are no part of any module of Anima's.

    Modules are named as in the original files, the text encoder's with `text_encoder.` before.
    """

    path: str
    patches: Mapping[str, Patch]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Sequence[str] = ()

    @property
    def summary(self) -> str:
        """Kinds and ranks, for a person."""
        kinds = sorted({patch.kind for patch in self.patches.values()})
        ranks = sorted({patch.rank for patch in self.patches.values() if patch.rank})
        span = f" of rank {ranks[0]}" if ranks else ""
        return " and ".join(TITLES[kind] for kind in kinds) + span + (f" to {ranks[-1]}" if len(ranks) > 1 else "")

    def require_all_used(self, *, allow_unused: bool, advice: str = "") -> None:
        """Say on stderr what is left over if that is allowed, else raise UserError. `advice` is on the cause."""
        if not self.patches:
            what = accounting.looks_like(self.unused)
            listed = f", with the keys {shorten(self.unused, UNUSED_SHOWN)}" if adapter_kind(self.unused) else ""
            raise UserError(f"{self.path}: holds no adapter of Anima's; {what}{listed}")
        if not self.unused:
            return
        near = dialects.nearest_spelling(self.unused[0]) + (advice and f"; {advice}")
        text = f"{self.path}: {len(self.unused)} keys are unused: {shorten(self.unused, UNUSED_SHOWN)}{near}"
        if not allow_unused:
            raise UserError(f"{text}; --allow_unused (allow_unused=True) goes on without them")
        print(f"warning: {text}", file=sys.stderr)


@contextlib.contextmanager
def open_adapter(path: PathLike, *, allow_unused: bool = False) -> Iterator[Adapter]:
    """The adapter in a file of any dialect, or in a folder that holds one; its parts can be read while it is open.

    Raises UserError for keys that belong to no module of Anima's, unless they are allowed, and for parts that do not
    belong together.
    """
    with SafetensorsFile(file_of(path)) as file:
        yield adapter_in(file, allow_unused=allow_unused)


def adapter_in(file: SafetensorsFile, *, allow_unused: bool = False) -> Adapter:
    """As `open_adapter`, of a file that is open already."""
    adapter = read_adapter(file)
    adapter.require_all_used(allow_unused=allow_unused)
    for module, patch in adapter.patches.items():
        if fault := patch.fault():
            raise UserError(f"{file.path}: {module} {fault}")
    return adapter


def fitted(adapter: Adapter, weights: Mapping[str, tuple[int, ...]], *, allow_unused: bool = False) -> Adapter:
    """The part of an adapter that changes one of `weights`, tensors' names (`….weight`) and shapes; says how many.

    Warns of an adapter that seems made for fewer blocks than there are, which fits and is at the wrong ones. Raises
    UserError, with the names of the modules, for what changes none, unless that is allowed, and for a patch of
    another shape.
    """
    found = {module: _present(weights, module, patch) for module, patch in adapter.patches.items()}
    found = {module: patch for module, patch in found.items() if patch.parts}
    for module, patch in found.items():
        if fault := patch.fault(weights.get(f"{module}.weight"), weights.get(f"{module}.bias")):
            raise UserError(f"{adapter.path}: {module} {fault}")
    print(f"{adapter.path}: {len(found)} of {len(adapter.patches)} modules matched ({adapter.summary})")
    absent = [
        part.key
        for module, patch in adapter.patches.items()
        for name, part in patch.parts.items()
        if part.key and (module not in found or name not in found[module].parts)
    ]
    if not found:
        raise UserError(f"{adapter.path}: changes nothing that the model has: {shorten(absent, UNUSED_SHOWN)}")
    depths = another_depth(adapter.patches, weights)
    advice = f"it seems {depths}" if depths else ""
    if advice and not absent:
        print(f"warning: {adapter.path}: {advice}", file=sys.stderr)
    dataclasses.replace(adapter, unused=absent).require_all_used(allow_unused=allow_unused, advice=advice)
    return dataclasses.replace(adapter, patches=found)


def write_adapter(
    path: PathLike,
    patches: Mapping[str, Patch],
    dialect: Dialect = COMFYUI,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write an adapter in a dialect, `dtype` None keeping each part's; the lines say what had to be written otherwise.

    Where the dialect has no place for a scale (alpha / rank), it is multiplied into lora_B. The file appears whole or
    not at all. Raises UserError, naming the modules, for what the dialect cannot express.
    """
    parts: dict[str, Part] = {}
    lost: dict[str, list[str]] = {}
    folded, metadata = 0, dict(metadata or {}) or {"format": "pt"}
    if dialect is DIALECTS["kohya"] and not any("alpha" in patch.parts for patch in patches.values()):
        patches = {module: _with_alpha(patch) for module, patch in patches.items()}
        metadata[ALPHA_IS_RANK] = "true"
    for module, patch in patches.items():
        spelling, written = dialect.module(module), dict(patch.parts)
        if spelling is None:
            lost.setdefault("text encoder", []).append(module)
            continue
        if not dialect.alpha and "alpha" in written and written.keys() >= {"lora_B"}:
            del written["alpha"]
            if patch.scale != 1.0:
                written["lora_B"] = _scaled(written["lora_B"], patch.scale)
                folded += 1
        for part, value in written.items():
            if part in dialect.parts:
                parts[spelling + dialect.parts[part]] = value if dtype is None else _cast(value, part, np.dtype(dtype))
            else:
                lost.setdefault(part, []).append(module)
    if lost:
        listed = "; ".join(f"{part} of {len(of)} modules ({shorten(of, 3)})" for part, of in lost.items())
        raise UserError(f"{path}: files of {dialect.title} have no place for {listed}")
    if folded:
        metadata.pop("alpha", None)
    listed = [safetensors.TensorInfo(key, part.dtype, part.shape) for key, part in parts.items()]
    gathered.write(path, listed, lambda key: copying.contiguous(parts[key].read()), metadata)
    note = f"alpha / rank of {folded} modules was multiplied into lora_B, as files of {dialect.title} have no alpha"
    return [note] if folded else []


def load_lora(path: PathLike, model: nnx.Module, weight: float = 1.0, *, allow_unused: bool = False) -> None:
    """Put the adapter in a file on `model`, in place, times `weight`, in the file's dtype. Other modules stay bare.

    `model` is a transformer or a text encoder, the file a LoRA, LoKr, LoHa or DoRA of any dialect. Raises UserError for
    what has no place in the model, and for differences of whole weights, which only merging can apply.
    """
    tensors = module_tensors(model)
    shapes = {f"{name}.weight": shape for name, (_, _, shape) in tensors.items()}
    with open_adapter(path, allow_unused=allow_unused) as found:
        adapter = fitted(found, shapes, allow_unused=allow_unused)
        slots, values = factors_of(adapter, tensors)
        if weight != 1.0 and any(one.kind == "dora" for one in slots.values()):
            raise UserError(f"{adapter.path}: a DoRA at weight {weight}: beside a model's weights it has weight 1")
        modules.attach(model, slots)
        graphdef, params = parameters.split(model)
        values |= {name: np.float32(weight) * value for name, value in values.items() if name.endswith(modules.SCALE)}
        filled = {name: jnp.asarray(value) for name, value in values.items()}
    nnx.update(model, nnx.state(parameters.merge(graphdef, params | filled)))


def save_lora(
    path: PathLike,
    params: Params,
    ranks: Ranks,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapters among `params` as the trainer does; `dtype` None keeps theirs.

    Layers of rank 0 are left out, and so is what lies beyond a layer's own rank. The file appears whole or not at all.
    """
    write_adapter(path, patches_of(params, ranks), dtype=dtype, metadata=metadata)


def patches_of(params: Params, ranks: Ranks) -> dict[str, Patch]:
    """The adapters among a model's parameters."""
    parts: dict[str, dict[str, Part]] = {}
    for module, (path, layer) in module_names({path: len(layers) for path, layers in ranks.items()}).items():
        if not ranks[path][layer]:
            continue
        scale = float(params[f"{path}.{modules.SCALE}"][layer])
        own = parts.setdefault(module, {})
        for factor, name in dialects.PART_OF_FACTOR.items():
            if f"{path}.{factor}" in params:
                own[name] = _layer_part(params[f"{path}.{factor}"], factor, layer, ranks[path][layer])
        rank = Patch(own).rank
        if rank is not None and scale != 1.0:
            own["alpha"] = Part.of(np.asarray(scale * rank, FLOAT32))
    return {module: Patch(own) for module, own in parts.items()}


def ranks_of(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The ranks of the adapters on `model` (abstract or not)."""
    return {path: module.ranks for path, module in modules.adapted(model)}


def module_names(layers: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Name in files of each layer of stacked modules → the module's path, and the layer. `layers` says how many."""
    abstract = {path: np.broadcast_to(np.uint8(0), (count, 1, 1)) for path, count in layers.items()}
    tensors = file_tensors(dialects.MODULE_RULES, abstract)
    return {tensor.name: (tensor.path, tensor.layer) for tensor in tensors if tensor.layer is not None}


def module_tensors(model: nnx.Module) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Name in files of every linear layer of `model` that takes an adapter → its path, layer and weight's shape."""
    kernels = modules.target_shapes(model)
    inside = any(path.startswith(("blocks.", dialects.TEXT_ENCODER)) for path in kernels)
    # A text encoder alone has the paths that it has inside a model without their beginning.
    full = kernels if inside else {dialects.TEXT_ENCODER + path: shape for path, shape in kernels.items()}
    cut = 0 if inside else len(dialects.TEXT_ENCODER)
    names = module_names({path: shape[0] for path, shape in full.items()})
    return {name: (path[cut:], layer, full[path][:0:-1]) for name, (path, layer) in names.items()}


def factors_of(
    adapter: Adapter, tensors: Mapping[str, tuple[str, int, tuple[int, ...]]]
) -> tuple[dict[str, modules.AdapterSpec], dict[str, np.ndarray]]:
    """An adapter as factors of stacked modules: what to attach, and the values of all its parameters, scales included.

    `tensors` is what `module_tensors` gives. Raises UserError where the layers of a module differ in more than rank.
    """
    by_path: dict[str, dict[int, Patch]] = {}
    for module, patch in adapter.patches.items():
        path, layer, _ = tensors[module]
        by_path.setdefault(path, {})[layer] = patch
    layers = {path: 1 + max(layer for p, layer, _ in tensors.values() if p == path) for path in by_path}
    slots, values = {}, {}
    for path, patches in by_path.items():
        slots[path], own = _stacked(adapter.path, path, patches, layers[path])
        values |= {f"{path}.{name}": value for name, value in own.items()}
    return slots, values


_FACTOR_OF_PART = {part: factor for factor, part in dialects.PART_OF_FACTOR.items()}


def _stacked(
    label: str, path: str, patches: Mapping[int, Patch], layers: int
) -> tuple[modules.AdapterSpec, dict[str, np.ndarray]]:
    """One module's patches, by layer, as arrays with a layer axis in front."""
    kinds = {patch.kind for patch in patches.values()}
    names = {frozenset(patch.parts) - {"alpha"} for patch in patches.values()}
    unfit = [name for one in names for name in one if name not in _FACTOR_OF_PART]
    if any(patch.kind == "dora" and patch.parts["dora_scale"].shape[0] == 1 for patch in patches.values()):
        unfit.append("dora_scale for each input")
    (parts, *others) = names
    if unfit or others or kinds == {"diff"} or ("dora_scale" in parts and kinds != {"dora"}):
        kind = f"{unfit[0]}" if unfit else " and ".join(sorted({", ".join(sorted(one)) for one in names}))
        raise UserError(f"{label}: {path}: {kind} cannot be trained on or kept beside a model; merge the file instead")
    factors: dict[str, dict[int, np.ndarray]] = {}
    for layer, patch in patches.items():
        for name in parts:
            factor = _FACTOR_OF_PART[name]
            array = patch.parts[name].read()
            factors.setdefault(factor, {})[layer] = array.reshape(-1) if factor == "lora_magnitude" else array.T
    stacked, shapes = {}, {}
    for factor, arrays in factors.items():
        shape = tuple(map(max, zip(*(array.shape for array in arrays.values()), strict=True)))
        rank_axis = modules.FACTORS[factor].rank_axis
        if any(size != shape[axis] for a in arrays.values() for axis, size in enumerate(a.shape) if axis != rank_axis):
            raise UserError(f"{label}: {path}: {factor} differs in shape between blocks; merge the file instead")
        dtype = np.result_type(*(array.dtype for array in arrays.values()))
        shapes[factor], stacked[factor] = shape, np.zeros((layers, *shape), dtype)
        for layer, array in arrays.items():
            stacked[factor][layer][tuple(map(slice, array.shape))] = array
    scales, ranks = np.zeros(layers, FLOAT32), [0] * layers
    for layer, patch in patches.items():
        # A LoKr of two whole factors has no rank; 1 says that there is an adapter.
        scales[layer], ranks[layer] = patch.scale, patch.rank or 1
    return modules.AdapterSpec(kinds.pop(), shapes, ranks), {**stacked, modules.SCALE: scales}


# ---- reading ---------------------------------------------------------------------------------------------------------


def file_of(path: PathLike) -> PathLike:
    """The one safetensors file in a folder, as the trainer writes them; any other path as it is."""
    if locations.is_remote(path) or not os.path.isdir(path):
        return path
    files = sorted(pathlib.Path(path).glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .safetensors files, expected one adapter")
    return files[0]


def read_adapter(file: SafetensorsFile) -> Adapter:
    """The adapter in an open file, whatever is left over and whether its parts belong together or not."""
    keys = {key: split for key in file.tensors if (split := split_key(key))}
    known = dialects.modules_by_spelling(dict.fromkeys(spelling for spelling, _ in keys.values()))
    parts: dict[str, dict[str, Part]] = {}
    unused = [key for key in file.tensors if key not in keys or keys[key][0] not in known]
    for key, (spelling, part) in keys.items():
        if spelling in known:
            module, name = known[spelling], part
            if module.endswith(".bias"):  # ComfyUI's way to name a bias's difference
                module, name = module.removesuffix(".bias"), "diff_b" if part == "diff" else part
            own = parts.setdefault(module, {})
            if name in own:
                raise UserError(f"{file.path}: {key}: a second {name} of {module}")
            tensor = file.tensors[key]
            own[name] = Part(tensor.shape, tensor.dtype, lambda key=key: file.read(key), key)
    idle = {module for module, own in parts.items() if own.keys() <= {"alpha", "dora_scale"}}
    unused += [key for key, (spelling, _) in keys.items() if known.get(spelling, "").removesuffix(".bias") in idle]
    patches = {module: Patch(own) for module, own in parts.items() if module not in idle}
    if any(spelling.startswith(dialects.PEFT_PREFIXES) for spelling in known):
        patches = _with_alphas(patches, _peft_config(file))
    metadata = {key: value for key, value in file.metadata.items() if key != DIFFUSERS_SETTINGS}
    if metadata.pop(ALPHA_IS_RANK, None):
        patches = {module: _without_alpha(patch) for module, patch in patches.items()}
    return Adapter(file.path, patches, metadata, tuple(unused))


def _peft_config(file: SafetensorsFile) -> dict[str, Any]:
    """The settings of PEFT's that come with a file: in its metadata as diffusers has them, or in a JSON beside it."""
    beside = pathlib.Path(file.path).with_name("adapter_config.json")
    try:
        if DIFFUSERS_SETTINGS in file.metadata:
            return json.loads(file.metadata[DIFFUSERS_SETTINGS])
        is_peft = any(key.startswith("base_model.model.") for key in file.tensors)
        return json.loads(beside.read_text(encoding="utf-8")) if is_peft and beside.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: its PEFT settings (adapter_config.json) cannot be read: {error}") from error


def _with_alphas(patches: Mapping[str, Patch], config: Mapping[str, Any]) -> dict[str, Patch]:
    """The patches with the alphas that PEFT's settings give them; those of diffusers have the component before."""
    found = {}
    for module, patch in patches.items():
        spelled = DIALECTS["diffusers"].module(module) or module
        component, _, name = spelled.partition(".")
        own = {key.removeprefix(f"{component}."): value for key, value in config.items()}
        alpha = own.get("lora_alpha", own.get("alpha"))
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            matched = re.compile(rf"(.*\.)?({pattern.removeprefix('^')})")
            alpha = value if any(map(matched.fullmatch, (name, module, spelled))) else alpha
        rank = patch.rank
        if alpha is not None and rank is not None and "alpha" not in patch.parts:
            alpha = float(alpha) * rank**0.5 if own.get("use_rslora") else float(alpha)
            if alpha != rank:
                patch = Patch({**patch.parts, "alpha": Part.of(np.asarray(alpha, FLOAT32))})  # noqa: PLW2901
        found[module] = patch
    return found


def _with_alpha(patch: Patch) -> Patch:
    """With an alpha that is the rank."""
    return Patch({**patch.parts, "alpha": Part.of(np.asarray(patch.rank, FLOAT32))}) if patch.rank else patch


def _without_alpha(patch: Patch) -> Patch:
    return Patch({name: part for name, part in patch.parts.items() if name != "alpha" or patch.scale != 1.0})


# ---- single parts ----------------------------------------------------------------------------------------------------


def _present(weights: Mapping[str, Any], module: str, patch: Patch) -> Patch:
    """The parts that change a weight or a bias that there is."""
    has = {name: f"{module}.{'bias' if name == 'diff_b' else 'weight'}" in weights for name in patch.parts}
    return Patch({name: part for name, part in patch.parts.items() if has[name]})


def _cast(part: Part, name: str, dtype: np.dtype) -> Part:
    return part if name == "alpha" else Part(part.shape, dtype, lambda: copying.cast(part.read(), dtype, name))


def _scaled(part: Part, scale: float) -> Part:
    return dataclasses.replace(
        part, read=lambda: copying.cast(part.float32() * np.float32(scale), part.dtype, "lora_B")
    )


def _layer_part(stacked: Any, factor: str, layer: int, rank: int) -> Part:
    """One layer's own rows of a stacked factor, as a file has it."""
    rank_axis = modules.FACTORS[factor].rank_axis
    shape = list(stacked.shape[1:])
    if rank_axis is not None:
        shape[rank_axis] = rank
    file_shape = (shape[0], 1) if len(shape) == 1 else (shape[1], shape[0])

    def read() -> np.ndarray:
        values = gathered.on_host(stacked[layer])[tuple(map(slice, shape))]
        return values.reshape(-1, 1) if values.ndim == 1 else values.T

    return Part(file_shape, np.dtype(stacked.dtype), read)
