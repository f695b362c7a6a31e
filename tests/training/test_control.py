"""Training a control network: the reference's gradients, torch's losses, and what must hold for every run."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from anima_jax.checkpoints.control import load_control
from anima_jax.checkpoints.models import load_dit
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, PATCH, ControlConfig
from anima_jax.models.dit import patchify
from anima_jax.models.llm_adapter import Text
from anima_jax.parallel.mesh import current_mesh
from anima_jax.training import control, optimizers
from anima_jax.training import step as training_step
from anima_jax.training.optimizers import LearningRates
from anima_jax.training.resume import Checkpointer, run_metadata
from anima_jax.training.step import (
    StepConfig,
    TrainBatch,
    TrainState,
    apply_gradients,
    example_losses,
    init_state,
    loss_fn,
)
from tests.golden_files import GOLDEN, GRADIENT_TOLERANCE, VALUE_TOLERANCE, channel_last, golden
from tests.models import control_peer, dit_peer
from tests.models.networks import quick_jit

MODEL, NETWORK = GOLDEN / "dit_image.model.safetensors", GOLDEN / "lllite.safetensors"
STRENGTH = 0.8  # the golden's
VANISHING = 1e-6
"""Gradients that are zero: those of a bias before a norm of groups of one channel. The reference has rounding there."""

STEPS, RATE, BETAS, EPS, DECAY, CLIP = 20, 1e-3, (0.9, 0.99), 1e-8, 0.1, 1.0
CONFIG = StepConfig(compute_dtype=jnp.float32, control_strength=STRENGTH)


def tokens(array):
    return patchify(jnp.asarray(channel_last(array)))


@functools.cache
def model():
    """(graphdef with the golden control network, frozen and trained parameters, sizes of the network)."""
    base, network = load_dit(MODEL), load_control(NETWORK)
    base.control = nnx.data(network)
    graphdef, params = parameters.split(base)
    trained = {path: value for path, value in params.items() if path.startswith(control.PREFIX)}
    return graphdef, {path: params[path] for path in params.keys() - trained.keys()}, trained, network.config


def batch() -> TrainBatch:
    """The golden batch. Control pictures are uint8 in training; the golden's are not, and not rounded here."""
    io, pixels = golden("dit_image.io"), golden("lllite.io")["image"] * 255
    rows, columns = (side // PATCH for side in pixels.shape[-2:])
    patches = rearrange(pixels, "b c (y m) (x n) -> b (y x) (m n c)", m=PATCH, n=PATCH)
    grid, ids = np.tile([[1, rows, columns]], (2, 1)), np.array([[0, 1], [0, 2]], np.uint32)
    text = Text(io["qwen"], io["qwen_mask"], io["t5_ids"], io["t5_mask"])
    return TrainBatch(tokens(io["x0"]), grid, ids, np.zeros(2, np.int32), text, control_blp=patches)


@pytest.fixture(autouse=True)
def _context_of_the_golden(monkeypatch):
    monkeypatch.setattr(training_step, "CONTEXT_ROWS", 0)  # it has no rows of zeros


@quick_jit
@jax.value_and_grad
def loss_and_gradients(trained, noise_blc, times_b):
    graphdef, frozen, _, _ = model()
    net = parameters.merge(graphdef, frozen | trained)
    return jnp.mean(example_losses(net, batch(), noise_blc, times_b, CONFIG))


def test_the_steps_gradients_are_the_references():
    _, _, trained, network = model()
    io = golden("lllite.io")
    loss, grads = loss_and_gradients(trained, tokens(golden("dit_image.io")["noise"]), io["t"])
    assert float(loss) == pytest.approx(float(io["loss"][0]), rel=VALUE_TOLERANCE)
    tensors = control.tensors_of(network, trained)
    assert {f"grad.{tensor.name}" for tensor in tensors} == {name for name in io if name.startswith("grad.")}
    for tensor in tensors:
        grad = grads[tensor.path] if tensor.layer is None else grads[tensor.path][tensor.layer]
        found, expected = tensor.layout.to_file(np.asarray(grad)), io[f"grad.{tensor.name}"]
        largest = np.abs(expected).max()
        error = GRADIENT_TOLERANCE * largest if largest > VANISHING else VANISHING
        assert np.abs(found - expected).max() < error, tensor.name


# ---- twenty steps ----------------------------------------------------------------------------------------------------


def draws() -> tuple[np.ndarray, np.ndarray]:
    """Return the noise (step, b, c, t, y, x), in the files' layout, and the times (step, b)."""
    rng, shape = np.random.default_rng(0), golden("dit_image.io")["x0"].shape
    return rng.standard_normal((STEPS, *shape), np.float32), rng.uniform(0.05, 0.95, (STEPS, shape[0])).astype("f4")


def torch_losses() -> list[float]:
    """Return the loss before each step of a control network trained in torch on diffusers' transformer."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    weights, config = load_file(MODEL), load_dit(MODEL).config
    transformer = dit_peer.transformer(config).requires_grad_(False)
    names = dit_peer.original_names(transformer.state_dict())
    transformer.load_state_dict({peer: torch.from_numpy(weights[f"net.{name}"]) for peer, name in names.items()})
    own = {name: torch.from_numpy(value).requires_grad_() for name, value in load_file(NETWORK).items()}
    parts = [
        {"params": [value for value in own.values() if (value.ndim > 1) == decayed], "weight_decay": DECAY * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(parts, lr=RATE, betas=BETAS, eps=EPS)
    io = {name: torch.from_numpy(value) for name, value in golden("dit_image.io").items()}
    picture, found = 2 * torch.from_numpy(golden("lllite.io")["image"]) - 1, []
    for noise, times in zip(*map(torch.from_numpy, draws()), strict=True):
        t = times[:, None, None, None, None]
        with control_peer.steered(transformer, own, control_peer.embedding(own, picture), STRENGTH):
            velocity = dit_peer.velocity_tensor(transformer, (1 - t) * io["x0"] + t * noise, times, io["context_train"])
        loss = torch.mean((velocity - (noise - io["x0"])) ** 2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), CLIP)
        optimizer.step()
        found.append(loss.item())
    return found


@functools.cache
def our_optimizer():
    return optimizers.build(
        OptimizerConfig(type="adamw", lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY),
        LearningRates({"control": RATE}),
        control.tensors_of(*model()[:1:-1]),
        clip_norm=CLIP,
    )


@quick_jit
def update(state, loss, grads):
    return apply_gradients(state, loss, grads, optimizer=our_optimizer(), config=CONFIG)


def advance(state: TrainState, start: int = 0, end: int = STEPS) -> tuple[TrainState, list[float]]:
    """Return the state after these steps, and the loss before each of them."""
    found = []
    for noise, times in list(zip(*draws(), strict=True))[start:end]:
        loss, grads = loss_and_gradients(state.params, tokens(noise), times)
        state, _ = update(state, loss, grads)
        found.append(float(loss))
    return state, found


def new_state() -> TrainState:
    return init_state(jax.tree.map(jnp.copy, model()[2]), our_optimizer(), CONFIG)


def test_twenty_steps_of_adamw_have_torchs_losses():
    expected, (_, found) = torch_losses(), advance(new_state())
    # Sums differ by 1e-7; AdamW divides by the size of the gradient, which amplifies this where it is small.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(tmp_path):
    plan = BatchPlan([Tier("64", np.arange(2), 24, 2)], seed=0)
    groups = dict.fromkeys(model()[2], "control")
    metadata = run_metadata(model()[2], groups, plan, np.arange(2), {})
    whole, losses = advance(new_state(), end=6)
    half, _ = advance(new_state(), end=3)
    with contextlib.closing(Checkpointer(tmp_path, plan, metadata)) as checkpointer:
        checkpointer.save(3, half, wait=True)
    with contextlib.closing(Checkpointer(tmp_path, plan, metadata)) as checkpointer:
        state, messages = checkpointer.restore(new_state(), our_optimizer().init)
    resumed, later = advance(state, start=3, end=6)
    assert (messages, later) == ([], losses[3:])
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


# ---- a new network ---------------------------------------------------------------------------------------------------

SMALL = ControlConfig(3, 16, 12, 10, 1, (1, 2), LAYERS, 3, width=64)


@functools.cache
def small():
    """Parameters of a new network with every part, and the graphdef of the golden model with it."""
    base = load_dit(MODEL)
    params = control.initial(SMALL, 0, current_mesh())
    base.control = nnx.data(control.network_with(SMALL, params))
    return parameters.split(base)[0], params


def test_a_new_network_has_pytorchs_initial_values():
    _, params = small()
    zeros = {path for path, value in params.items() if not value.any()}
    assert zeros == {
        path
        for path in params
        if any(part in path for part in (".up.", ".cond_to_film.", ".depth_bias", "norm"))
        and not path.endswith("scale")
    }
    for path, value in params.items():
        if path not in zeros and path.endswith((".kernel", ".bias")):
            kernel = params[path.rpartition(".")[0] + ".kernel"]
            bound = 1 / np.sqrt(kernel.shape[-2])
            assert np.abs(value).max() <= bound
            assert value.size < 100 or np.abs(value).max() > 0.9 * bound
    rows = params["control.blocks.mlp_layer1.down.kernel"]
    assert not np.array_equal(rows[0], rows[1])


def test_a_new_network_leaves_the_loss_as_it_is_bit_for_bit():
    graphdef, params = small()
    config = StepConfig(compute_dtype=jnp.bfloat16, seed=3)

    @quick_jit
    def losses(params):
        net = parameters.merge(graphdef, parameters.cast_to_compute(model()[1] | params, jnp.bfloat16))
        return loss_fn(net, batch(), None, config), loss_fn(net, batch()._replace(control_blp=None), None, config)

    assert np.equal(*losses(params))


def test_dropout_is_drawn_for_each_example_and_epoch():
    graphdef, frozen, trained, _ = model()
    config = StepConfig(compute_dtype=jnp.float32, dropout=0.5)

    @quick_jit
    def loss(examples):
        return loss_fn(parameters.merge(graphdef, frozen | trained), examples, None, config)

    first = batch()
    turned = jax.tree.map(lambda x: x[::-1], first)
    later = first._replace(epochs_b=first.epochs_b + 1)
    # Sums over the batch have another order.
    assert float(loss(turned)) == pytest.approx(float(loss(first)), rel=1e-6)
    assert float(loss(later)) != pytest.approx(float(loss(first)), rel=1e-4)
