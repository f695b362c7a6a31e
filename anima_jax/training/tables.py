"""Tables printed before a run: the model, its parameters and their sharding, and the estimate of a dry run."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import jax

from anima_jax.adapters.kinds import KINDS
from anima_jax.adapters.modules import AdapterSpec
from anima_jax.assets import docs_page
from anima_jax.checkpoints.names.groups import CONTROL, GROUPS, group_of
from anima_jax.config.main import MainConfig
from anima_jax.errors import plural
from anima_jax.models.parameters import Params
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DeviceSpec
from anima_jax.training.estimate import GIB, Estimate
from anima_jax.training.evaluate import QUANTILES
from anima_jax.training.flops import Flops
from anima_jax.training.scaling import Traffic
from anima_jax.training.state import ParamPartition


def start_up_table(config: MainConfig, partition: ParamPartition, data: str) -> str:
    """Return the table of a run: the model, its parameters by group, and `data`, the description of its data."""
    model = partition.config
    sizes = f"{plural(model.blocks, 'block')} of width {model.width:,}, {plural(model.heads, 'head')}, "
    sizes += f"MLP {model.mlp_width:,}"
    if model.adapter:
        sizes += f"; LLM adapter: {plural(model.adapter.blocks, 'block')} of width {model.adapter.width:,}"
    trained = "full training"
    if partition.adapter_specs is not None:
        trained = "\n".join([adapter_line(partition.adapter_specs), *partition.messages])
    if partition.control:
        trained = "\n".join([f"control network: {partition.control}", *partition.messages])
    start = "a fresh network" if config.model.config else config.model.transformer_path
    parts = {
        "model": f"{start}\n{sizes}\ncomputed in {config.compute_dtype}\n{trained}",
        "parameters": parameter_table(partition, config.learning_rates, config.param_dtype),
        "data": data,
    }
    return "\n".join(f"{name}\n{textwrap.indent(text, '  ')}" for name, text in parts.items())


def adapter_line(adapter_specs: Mapping[str, AdapterSpec]) -> str:
    """Return a line with the kind, ranks and number of the adapters."""
    ranks = [rank for spec in adapter_specs.values() for rank in spec.ranks if rank]
    span = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
    kind = KINDS[next(iter(adapter_specs.values())).kind].title
    modules, layers = plural(len(ranks), "module"), plural(len(adapter_specs), "linear layer")
    return f"{kind} of rank {span} on {modules}, {layers} per block"


def parameter_table(
    partition: ParamPartition, learning_rates: Mapping[str, float], param_dtype: str = "float32"
) -> str:
    """Return a table of each group's parameters, trained parameters, learning rate and storage dtypes.

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
        # `group_of` accepts paths too: it looks for parts that they have in common with names in files.
        frozen: Params = {path: value for path, value in partition.frozen.items() if group_of(path) == group}
        if group in {"text_encoder", CONTROL} and not (trained or frozen):
            continue
        lines.append(row(group, trained, frozen, f"{learning_rates[group]:g}" if trained else "frozen"))
    lines.append(row("total", partition.params, partition.frozen, ""))
    return "\n".join(lines)


def mesh_table(
    sizes: Mapping[str, int], partition: ParamPartition, learning_rates: Mapping[str, float], device_name: str
) -> str:
    """Return a table of the mesh and, on several devices, each parameter's shape, sharding and rate (0 if frozen).

    Parameters of a group that have all of these in common are one row, with the path of the first of them.
    """
    axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
    lines = [f"mesh of {math.prod(sizes.values())} devices ({device_name}): {axes}"]
    if math.prod(sizes.values()) == 1:
        return lines[0]
    lines.append(f"{'parameter':<52} {'shape':>16} {'sharded over':>24} {'learning rate':>14}")
    alike: dict[tuple[str, ...], list[str]] = {}
    for path, leaf in sorted({**partition.frozen, **partition.params}.items()):
        spec = rules.partition_spec(path, leaf.shape, sizes)
        over = ", ".join("+".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in spec)
        rate = learning_rates[partition.groups[path]] if path in partition.params else 0.0
        shape = "×".join(map(str, leaf.shape))
        alike.setdefault((group_of(path), shape, over or "replicated", f"{rate:g}"), []).append(path)
    for (_, shape, over, rate), (first, *others) in alike.items():
        name = f"{first} +{len(others)}" if others else first
        lines.append(f"{name:<52} {shape:>16} {over:>24} {rate:>14}")
    return "\n".join(lines)


