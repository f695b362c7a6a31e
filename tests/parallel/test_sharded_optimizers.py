"""Optimizers with statistics of whole matrices, sharded over eight devices, compared with one device."""

from typing import Any

import numpy as np
import pytest

SHAPES = {
    "blocks.mlp.layer1.kernel": (2, 32, 48),
    "blocks.cross_attn.q_proj.kernel": (2, 40, 40),
    "blocks.self_attn.q_norm.scale": (2, 8),
}


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (0.1 * rng.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}


def trained(name: str, lr: float, mesh_sizes: dict[str, int] | None) -> tuple[dict[str, np.ndarray], float]:
    """Return the weights after three steps, and the largest share of a matrix-sized state that a device has."""
    import jax
    import optax

    from anima_jax.checkpoints.names import dit, file_tensors
    from anima_jax.config.optimizer import OptimizerConfig
    from anima_jax.parallel import rules
    from anima_jax.parallel.mesh import local_mesh, make_mesh
    from anima_jax.training import optimizers
    from anima_jax.training.step import opt_state_shardings

    tensors = file_tensors(dit.RULES, draw(0))
    rates = optimizers.LearningRates(dict.fromkeys([group for group, _ in optimizers.GROUPS], lr))
    transform = optimizers.build(OptimizerConfig(type=name, lr=lr, weight_decay=0.1), rates, tensors)
    mesh = make_mesh(mesh_sizes) if mesh_sizes else local_mesh()
    params: Any = draw(0)
    places = rules.shardings(params, params, mesh)
    params = jax.device_put(params, places)
    shardings = opt_state_shardings(transform, params, mesh)

    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(step, out_shardings=(places, shardings))
    state = jax.jit(transform.init, out_shardings=shardings)(params)
    for seed in (1, 2, 3):
        params, state = update(params, state, jax.device_put(draw(seed), places))
    whole = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == SHAPES["blocks.mlp.layer1.kernel"]]
    share = max(leaf.addressable_shards[0].data.size / leaf.size for leaf in whole)
    return {path: np.asarray(value) for path, value in params.items()}, share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lr", "tolerance"),
    [
        ("adafactor", 1e-2, 1e-3),  # a first moment in bfloat16: where a rounding changes, it changes by 0.4 %
        ("came", 1e-2, 1e-5),
        ("muon", 1e-2, 2e-2),  # iterates in bfloat16, where another order of sums can change a rounding
        ("prodigy_plus_schedule_free", 1.0, 1e-5),
    ],
)
def test_sharded_updates_equal_those_of_one_device(on_eight, name, lr, tolerance):
    sizes = {"data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    (ours, share), (expected, _) = on_eight(trained, name, lr, sizes), trained(name, lr, None)
    assert share == 1 / 8
    for path, start in draw(0).items():
        error = np.linalg.norm(ours[path] - expected[path]) / np.linalg.norm(expected[path] - start)
        assert error <= tolerance, (path, error)
