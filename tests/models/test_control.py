"""Control networks against the reference's own numbers and torch, and what must hold for every one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax.adapters.modules import adapter_spec, attach
from anima_jax.checkpoints.control import load_control, save_control
from anima_jax.checkpoints.models import load_dit
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT, DiTConfig, patchify
from anima_jax.models.quantised import Quantised, quantise_transformer
from tests.golden_files import GOLDEN, GRADIENT_TOLERANCE, VALUE_TOLERANCE, channel_last, golden, relative_error
from tests.models import control_peer, dit_peer
from tests.models.networks import normal, quick_jit, random_model, randomise

STRENGTH = 0.8  # the golden's
VANISHING = 1e-6
"""Gradients that are zero: those of a bias before a norm of groups of one channel. The reference has rounding there."""

INPAINTING = ControlConfig(4, 24, 10, 14, 2, (1, 2, 4), LAYERS, 3, True, 60)
"""Everything that a network can have."""


@functools.cache
def small_network() -> ControlNetwork:
    return random_model(ControlNetwork, INPAINTING)


def pixels(network: ControlNetwork, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A control image (1, y, x, c) of this many tokens."""
    image = np.random.default_rng(seed).uniform(-1, 1, (1, 16 * rows, 16 * columns, network.config.channels))
    if network.config.channels == 4:
        image[..., 3] = np.where(image[..., 3] > 0, 1, -1)
    return image.astype(np.float32)


