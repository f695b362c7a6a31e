"""The tables of docs/scaling.md: traffic and step time of a full fine-tune on 8 to 1,024 devices.

python -m tests.benchmarks.scaling [--counted]

The predictions are arithmetic. With --counted, programs of the released size are compiled for eight simulated devices
(about a minute each) and the bytes sent are counted in the partitioned program.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import tempfile

BATCH_PER_DEVICE = 2
STRONG_BATCH = 1024
SHAPE = {"tokens": 4096, "grid": (1, 64, 64), "source_rows": 256, "target_rows": 256}
REMAT = "attention"
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 2, 2, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Predictions for many devices.")
    parser.add_argument("--counted", action="store_true", help="compile and count for eight simulated devices")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    for device in ("H100", "TPU v5p"):
        weak_and_strong(device)
    if options.counted:
        counted()


def predict(device: str, sizes: dict[str, int], batch: int):
    """Predict the seconds of a step by part, the traffic, and the bytes of state per device."""
    import jax.numpy as jnp

    from anima_jax.models import parameters
    from anima_jax.models.dit import AnimaDiT, DiTConfig
    from anima_jax.parallel import rules
    from anima_jax.parallel.devices import find_device_spec
    from anima_jax.training.flops import Workload, flops
    from anima_jax.training.scaling import step_seconds, traffic

    config = DiTConfig()
    params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
    replicas = sizes["data"] * sizes["fsdp"]
    accumulation = max(1, batch // (replicas * BATCH_PER_DEVICE))
    workload = Workload("", batch, accumulation, **SHAPE)
    sent = traffic(config, params, {}, sizes, workload, remat=REMAT, itemsize=jnp.dtype("bfloat16").itemsize)
    spec = find_device_spec(device)
    assert spec is not None
    seconds = step_seconds(spec, sizes, workload, flops(config, params, workload, REMAT), sent)
    return seconds, sent, 3 * rules.shard_bytes(params, params, sizes)


def table(title: str, rows) -> None:
    print(f"\n**{title}**\n")
    print(
        "| devices | mesh | examples/step | state per device | sent per device | s per step | images/s | efficiency |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for devices, sizes, batch, (seconds, sent, held) in rows:
        slow, fast = batch / seconds.most, batch / seconds.least
        print(
            f"| {devices:,} | data {sizes['data']}, fsdp {sizes['fsdp']} | {batch:,} | {held / 1e9:.1f} GB "
            f"| {sent.total / 1e9:.1f} GB | {seconds.least:.3g} to {seconds.most:.3g} | {slow:,.0f} to {fast:,.0f} "
            f"| {seconds.compute / seconds.most:.0%} to {seconds.compute / seconds.least:.0%} |"
        )


def weak_and_strong(device: str) -> None:
    """Print both scaling tables of a kind of device, on meshes with 8-way fsdp."""
    counts = (8, 16, 32, 64, 128, 256, 512, 1024)
    weak = {devices: BATCH_PER_DEVICE * devices for devices in counts}
    strong = dict.fromkeys(counts, STRONG_BATCH)
    for title, batches in (
        (f"weak scaling: {BATCH_PER_DEVICE} examples per device", weak),
        (f"strong scaling: {STRONG_BATCH:,} examples per step", strong),
    ):
        rows = []
        for devices, batch in batches.items():
            sizes = {"data": devices // 8, "fsdp": 8, "tensor": 1, "context": 1}
            rows.append((devices, sizes, batch, predict(device, sizes, batch)))
        table(f"{device}, {title}", rows)


def counted() -> None:
    print("\n**Eight devices, 8 examples per step: GB sent per device, predicted and counted**\n")
    print("| mesh (data, fsdp, tensor, context) | predicted | counted | gathers | sums | exchanges | other |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in MESHES:
        sizes = dict(zip(("data", "fsdp", "tensor", "context"), shape, strict=True))
        found = count(compiled(sizes))
        by = [found.get(name, 0.0) / 1e9 for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")]
        predicted = predict("TPU v5p", sizes, 8)[1].total / 1e9
        numbers = " | ".join(f"{value:.2f}" for value in (predicted, sum(by), *by))
        print(f"| {', '.join(map(str, shape))} | {numbers} |", flush=True)


def compiled(sizes: dict[str, int]) -> str:
    """Compile the gradient program of the released size; return the text that the partitioner writes."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models import parameters
    from anima_jax.models.dit import AnimaDiT, DiTConfig
    from anima_jax.parallel import rules
    from anima_jax.parallel.mesh import batch_sharding, make_mesh
    from anima_jax.training.flops import Workload
    from anima_jax.training.memory import abstract_batch
    from anima_jax.training.step import StepConfig, loss_and_gradients

    config = DiTConfig()
    graphdef, params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    mesh = make_mesh(sizes)
    shardings = rules.shardings(params, params, mesh)
    placed = {p: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=shardings[p]) for p, x in params.items()}
    batch = abstract_batch(Workload("", 8, 1, **SHAPE), 8, config, jnp.bfloat16)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, 8)), batch)
    settings = StepConfig(remat=REMAT)

    def gradients(params, batch):
        return loss_and_gradients(params, {}, batch, None, graphdef=graphdef, config=settings)

    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        jax.jit(gradients, out_shardings=(None, shardings)).lower(placed, batch).compile(compiler_options=options)
        (dump,) = pathlib.Path(folder).glob("*jit_gradients*after_spmd-partitioning*.txt")
        return dump.read_text()


@dataclasses.dataclass
class _Computation:
    """One computation of an HLO program: bytes sent by operation, and the loops and computations it calls."""

    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    calls: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    constants: list[int] = dataclasses.field(default_factory=list)


def count(program: str) -> dict[str, float]:
    """Bytes sent per device by operation; a loop counts as often as it runs."""
    computations: dict[str, _Computation] = {}
    current, entry = _Computation(), ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations[head[2]] = _Computation()
            entry = head[2] if head[1] else entry
        elif loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
            current.calls.append((loop[2], loop[1]))
        elif call := re.search(r" (?:call|conditional)\(.*to_apply=%?([\w.\-]+)", line):
            current.calls.append((call[1], None))
        elif constant := re.search(r"= s32\[\] constant\((\d+)\)", line):
            current.constants.append(int(constant[1]))
        else:
            _add(current.sent, line)
    total: dict[str, float] = {}

    def walk(name: str, times: int) -> None:
        for operation, size in computations[name].sent.items():
            total[operation] = total.get(operation, 0.0) + times * size
        for body, condition in computations[name].calls:
            walk(body, times * (max(computations[condition].constants, default=1) if condition else 1))

    walk(entry, 1)
    return total


_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2, "s8": 1, "u8": 1}


def _add(sent: dict[str, float], line: str) -> None:
    match = re.search(r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", line)
    if not match:
        return
    size = sum(
        _BYTES[kind] * math.prod(map(int, filter(None, shape.split(","))))
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
    )
    count = _group(line)
    factor = {"all-reduce": 2.0, "collective-permute": count / max(1, count - 1)}.get(match[2], 1.0)
    sent[match[2]] = sent.get(match[2], 0.0) + factor * size * (count - 1) / count


def _group(line: str) -> int:
    """Number of devices that exchange with each other, from any of HLO's notations for it."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else 2


if __name__ == "__main__":
    main()
