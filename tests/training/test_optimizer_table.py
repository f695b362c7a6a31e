"""Optimizers by name, compared with torch, with optax on the file's tensors, and with the published formulas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.errors import UserError
from anima_jax.training import optimizers
from anima_jax.training.optimizers import LearningRates
from anima_jax.training.optimizers.layers import in_host_memory

SHAPES = {
    "blocks.mlp.layer1.kernel": (2, 40, 96),
    "blocks.self_attn.q_norm.scale": (2, 16),
    "blocks.cross_attn.q_proj.kernel": (2, 40, 40),
    "llm_adapter.embed.embedding": (48, 40),
    "x_embedder.kernel": (68, 40),
    "final_layer.linear.kernel": (40, 64),
}
TENSORS = file_tensors(dit.RULES, {path: np.broadcast_to(np.float32(0), shape) for path, shape in SHAPES.items()})
GROUPS = [group for group, _ in optimizers.GROUPS]
SAME_RATES = dict.fromkeys(GROUPS, 1e-2)
STEPS = 5
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Each program runs five times: optimised compilation would take longer than that."""


def draw(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.normal(size=shape)).astype(np.float32) for path, shape in SHAPES.items()}


START = draw(0)
GRADIENTS = [draw(seed, 0.1) for seed in range(1, STEPS + 1)]


def to_file(params) -> dict[str, np.ndarray]:
    """Return the tensors of the file: one per layer, matrices (out, in)."""
    return {
        t.name: np.ascontiguousarray(
            t.layout.to_file(np.asarray(params[t.path] if t.layer is None else params[t.path][t.layer]))
        )
        for t in TENSORS
    }


def build(
    name: str, rates: Any = SAME_RATES, tensors=TENSORS, *, clip_norm=0.0, global_batch=1, layer_rates=None, **config
):
    """Build an optimizer, by default without clipping; `rates` by group."""
    rates = rates if isinstance(rates, LearningRates) else LearningRates(rates)
    config = OptimizerConfig(type=name, lr=0.0, **config)
    return optimizers.build(
        config, rates, tensors, clip_norm=clip_norm, global_batch=global_batch, layer_rates=layer_rates
    )


def train(optimizer, start, gradients) -> tuple[dict[str, Any], Any]:
    """Return the parameters and the state after the steps."""
    params: Any = jax.tree.map(jnp.asarray, start)
    state = jax.jit(optimizer.init, compiler_options=QUICK)(params)
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    for grads in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def trained(name: str, **more):
    """Return the file's tensors after training with our optimizer."""
    return to_file(train(build(name, **more), START, GRADIENTS)[0])


def decayed(name: str) -> bool:
    """Return whether weight decay applies to a tensor of the file: not to norms and the token table."""
    return not name.endswith("norm.weight") and not name.startswith("llm_adapter.embed")


def assert_same(ours, expected, rtol=2e-5, atol=2e-6):
    """The order of operations in five float32 updates changes some units in the last place."""
    assert set(ours) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(ours[name], np.asarray(value), rtol=rtol, atol=atol, err_msg=name)


def by_torch(make):
    """Return the file's tensors after training with torch's `make(torch.optim, groups)`."""
    torch = pytest.importorskip("torch")
    peers = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in to_file(START).items()}
    optimizer = make(
        torch.optim,
        [
            {"params": [p for name, p in peers.items() if decayed(name)], "weight_decay": 0.1},
            {"params": [p for name, p in peers.items() if not decayed(name)], "weight_decay": 0.0},
        ],
    )
    for grads in GRADIENTS:
        for name, value in to_file(grads).items():
            peers[name].grad = torch.tensor(value)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in peers.items()}


@pytest.mark.parametrize(
    ("name", "options", "make"),
    [
        ("adamw", {"betas": (0.8, 0.95)}, lambda t, p: t.AdamW(p, lr=1e-2, betas=(0.8, 0.95))),
        ("offload", {}, lambda t, p: t.AdamW(p, lr=1e-2)),
        ("sgd", {}, lambda t, p: t.SGD(p, lr=1e-2)),
        ("sgd", {"momentum": 0.9}, lambda t, p: t.SGD(p, lr=1e-2, momentum=0.9)),
        (
            "sgd",
            {"momentum": 0.9, "nesterov": True},
            lambda t, p: t.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        ),
    ],
)
def test_updates_equal_torchs_on_the_files_tensors(name, options, make):
    expected = by_torch(make)
    ours = trained(name, weight_decay=0.1, **options)
    assert_same(ours, expected)


PER_TENSOR = ("scale_by_trust_ratio", "scale_by_param_block_rms")
SHARED = ("prodigy", "dadapt_adamw", "dog", "dowg")


