"""Adapters on a transformer in Python: a new one, one from a file, and back into a file.

The functions return a new model, which shares the arrays of the base model; the model that they are given is unchanged.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from anima_jax.adapters import modules
from anima_jax.adapters.dialects import DIALECTS, module_names
from anima_jax.adapters.file import Adapter, fit_to_weights, open_adapter, patches_of, write_adapter
from anima_jax.adapters.kinds import FACTORS, KINDS, SCALE
from anima_jax.adapters.modules import AdapterSpec, adapter_spec
from anima_jax.adapters.patch import Patch
from anima_jax.adapters.planning import matches, require_patterns_fit, trainable_factors
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.names.groups import group_of
from anima_jax.errors import UserError, did_you_mean, plural, suggests_names
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.parameters import Params, merge, split
from anima_jax.parallel.mesh import current_mesh, standard_mesh
from anima_jax.parallel.rules import shardings


@suggests_names
def add_adapter(
    dit: AnimaDiT,
    kind: str = "lora",
    *,
    rank: int = 16,
    alpha: float | None = None,
    target_modules: Sequence[str] = (),
    exclude_modules: Sequence[str] = (),
    llm_adapter: bool = False,
    decompose_factor: int = -1,
    seed: int = 0,
) -> AnimaDiT:
    """Return the transformer with a new adapter, which changes nothing until it is trained.

    `kind` is lora, dora, lokr or loha. The update is scaled by alpha / rank; without `alpha`, which is then the rank,
    by 1. `target_modules` and `exclude_modules` are regular expressions for module names or parts of them, such as
    "self_attn"; without targets it is all of the blocks' linear layers, and with `llm_adapter` those of the LLM adapter
    too. `decompose_factor` is LoKr's. Factors are float32, drawn from `seed`. Raises UserError for an unknown kind, a
    rank or alpha out of range, a pattern that fits no module, and a model that already has an adapter.
    """
    trainable = [name for name, row in KINDS.items() if row.forward is not None]
    if kind not in trainable:
        raise UserError(f"adapter '{kind}', expected one of {', '.join(trainable)}{did_you_mean(kind, trainable)}")
    if not 1 <= rank < 2**16 or (alpha is not None and not 0 < alpha < float("inf")):
        raise UserError(f"an adapter of rank {rank} and alpha {alpha}, expected a rank of at least 1 and alpha above 0")
    targets = _targets(dit)
    places = module_names({path: shape[0] for path, shape in targets.items()})
    names = [name for name in places if llm_adapter or group_of(name) != "llm_adapter"]
    require_patterns_fit((*target_modules, *exclude_modules), names)
    ranks = {path: [0] * shape[0] for path, shape in targets.items()}
    for name in names:
        if (not target_modules or matches(target_modules, name)) and not matches(exclude_modules, name):
            path, layer = places[name]
            ranks[path][layer] = rank
    specs = {
        path: adapter_spec(kind, shape, ranks[path], decompose_factor)
        for path, shape in targets.items()
        if any(ranks[path])
    }
    if not specs:
        raise UserError("exclude_modules leaves no module for the adapter")
    return _attached(dit, specs, {path: spec.scales(alpha) for path, spec in specs.items()}, None, seed)


@suggests_names
def load_adapter(dit: AnimaDiT, path: PathLike, *, allow_unused: bool = False) -> AnimaDiT:
    """Return the transformer with the adapter of a file, of any dialect, to train it further or to sample with it.

    `path` is a .safetensors file, local, `gs://…` or `hf://owner/repo/file`, or a folder that contains one. Factors are
    float32, with the file's values. Raises UserError for a file that does not fit the transformer, for keys that belong
    to no module (with `allow_unused` a warning), for kinds and parts that cannot be trained (`AnimaPipeline` applies
    those, too), and for a model that already has an adapter.
    """
    targets = _targets(dit)
    places = module_names({path: shape[0] for path, shape in targets.items()})
    weights = {f"{name}.weight": targets[stack][:0:-1] for name, (stack, _) in places.items()}
    specs, scales, factors = {}, {}, {}
    with open_adapter(path, allow_unused=allow_unused) as opened:
        adapter = fit_to_weights(opened, weights, allow_unused=allow_unused)
        by_stack: dict[str, dict[int, Patch]] = {}
        for name, patch in adapter.patches.items():
            stack, layer = places[name]
            by_stack.setdefault(stack, {})[layer] = patch
        for stack, patches in by_stack.items():
            specs[stack], own = _stacked(adapter, stack, patches, targets[stack][0])
            factors |= {f"{stack}.{name}": values for name, values in own.items()}
            scales[stack] = [patches[n].scale if n in patches else 0.0 for n in range(targets[stack][0])]
    return _attached(dit, specs, scales, factors)


@suggests_names
def save_adapter(
    path: PathLike,
    dit: AnimaDiT,
    *,
    dtype: DTypeLike | None = None,
    dialect: str = "comfyui",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter of a transformer to a .safetensors file.

    `dtype` None keeps the factors' dtype, float32. `dialect` is comfyui (and diffusion-pipe's), kohya or diffusers, or
    peft or peft_original, for which `path` is a folder. A file appears only when it is complete. All processes must
    call this; process 0 writes. Raises UserError for a model without an adapter, an unknown dialect, a kind that the
    dialect cannot express, and a file that cannot be written.
    """
    specs: dict[str, AdapterSpec] = {}
    for stack, module in modules.adapted(dit):
        shapes = {name: getattr(module, name).shape[1:] for name in module.factors}
        specs[stack] = AdapterSpec(module.kind, shapes, module.ranks)
    if not specs:
        raise UserError(f"{path}: the transformer has no adapter to write; save_dit writes the transformer")
    if dialect not in DIALECTS:
        near = did_you_mean(dialect, DIALECTS)
        raise UserError(f"dialect '{dialect}', expected one of {', '.join(DIALECTS)}{near}")
    for message in write_adapter(
        path, patches_of(split(dit)[1], specs), DIALECTS[dialect], dtype=dtype, metadata=metadata
    ):
        print(message)


