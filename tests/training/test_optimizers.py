"""Parameter groups, learning rates and AdamW, compared with torch and diffusion-pipe's definitions."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.training import optimizers
from anima_jax.training.optimizers import LearningRates

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
RATES = {"llm_adapter": 1e-4, "self_attn": 2e-4, "cross_attn": 3e-4, "mlp": 4e-4, "mod": 5e-4, "base": 6e-4}

CONFIG = DiTConfig(16, 2, 1, 32, 16, 4, adapter=LLMAdapterConfig(16, 1, 1, 32, 16, 16, 10))
TENSORS = file_tensors(dit.RULES, parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1])


# diffusion-pipe's rule (models/cosmos_predict2.py, `CosmosPredict2Pipeline.get_param_groups`): the first pattern that
# the original name contains.
@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("llm_adapter.blocks.0.self_attn.q_proj.weight", "llm_adapter"),
        ("llm_adapter.embed.weight", "llm_adapter"),
        ("blocks.3.self_attn.q_proj.weight", "self_attn"),
        ("blocks.3.self_attn.q_norm.weight", "self_attn"),
        ("blocks.3.cross_attn.output_proj.weight", "cross_attn"),
        ("blocks.3.mlp.layer1.weight", "mlp"),
        ("blocks.3.adaln_modulation_self_attn.1.weight", "mod"),
        ("blocks.3.adaln_modulation_mlp.2.weight", "mod"),
        ("final_layer.adaln_modulation.1.weight", "mod"),
        ("final_layer.linear.weight", "base"),
        ("x_embedder.proj.1.weight", "base"),
        ("t_embedder.1.linear_1.weight", "base"),
        ("diffusion_model.blocks.0.mlp.layer1.lora_A.weight", "mlp"),
    ],
)
def test_groups_equal_those_of_diffusion_pipe(name, group):
    assert optimizers.group_of(name) == group


def test_every_parameter_has_a_group_and_only_matrices_have_weight_decay():
    groups, decayed = optimizers.groups_by_path(TENSORS), {t.path for t in TENSORS if optimizers.is_decayed(t)}
    assert set(groups) == {tensor.path for tensor in TENSORS}
    assert set(groups.values()) == set(RATES)
    spared = set(groups) - decayed
    assert "llm_adapter.embed.embedding" in spared
    assert all(path.endswith((".scale", ".bias", "embed.embedding")) for path in spared)
    assert all(path.endswith(".kernel") for path in decayed)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_learning_rates_equal_torchs(kind, warmup):
    torch = pytest.importorskip("torch")
    lr_scheduler = torch.optim.lr_scheduler
    total, rate = 20, 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    main = {
        "constant": lambda: lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=1e-6),
    }[kind]()
    if warmup:
        ramp = lr_scheduler.LinearLR(optimizer, 1.0 / warmup, 1.0, warmup)
        main = lr_scheduler.SequentialLR(optimizer, [ramp, main], [warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        main.step()
    rates = LearningRates({"base": rate}, kind, warmup_steps=warmup, total_steps=total)
    schedule = rates.of("base")
    np.testing.assert_allclose(
        [np.asarray(schedule(jnp.array(n))) for n in range(total)], expected, rtol=1e-5, atol=1e-12
    )
    reported = [rates.after(n)["base"] for n in range(total)]
    np.testing.assert_allclose(reported, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("case", "schedule", "more"),
    [
        ("constant_with_warmup", "constant_with_warmup", {}),
        ("cosine_with_restarts 3", "cosine_with_restarts", {"num_cycles": 3}),
        ("cosine_with_restarts 1", "cosine_with_restarts", {}),
        ("polynomial 1", "polynomial", {}),
        ("polynomial 2.5", "polynomial", {"power": 2.5, "min_lr": 1e-5}),
        ("rex", "rex", {"min_lr": 1e-5, "warmup_steps": 0}),
    ],
)
def test_learning_rates_equal_transformers(case, schedule, more):
    """Those of transformers' get_scheduler with 24 steps, 4 of them warmup, and of pytorch_optimizer's REXScheduler."""
    expected = json.loads((GOLDEN / "schedules.json").read_text(encoding="utf-8"))[case]
    rates = LearningRates({"base": 3e-4}, schedule, **({"warmup_steps": 4, "total_steps": 24} | more))
    reported = [rates.after(step)["base"] for step in range(25)]
    np.testing.assert_allclose(reported, expected, rtol=1e-8, atol=1e-13)
    traced = jax.vmap(rates.of("base"))(jnp.arange(25))
    np.testing.assert_allclose(traced, expected, rtol=2e-5, atol=1e-10)


def test_the_rate_of_a_frozen_group_stays_0():
    rates = LearningRates({"mlp": 1e-3, "mod": 0.0}, "cosine", total_steps=10)
    assert [rates.after(step)["mod"] for step in (0, 5, 10)] == [0.0, 0.0, 0.0]


def test_updates_equal_torchs_adamw_with_groups_clipping_and_weight_decay():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    tensors = [
        t
        for t in TENSORS
        if t.path in {"blocks.mlp.layer1.kernel", "blocks.self_attn.q_norm.scale", "llm_adapter.embed.embedding"}
    ]
    shapes = {
        t.path: (2, *t.layout.to_model(np.zeros(t.shape)).shape) if t.layer is not None else t.shape for t in tensors
    }
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    gradients = [{path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()} for _ in range(5)]

    config = OptimizerConfig(type="adamw", lr=0.0, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    optimizer = optimizers.build(config, LearningRates(RATES), tensors, clip_norm=1.0)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)

    peers = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start.items()}
    decay = {"blocks.mlp.layer1.kernel": 0.1, "blocks.self_attn.q_norm.scale": 0.0, "llm_adapter.embed.embedding": 0.0}
    rates = {"blocks.mlp.layer1.kernel": "mlp", "blocks.self_attn.q_norm.scale": "self_attn"}
    peer = torch.optim.AdamW(
        [
            {"params": [p], "lr": RATES[rates.get(path, "llm_adapter")], "weight_decay": decay[path]}
            for path, p in peers.items()
        ],
        betas=(0.9, 0.99),
        eps=1e-6,
    )
    for grads in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for path, value in grads.items():
            peers[path].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(list(peers.values()), 1.0)
        peer.step()
    for path, value in params.items():
        # torch divides by norm + 1e-6 when it clips: a relative difference of 1e-7 here.
        np.testing.assert_allclose(value, peers[path].detach().numpy(), rtol=1e-5, atol=1e-6, err_msg=path)


def test_frozen_groups_have_no_optimizer_state():
    trained = [tensor for tensor in TENSORS if "llm_adapter" not in tensor.name]
    optimizer = optimizers.build(OptimizerConfig(type="adamw", lr=0.0), LearningRates(RATES), trained)
    shapes = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1]
    params = {tensor.path: shapes[tensor.path] for tensor in trained}
    state = jax.eval_shape(optimizer.init, params)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * parameters.count(params)


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_constant_rate_does_not_depend_on_the_number_of_steps_so_more_epochs_compile_to_the_same_program(warmup):
    programs = [
        jax.jit(LearningRates({"mlp": 1e-3}, "constant", warmup, total).of("mlp")).lower(jnp.int32(3)).as_text()
        for total in (10, 20)
    ]
    assert programs[0] == programs[1]
    rates = LearningRates({"mlp": 1e-3}, "constant", warmup, 10)
    assert rates.after(3)["mlp"] == pytest.approx(1e-3 if not warmup else 1e-3 * (0.2 + 0.8 * 3 / 5))