def packed(images, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches (b, l, p) of images of several sizes with garbage as padding, and their grids."""
    patches, grid = [], []
    for image in images:
        rows, columns = image.shape[1] // 16, image.shape[2] // 16
        own = image.reshape(rows, 16, columns, 16, -1).swapaxes(1, 2).reshape(rows * columns, -1)
        patches.append(np.concatenate([own, normal(length - len(own), own.shape[1], seed=5)]))
        grid.append([1, rows, columns])
    return np.stack(patches), np.array(grid, np.int32)


@pytest.fixture(scope="module")
def reference():
    io = golden("lllite.io")
    inputs = [jnp.asarray(channel_last(io["x_t"])), jnp.asarray(io["t"]), jnp.asarray(io["context"])]
    model = load_dit(GOLDEN / "dit_image.model.safetensors")
    return model, load_control(GOLDEN / "lllite.safetensors"), io, inputs


@pytest.mark.parametrize("options", [{}, {"remat": "dots", "remat_every": 3}], ids=str)
def test_embedding_velocity_loss_and_every_gradient_equal_the_reference(reference, options, tmp_path):
    model, network, io, inputs = reference
    graphdef, params = parameters.split(network)

    def loss_of(params):
        network = parameters.merge(graphdef, params)
        embedding = network.embed(2 * jnp.asarray(channel_last(io["image"])) - 1)
        out = model(*inputs, controls=[(network, embedding, STRENGTH)], **options)
        return jnp.mean((out - channel_last(io["target"])) ** 2), (out, embedding)

    (loss, (out, embedding)), grads = quick_jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert relative_error(embedding, io["cond_emb"]) < VALUE_TOLERANCE
    assert relative_error(out, channel_last(io["velocity"])) < VALUE_TOLERANCE
    assert float(loss) == pytest.approx(float(io["loss"][0]), rel=VALUE_TOLERANCE)
    # Through a file, which has the names and layouts of the reference's gradients.
    save_control(tmp_path / "grads.safetensors", parameters.merge(graphdef, grads))
    found = load_file(tmp_path / "grads.safetensors")
    expected = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    assert found.keys() == expected.keys()
    errors = {
        name: relative_error(found[name], value) if np.abs(value).max() > VANISHING else np.abs(found[name]).max()
        for name, value in expected.items()
    }
    assert max(errors.values()) < GRADIENT_TOLERANCE


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    """(diffusers' transformer, ours with its weights, a network, the tensors of its file)."""
    pytest.importorskip("diffusers")
    config = DiTConfig(60, 3, 3, 240, 28, 12, adapter=None)
    peer, network = randomise(dit_peer.transformer(config)), small_network()
    ours = parameters.merge(
        parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[0], dit_peer.our_params(peer, config)
    )
    path = tmp_path_factory.mktemp("control") / "network.safetensors"
    save_control(path, network)
    return peer, ours, network, load_file(path)


def test_every_part_equals_torch_on_random_weights(steered):
    """ASPP, an inpainting mask, modules at all layers, several networks in order, a strength for each image."""
    import torch

    peer, ours, network, tensors = steered
    image = np.concatenate([pixels(network, 3, 5, seed) for seed in range(2)])
    other = np.concatenate([pixels(network, 3, 5, seed) for seed in range(2, 4)])
    latents, times, context = normal(2, 16, 1, 6, 10), np.array([0.2, 0.9], np.float32), normal(2, 9, 28, seed=2)
    expected, embeddings = [], []
    with torch.inference_mode():
        stored = {name: torch.from_numpy(value) for name, value in tensors.items()}
        for each in (image, other):
            colours, mask = np.moveaxis(each, -1, 1)[:, :3], np.moveaxis(each, -1, 1)[:, 3:]
            seen = control_peer.with_mask(*map(torch.from_numpy, (colours, (mask + 1) / 2)), masked_input=True)
            embeddings.append(control_peer.embedding(stored, seen, INPAINTING.dilations))
        for row, strength in enumerate((1.5, 0.0)):
            inputs = [value[row : row + 1] for value in (latents, times, context)]
            first, second = (embedding[row : row + 1] for embedding in embeddings)
            with control_peer.steered(peer, stored, first, strength), control_peer.steered(peer, stored, second, -0.7):
                expected.append(dit_peer.velocity(peer, *inputs))

    @quick_jit
    def run(network, image, other):
        found = [network.embed(image), network.embed(other)]
        controls = [(network, found[0], jnp.array([1.5, 0.0])), (network, found[1], -0.7)]
        return found, ours(jnp.asarray(channel_last(latents)), times, jnp.asarray(context), controls=controls)

    found, velocity = run(network, image, other)
    assert relative_error(found[0], embeddings[0]) < VALUE_TOLERANCE
    assert relative_error(velocity, np.concatenate(expected)) < VALUE_TOLERANCE


def test_images_of_mixed_sizes_are_embedded_as_torch_embeds_each_alone(steered):
    import torch

    _, _, network, tensors = steered
    stored = {name: torch.from_numpy(value) for name, value in tensors.items()}
    images = [pixels(network, rows, columns, seed) for seed, (rows, columns) in enumerate([(4, 6), (7, 3), (1, 9)])]
    found = np.asarray(quick_jit(network.embed_patches)(*packed(images, 24)))
    for own, image in zip(found, images, strict=True):
        colours, mask = np.moveaxis(image, -1, 1)[:, :3], np.moveaxis(image, -1, 1)[:, 3:]
        seen = control_peer.with_mask(*map(torch.from_numpy, (colours, (mask + 1) / 2)), masked_input=True)
        alone = control_peer.embedding(stored, seen, INPAINTING.dilations)[0].numpy()
        assert relative_error(own[: len(alone)], alone) < VALUE_TOLERANCE
        assert not own[len(alone) :].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strength_zero_and_a_new_network_change_nothing_at_all(reference, dtype):
    model, network, io, (latents, times, context) = reference
    graphdef, params = parameters.split(network)
    new = {path: jnp.zeros_like(value) if ".up." in path else value for path, value in params.items()}

    @quick_jit
    def run(strength):
        embedding = jnp.asarray(io["cond_emb"])
        controls = [(network, embedding, strength), (parameters.merge(graphdef, new), embedding, 1.0)]
        inputs = latents.astype(dtype), times, context.astype(dtype)
        return model(*inputs), model(*inputs, controls=controls)

    assert np.array_equal(*run(jnp.zeros(2)))


def test_what_a_step_of_sampling_knows_already_changes_no_number(reference):
    model, network, io, (latents, times, context) = reference

    @quick_jit
    def run(latents):
        known = model.modulations(times), model.keys_values(context)
        options = {"controls": [(network, jnp.asarray(io["cond_emb"]), STRENGTH)], "remat": "none"}
        cache = {"after_first": lambda before, after, rest: rest(after)}
        return [model.velocity(patchify(latents), (1, 4, 6), *known, **options, **more) for more in ({}, cache)]

    expected = patchify(jnp.asarray(channel_last(io["velocity"])))
    assert all(relative_error(each, expected) < VALUE_TOLERANCE for each in run(latents))


def test_quantised_and_adapted_layers_are_steered_alike(reference):
    """The oracle is the same model with its dequantised, merged weights."""
    model, network, io, inputs = reference
    controls = [(network, jnp.asarray(io["cond_emb"]), STRENGTH)]
    graphdef, params = parameters.split(model)
    stored = {path: quantise_transformer(path, value, "int8") for path, value in params.items()}
    plain = {path: value.values() if isinstance(value, Quantised) else value for path, value in stored.items()}
    adapted = parameters.merge(graphdef, stored)
    paths = ("blocks.self_attn.q_proj", "blocks.mlp.layer1")
    specs = {path: adapter_spec("lora", params[f"{path}.kernel"].shape, [4] * 3) for path in paths}
    attach(adapted, specs)
    own_graphdef, own = parameters.split(adapted)
    for path in paths:
        a, b = (jnp.asarray(0.1 * normal(*own[f"{path}.{name}"].shape, seed=3)) for name in ("lora_a", "lora_b"))
        own |= {f"{path}.lora_a": a, f"{path}.lora_b": b, f"{path}.lora_scale": jnp.ones(3)}
        plain[f"{path}.kernel"] = plain[f"{path}.kernel"] + a @ b
    run = quick_jit(
        lambda graphdef, params: parameters.merge(graphdef, params)(*inputs, controls=controls), static_argnums=0
    )
    assert relative_error(run(own_graphdef, own), run(graphdef, plain)) < VALUE_TOLERANCE


def test_inputs_that_do_not_fit_are_named(reference):
    model, network, io, (latents, times, context) = reference
    embedding = jnp.asarray(io["cond_emb"])
    video = jnp.concatenate([latents] * 2, axis=1)
    cases = (
        ("single images", video, (network, jnp.concatenate([embedding] * 2, axis=1), 1.0)),
        (r"embedding of shape \(2, 23, 12\), expected \(2, 24, 12\)", latents, (network, embedding[:, :-1], 1.0)),
        ("3 blocks of width 60, the model has 3 of width 64", latents, (small_network(), embedding, 1.0)),
        (r"strengths of shape \(3,\)", latents, (network, embedding, jnp.ones(3))),
    )
    for message, own, control in cases:
        with pytest.raises(ValueError, match=message):
            model(own, times, context, controls=[control])
    for message, shape, dtype in (
        ("4 channels for a network of 3", (1, 32, 32, 4), "float32"),
        ("16·rows", (1, 30, 32, 3), "float32"),
        (r"of uint8, expected floats in \[−1, 1\]", (1, 32, 32, 3), "uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            network.embed(jnp.zeros(shape, dtype))
    with pytest.raises(ValueError, match="of int32, expected floats"):
        network.embed_patches(jnp.zeros((1, 4, 768), jnp.int32), jnp.array([[1, 2, 2]]))