@pytest.mark.parametrize("name", [*PER_TENSOR, *SHARED])
def test_optimizers_that_use_shapes_or_norms_equal_optax_on_the_files_tensors(name):
    function = getattr(optax, name, None) or getattr(optax.contrib, name)
    own = {"use_bias_correction": True} if name == "prodigy" else {}
    rates = dict.fromkeys(GROUPS, 1.0 if name in SHARED else 1e-2)
    peer = (
        optax.chain(function(), optax.scale_by_learning_rate(1e-2))
        if name.startswith("scale_by")
        else function(learning_rate=rates["base"])
    )
    expected, _ = train(peer, to_file(START), [to_file(grads) for grads in GRADIENTS])
    ours = trained(name, rates=rates, weight_decay=0.0, **own)
    moved = max(float(np.abs(np.asarray(expected[n]) - v).max()) for n, v in to_file(START).items())
    assert moved > 1e-6
    assert_same(ours, expected, rtol=1e-4, atol=1e-5 * max(moved, 0.1))


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adamw"])
def test_weight_decay_with_a_shared_estimate_applies_to_matrices_only(name):
    """Compare with optax's, once with and once without weight decay of all tensors: in the first step the decay does
    not change the estimate, so each tensor equals one of the two."""
    function = getattr(optax.contrib, name)
    steps = [to_file(GRADIENTS[0])]
    with_decay, without = (
        train(function(1.0, weight_decay=w, estim_lr0=0.1), to_file(START), steps)[0] for w in (0.3, 0.0)
    )
    options = {"d0": 0.1} | ({"bias_correction": True} if name == "prodigy" else {})
    optimizer = build(name, rates=dict.fromkeys(GROUPS, 1.0), weight_decay=0.3, **options)
    ours = to_file(train(optimizer, START, GRADIENTS[:1])[0])
    assert_same(ours, {n: with_decay[n] if decayed(n) else without[n] for n in ours})


@pytest.mark.parametrize("bias_correction", [False, True])
def test_prodigy_equals_the_paper_with_and_without_bias_correction(bias_correction):
    """arXiv 2306.06101, algorithm 4, in float64, with the defaults of prodigyopt, which diffusion-pipe uses."""
    options = {"d0": 1e-3, "use_bias_correction": bias_correction}
    optimizer = build("Prodigy", rates=dict.fromkeys(GROUPS, 1.0), weight_decay=0.1, **options)
    same_way = [START] * 8  # so that the estimate grows
    ours = to_file(train(optimizer, START, same_way)[0])
    start = {name: value.astype(np.float64) for name, value in to_file(START).items()}
    x, (m, v, s) = dict(start), (dict.fromkeys(start, 0.0) for _ in range(3))
    d, r, b1, b2, b3 = 1e-3, 0.0, 0.9, 0.999, math.sqrt(0.999)
    for t, grads in enumerate(same_way, start=1):
        g = to_file(grads)
        rate = d * (math.sqrt(1 - b2**t) / (1 - b1**t) if bias_correction else 1.0)
        r = b3 * r + d / 1e-3 * rate * sum(np.sum(g[n] * (start[n] - x[n])) for n in x)
        for n in x:
            m[n] = b1 * m[n] + (1 - b1) * d * g[n]
            v[n] = b2 * v[n] + (1 - b2) * d * d * g[n].astype(np.float64) ** 2
            s[n] = b3 * s[n] + d / 1e-3 * rate * g[n]
        d = max(d, r / sum(np.abs(one).sum() for one in s.values()))
        for n, value in x.items():
            decay = 0.1 if decayed(n) else 0.0
            x[n] = value - rate * (decay * value + m[n] / (np.sqrt(v[n]) + d * 1e-8))
    assert d > 2e-3
    assert_same(ours, x, rtol=1e-4, atol=1e-5)


def test_prodigy_has_one_estimate_and_updates_in_proportion_to_the_groups_rates():
    rates = {**dict.fromkeys(GROUPS, 1.0), "mlp": 0.25}
    optimizer = build("prodigy", rates=rates)
    equal = build("prodigy", rates=dict.fromkeys(GROUPS, 1.0))
    ours, state = train(optimizer, START, GRADIENTS[:1])
    peer, peer_state = train(equal, START, GRADIENTS[:1])
    assert state[1].estim_lr.shape == ()
    assert state[1].estim_lr == peer_state[1].estim_lr
    for path, start in START.items():
        share = 0.25 if ".mlp" in path else 1.0
        np.testing.assert_allclose(ours[path] - start, share * (peer[path] - start), rtol=1e-3, atol=1e-7)


