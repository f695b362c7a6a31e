"""--dry_run: tables of a run and of the memory, FLOPs and time that it needs, computed from shapes alone."""

import math

from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData
from anima_jax.errors import UserError
from anima_jax.parallel.mesh import current_mesh, resolve_sizes
from anima_jax.parallel.topologies import Topology
from anima_jax.text.tokenizers import Tokenizers
from anima_jax.training import estimate, fit, tables
from anima_jax.training.compiled_run import RunCompiler
from anima_jax.training.run import Run
from anima_jax.training.state import ParamPartition, build_optimizer
from anima_jax.training.step import StepConfig
from anima_jax.training.target import COMMON, Target

ATTEMPTS = 3
"""How many variants of a run that does not fit are compiled at most."""


def dry_run(
    run: Run,
    partition: ParamPartition,
    data: TrainingData,
    tokenizers: Tokenizers,
    target: Target,
    reload: fit.Reload,
    topology: Topology | None = None,
) -> None:
    """Print the tables of a run of `partition` (shapes) on the devices of `target`, and whether it fits them.

    If it does not, print the first settings that do, which `reload` loads. With a `topology` the run's programs are
    compiled for it, and the compiler's memory decides. Raises UserError if it does not fit devices
    that the command line names.
    """
    config = run.config
    print(tables.start_up_table(config, partition, data.describe(tokenizers)))
    rows = data.text_rows(tokenizers)
    sizes = resolve_sizes(config.mesh.sizes, target.devices) if target.devices else None
    found = estimate.estimate(
        config,
        StepConfig.of(config),
        partition,
        build_optimizer(config, partition, data.plan),
        estimate.step_workloads(run, data, *rows),
        sizes=sizes,
        device_specs=target.specs or COMMON,
        platform=target.platform,
        masked=data.masked,
    )
    mesh = sizes or current_mesh().shape
    print(tables.mesh_table(mesh, partition, config.learning_rates, target.name))
    print(tables.estimate_table(found))
    steps = run_steps(config, data)
    if target.spec or target.devices:
        print("\n".join(tables.time_lines(found, steps, target.memory)))
    else:
        print(f"\n{tables.kinds_table(found, steps)}\n")
    variants = fit.RunVariants(
        run, partition, data, rows, reload, devices=math.prod(mesh.values()), platform=target.platform
    )
    compile_variant = RunCompiler(run, data, rows, topology) if topology else None
    _judge(found, variants, target, compile_variant)


def run_steps(config: MainConfig, data: TrainingData) -> dict[str, int]:
    """Return the number of steps of each tier in the run, by the tier's name."""
    steps = {tier.name: tier.batches(config.epochs) for tier in data.plan.tiers}
    total, limit = sum(steps.values()), config.max_steps
    if limit is None or limit >= total:
        return steps
    return {name: round(count * limit / total) for name, count in steps.items()}


def _judge(
    found: estimate.Estimate, variants: fit.RunVariants, target: Target, compile_variant: RunCompiler | None
) -> None:
    """Print whether the run fits, and if not the settings with which it does. Raises UserError as `dry_run`."""
    needed = found.memory.total
    if compile_variant:
        own = variants.of({})
        assert own is not None  # its memory was counted before
        compiled = compile_variant(own)
        print("\n".join(compiled.lines()) + "\n")
        needed = compiled.total
    if target.spec and target.spec.note:
        print(f"{target.spec.name} {target.spec.note}")
    given = fit.float16_keys(variants.config, target)
    if given:
        print(f"  {fit.set_line(given)}")
    if target.memory is None:
        return
    if needed <= target.memory:
        print(f"it fits: {estimate.need(needed, target.memory, target.name)}")
        return
    print(f"it does not fit: {estimate.need(needed, target.memory, target.name)}")
    fitting = _fitting(variants, target.memory, given, compile_variant, needed / found.memory.total)
    if fitting is None:
        found_none = (
            f"no setting was found in {ATTEMPTS} compilations" if compile_variant else "no other setting is enough"
        )
        remedy = f"{found_none}: expected an [adapter], smaller images, or devices with more memory"
        print(remedy)
    else:
        keys, total = fitting
        remedy = fit.set_line(keys)
        print(f"it fits with {total / estimate.GIB:.1f} GiB if these flags are added:\n  {remedy}")
        for line in fit.changes(keys):
            print(f"  {line}")
    if target.named:
        estimate.check_memory(needed, target.memory, target.name, remedy)


def _fitting(
    variants: fit.RunVariants,
    limit: float,
    given: fit.Keys,
    compile_variant: RunCompiler | None,
    over: float,
) -> tuple[fit.Keys, float] | None:
    """Return the cheapest settings with which the run fits `limit`, and the bytes that it then needs; None: none.

    With a compiler its figure counts: settings are looked for at the counted memory that corresponds to the limit,
    which at first is divided by `over`, compiled / counted, and then by that of the settings that were compiled.
    """
    for _ in range(ATTEMPTS):
        keys = fit.fitting_keys(variants, limit / over, given=given)
        variant = variants.of(keys) if keys is not None else None
        if keys is None or variant is None:
            return None
        if compile_variant is None:
            return keys, variant.found.total
        print(f"compiling with {fit.set_line(keys)}", flush=True)
        try:
            needed = compile_variant(variant).total
        except UserError as error:
            print(f"{error}: so counted")
            return keys, variant.found.total
        if needed <= limit:
            return keys, needed
        over = max(over, needed / variant.found.total)
    return None
