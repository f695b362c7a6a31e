"""Optimizers compared with those that diffusion-pipe runs: GenericOptim, automagic, pytorch_optimizer's and others.

`tests/golden/optimizers.json` has the movement of the weights after 20 steps in the reference, as its products with
eight random vectors per tensor.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.training import optimizers
from anima_jax.training.optimizers import LearningRates

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "optimizers.json").read_text(encoding="utf-8"))
SHAPES = {
    "blocks.mlp.layer1.kernel": (2, 32, 44),
    "blocks.cross_attn.q_proj.kernel": (2, 33, 33),
    "blocks.self_attn.q_norm.scale": (2, 7),
}
TENSORS = file_tensors(dit.RULES, {path: np.broadcast_to(np.float32(0), shape) for path, shape in SHAPES.items()})
STEPS = 20
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BFLOAT16 = 2e-2
"""Muon iterates in bfloat16, where another order of the sums in a product can change a rounding: 2 % of the update."""

TOLERANCES = {
    "muon": BFLOAT16,
    "adamuon": BFLOAT16,
    "normuon": BFLOAT16,
    "muon polar": BFLOAT16,
    "mars shampoo": BFLOAT16,
    "adafactor": 1e-4,  # its first moment is in bfloat16
    "automagic": 3e-3,  # rates in 8 bits, often exactly between two codes
    # The first gradient alone chooses the basis: near eigenvalues, and any basis of its null space. So matrices are
    # square, or their longer side has no basis; otherwise the reference moves by 20 % if gradients change by 1e-7.
    "soap": 1e-4,
    "soap on one side": 1e-4,
    "fromage": 3e-5,  # it divides all weights by √(1 + η²), which rounds them twice
    "prodigy": 2e-4,  # the estimate of d begins with differences of weights that are 1e-6 apart
}
"""Case → its tolerance, if that is not 1e-5 of the movement."""


def draw(seed: int, scale: float) -> dict[str, np.ndarray]:
    """Return random parameters; RandomState's numbers are the same in every version of NumPy."""
    rng = np.random.RandomState(seed)
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in SHAPES.items()}


START = draw(0, 0.1)
MEAN = draw(99, 0.1)
GRADIENTS = [{path: MEAN[path] + noise for path, noise in draw(seed, 0.1).items()} for seed in range(1, STEPS + 1)]


def to_file(params) -> dict[str, np.ndarray]:
    """Return the tensors of the file: one per layer, matrices (out, in)."""
    return {t.name: np.ascontiguousarray(t.layout.to_file(np.asarray(params[t.path])[t.layer])) for t in TENSORS}


def projections(moved: np.ndarray) -> np.ndarray:
    """Return the products of a tensor with eight random vectors of unit length."""
    vectors = np.random.RandomState(7).standard_normal((8, moved.size))
    return vectors @ moved.ravel().astype(np.float64) / np.linalg.norm(vectors, axis=1)


def build(case: dict[str, Any], seed: int = 0) -> optax.GradientTransformation:
    config = OptimizerConfig(type=case["type"], lr=case["lr"], weight_decay=case["weight_decay"], **case["options"])
    rates = LearningRates(dict.fromkeys([group for group, _ in optimizers.GROUPS], case["lr"]))
    return optimizers.build(config, rates, TENSORS, clip_norm=0.0, seed=seed)


def run(transform: optax.GradientTransformation, start: Any, gradients: list[Any]) -> tuple[Any, Any]:
    """Return the parameters and the state after the steps."""

    def step(carry, grads):
        params, state = carry
        updates, state = transform.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = {path: jnp.stack([grads[path] for grads in gradients]) for path in gradients[0]}
    params = jax.tree.map(jnp.asarray, start)
    whole = jax.jit(lambda params, grads: jax.lax.scan(step, (params, transform.init(params)), grads)[0])
    return whole.lower(params, stacked).compile(compiler_options=QUICK)(params, stacked)


QUICK_CASES = ("generic factored", "muon", "normuon", "automagic", "adafactor float32", "came", "adan", "mars", "soap")


@pytest.mark.parametrize("name", [n if n in QUICK_CASES else pytest.param(n, marks=pytest.mark.slow) for n in GOLDEN])
def test_movements_equal_the_references(name):
    case = GOLDEN[name]
    params, state = run(build(case), START, GRADIENTS)
    params = optimizers.averaged(state, params) if case.get("averaged") else params
    start, ours = to_file(START), to_file(params)
    for tensor, expected in case["moved"].items():
        moved = ours[tensor] - start[tensor]
        # The products vary about 0 with a standard deviation of norm / √size: the error is relative to their norm.
        error = np.linalg.norm(projections(moved) - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCES.get(name, 1e-5), (tensor, error)