def test_muon_uses_adamw_for_narrow_matrices():
    shapes = {"blocks.mlp.layer1.kernel": (2, 40, 31)}
    tensors = file_tensors(dit.RULES, {path: np.broadcast_to(np.float32(0), s) for path, s in shapes.items()})
    state = jax.eval_shape(
        build("muon", tensors=tensors).init,
        {path: jax.ShapeDtypeStruct(s, jnp.float32) for path, s in shapes.items()},
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 2 * 40 * 31


def test_lion_equals_its_formula():
    """arXiv 2302.06675: u = sign(β1·m + (1 − β1)·g), w −= η·(u + λ·w), m = β2·m + (1 − β2)·g."""
    ours = trained("Lion", betas=(0.9, 0.99), weight_decay=0.1)
    for name, start in to_file(START).items():
        weight, momentum, decay = start, np.zeros_like(start), 0.1 if decayed(name) else 0.0
        for grads in GRADIENTS:
            grad = to_file(grads)[name]
            weight = weight - 1e-2 * (np.sign(0.9 * momentum + 0.1 * grad) + decay * weight)
            momentum = 0.99 * momentum + 0.01 * grad
        np.testing.assert_allclose(ours[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_stable_adamw_clips_the_update_of_each_tensor():
    """arXiv 2304.13013, algorithm 2, with gradients that grow, so that it clips."""
    gradients = [{path: 4.0**n * g for path, g in grads.items()} for n, grads in enumerate(GRADIENTS)]
    optimizer = build("StableAdamW", betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    ours = to_file(train(optimizer, START, gradients)[0])
    clipped = False
    for name, start in to_file(START).items():
        w, m, v = start.astype(np.float64), 0.0, 0.0
        for t, grads in enumerate(gradients, start=1):
            g = to_file(grads)[name].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.99**t)
            excess = max(1.0, np.sqrt(np.mean(g * g / np.maximum(v_hat, 1e-12))))
            clipped |= excess > 1.2
            w = w - 1e-2 / excess * (m_hat / (np.sqrt(v_hat) + 1e-6) + (0.1 if decayed(name) else 0.0) * w)
        np.testing.assert_allclose(ours[name], w, rtol=1e-4, atol=1e-5, err_msg=name)
    assert clipped


def test_schedule_free_equals_its_formula_and_returns_the_average():
    """arXiv 2405.15682: y between z and x; x the mean of z weighted by the squared largest rate so far."""
    rates = LearningRates({**SAME_RATES, "mlp": 5e-3}, warmup_steps=3)
    optimizer = build("ScheduleFreeAdamW", rates=rates, weight_decay=0.1)
    params, state = train(optimizer, START, GRADIENTS)
    average = optimizers.averaged(state, params)
    assert average is not None
    ours_y, ours_x = to_file(params), to_file(average)
    for name, start in to_file(START).items():
        x = y = z = start.astype(np.float64)
        v, total, largest = 0.0, 0.0, 0.0
        for t, grads in enumerate(GRADIENTS, start=1):
            g = to_file(grads)[name].astype(np.float64)
            rate = (5e-3 if ".mlp" in name else 1e-2) * np.interp(t - 1, [0, 3], [1 / 3, 1.0])
            v = 0.999 * v + 0.001 * g * g
            z = z - rate * (g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + (0.1 if decayed(name) else 0.0) * y)
            largest = max(largest, rate)
            total += largest**2
            x = x + largest**2 / total * (z - x)
            y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(ours_y[name], y, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours_x[name], x, rtol=1e-5, atol=1e-5, err_msg=name)
    assert optimizers.averaged(train(build("adamw"), START, [])[1], params) is None


def test_beta2_half_life_is_the_examples_after_which_a_gradient_counts_half():
    ours = trained("adamw", betas=(0.9, 0.5), beta2_half_life=1000.0, global_batch=100)
    peer = trained("adamw", betas=(0.9, 0.5 ** (100 / 1000)))
    assert_same(ours, peer, rtol=1e-7)


@pytest.mark.parametrize("name", optimizers.rows())
def test_every_name_trains_every_parameter_with_float32_moments(name):
    """Traced, not run: updates have the parameters' shapes, and the state keeps its structure, shapes and dtypes."""
    optimizer = build(name, clip_norm=1.0)
    params = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(optimizer.update, params, state, params)
    assert {path: (u.shape, u.dtype) for path, u in updates.items()} == {p: (s, jnp.float32) for p, s in SHAPES.items()}
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(state)] == [(a.shape, a.dtype) for a in jax.tree.leaves(new)]
    # pytorch_optimizer's AdaFactor has its first moment in bfloat16, prodigy-plus-schedule-free what it measures.
    narrow = name in {"adafactor", "prodigy_plus_schedule_free"}
    assert narrow or all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["prodigy", "dog", "schedule_free_adamw", "adamw8bit"])
def test_parameters_and_state_can_be_donated_together(name):
    optimizer = build(name)
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    step = jax.jit(lambda p, s, g: optimizer.update(g, s, p), donate_argnums=(0, 1))
    updates, _ = step(params, state, jax.tree.map(jnp.asarray, GRADIENTS[0]))
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("adamq", {}, "did you mean 'adam"),
        ("GenericOptim", {"muon": True, "normuon": True}, "only one of them can be true"),
        ("GenericOptim", {"momentum_type": "emma"}, "expected 'ema' or 'sm' or 'none' (did you mean 'ema'?)"),
        ("GenericOptim", {"momentum_type": "sm"}, "a rank above 0"),
        ("came", {"betas": (0.9, 0.999)}, "'came' has 3, by default [0.9, 0.999, 0.9999]"),
        ("adamw", {"betas": (0.9, 1.0)}, "expected numbers below 1"),
        ("adamw", {"eps": (1e-8, 1e-3)}, "'adamw' has one"),
        ("lbfgs", {}, "needs more than gradients"),
        ("adamw", {"nesterof": True}, "nesterof: not an argument of 'adamw' (did you mean 'nesterov'?)"),
        ("adamw", {"amsgrad": True}, "use type = 'amsgrad'"),
        ("adamw", {"nesterov": 1.5}, "expected true or false"),
        ("sgd", {"betas": (0.9, 0.99)}, "betas"),
        ("sgd", {"eps": 1e-8}, "eps: not an argument of 'sgd'"),
        ("sgd", {"nesterov": True}, "needs a momentum"),
        ("sgd", {"momentum": "much"}, "momentum = 'much': expected a number"),
        ("sm3", {"weight_decay": 0.1}, "weight_decay: not an argument of 'sm3'"),
        ("prodigy", {"decouple": False}, "weight decay is always decoupled"),
        ("sgd", {"beta2_half_life": 100.0}, "beta2_half_life"),
        ("lion", {"betas": (0.9, 0.99, 0.999)}, "'lion' has 2"),
        ("rprop", {"rates": LearningRates(SAME_RATES, "cosine")}, "a constant learning rate"),
        ("schedule_free_adamw", {"betas": (0.0, 0.99)}, "first beta above 0"),
        ("muon", {"preconditioning": "none"}, "preconditioning: not an argument of 'muon'"),
    ],
)
def test_an_error_is_one_line_that_names_the_key(name, more, message):
    with pytest.raises(UserError) as caught:
        build(name, **more)
    (line,) = caught.value.messages
    assert line.startswith("[optimizer] ")
    assert message in line