def estimate_table(estimate: Estimate) -> str:
    """Return tables of memory, of FLOPs, traffic and time per step, and of the training times at the quantiles."""
    parts = [_memory_lines(estimate), _flops_lines(estimate), _traffic_lines(estimate), _times_lines(estimate)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _memory_lines(estimate: Estimate) -> list[str]:
    memory = estimate.memory
    rows = [(name, size, "") for name, size in memory.rows.items() if size]
    rows.append(("total", memory.total, "  (as compiled)" if memory.measured else "  (counted from shapes)"))
    rows += [(name, size, "  (host)") for name, size in memory.on_host.items()]
    return [
        _line("memory per device", ["GiB"]),
        *(_line(name, [f"{size / GIB:.3f}"]) + end for name, size, end in rows),
    ]


def _flops_lines(estimate: Estimate) -> list[str]:
    lines = [_line("TFLOPs per step", [*Flops._fields, "total"])]
    for workload, example in estimate.flops.items():
        parts = [workload.batch * part / 1e12 for part in example]
        lines.append(_line(workload.tier, [f"{part:.4g}" for part in [*parts, sum(parts)]]))
    return lines


def _traffic_lines(estimate: Estimate) -> list[str]:
    lines = [_line("GB sent per device", [*Traffic._fields, "total"])] if estimate.traffic else []
    for tier, sent in estimate.traffic.items():
        lines.append(_line(tier, [f"{size / 1e9:.3f}" for size in [*sent, sent.total]]))
    return lines


def time_lines(estimate: Estimate, steps: Mapping[str, int], memory: float | None = None) -> list[str]:
    """Return the time of a step of each tier and of the whole run, on each kind of device that has the memory.

    `steps` are the steps of the run by tier. `memory` are the bytes of a device, by default those of its kind.
    """
    lines: list[str] = []
    specs = dict.fromkeys(spec for _, spec in estimate.seconds)
    fitting = [spec for spec in specs if (memory or spec.memory) >= estimate.by_platform[spec.platform].total]
    for spec in fitting or (specs if len(specs) == 1 else ()):
        for (work, of), seconds in estimate.seconds.items():
            if of == spec:
                parts = ", ".join(f"{name} {value:.3g}" for name, value in seconds._asdict().items() if value)
                bounds = f"{_range(seconds.least, seconds.most)} s per step on {spec.name}"
                images = f"{_range(work.batch / seconds.most, work.batch / seconds.least)} images/s"
                lines.append(f"{work.tier}: {bounds} (seconds of {parts}; see {docs_page('scaling.md')}), {images}")
        least, most, images = run_time(estimate, steps, spec)
        count = f"{plural(sum(steps.values()), 'step')}, {plural(images, 'image')}"
        lines.append(f"the run: {count}, {_range(least / 3600, most / 3600)} hours on {spec.name}")
    return lines


def kinds_table(estimate: Estimate, steps: Mapping[str, int]) -> str:
    """Return a table of the kinds of devices that the estimate is for: whether the run fits, and its time."""
    lines = [f"{'on one device':<22} {'GB':>6} {'fits':>6} {'s per step':>12} {'images/s':>10} {'hours':>10}"]
    total = sum(steps.values())
    for spec in dict.fromkeys(spec for _, spec in estimate.seconds):
        fits = spec.memory >= estimate.by_platform[spec.platform].total
        _, most, images = run_time(estimate, steps, spec)
        cells = [f"{number:.3g}" for number in (most / total, images / most, most / 3600)] if fits else ["", "", ""]
        row = f"{spec.name:<22} {spec.memory / 1e9:>6.0f} {'yes' if fits else 'no':>6}"
        lines.append(f"{row} {cells[0]:>12} {cells[1]:>10} {cells[2]:>10}".rstrip())
    return "\n".join(lines)


def run_time(estimate: Estimate, steps: Mapping[str, int], spec: DeviceSpec) -> tuple[float, float, int]:
    """Return the least and most seconds of a run, and the number of its examples, given the steps of each tier."""
    own = [(work, seconds) for (work, of), seconds in estimate.seconds.items() if of == spec]
    least, most = (
        sum(steps[work.tier] * getattr(seconds, bound) for work, seconds in own) for bound in ("least", "most")
    )
    return least, most, sum(steps[work.tier] * work.batch for work, _ in own)


def _range(least: float, most: float) -> str:
    low, high = f"{least:.3g}", f"{most:.3g}"
    return low if low == high else f"{low} to {high}"


def _times_lines(estimate: Estimate) -> list[str]:
    lines = [_line("t at quantile", [f"{q:.1f}" for q in QUANTILES], 5)]
    return lines + [_line(name, [f"{t:.3f}" for t in times], 5) for name, times in estimate.times.items()]


def _line(name: str, cells: Sequence[str], width: int = 10) -> str:
    """Return a line of a table: a name and right-aligned cells."""
    return " ".join([f"{name:<22}", *(f"{cell:>{width}}" for cell in cells)])
