"""What a person reads before a run: tables of the model, of its parameters, and of where they are placed."""

import math
import textwrap
from collections.abc import Mapping

import jax

from anima_jax.adapters.kinds import KINDS
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.checkpoints.names.groups import GROUPS, group_of
from anima_jax.config.main import MainConfig
from anima_jax.models.parameters import Params
from anima_jax.parallel import rules
from anima_jax.training.state import ParamPartition


def start_up_table(config: MainConfig, partition: ParamPartition, data: str) -> str:
    """Return what a run is about to do: the model, its parameters by group, and the data as `data` describes them."""
    model = partition.config
    sizes = f"{model.blocks} blocks of width {model.width:,}, {model.heads} heads, MLP {model.mlp_width:,}"
    if model.adapter:
        sizes += f"; LLM adapter: {model.adapter.blocks} blocks of width {model.adapter.width:,}"
    trained = "full training"
    if partition.specs is not None:
        trained = "\n".join([adapter_line(partition.specs), *partition.messages])
    start = "a fresh network" if config.model.config else config.model.transformer_path
    parts = {
        "model": f"{start}\n{sizes}\ncomputed in {config.compute_dtype}\n{trained}",
        "parameters": parameter_table(partition, config.learning_rates, config.param_dtype),
        "data": data,
    }
    return "\n".join(f"{name}\n{textwrap.indent(text, '  ')}" for name, text in parts.items())


def adapter_line(specs: Mapping[str, AdapterSpec]) -> str:
    """Return the kind, ranks and number of the adapters."""
    ranks = [rank for spec in specs.values() for rank in spec.ranks if rank]
    span = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
    kind = KINDS[next(iter(specs.values())).kind].title
    return f"{kind} of rank {span} on {len(ranks)} modules, {len(specs)} linear layers a block"


def parameter_table(
    partition: ParamPartition, learning_rates: Mapping[str, float], param_dtype: str = "float32"
) -> str:
    """Return each group's number of parameters, trained parameters and learning rate, and the dtypes of its storage.

    Trained parameters are stored in `param_dtype` during training.
    """
    lines = [f"{'group':<12} {'parameters':>14} {'trained':>14} {'learning rate':>14}  dtype"]

    def row(name: str, trained: Params, frozen: Params, rate: str) -> str:
        # The first leaf of a quantised weight contains its values, the others its scales.
        dtypes = [str(jax.tree.leaves(value)[0].dtype) for value in frozen.values()]
        stored = ", ".join(dict.fromkeys([*([param_dtype] if trained else []), *dtypes]))
        learned, fixed = (sum(math.prod(value.shape) for value in part.values()) for part in (trained, frozen))
        return f"{name:<12} {learned + fixed:>14,} {learned:>14,} {rate:>14}  {stored}".rstrip()

    for group, _ in GROUPS:
        trained: Params = {path: value for path, value in partition.params.items() if partition.groups[path] == group}
        # `group_of` searches for words that paths and names in files share.
        frozen: Params = {path: value for path, value in partition.frozen.items() if group_of(path) == group}
        if group == "text_encoder" and not frozen:
            continue
        lines.append(row(group, trained, frozen, f"{learning_rates[group]:g}" if trained else "frozen"))
    lines.append(row("total", partition.params, partition.frozen, ""))
    return "\n".join(lines)


def mesh_table(
    sizes: Mapping[str, int], partition: ParamPartition, learning_rates: Mapping[str, float], device_name: str
) -> str:
    """Return the mesh, and each parameter's shape, sharding and learning rate (0 if frozen)."""
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [f"mesh of {math.prod(sizes.values())} devices ({device_name}): {axes}"]
    if math.prod(sizes.values()) == 1:
        return lines[0]
    lines.append(f"{'parameter':<52} {'shape':>16} {'sharded over':>24} {'learning rate':>14}")
    for path, leaf in sorted({**partition.frozen, **partition.params}.items()):
        spec = rules.spec(path, leaf.shape, sizes)
        over = ", ".join("+".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in spec)
        rate = learning_rates[partition.groups[path]] if path in partition.params else 0.0
        shape = "×".join(map(str, leaf.shape))
        lines.append(f"{path:<52} {shape:>16} {over or 'replicated':>24} {rate:>14g}")
    return "\n".join(lines)
