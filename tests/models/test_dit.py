"""The transformer and its adapter against the references' own numbers, and properties of the token core."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.checkpoints.models import load_dit
from anima_jax.checkpoints.names import dit as dit_names
from anima_jax.checkpoints.names import file_tensors
from anima_jax.models import dit as module
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig, patchify, unpatchify
from anima_jax.models.llm_adapter import LLMAdapterConfig
from tests.golden_files import GOLDEN, GRADIENT_TOLERANCE, VALUE_TOLERANCE, channel_last, golden, relative_error
from tests.models.networks import adapter_context, normal, quick_jit, random_model, random_params, velocity

SMALL = DiTConfig(
    width=48,
    blocks=2,
    heads=2,
    mlp_width=64,
    context_width=24,
    adaln_rank=8,
    adapter=LLMAdapterConfig(24, 2, 2, 32, 20, 24, 50),
)


def small_model(config=SMALL):
    return random_model(AnimaDiT, config)


def random(*shape, seed=0):
    return jnp.asarray(normal(*shape, seed=seed))


@pytest.fixture(scope="module", params=["dit_image", "dit_video"])
def case(request):
    model = load_dit(GOLDEN / f"{request.param}.model.safetensors")
    return model, golden(f"{request.param}.io")


def training_text(io):
    return [jnp.asarray(io[name]) for name in ("qwen", "t5_ids", "qwen_mask", "t5_mask")]


def test_training_velocity_loss_and_every_gradient_equal_the_reference(case):
    model, io = case
    graphdef, params = parameters.split(model)

    def loss_of(params):
        model = parameters.merge(graphdef, params)
        context = model.llm_adapter(*training_text(io))
        out = model(jnp.asarray(channel_last(io["x_t"])), jnp.asarray(io["t"]), context)
        return jnp.mean((out - channel_last(io["target"])) ** 2), (out, context)

    (loss, (out, context)), grads = quick_jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert relative_error(context, io["context_train"]) < VALUE_TOLERANCE
    assert relative_error(out, channel_last(io["velocity"])) < VALUE_TOLERANCE
    assert float(loss) == pytest.approx(io["loss"][0], rel=VALUE_TOLERANCE)
    tensors = file_tensors(dit_names.RULES, params)
    assert len(tensors) == sum(name.startswith("grad.") for name in io)
    for tensor in tensors:
        grad = np.asarray(grads[tensor.path] if tensor.layer is None else grads[tensor.path][tensor.layer])
        expected = io.get(f"grad.{tensor.name}", io.get(f"grad.net.{tensor.name}"))
        assert relative_error(tensor.layout.to_file(grad), expected) < GRADIENT_TOLERANCE, tensor.name


def test_inference_context_and_velocity_equal_the_reference(case):
    model, io = case
    real_source, tokens = io["qwen_mask"][0].astype(bool), io["t5_weights"].shape[1]
    source, target = jnp.asarray(io["qwen"][:1, real_source]), jnp.asarray(io["t5_ids"][:1, :tokens])
    rows = adapter_context(model, source, target) * io["t5_weights"][..., None]
    assert relative_error(rows, io["context_infer"][:, :tokens]) < VALUE_TOLERANCE
    x_t, times = jnp.asarray(channel_last(io["x_t"][:1])), jnp.asarray(io["t"][:1])
    expected = channel_last(io["velocity_infer"])
    assert relative_error(velocity(model, x_t, times, io["context_infer"]), expected) < VALUE_TOLERANCE
    # The zero rows need not be stored: they only take part in the softmax.
    shortened = quick_jit(lambda model, rows: model(x_t, times, rows, zero_context=512 - tokens))(model, rows)
    assert relative_error(shortened, expected) < VALUE_TOLERANCE


def test_inner_values_equal_the_reference(case):
    model, io = case
    frames, height, width = io["x_t"].shape[2:]
    grid = jnp.array([[frames, height // 2, width // 2]])
    length = int(jnp.prod(grid))
    angles = module.rotary_angles_3d(module.token_positions(grid, length), model.config)[0]
    # The reference stores the angles twice, once for each half of the head.
    assert relative_error(np.tile(angles, 2), io["rope_angles"]) < VALUE_TOLERANCE
    tokens = patchify(jnp.asarray(channel_last(io["x_t"])))
    embedded = model.x_embedder(model._with_padding_mask(tokens))
    assert relative_error(embedded.reshape(io["embedded"].shape), io["embedded"]) < VALUE_TOLERANCE
    features = module.timestep_features(jnp.asarray(io["t"])[:, None], model.config.width)
    assert relative_error(features, io["t_emb_raw"]) < VALUE_TOLERANCE
    assert relative_error(model.t_embedding_norm(features), io["t_emb"]) < VALUE_TOLERANCE
    assert relative_error(model.t_embedder(features), io["adaln_lora"]) < VALUE_TOLERANCE


def test_an_empty_caption_gives_the_references_context_and_gradients():
    model, io = load_dit(GOLDEN / "dit_image.model.safetensors"), golden("adapter_empty_caption.io")
    graphdef, params = parameters.split(model)
    params = {path: value for path, value in params.items() if path.startswith("llm_adapter.")}
    rest = {path: value for path, value in parameters.split(model)[1].items() if path not in params}

    def loss_of(params):
        context = parameters.merge(graphdef, rest | params).llm_adapter(*training_text(io))
        return jnp.sum(context**2), context

    (_, context), grads = quick_jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert relative_error(context, io["context_train"]) < VALUE_TOLERANCE
    for tensor in file_tensors(dit_names.RULES, params):
        grad = np.asarray(grads[tensor.path] if tensor.layer is None else grads[tensor.path][tensor.layer])
        name = tensor.name.removeprefix("llm_adapter.")
        expected = next(
            io[key] for key in io if key.startswith("grad.") and key.endswith(name) and key[-len(name) - 1] == "."
        )
        assert relative_error(tensor.layout.to_file(grad), expected) < GRADIENT_TOLERANCE, tensor.name


def test_bfloat16_stays_near_float32(case):
    model, io = case
    graphdef, params = parameters.split(model)
    rounded = parameters.merge(graphdef, parameters.cast_to_compute(params, jnp.bfloat16))
    source, *rest = training_text(io)
    context = adapter_context(rounded, source.astype(jnp.bfloat16), *rest)
    out = velocity(rounded, jnp.asarray(channel_last(io["x_t"]), jnp.bfloat16), jnp.asarray(io["t"]), context)
    assert out.dtype == jnp.float32
    assert relative_error(out, channel_last(io["velocity"])) < 2e-2  # 8 bits a number, some 20 roundings deep


def test_examples_of_different_shapes_in_one_padded_batch_equal_each_alone():
    model = small_model()
    grids = np.array([[1, 3, 5], [2, 2, 4], [1, 1, 1]])
    budget = 20
    latents = [random(1, t, 2 * y, 2 * x, 16, seed=i) for i, (t, y, x) in enumerate(grids)]
    times, context = jnp.array([0.2, 0.5, 0.9]), random(3, 7, 24)
    tokens = [patchify(x)[0] for x in latents]
    # What stands in the padding must not matter: large numbers would show.
    padded = jnp.stack([jnp.pad(x, ((0, budget - len(x)), (0, 0)), constant_values=9.0) for x in tokens])
    together = quick_jit(lambda model, *inputs: model.velocity(*inputs))(model, padded, grids, times, context)
    for i, grid in enumerate(grids):
        alone = velocity(model, latents[i], times[i : i + 1], context[i : i + 1])
        real = together[i : i + 1, : int(np.prod(grid))]
        assert relative_error(unpatchify(real, *(int(n) for n in grid)), alone) < VALUE_TOLERANCE


def test_a_batch_without_padding_needs_no_lengths():
    model = small_model()
    tokens, times, context = random(2, 12, 64), jnp.array([0.2, 0.5]), random(2, 7, 24)
    grids = np.array([[1, 3, 4], [1, 3, 4]])
    told = quick_jit(lambda model, *inputs: model.velocity(*inputs, padded=False))
    fixed = quick_jit(lambda model, tokens, *inputs: model.velocity(tokens, (1, 3, 4), *inputs))
    np.testing.assert_array_equal(told(model, tokens, grids, times, context), fixed(model, tokens, times, context))


def test_what_does_not_depend_on_the_latents_can_be_computed_once():
    model, times = small_model(), jnp.array([0.2, 0.9])
    tokens, context = random(2, 12, 64), random(2, 7, 24)
    plain = quick_jit(lambda model, *inputs: model.velocity(tokens, (1, 3, 4), *inputs, zero_context=5))

    def known(model, times, context, index=None):
        modulations = model.modulations(times) if index is None else model.modulations(times).at(index)
        return model.velocity(tokens, (1, 3, 4), modulations, model.keys_values(context), zero_context=5)

    found = quick_jit(known)(model, times, context)
    assert relative_error(found, plain(model, times, context)) < VALUE_TOLERANCE
    of_one = quick_jit(known)(model, times, context, 1)
    assert relative_error(of_one, plain(model, jnp.full(2, 0.9), context)) < VALUE_TOLERANCE
    with pytest.raises(ValueError, match="batch sizes differ: latents 2, times 2, context rows 1"):
        known(model, times, context[:1])


def test_padded_and_masked_captions_equal_each_alone_in_the_adapter():
    model = small_model()
    source, ids = random(2, 9, 20), jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 8)))
    lengths = [(9, 3), (4, 8)]
    source_mask = jnp.stack([jnp.arange(9) < n for n, _ in lengths])
    target_mask = jnp.stack([jnp.arange(8) < m for _, m in lengths])
    together = adapter_context(model, source, ids, source_mask, target_mask)
    for i, (n, m) in enumerate(lengths):
        alone = adapter_context(model, source[i : i + 1, :n], ids[i : i + 1, :m])
        assert relative_error(together[i : i + 1, :m], alone) < VALUE_TOLERANCE
        assert np.all(np.asarray(together[i, m:]) == 0)


def test_masks_may_have_holes():
    model = small_model()
    source, ids = random(1, 6, 20), jnp.array([[3, 9, 4]])
    mask = jnp.array([[True, True, False, True, False, False]])
    base = adapter_context(model, source, ids, mask)
    changed = source.at[0, jnp.array([2, 4, 5])].add(5.0)
    np.testing.assert_allclose(adapter_context(model, changed, ids, mask), base, atol=1e-6)
    assert relative_error(adapter_context(model, source.at[0, 3].add(5.0), ids, mask), base) > 1e-3


@pytest.mark.parametrize("changed", ["source", "target"])
def test_both_text_paths_change_the_velocity(changed):
    model = small_model()
    source, ids = random(1, 5, 20), jnp.array([[3, 9, 4]])

    def velocity_of(source, ids):
        return velocity(model, random(1, 1, 4, 4, 16), jnp.array([0.5]), adapter_context(model, source, ids))

    base = velocity_of(source, ids)
    other = velocity_of(source + 1.0, ids) if changed == "source" else velocity_of(source, ids + 1)
    assert relative_error(other, base) > 1e-3


def test_times_can_differ_per_frame():
    model = small_model()
    latents, context, times = random(1, 3, 4, 4, 16), random(1, 5, 24), jnp.array([[0.2, 0.2, 0.2]])
    shared = velocity(model, latents, times[:, 0], context)
    assert relative_error(velocity(model, latents, times, context), shared) < VALUE_TOLERANCE
    # With self-attention closed a frame's velocity depends on its own time alone.
    graphdef, params = parameters.split(model)
    params["blocks.self_attn.output_proj.kernel"] *= 0.0
    model = parameters.merge(graphdef, params)
    mixed = velocity(model, latents, jnp.array([[0.2, 0.7, 0.2]]), context)
    alone = [velocity(model, latents, jnp.array([t]), context) for t in (0.2, 0.7)]
    assert relative_error(mixed[:, ::2], alone[0][:, ::2]) < VALUE_TOLERANCE
    assert relative_error(mixed[:, 1], alone[1][:, 1]) < VALUE_TOLERANCE


def test_context_rows_beyond_an_examples_length_are_ignored():
    model = small_model()
    latents, times, context = random(2, 1, 4, 4, 16), jnp.array([0.3, 0.6]), random(2, 9, 24)
    cut = quick_jit(lambda model, lengths: model(latents, times, context, context_lengths_b=lengths))
    alone = velocity(model, latents[1:], times[1:], context[1:, :6])
    assert relative_error(cut(model, jnp.array([9, 6]))[1:], alone) < VALUE_TOLERANCE


@functools.cache
def gradient_with(remat):
    graphdef, params = parameters.split(small_model(dataclasses.replace(SMALL, adapter=None)))
    latents, times, context = random(1, 1, 4, 4, 16), jnp.array([0.3]), random(1, 9, 24)

    def loss(params):
        return jnp.sum(parameters.merge(graphdef, params)(latents, times, context, remat=remat) ** 2)

    return quick_jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", [name for name in module.REMAT_POLICIES if name != "none"])
def test_remat_changes_no_gradient(remat):
    expected = gradient_with("none")
    for path, grad in gradient_with(remat).items():
        assert relative_error(grad, expected[path]) < GRADIENT_TOLERANCE, path


def test_seventeen_input_channels_predict_sixteen():
    config = DiTConfig(48, 1, 2, 64, 24, 8, latent_channels=17, adapter=None)
    model = small_model(config)
    latents = random(1, 2, 4, 4, 17)
    out = velocity(model, latents, jnp.array([0.5]), random(1, 3, 24))
    assert out.shape == (1, 2, 4, 4, 16)
    other = velocity(model, latents.at[..., 16].add(1.0), jnp.array([0.5]), random(1, 3, 24))
    assert relative_error(other, out) > 1e-3
    # Height and width are extrapolated by 3 instead of 4 (diffusion-pipe's cosmos_predict2.py, `get_dit_config`).
    positions = jnp.array([[[0, 1, 0]]])
    ratio = 3.0 ** (8 / 6) * 1e4
    expected = ratio ** -(np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(module.rotary_angles_3d(positions, config)[0, 0, 4:8], expected, rtol=1e-5)


# Sizes of released models (diffusion-pipe's cosmos_predict2.py, `get_dit_config`): (width, head size) → heads, from
# shapes alone.
@pytest.mark.parametrize(
    ("width", "head_size", "blocks", "heads"), [(2048, 128, 28, 16), (5120, 128, 36, 40), (1280, 64, 20, 20)]
)
def test_sizes_follow_from_the_shapes_in_a_file(width, head_size, blocks, heads):
    config = DiTConfig(width=width, blocks=blocks, heads=heads, mlp_width=4 * width)
    assert config.head_size == head_size
    _, abstract = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    shapes = {tensor.name: tensor.shape for tensor in file_tensors(dit_names.RULES, abstract)}
    assert shapes["x_embedder.proj.1.weight"] == (width, 68)
    assert dit_names.config_from_shapes(shapes) == config


def test_the_released_model_has_its_published_number_of_bytes():
    _, abstract = parameters.abstract(lambda rngs: AnimaDiT(DiTConfig(), rngs=rngs))
    # The released base model is a bfloat16 file of 4,182,218,328 bytes; its header is some 70 kB.
    assert 0 < 4_182_218_328 - 2 * parameters.count(abstract) < 200_000


@pytest.mark.parametrize("shape", [(1, 1, 5, 4, 16), (1, 1, 4, 4, 17)])
def test_odd_sides_and_wrong_channels_are_refused(shape):
    with pytest.raises(ValueError, match="expected even sides and 16 channels"):
        small_model()(jnp.zeros(shape), jnp.zeros(1), jnp.zeros((1, 3, 24)))


LATENTS, TIMES, CONTEXT = np.zeros((2, 1, 4, 4, 16), np.float32), np.full(2, 0.5, np.float32), np.zeros((2, 3, 24))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"latents": LATENTS.astype(np.int32)}, "latents are int32, expected floating-point numbers"),
        ({"times": np.array([500, 20])}, "times are int64, expected floating-point numbers"),
        ({"context": CONTEXT.astype(np.int8)}, "context rows are int8, expected floating-point numbers"),
        (
            {"latents": LATENTS[0]},
            r"latents have the shape \(1, 4, 4, 16\), expected \(batch, frames, y, x, channels\)",
        ),
        ({"times": np.float32(0.5)}, r"times have the shape \(\), expected \(batch,\) or \(batch, frames\)"),
        ({"times": TIMES[:1]}, "batch sizes differ: latents 2, times 1, context rows 2"),
        ({"context": CONTEXT[:1]}, "batch sizes differ: latents 2, times 2, context rows 1"),
        ({"latents": LATENTS[:1]}, "batch sizes differ: latents 1, times 2, context rows 2"),
        ({"context": CONTEXT[..., :23]}, r"context rows are \(2, 3, 23\), expected \(batch, rows, 24\)"),
        ({"times": np.full((2, 3), 0.5)}, "times of 3 frames for latents of 1 frame"),
        ({"times": TIMES * 1000}, r"times 500 to 500, expected 0 \(data\) to 1 \(noise\)"),
        ({"times": np.array([-0.01, 0.5])}, r"times -0.01 to 0.5, expected 0"),
        ({"times": np.array([np.nan, 0.5])}, r"times nan to nan, expected 0"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(inputs, message):
    arrays = {"latents": LATENTS, "times": TIMES, "context": CONTEXT} | inputs
    with pytest.raises(ValueError, match=message):
        small_model()(*map(jnp.asarray, arrays.values()) if "int64" not in message else arrays.values())
    if "expected 0" not in message:  # also while it is traced
        with pytest.raises(ValueError, match=message.replace("int64", "int32")):
            jax.eval_shape(small_model(), *arrays.values())


def test_tokens_must_fill_their_grid():
    with pytest.raises(ValueError, match="4 tokens for a grid of 1 × 2 × 3 patches"):
        small_model().velocity(jnp.zeros((2, 4, 64)), (1, 2, 3), jnp.asarray(TIMES), jnp.asarray(CONTEXT))
    with pytest.raises(ValueError, match="batch sizes differ: latents 2, times 2, context rows 2, grid 1"):
        small_model().velocity(jnp.zeros((2, 4, 64)), jnp.ones((1, 3), int), jnp.asarray(TIMES), jnp.asarray(CONTEXT))
    with pytest.raises(ValueError, match=r"tokens have the shape \(2, 4, 60\), expected \(batch, tokens, 64\)"):
        small_model().velocity(jnp.zeros((2, 4, 60)), (1, 2, 2), jnp.asarray(TIMES), jnp.asarray(CONTEXT))


@pytest.mark.parametrize("width", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_activations_beyond_float16_do_not_change_the_velocity(width):
    config = DiTConfig(width, 2, width // 128, 4 * width, 1024, 32, adapter=None)
    graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))
    params = random_params(shapes)
    # The residual stream reaches 10⁵ at once, and what the blocks add to it does too; float16 ends at 65504.
    params["x_embedder.kernel"] *= 3e4
    for path in ("mlp.layer2", "self_attn.output_proj", "cross_attn.output_proj"):
        params[f"blocks.{path}.kernel"] *= 1e5

    def run(dtype):
        inputs = (random(1, 1, 8, 8, 16).astype(dtype), jnp.array([0.4]), random(1, 16, 1024, seed=1).astype(dtype))
        model = parameters.merge(graphdef, parameters.cast_to_compute(params, dtype))
        return velocity(model, *inputs)

    exact, rounded = run(jnp.float32), run(jnp.float16)
    assert np.isfinite(rounded).all()
    assert relative_error(rounded, exact) < 5e-3  # eleven bits, after two blocks
