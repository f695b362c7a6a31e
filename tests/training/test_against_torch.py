"""Twenty training steps compared with the same training in plain torch, on the golden model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax.checkpoints.models import load_dit
from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.models import parameters
from anima_jax.models.dit import patchify
from anima_jax.models.llm_adapter import Text
from anima_jax.training import optimizers
from anima_jax.training.optimizers import LearningRates
from anima_jax.training.step import StepConfig, TrainBatch, apply_gradients, example_losses, init_state
from tests.golden_files import GOLDEN, channel_last, golden
from tests.models import dit_peer
from tests.models.networks import quick_jit

STEPS = 20
RATE, ADAPTER_RATE = 1e-3, 5e-4
BETAS, EPS, DECAY, CLIP = (0.9, 0.99), 1e-8, 0.1, 1.0
MODEL = GOLDEN / "dit_image.model.safetensors"


def draws() -> tuple[np.ndarray, np.ndarray]:
    """Return the noise (step, b, c, t, y, x), in the files' layout, and the times (step, b)."""
    rng = np.random.default_rng(0)
    shape = golden("dit_image.io")["x0"].shape
    return rng.standard_normal((STEPS, *shape), np.float32), rng.uniform(0.05, 0.95, (STEPS, shape[0])).astype("f4")


def torch_losses() -> list[float]:
    """Return the loss before each step of the torch model."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config, weights = load_dit(MODEL).config, load_file(MODEL)
    adapter = diffusers.AnimaTextConditioner(
        source_dim=config.adapter.source_width,
        target_dim=config.adapter.target_width,
        model_dim=config.adapter.width,
        num_layers=config.adapter.blocks,
        num_attention_heads=config.adapter.heads,
        mlp_ratio=config.adapter.mlp_width / config.adapter.width,
        target_vocab_size=config.adapter.vocabulary,
        min_sequence_length=512,
    )
    transformer = dit_peer.transformer(config)
    names = dit_peer.original_names(transformer.state_dict())
    transformer.load_state_dict({peer: torch.from_numpy(weights[f"net.{name}"]) for peer, name in names.items()})
    adapter.load_state_dict(
        {name: torch.from_numpy(weights[f"net.llm_adapter.{name}"]) for name in adapter.state_dict()}
    )

    def groups(module, rate):
        # diffusion-pipe: no weight decay of vectors and the adapter's token table.
        named = list(module.named_parameters())
        decayed = [p for name, p in named if p.ndim > 1 and name != "embed.weight"]
        spared = [p for name, p in named if p.ndim == 1 or name == "embed.weight"]
        return [
            {"params": decayed, "lr": rate, "weight_decay": DECAY},
            {"params": spared, "lr": rate, "weight_decay": 0.0},
        ]

    optimizer = torch.optim.AdamW(
        groups(transformer, RATE) + groups(adapter, ADAPTER_RATE), lr=RATE, betas=BETAS, eps=EPS
    )
    every = [*transformer.parameters(), *adapter.parameters()]
    io = {name: torch.from_numpy(value) for name, value in golden("dit_image.io").items()}
    found = []
    for noise, times in zip(*map(torch.from_numpy, draws()), strict=True):
        t = times[:, None, None, None, None]
        context = adapter(io["qwen"], io["t5_ids"].long(), io["t5_mask"].bool(), io["qwen_mask"].bool())
        velocity = dit_peer.velocity_tensor(transformer, (1 - t) * io["x0"] + t * noise, times, context)
        loss = torch.mean((velocity - (noise - io["x0"])) ** 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(every, CLIP)
        optimizer.step()
        found.append(loss.item())
    return found


def our_losses() -> list[float]:
    """Return the loss before each of our steps, given the same random numbers."""
    graphdef, params = parameters.split(load_dit(MODEL))
    rates = dict.fromkeys((group for group, _ in optimizers.GROUPS), RATE) | {"llm_adapter": ADAPTER_RATE}
    optimizer = optimizers.build(
        OptimizerConfig(type="adamw", lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY),
        LearningRates(rates),
        file_tensors(dit.RULES, params),
        clip_norm=CLIP,
    )
    config = StepConfig(compute_dtype=jnp.float32)
    io = golden("dit_image.io")
    text = Text(io["qwen"], io["qwen_mask"], io["t5_ids"], io["t5_mask"])
    rows, columns = (side // 2 for side in io["x0"].shape[-2:])
    grid = np.tile([[1, rows, columns]], (len(io["x0"]), 1))

    def tokens(array):
        return patchify(jnp.asarray(channel_last(array)))

    unused = np.zeros((len(grid), 2), np.uint32), np.zeros(len(grid), np.int32)
    batch = TrainBatch(tokens(io["x0"]), grid, *unused, text)

    @quick_jit
    def step(state, noise_blc, times_b):
        def loss_of(params):
            return jnp.mean(example_losses(parameters.merge(graphdef, params), batch, noise_blc, times_b, config))

        return apply_gradients(state, *jax.value_and_grad(loss_of)(state.params), optimizer=optimizer, config=config)

    state, found = init_state(params, optimizer, config), []
    for noise, times in zip(*draws(), strict=True):
        state, metrics = step(state, tokens(noise), times)
        found.append(float(metrics.loss))
    return found


def test_twenty_steps_of_adamw_have_torchs_losses():
    expected, found = torch_losses(), our_losses()
    assert expected[-1] < 0.8 * expected[0]
    # Sums differ by 1e-7; AdamW divides by the size of the gradient, which amplifies this where it is small.
    np.testing.assert_allclose(found, expected, rtol=1e-4)
