"""Training a control network: the reference's gradients, torch's losses, and what must hold for every run."""

import collections
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from anima_jax.checkpoints.control import load_control
from anima_jax.checkpoints.models import load_dit
from anima_jax.config.load import load_config
from anima_jax.config.optimizer import OptimizerConfig
from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, PATCH, ControlConfig
from anima_jax.models.dit import patchify
from anima_jax.models.llm_adapter import Text
from anima_jax.models.quantised import Quantised
from anima_jax.parallel.mesh import current_mesh
from anima_jax.platform import compiling_for
from anima_jax.sampling.control_networks import ControlNetworks
from anima_jax.sampling.controls import Control
from anima_jax.training import control, optimizers
from anima_jax.training import step as training_step
from anima_jax.training.compiled_run import copied_bytes, lowered_samples
from anima_jax.training.export import about_adapter, export, find_export
from anima_jax.training.optimizers import LearningRates
from anima_jax.training.resume import Checkpointer, run_metadata
from anima_jax.training.samples import check_pictures, control_pictures
from anima_jax.training.state import prepare
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
from tests.small_run import write_config, write_transformer

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


@pytest.mark.slow
def test_twenty_steps_of_adamw_have_torchs_losses():
    expected, (_, found) = torch_losses(), advance(new_state())
    # Sums differ by 1e-7; AdamW divides by the size of the gradient, which amplifies this where it is small.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
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


# ---- from the configuration ------------------------------------------------------------------------------------------

LLLITE = "type = 'lllite'\ncond_dim = 16\ncond_emb_dim = 12\nmlp_dim = 10\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    for name in ("pictures", "edges"):
        (folder / name).mkdir()
    write_transformer(folder / "base.safetensors")
    return folder


def configured(folder, keys: str = "", *overrides: str):
    path = write_config(folder, folder / "pictures", "epochs = 1", adapter=LLLITE + keys)
    with open(folder / "dataset.toml", "a", encoding="utf-8") as file:
        file.write(f"control_path = '{folder / 'edges'}'\n")
    return load_config(path, overrides)


def test_only_the_network_is_trained_beside_a_frozen_model_of_any_storage(folder):
    partition = prepare(configured(folder, "", "model.transformer_dtype=int8", "model.dtype=bfloat16"))
    assert set(partition.groups.values()) == {"control"}
    assert {value.dtype for value in partition.params.values()} == {jnp.dtype(jnp.float32)}
    assert all(path.startswith(control.PREFIX) for path in partition.params)
    assert not any(path.startswith(control.PREFIX) for path in partition.frozen)
    assert isinstance(partition.frozen["blocks.mlp.layer1.kernel"], Quantised)


def shapes(tree) -> collections.Counter:
    return collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def test_the_sampling_program_that_is_compiled_ahead_has_the_control_networks_inputs(folder):
    sizes = ("sample.width=64", "sample.height=32", "sample.steps=2", "model.dtype=bfloat16")
    Image.new("RGB", (64, 32)).save(folder / "sample.png")
    config = configured(folder, "", "sample.prompts=['a', 'b']", f"sample.control={folder}/sample.png", *sizes)
    plain = configured(folder, "", "sample.prompts=['a', 'b']", *sizes)
    partition = prepare(config)
    network = control.network_with(partition.control, partition.params)
    controls = [[Control(network, picture)] for picture in control_pictures(config.sample)]
    inputs = ControlNetworks(partition.config, jnp.bfloat16).inputs(controls, np.array([[1, 4, 8]] * 2), 16, 3.0)
    with compiling_for("gpu"):
        program, without = (shapes(lowered_samples(each, partition).args_info) for each in (config, plain))
    assert program - without == shapes(inputs)
    modules = [leaf for path, leaf in partition.params.items() if path.endswith("kernel") and ".blocks." in path]
    copied = copied_bytes(config, partition) - copied_bytes(plain, partition)
    assert copied == sum(leaf.size for leaf in modules) * 2  # the trunk is in float32 already


