"""A process in which the table of adapter kinds has one more row, MoSLoRA (arXiv 2406.11909), for test_new_kind.py.

y = W x + s · B M A x: the mixer M (rank, rank) is a third factor. Everything else in the process is the package as it
is: other modules are imported only when the row is in the table, from which they read their own tables.

python -m tests.adapters.new_kind FOLDER
"""

import importlib.util
import json
import pathlib
import re
import sys
import types
from collections.abc import Callable

ALPHA, TOKENS = 6.0, 10
BLOCK_RANKS = (4, 8)
"""Rank in each block of the transformer that gets the adapter."""

STACK_RANKS = (4, 2, 0)
"""Rank in each layer of the stack whose result is compared."""


def table_with(row: Callable[[types.ModuleType], object]) -> None:
    """Import `anima_jax.adapters.kinds` with `row(module)` before the last row of its table."""
    spec = importlib.util.find_spec("anima_jax.adapters.kinds")
    assert spec is not None
    assert spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    rows, derived, rest = pathlib.Path(spec.origin).read_text(encoding="utf-8").partition("\nKINDS = ")
    exec(compile(rows, spec.origin, "exec"), vars(module))
    module._ROWS = (*module._ROWS[:-1], row(module), module._ROWS[-1])
    exec(compile(derived + rest, spec.origin, "exec"), vars(module))


def moslora(kinds: types.ModuleType):
    mixer = kinds.Factor("lora_mixer", ("rank", "rank"), suffix=".weight", endings=r"lora_mixer\.weight")

    def forward(ops, x, factors):
        hidden = ops.linear(ops.linear(x, factors["lora_a"]), factors["lora_mixer"])
        return ops.linear(ops.scaled(ops.dropped(hidden, True)), factors["lora_b"])

    return kinds.AdapterKind(
        "moslora",
        "MoSLoRA",
        products=(kinds.Product((kinds.LORA_B, mixer, kinds.LORA_A)),),
        forward=forward,
        shapes=lambda rank, features_in, features_out, _: {
            "lora_a": (features_in, rank),
            "lora_mixer": (rank, rank),
            "lora_b": (rank, features_out),
        },
        rows=lambda shapes, rows: {"lora_a": rows, "lora_mixer": rows, "lora_b": rows},
    )


def main(folder: pathlib.Path) -> None:
    """Write what the package makes of the row: `arrays.npz`, `results.json` and an adapter file, to `folder`."""
    table_with(moslora)
    import jax.numpy as jnp
    import numpy as np

    from anima_jax.adapters.merge import AdapterStack
    from anima_jax.checkpoints.models import load_dit
    from anima_jax.config.load import load_config
    from anima_jax.models import parameters
    from anima_jax.parallel import rules
    from anima_jax.training.export import export
    from anima_jax.training.flops import Workload, flops
    from anima_jax.training.state import prepare
    from tests.adapters.test_modules import WIDTH_IN, adapted, run
    from tests.models.networks import normal
    from tests.small_run import write_config, write_transformer

    def prepared(more: str = ""):
        adapter = rf"""
            type = 'moslora'
            rank = {BLOCK_RANKS[1]}
            alpha = {ALPHA}
            target_modules = ['mlp\.layer1']
            rank_pattern = {{ 'blocks\.0\..*' = {BLOCK_RANKS[0]} }}
            {more}
        """
        return prepare(load_config(write_config(folder, folder, "epochs = 1", adapter=adapter)))

    def saved(what: str, values) -> None:
        arrays.update({f"{what}/{path}": np.asarray(value) for path, value in values.items()})

    arrays: dict[str, np.ndarray] = {}
    base = write_transformer(folder / "base.safetensors")
    partition = prepared()
    saved("fresh", partition.params)
    trained = {}
    for seed, (path, fresh) in enumerate(partition.params.items()):
        module, _, name = path.rpartition(".")
        values, spec = np.zeros(fresh.shape, np.float32), partition.adapter_specs[module]
        for layer in range(len(values)):
            shape = spec.layer_shape(name, layer)
            values[layer][tuple(map(slice, shape))] = normal(*shape, seed=100 * seed + layer)
        trained[path] = jnp.asarray(values)
    saved("trained", trained)

    path = export(folder / "export", partition, trained, "float32")
    saved("read back", prepared(f"init_from_existing = '{path.parent}'").params)
    params = parameters.split(load_dit(folder / "base.safetensors", jnp.float32))[1]
    saved("base", {name: base[name] for name in params})
    saved("merged", AdapterStack([path], params, {}).params_for([1.0])[0])

    graphdef, stack = adapted("moslora", STACK_RANKS)
    x = jnp.asarray(normal(5, WIDTH_IN, seed=1))
    saved("stack", stack | {"x": x, "y": run(graphdef, stack, x)[0]})

    work = Workload("", 1, 1, TOKENS, (1, 2, 5), 16, 16)
    names = [*partition.frozen, *partition.params]
    results = {
        "kinds": sorted({spec.kind for spec in partition.adapter_specs.values()}),
        "matching rules": {name: sum(bool(re.fullmatch(rule, name)) for rule, _ in rules.RULES) for name in names},
        "flops": [flops(partition.config, own, work, "none").forward for own in ({}, partition.params)],
    }
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
