"""The tables of docs/scaling.md: traffic and step time of a full fine-tune on 8 to 1,024 devices.

python -m tests.benchmarks.scaling [--counted]

The predictions are arithmetic. With --counted, programs of the released size are compiled for 8 to 256 simulated
devices (about a minute each) and the bytes sent are counted in the partitioned program.
"""

import argparse
import math
import pathlib
import re
import tempfile

BATCH_PER_DEVICE = 2
STRONG_BATCH = 1024
SHAPE = {"tokens": 4096, "grid": (1, 64, 64), "source_rows": 256, "target_rows": 256}
REMAT = "attention"
AXES = ("data", "fsdp", "tensor", "context")
MESHES = (
    *((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 2, 2, 2)),
    *((4, 8, 1, 1), (16, 8, 1, 1), (32, 8, 1, 1), (16, 16, 1, 1)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predictions for many devices.")
    parser.add_argument("--counted", action="store_true", help="compile and count for simulated devices")
    options = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(map(math.prod, MESHES)))
    for device in ("H100", "TPU v5p"):
        weak_and_strong(device)
    if options.counted:
        print_counted()


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


def counted(shape: tuple[int, ...], batch: int) -> dict[str, float]:
    """Return the bytes that a device sends in a step, by kind of collective, in the partitioned program."""
    import jax
    import jax.numpy as jnp

    from anima_jax.models import parameters
    from anima_jax.models.dit import AnimaDiT, DiTConfig
    from anima_jax.parallel import rules
    from anima_jax.parallel.mesh import batch_sharding, make_mesh
    from anima_jax.platform import Hardware, compiling_for
    from anima_jax.training.flops import Workload
    from anima_jax.training.hlo import Program, collectives
    from anima_jax.training.memory import abstract_batch
    from anima_jax.training.step import StepConfig, loss_and_gradients

    config = DiTConfig()
    graphdef, params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[: math.prod(shape)])
    shardings = rules.shardings(params, params, mesh)
    placed = {p: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=shardings[p]) for p, x in params.items()}
    examples = abstract_batch(Workload("", batch, 1, **SHAPE), batch, config, jnp.bfloat16)
    one = batch_sharding(mesh, batch)
    examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), examples)
    settings = StepConfig(remat=REMAT)

    def gradients(params, examples):
        return loss_and_gradients(params, {}, examples, None, graphdef=graphdef, config=settings)

    # For a GPU without fused attention, so that products are made as on accelerators, in 16 bits.
    target = compiling_for(Hardware("gpu", host_memory=False))
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh), target:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        options |= {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        jax.jit(gradients, out_shardings=(None, shardings)).lower(placed, examples).compile(compiler_options=options)
        (dump,) = pathlib.Path(folder).glob("*jit_gradients*after_spmd-partitioning*.txt")
        found: dict[str, float] = {}
        for each in collectives(Program(scattered(dump.read_text()))):
            found[each.kind] = found.get(each.kind, 0.0) + each.sent
        return found


def scattered(program: str) -> str:
    """Return the program with reduce-scatters for sums of which a device keeps a slice, as accelerators make them."""
    for part, name in re.findall(r"= (\S+) dynamic-slice\(%(all-reduce[\w.\-]*),", program):
        program = re.sub(rf"(%{re.escape(name)} = )\S+ all-reduce\(", rf"\g<1>{part} reduce-scatter(", program)
    return program


def print_counted() -> None:
    print("\n**2 examples per replica: GB sent per device, predicted and counted**\n")
    print("| mesh (data, fsdp, tensor, context) | predicted | counted | gathers | scatters | sums | exchanges |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for shape in MESHES:
        batch = BATCH_PER_DEVICE * shape[0] * shape[1]
        found = counted(shape, batch)
        by = [found.get(name, 0.0) / 1e9 for name in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")]
        total, predicted = sum(found.values()) / 1e9, predict("TPU v5p", dict(zip(AXES, shape, strict=True)), batch)[1]
        numbers = " | ".join(f"{value:.2f}" for value in (predicted.total / 1e9, total, *by))
        print(f"| {', '.join(map(str, shape))} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
