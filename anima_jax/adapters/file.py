"""Reading and writing of adapter files in every dialect.

`open_adapter` returns an `Adapter`, which maps each module that the file changes to its `Patch`. `write_adapter` writes
patches in a dialect; `patches_of` makes them from a model's parameters. The trainer's files contain
`diffusion_model.<module>.lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), and an alpha only where the scale is
not 1.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from anima_jax.adapters import dialects, dora, peft, peft_settings
from anima_jax.adapters.depths import depth_mismatch
from anima_jax.adapters.dialects import COMFYUI, DIALECTS, LAYOUTS, Dialect, module_names
from anima_jax.adapters.kinds import FACTORS, SCALE, adapter_kind, split_key, unsupported
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.adapters.opening import open_adapter_file
from anima_jax.adapters.patch import BIAS_PARTS, FLOAT32, Part, Patch
from anima_jax.checkpoints import accounting, copying, gathered, hashes, safetensors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names import dit
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.errors import UserError, plural, shorten
from anima_jax.models.parameters import Params

UNUSED_SHOWN = 20


WITH_CORE = {part: DIALECTS["kohya"].parts[part] for part in ("lora_A", "lora_B")}
"""Endings of the factors beside `lora_mid`: ComfyUI ignores it beside others."""

NORM_OF_BASE = "dora_norm_of_base"
"""Metadata key of a file whose DoRA has magnitudes for the norm of W, as ComfyUI divides."""

ALPHA_IS_RANK = "alpha_is_rank"
"""Metadata key of a file whose alphas were added only because its dialect requires them."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The contents of an adapter file: module → patch, and the `unused` keys, which belong to no Anima module.

    Modules have their names in the original files, with the prefix `text_encoder.` for the text encoder's. `tensors`
    describes every tensor of the file.
    """

    path: str
    patches: Mapping[str, Patch]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Sequence[str] = ()
    tensors: Mapping[str, safetensors.TensorInfo] = dataclasses.field(default_factory=dict)

    @property
    def summary(self) -> str:
        """Kinds and ranks as text, such as `LoRA of rank 8 to 16`."""
        kinds = [patch.kind for patch in self.patches.values()]
        titles = {kind.name: kind.title for kind in sorted(kinds, key=lambda kind: kind.name)}
        ranks = sorted({patch.rank for patch in self.patches.values() if patch.rank})
        span = f" of rank {ranks[0]}" if ranks else ""
        return " and ".join(titles.values()) + span + (f" to {ranks[-1]}" if len(ranks) > 1 else "")

    def warnings(self) -> Iterator[str]:
        """Yield a remark about modules with parts of several kinds, of which only one counts."""
        several = {module: patch for module, patch in self.patches.items() if patch.idle}
        for module, patch in itertools.islice(several.items(), 1):
            others = f" and {plural(len(several) - 1, 'other module')}" if len(several) > 1 else ""
            idle = ", ".join(sorted(patch.idle))
            yield f"{module}{others}: {idle} beside {patch.kind.title} has no effect, as in ComfyUI"

    def require_all_used(self, *, allow_unused: bool, advice: str = "", whole_parts: bool = False) -> None:
        """Raise UserError if there is no patch or keys are unused; with `allow_unused`, only warn about the keys.

        `advice` on the cause is added to the message. The message names --allow_unused only where that is safe: if few
        keys are unused, or only parts for networks that the model does not have (`whole_parts`).
        """
        if not self.patches:
            what = accounting.looks_like(self.tensors, self.metadata)
            listed = f", with the keys {shorten(self.unused, UNUSED_SHOWN)}" if adapter_kind(self.unused) else ""
            raise UserError(f"{self.path}: holds no adapter of Anima's; {what}{listed}")
        if not self.unused:
            return
        advice = "; ".join(filter(None, (unsupported(self.unused), advice)))
        near = dialects.nearest_spelling(self.unused[0]) + (advice and f"; {advice}")
        text = f"{self.path}: {len(self.unused)} keys are unused: {shorten(self.unused, UNUSED_SHOWN)}{near}"
        if allow_unused:
            print(f"warning: {text}", file=sys.stderr)
            return
        few = not advice and len(self.unused) <= accounting.MOST_UNUSED * len(self.tensors)
        if few or whole_parts:
            raise UserError(f"{text}; --allow_unused (allow_unused=True) goes on without them")
        raise UserError(
            f"{text}; only {plural(len(self.patches), 'module')} fit{accounting.foreign_hint(self.tensors)}"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_adapter(path: PathLike, *, allow_unused: bool = False) -> Iterator[Adapter]:
    """Open an adapter file of any dialect, or a folder that contains one. Parts are read on demand while it is open.

    Raises UserError for keys that belong to no Anima module, unless `allow_unused`, and for parts that do not form an
    adapter.
    """
    with open_adapter_file(path) as file:
        yield adapter_in(file, allow_unused=allow_unused)


def adapter_in(file: TensorFile, *, allow_unused: bool = False) -> Adapter:
    """Return the adapter in a file that is already open. Raises UserError as `open_adapter` does."""
    adapter = read_adapter(file)
    adapter.require_all_used(allow_unused=allow_unused)
    for module, patch in adapter.patches.items():
        if error := patch.error():
            raise UserError(f"{file.path}: {_named(module, patch)} {error}")
    for warning in adapter.warnings():
        print(f"warning: {file.path}: {warning}", file=sys.stderr)
    return adapter


def _named(module: str, patch: Patch) -> str:
    """Return the module with one of its keys in the file, if that has another name for it."""
    key = next((part.key for part in patch.parts.values() if part.key), module)
    return module if module in key else f"{module} ({key})"


def read_adapter(file: TensorFile) -> Adapter:
    """Return the adapter in an open file with its unused keys, without checking that its parts fit together."""
    keys = [(key, spelling, part) for key in file.tensors for spelling, part in _split(key)]
    settings = peft.read_settings(file)
    spellings = dict.fromkeys(spelling for _, spelling, _ in keys)
    known = dialects.modules_by_spelling(spellings, of_conditioner=settings.is_of_conditioner)
    parts: dict[str, dict[str, Part]] = {}
    for key, spelling, part in keys:
        if spelling not in known:
            continue
        module, name = known[spelling], part
        if module.endswith(".bias"):  # ComfyUI's name for a bias difference
            if part != "diff":
                continue
            module, name = module.removesuffix(".bias"), "diff_b"
        own, tensor = parts.setdefault(module, {}), file.tensors[key]
        if name in own:
            raise UserError(f"{file.path}: {key}: a second {name} of {module}")
        own[name] = Part(tensor.shape, tensor.dtype, lambda key=key: file.read(key), key)
    patches = {
        module: _with_inputs_scaled(Patch(own))
        for module, own in parts.items()
        if own.keys() - {"alpha", "dora_scale", "inv_scale", "reshape_weight"}
    }
    used = {part.key for module in patches for part in parts[module].values()}
    unused = tuple(key for key in file.tensors if key not in used)
    patches, metadata = peft.with_scales(settings, file.path, known, patches), dict(settings.metadata)
    if metadata.pop(ALPHA_IS_RANK, None):
        patches = {module: _without_idle_alpha(patch) for module, patch in patches.items()}
    if metadata.pop(NORM_OF_BASE, None):
        patches = {
            module: dataclasses.replace(patch, norm_of_base=True) if dora.is_by_output(patch) else patch
            for module, patch in patches.items()
        }
    return Adapter(file.path, patches, metadata, unused, file.tensors)


def _split(key: str) -> Iterator[tuple[str, str]]:
    """Yield the module names and part that a key means, or nothing if it is not a part's.

    anima_lora trains fused projections and splits them on export, but leaves their `inv_scale` in one piece.
    """
    split = split_key(key)
    fused = re.fullmatch(r"(.*attn[._])(qkv|kv)(_proj)", split[0]) if split and split[1] == "inv_scale" else None
    if fused and split:
        yield from ((fused[1] + letter + fused[3], split[1]) for letter in fused[2])
    elif split:
        yield split


def _without_idle_alpha(patch: Patch) -> Patch:
    return patch.with_parts({name: part for name, part in patch.parts.items() if name != "alpha" or patch.scale != 1})


def _with_inputs_scaled(patch: Patch) -> Patch:
    """Return a patch whose `inv_scale` is multiplied into its factor of the inputs, if its kind has one."""
    inputs = (factor for factor in patch.kind.factors if {"in", "rank"} <= {*factor.axes})
    name = next((factor.part for factor in inputs), "")
    shapes = [patch.parts[part].shape for part in (name, "inv_scale") if part in patch.parts]
    if len(shapes) < 2 or shapes[0][1:] != shapes[1]:
        return patch
    factor, scale = patch.parts[name], patch.parts["inv_scale"]
    scaled = dataclasses.replace(factor, dtype=FLOAT32, read=lambda: factor.float32() * scale.float32())
    return patch.with_parts({part: one for part, one in patch.parts.items() if part != "inv_scale"} | {name: scaled})


def fit_to_weights(adapter: Adapter, weights: Mapping[str, tuple[int, ...]], *, allow_unused: bool = False) -> Adapter:
    """Return the part of an adapter that changes `weights` (tensor name, such as `….weight`, → shape).

    Prints how many modules matched. Warns about an adapter that seems made for fewer blocks, which fits but changes the
    wrong ones. Raises UserError if nothing matches, if a patch has another shape than its weight, and, unless
    `allow_unused`, if some parts match no weight; the message lists their keys.
    """
    found = {module: _present(weights, module, patch) for module, patch in adapter.patches.items()}
    found = {module: patch for module, patch in found.items() if patch.parts}
    for module, patch in found.items():
        if error := patch.error(weights.get(f"{module}.weight"), weights.get(f"{module}.bias")):
            raise UserError(
                f"{adapter.path}: {_named(module, patch)} {error}{accounting.foreign_hint(adapter.tensors)}"
            )
    print(f"{adapter.path}: {len(found)} of {len(adapter.patches)} modules matched ({adapter.summary})")
    absent = [
        part.key
        for module, patch in adapter.patches.items()
        for name, part in patch.parts.items()
        if part.key and (module not in found or name not in found[module].parts)
    ]
    if not found:
        raise UserError(f"{adapter.path}: changes nothing that the model has: {shorten(absent, UNUSED_SHOWN)}")
    depths = depth_mismatch(adapter.patches, weights)
    advice = f"it seems {depths}" if depths else ""
    if advice and not absent:
        print(f"warning: {adapter.path}: {advice}", file=sys.stderr)
    networks = {_network_of(name) for name in weights}
    elsewhere = all(_network_of(module) not in networks for module in adapter.patches if module not in found)
    dataclasses.replace(adapter, unused=absent).require_all_used(
        allow_unused=allow_unused, advice=advice, whole_parts=elsewhere
    )
    return dataclasses.replace(adapter, patches=found)


def _network_of(name: str) -> str:
    """Return which network a module or tensor belongs to: the text encoder, the LLM adapter or the transformer ("")."""
    return next((network for network in (TEXT_ENCODER, dit.ADAPTER) if name.startswith(network)), "")


def _present(weights: Mapping[str, Any], module: str, patch: Patch) -> Patch:
    """Return the patch without parts whose weight or bias the model does not have."""
    has = {name: f"{module}.{'bias' if name in BIAS_PARTS else 'weight'}" in weights for name in patch.parts}
    return patch.with_parts({name: part for name, part in patch.parts.items() if has[name]})


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(
    path: PathLike,
    patches: Mapping[str, Patch],
    dialect: Dialect = COMFYUI,
    *,
    dtype: DTypeLike | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Write an adapter in a dialect and return messages about changed values.

    `dtype` None keeps the dtype of each part. `path` is a file, and for PEFT the folder of its file and settings, which
    has a folder for each network but the transformer. A scale that the dialect has no alpha for is multiplied into a
    matrix. A file appears only when it is complete. Raises UserError, with the names of the modules, for parts that the
    dialect cannot express.
    """
    metadata, messages = dict(metadata or {}) or {"format": "pt"}, []
    if any(patch.norm_of_base for patch in patches.values()):
        if dialect.settings:
            raise UserError(f"{path}: the DoRA has magnitudes for ComfyUI's norm; --base FILE, its model, changes them")
        metadata[NORM_OF_BASE] = "true"
    if dialect is DIALECTS["kohya"] and not any("alpha" in patch.parts for patch in patches.values()):
        patches = {module: patch.with_alpha(patch.rank) for module, patch in patches.items()}
        metadata[ALPHA_IS_RANK] = "true"
    if not dialect.settings:
        patches, messages = _with_float32_scales(patches, dialect)
    parts = _spelled(path, patches, dialect, None if dtype is None else np.dtype(dtype))
    try:
        networks = peft_settings.settings_by_network(patches, dialect) if dialect.settings else {"": {}}
    except UserError as error:
        raise UserError(f"{path}: files of {dialect.title} have no place for {error}") from error
    if dialect.settings == "header":
        of_all = {f"{network}.{key}": value for network, own in networks.items() for key, value in own.items()}
        metadata[peft.DIFFUSERS_SETTINGS], networks = json.dumps(of_all, indent=2, sort_keys=True), {"": {}}
    targets = peft_settings.write_settings(path, networks) if dialect.settings == "beside" else {"": path}
    for network, target in targets.items():
        own = {key.rpartition("/")[2]: part for key, part in parts.items() if key.rpartition("/")[0] == network}
        _write_parts(target, own, metadata)
    if dialect.settings == "header" and any(patch.kind.name == "lokr" for patch in patches.values()):
        messages.append("diffusers loads a LoKr with load_lora_adapter of the network, not load_lora_weights")
    return messages