def test_modules_and_the_trunk_have_rates_of_their_own(folder):
    """A module with a rate of 0 is none, and not in the file."""
    keys = "target_layers = ['self_attn_qkv', 'mlp_fc1_pre']\n"
    keys += "lr_pattern = { 'blocks.0.self_attn.[kv]_proj' = 0, 'mlp.layer1' = 2e-3, 'conditioning1' = 5e-4 }\n"
    config = configured(folder, keys, "optimizer.type=sgd", "optimizer.lr=1e-3", "gradient_clipping=0")
    partition = prepare(config)
    assert partition.control is not None
    assert partition.control.absent == ("0.self_attn_k_proj", "0.self_attn_v_proj")
    optimizer = optimizers.build(
        OptimizerConfig(type="sgd", lr=1e-3),
        LearningRates(config.learning_rates),
        partition.tensors,
        clip_norm=0,
        layer_rates=partition.rates,
    )
    ones = jax.tree.map(jnp.ones_like, partition.params)
    state = init_state(jax.tree.map(jnp.zeros_like, partition.params), optimizer, CONFIG)
    step = quick_jit(functools.partial(apply_gradients, optimizer=optimizer, config=CONFIG))
    moved = step(state, jnp.ones(()), ones)[0].params
    rates = {
        "trunk.conv1.bias": [5e-4],
        "blocks.self_attn_q_proj.up.bias": [1e-3, 1e-3],
        "blocks.self_attn_k_proj.up.bias": [0, 1e-3],
        "blocks.mlp_layer1.up.bias": [2e-3, 2e-3],
    }
    for path, expected in rates.items():
        np.testing.assert_allclose(-moved[control.PREFIX + path][..., 0], np.squeeze(expected), rtol=1e-5)


def test_pictures_of_samples_are_checked_before_anything_is_encoded(folder, tmp_path):
    """Each is named with its key, once, however many prompts it is for."""
    solid, broken = tmp_path / "solid.png", tmp_path / "broken.png"
    Image.new("RGB", (32, 32)).save(solid)
    broken.write_bytes(b"no picture")
    for keys, paths, expected in (
        ("", [solid, solid], []),
        ("", [solid, broken], ["broken.png: cannot be read as an image: "]),
        ("cond_in_channels = 4\n", [solid, solid], ["solid.png: has no transparent part, which says what is drawn"]),
        ("cond_in_channels = 4\n", [broken, solid], ["broken.png: cannot be read", "solid.png: has no transp"]),
    ):
        overrides = ("sample.prompts=['a', 'b']", f"sample.control={[str(path) for path in paths]}")
        config = configured(folder, keys, *overrides)
        with pytest.raises(UserError) if expected else contextlib.nullcontext() as raised:
            check_pictures(config)
        lines = raised.value.messages if raised else []
        starts = [f"{config.path}: sample.control: {tmp_path}/{line}" for line in expected]
        assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_a_run_begins_from_a_file_and_adds_what_it_does_not_have(folder, tmp_path):
    config = configured(folder)
    partition = prepare(config)
    rng = np.random.default_rng(0)
    params = {path: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for path, value in partition.params.items()}
    about = about_adapter(config, partition, 7)
    path = export(tmp_path / "step7", partition, params, "float32", about, ema=params)
    assert path == tmp_path / "step7" / "ema" / "adapter_model.safetensors" == find_export(tmp_path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    expected = {
        "lllite.version": "2",
        "lllite.target_layers": "self_attn_q",
        "lllite.target_atomics": "self_attn_q_pre",
    }
    assert metadata.items() >= expected.items()
    assert (metadata["step"], len(metadata["base_model_sha256"])) == ("7", 64)

    more = prepare(configured(folder, f"target_layers = 'self_attn_qkv'\ninit_from_existing = '{path}'\n"))
    assert any("2 of 6 modules begin from" in message for message in more.messages)
    for name, value in more.params.items():
        if name in params:
            np.testing.assert_array_equal(value, params[name])
        else:
            assert value.any() == (".down." in name or ".mid." in name)
    wrong = {
        "target_layers = 'mlp_fc1_pre'\n": "changes 2 layers that are no target_layers, as blocks.0.self_attn.q_proj",
        "cond_resblocks = 3\nuse_aspp = true\n": r"expected cond_resblocks = 1, use_aspp = false$",
    }
    for keys, line in wrong.items():
        with pytest.raises(UserError, match=line):
            prepare(configured(folder, f"{keys}init_from_existing = '{path}'\n"))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            "rank = 4\n",
            "adapter.rank: belongs to the types 'lora', 'dora', 'lokr' or 'loha'; the keys of 'lllite' are ",
        ),
        ("target_layers = 'self_attn'\n", r"found 'self_attn', expected 'self_attn_q', .* \(did you mean"),
        ("inpaint_masked_input = true\n", "adapter.inpaint_masked_input: has no effect without cond_in_channels = 4"),
        (
            "use_aspp = true\naspp_dilations = [1, 100000]\n",
            r"aspp_dilations\[1\]: found 100000 .*, expected less than 10000",
        ),
        ("lr_pattern = { 'blocks.7' = 1e-3 }\n", r"'blocks.7' fits none of the 3 modules, such as conditioning1"),
        ("lr_pattern = { 'blocks' = 0 }\n", "leaves every module out, so nothing would be trained"),
    ],
)
def test_keys_that_cannot_be_used_are_named(folder, keys, line):
    with pytest.raises(UserError, match=line):
        prepare(configured(folder, keys))