def test_all_errors_are_listed_at_once():
    with pytest.raises(UserError) as caught:
        build("sgd", eps=1e-8, momentun=0.9, nesterov="yes")
    assert len(caught.value.messages) == 3


@pytest.mark.parametrize("name", ["adamw_optimi", "stableadamw"])
def test_optimi_has_weight_decay_by_default(name):
    """torch-optimi 0.2 and 0.3: weight_decay = 1e-2."""
    assert_same(trained(name), trained(name, weight_decay=1e-2), rtol=0, atol=0)


def test_arguments_that_choose_an_implementation_are_ignored():
    options = {"fused": True, "foreach": False, "amsgrad": False}
    assert_same(trained("AdamW", **options), trained("adamw"), rtol=0, atol=0)


def test_offloaded_moments_are_in_host_memory_and_updates_are_equal():
    """`offload` moves nothing on a CPU, so this calls what it uses on other devices."""
    inner = build("adamw")
    outer = in_host_memory(inner)
    params, grads = jax.tree.map(jnp.asarray, START), jax.tree.map(jnp.asarray, GRADIENTS[0])
    state = outer.init(params)
    expected, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    updates, state = jax.jit(outer.update)(grads, state, params)
    assert all(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(updates))
    for path, value in expected.items():
        np.testing.assert_array_equal(updates[path], value)
    again, _ = jax.jit(outer.update)(grads, state, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(again))


@pytest.mark.parametrize("name", ["adamw8bit", "muon", "prodigy_plus_schedule_free", "automagic", "soap", "noisy_sgd"])
def test_orbax_saves_and_restores_the_state(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint.experimental.v1")
    _, state = train(build(name, rates=dict.fromkeys(GROUPS, 1e-2)), START, GRADIENTS[:1])
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", jax.tree.map(abstract, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        plain = jax.random.key_data if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(plain(a), plain(b))


def abstract(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