def _write_parts(path: PathLike, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    # By name, as sd-scripts orders them, whose hashes depend on the order.
    tensors = [safetensors.TensorInfo(key, part.dtype, part.shape) for key, part in sorted(parts.items())]

    def array_of(key: str) -> np.ndarray:
        return copying.contiguous(parts[key].read())

    if any(key.startswith("ss_") for key in metadata):
        metadata = {**metadata, **hashes.sd_scripts_hashes(tensors, array_of, metadata)}
    gathered.write(path, tensors, array_of, metadata)


def _with_float32_scales(patches: Mapping[str, Patch], dialect: Dialect) -> tuple[dict[str, Patch], list[str]]:
    """Return patches whose scale is in an alpha or in a matrix, and messages about values that this changes."""
    found, messages = {module: _with_float32_alpha(patch.without_factor) for module, patch in patches.items()}, []
    if factors := [patch.factor for patch in patches.values() if patch.factor != 1.0]:
        rounded = any(abs(math.frexp(factor)[0]) != 0.5 for factor in factors)
        modules = plural(len(factors), "module")
        messages.append(
            f"alpha / rank of {modules} was multiplied into a matrix{', in float32' * rounded}, as files of "
            f"{dialect.title} have no alpha for a LoKr of two matrices"
        )
    single = [patch for patch in patches.values() if patch.factor == 1.0]
    if count := sum(np.float32(one.scale) != np.float32(_with_float32_alpha(one).scale) for one in single):
        messages.append(f"alpha of {plural(count, 'module')} was rounded to float32")
    return found, messages


def _with_float32_alpha(patch: Patch) -> Patch:
    """Return the patch with an alpha from PEFT's settings as float32, as other programs have it."""
    alpha = patch.parts.get("alpha")
    if alpha is None or alpha.key or alpha.dtype != np.float64:
        return patch
    return patch.with_parts({**patch.parts, "alpha": Part.of(alpha.float32())})


def _spelled(path: PathLike, patches: Mapping[str, Patch], dialect: Dialect, dtype: np.dtype | None) -> dict[str, Part]:
    """Return key → part in a dialect's names and in `dtype`.

    Raises UserError if the dialect has no name for a module or a part.
    """
    parts: dict[str, Part] = {}
    lost: dict[str, list[str]] = {}
    for module, patch in patches.items():
        spelling = dialect.module(module)
        if spelling is None:
            lost.setdefault("text encoder", []).append(module)
            continue
        suffixes = {**dialect.parts, **(WITH_CORE if "lora_mid" in patch.parts else {})}
        unneeded = {"alpha", *patch.idle} if dialect.settings else set()
        for name, part in patch.parts.items():
            if name in unneeded:
                continue
            stored = _stored(part, name, patch, of_peft=bool(dialect.settings))
            if name in dialect.parts and stored:
                parts[spelling + suffixes[name]] = _cast(stored, name, dtype)
            else:
                lost.setdefault(name, []).append(module)
    if lost:
        listed = "; ".join(f"{part} of {len(of)} modules ({shorten(of, 3)})" for part, of in lost.items())
        raise UserError(f"{path}: files of {dialect.title} have no place for {listed}")
    return parts


def _stored(part: Part, name: str, patch: Patch, *, of_peft: bool) -> Part | None:
    """Return a part in the shape that it has in files, or None if PEFT has none for it.

    PEFT has matrices, and magnitudes of one axis, for each output; ComfyUI needs magnitudes of two axes.
    """
    if name != "dora_scale":
        return part.matrix if of_peft else part
    if not of_peft:
        return _column_or_row(part, patch)
    return part.reshaped((part.shape[0],)) if dora.is_by_output(patch) else None


def _column_or_row(part: Part, patch: Patch) -> Part:
    """Return a magnitude with two axes, as ComfyUI needs it: PEFT's has one."""
    if len(part.shape) != 1:
        return part
    return part.reshaped(
        (*part.shape, 1) if (patch.update_shape or part.shape)[0] == part.shape[0] else (1, *part.shape)
    )


def _cast(part: Part, name: str, dtype: np.dtype | None) -> Part:
    if dtype is None or name in {"alpha", "reshape_weight"}:
        return part
    return Part(part.shape, dtype, lambda: copying.cast(part.read(), dtype, name))


def patches_of(params: Params, specs: Mapping[str, AdapterSpec]) -> dict[str, Patch]:
    """Return module → patch for the adapters in a model's parameters.

    Layers of rank 0 are left out, and factors are cut to their layer's own rank.
    """
    patches = {}
    for module, (path, layer) in module_names({path: len(spec.ranks) for path, spec in specs.items()}).items():
        spec = specs[path]
        if spec.ranks[layer]:
            parts = {
                FACTORS[name].part: _layer_part(params[f"{path}.{name}"], name, layer, spec.layer_shape(name, layer))
                for name in spec.shapes
            }
            patch, scale = Patch(parts), float(params[f"{path}.{SCALE}"][layer])
            patches[module] = patch if scale == 1.0 else patch.with_alpha(patch.rank and scale * patch.rank)
    return patches


def _layer_part(stacked: Any, factor: str, layer: int, shape: tuple[int, ...]) -> Part:
    """Return one layer's factor in the layout of files, cut to `shape`, which has the layer's own rank."""
    layout = LAYOUTS[factor]

    def read() -> np.ndarray:
        return layout.to_file(gathered.on_host(stacked[layer])[tuple(map(slice, shape))])

    return Part(layout.file_shape(shape), np.dtype(stacked.dtype), read)