def _targets(dit: AnimaDiT) -> dict[str, tuple[int, ...]]:
    """Return path → kernel shape of the modules that can take an adapter. Raises UserError if one has an adapter."""
    if count := sum(1 for _ in modules.adapted(dit)):
        raise UserError(f"the transformer already has an adapter, on {plural(count, 'stacked module')}")
    return modules.target_shapes(dit)


def _stacked(
    adapter: Adapter, stack: str, patches: Mapping[int, Patch], layers: int
) -> tuple[AdapterSpec, dict[str, np.ndarray]]:
    """Return the spec and the stacked factors of the patches of some layers of a module, zero beyond each rank.

    Raises UserError unless they have the factors of one kind that can be trained, which differ only in rank.
    """
    label = f"{adapter.path}: {stack}"
    kinds = {patch.kind.name for patch in patches.values()}
    kind = KINDS[min(kinds)]
    instead = "AnimaPipeline's loras apply it"
    found = {layer: trainable_factors(patch, label, instead) for layer, patch in patches.items()}
    names = {tuple(sorted(factors)) for factors in found.values()}
    ranks = tuple(patches[n].rank or 1 if n in patches else 0 for n in range(layers))
    if len(kinds) > 1 or len(names) > 1 or kind.forward is None or not _can_run(kind.name, names):
        what = f"{adapter.summary}, in a form that cannot be trained on"
        raise UserError(f"{label}: {what}; {instead}")
    shapes = {
        name: tuple(map(max, zip(*(factors[name].shape for factors in found.values()), strict=True)))
        for name in min(names)
    }
    stacked = {name: np.zeros((layers, *shape), np.float32) for name, shape in shapes.items()}
    spec = AdapterSpec(kind.name, shapes, ranks)
    for layer, factors in found.items():
        for name, values in factors.items():
            if values.shape != spec.layer_shape(name, layer):
                raise UserError(f"{label}: {FACTORS[name].part} differs in shape between layers")
            stacked[name][layer][tuple(map(slice, values.shape))] = values
    return spec, stacked


def _can_run(kind: str, names: set[tuple[str, ...]]) -> bool:
    """Return whether the forward pass of a kind takes these factors: those of a new adapter of a low or a high rank."""
    shapes = (KINDS[kind].shapes(rank, 64, 64, -1) for rank in (1, 64))
    return names <= {tuple(sorted(one)) for one in shapes}


def _attached(
    dit: AnimaDiT,
    specs: Mapping[str, AdapterSpec],
    scales: Mapping[str, Sequence[float]],
    factors: Params | None,
    seed: int = 0,
) -> AnimaDiT:
    """Return the transformer with adapters of these specs and scales, and these factors, or new ones if None."""
    graphdef, base = split(dit)
    model = merge(graphdef, base)
    modules.attach(model, specs)
    graphdef, params = split(model)
    with standard_mesh():
        mesh = current_mesh()
        placed = shardings(own := {path: leaf for path, leaf in params.items() if path not in base}, own, mesh)
        scale = {f"{path}.{SCALE}": np.asarray(values, np.float32) for path, values in scales.items()}
        if factors is None:
            fresh = {path: leaf for path, leaf in own.items() if modules.is_factor(path)}
            kernels = {path: leaf for path, leaf in base.items() if path.removesuffix(".kernel") in specs}
            kernels = jax.device_put(kernels, shardings(kernels, kernels, mesh))
            factors = modules.initial(fresh | kernels, specs, seed, {path: placed[path] for path in fresh})
        new = {path: jax.device_put(jnp.asarray(value), placed[path]) for path, value in (factors | scale).items()}
    return merge(graphdef, base | new)
