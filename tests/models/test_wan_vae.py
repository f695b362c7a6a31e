"""The Wan VAE: the reference's numbers, diffusers' on other sizes, and what chunks and files must not change."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from anima_jax import assets
from anima_jax.checkpoints.names import file_tensors
from anima_jax.checkpoints.names.wan_vae import config_from_shapes, rules
from anima_jax.errors import UserError
from anima_jax.models.parameters import abstract, count, merge
from anima_jax.models.wan_vae import ChannelNorm, WanVAE, WanVAEConfig
from make_assets.tiny_vae import draw_images

GOLDEN = Path(__file__).parents[1] / "golden"
FLOAT32 = 2e-5  # relative to the largest value: float32 rounding through some forty layers
BFLOAT16 = 2e-2  # relative in the root of mean squares: bfloat16 keeps eight bits, and forty layers round


def read(tensors: dict[str, np.ndarray]):
    """(graphdef, parameters) of the model in a file's tensors, every one of them used."""
    config = config_from_shapes({name: tensor.shape for name, tensor in tensors.items()})
    graphdef, shapes = abstract(lambda rngs: WanVAE(config, rngs=rngs))
    placed = file_tensors(rules(config), shapes)
    assert {tensor.name: tensor.shape for tensor in placed} == {name: t.shape for name, t in tensors.items()}
    return graphdef, {tensor.path: jnp.array(tensor.layout.to_model(tensors[tensor.name])) for tensor in placed}


@functools.cache
def golden_model():
    return read(load_file(GOLDEN / "vae.model.safetensors"))


def channel_last(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 3, 4, 1)


@functools.cache
def golden(name: str) -> np.ndarray:
    return channel_last(load_file(GOLDEN / "vae.io.safetensors")[name])


# Half of the tests' time is LLVM's; the smallest effort is enough for networks this small.
jit = functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


@jit
def encode(graphdef, params, pixels):
    return merge(graphdef, params).encode(pixels)


@jit
def decode(graphdef, params, latents):
    return merge(graphdef, params).decode(latents)


def peak_error(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def rms_error(found, expected) -> float:
    return float(np.sqrt(np.mean((np.asarray(found) - expected) ** 2) / np.mean(np.asarray(expected) ** 2)))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_encode_and_decode_equal_the_reference(kind):
    pixels, latents, decoded = (golden(f"{kind}.{part}") for part in ("pixels", "latents", "decoded"))
    assert peak_error(encode(*golden_model(), pixels), latents) < FLOAT32
    assert peak_error(decode(*golden_model(), latents), decoded) < FLOAT32


def test_later_frames_do_not_change_earlier_ones():
    latents, decoded = golden("video.latents"), golden("video.decoded")
    assert peak_error(decode(*golden_model(), latents[:, :2]), decoded[:, :5]) < FLOAT32


def diffusers_name(name: str, blocks_per_level: int) -> str:
    """The name in diffusers' file of a tensor of the original file."""

    def upsampling(match: re.Match) -> str:
        level, block = divmod(int(match[1]), blocks_per_level + 2)
        part = "upsamplers.0" if block == blocks_per_level + 1 else f"resnets.{block}"
        return f"decoder.up_blocks.{level}.{part}."

    name = re.sub(r"^decoder\.upsamples\.(\d+)\.", upsampling, name)
    for pattern, replacement in (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"^(\w+)\.conv1\.", r"\1.conv_in."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.downsamples\.", ".down_blocks."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


@functools.cache
def peer():
    """A random AutoencoderKLQwenImage of another form than the released one, and the same model here."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = WanVAEConfig(
        base_width=12, multipliers=(1, 2, 2, 4), blocks_per_level=1, temporal_down=(True, False, True)
    )
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLQwenImage(
        base_dim=config.base_width,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks_per_level,
        temperal_downsample=list(config.temporal_down),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
            elif name.startswith("decoder.conv_out."):
                parameter.mul_(0.25)  # the peer clips to [-1, 1]
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    _, shapes = abstract(lambda rngs: WanVAE(config, rngs=rngs))
    names = [tensor.name for tensor in file_tensors(rules(config), shapes)]
    tensors = {name: state.pop(diffusers_name(name, config.blocks_per_level)) for name in names}
    assert not state, f"tensors of the peer that have no place here: {sorted(state)}"
    assert config_from_shapes({name: tensor.shape for name, tensor in tensors.items()}) == config
    return model, read(tensors)


@pytest.mark.parametrize("frames", [1, 9])
def test_equals_diffusers_on_random_weights_of_other_sizes(frames):
    torch = pytest.importorskip("torch")
    model, ours = peer()
    rng = np.random.default_rng(frames)
    pixels = rng.uniform(-1, 1, (1, frames, 24, 16, 3)).astype(np.float32)
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(pixels.transpose(0, 4, 1, 2, 3))).latent_dist.mode()
        decoded = channel_last(model.decode(mean).sample.numpy())
    assert np.abs(decoded).max() < 1.0
    statistics = np.array(model.config.latents_mean), np.array(model.config.latents_std)
    latents = ((channel_last(mean.numpy()) - statistics[0]) / statistics[1]).astype(np.float32)
    assert peak_error(encode(*ours, pixels), latents) < FLOAT32
    assert peak_error(decode(*ours, latents), decoded) < FLOAT32


def test_bfloat16_stays_near_float32():
    pixels, latents, decoded = (golden(f"video.{part}") for part in ("pixels", "latents", "decoded"))
    found_latents = encode(*golden_model(), jnp.asarray(pixels, jnp.bfloat16))
    found_pixels = decode(*golden_model(), jnp.asarray(latents, jnp.bfloat16))
    assert found_latents.dtype == found_pixels.dtype == jnp.float32
    assert rms_error(found_latents, latents) < BFLOAT16
    assert rms_error(found_pixels, decoded) < BFLOAT16


def test_memory_does_not_grow_with_the_length_of_a_video():
    config = WanVAEConfig(base_width=8, multipliers=(1, 2), blocks_per_level=1, temporal_down=(True,))
    graphdef, params = abstract(lambda rngs: WanVAE(config, rngs=rngs))

    def temporaries(function, shape) -> int:
        lowered = function.lower(graphdef, params, jax.ShapeDtypeStruct(shape, jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = (temporaries(encode, (1, frames, 32, 32, 3)) for frames in (17, 33))
    assert long < 1.02 * short
    short, long = (temporaries(decode, (1, frames, 16, 16, 16)) for frames in (9, 17))
    assert long < 1.02 * short


def test_a_file_is_converted_and_back_bit_for_bit():
    tensors = load_file(GOLDEN / "vae.model.safetensors")
    _, params = read(tensors)
    config = config_from_shapes({name: tensor.shape for name, tensor in tensors.items()})
    for tensor in file_tensors(rules(config), params):
        back = np.ascontiguousarray(tensor.layout.to_file(np.asarray(params[tensor.path])))
        assert back.tobytes() == tensors[tensor.name].tobytes(), tensor.name


def test_sizes_read_from_a_file_are_those_of_its_model():
    for config in (WanVAEConfig(), WanVAEConfig(base_width=6, multipliers=(1, 3), temporal_down=(True,))):
        _, shapes = abstract(lambda rngs, config=config: WanVAE(config, rngs=rngs))
        assert config_from_shapes({t.name: t.shape for t in file_tensors(rules(config), shapes)}) == config


def test_the_default_sizes_are_those_of_the_released_file():
    _, shapes = abstract(lambda rngs: WanVAE(WanVAEConfig(), rngs=rngs))
    assert 2 * count(shapes) / 1e6 == pytest.approx(254, abs=0.5)  # qwen_image_vae.safetensors: 254 MB of bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv2.weight": None}, "has no tensor conv2.weight"),
        ({"encoder.conv1.weight": (8, 27)}, "expected 5 axes"),
        ({"conv2.weight": (4, 4, 1, 1, 1)}, "4 latent channels"),
        ({"encoder.downsamples.4.residual.6.weight": None}, "the same number in each"),
        ({"encoder.downsamples.4.residual.6.weight": (12, 12, 3, 3, 3)}, "not multiples"),
    ],
)
def test_an_unsupported_vae_is_refused_on_one_line(change, message):
    shapes = {name: tensor.shape for name, tensor in load_file(GOLDEN / "vae.model.safetensors").items()}
    shapes = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(UserError, match=message):
        config_from_shapes(shapes)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 3), "1 \\+ 4n frames, not 3"),
        ((1, 0, 16, 16, 3), "1 \\+ 4n frames, not 0"),
        ((1, 1, 16, 12, 3), "multiples of 8, not 16×12"),
        ((1, 1, 16, 16, 4), "must be \\(b, t, y, x, 3\\)"),
        ((1, 16, 16, 3), "must be \\(b, t, y, x, 3\\)"),
    ],
)
def test_pixels_of_a_wrong_shape_are_refused(shape, message):
    graphdef, params = golden_model()
    with pytest.raises(ValueError, match=message):
        merge(graphdef, params).encode(jnp.zeros(shape))


def test_latents_of_a_wrong_shape_are_refused():
    graphdef, params = golden_model()
    for shape in ((1, 2, 2, 16), (1, 1, 2, 2, 4), (1, 0, 2, 2, 16)):
        with pytest.raises(ValueError, match="latents must be"):
            merge(graphdef, params).decode(jnp.zeros(shape))


def test_the_norm_of_zeros_is_zero_and_has_a_finite_gradient():
    norm = ChannelNorm(4)
    values, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((2, 4)))
    assert values == 0.0
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(norm(jnp.array([3.0, 0.0, 4.0, 0.0])), [1.2, 0.0, 1.6, 0.0], rtol=1e-6)


@functools.cache
def shipped_model():
    file = Path(assets.__file__).with_name("tiny_vae.safetensors")
    assert file.stat().st_size <= 2e6
    return read({name: tensor.astype(np.float32) for name, tensor in load_file(file).items()})


def test_the_shipped_vae_reconstructs_new_images_and_its_latents_are_normalised():
    images = draw_images(48, np.random.default_rng(2026))  # a seed that training did not use
    latents = encode(*shipped_model(), images)
    decoded = decode(*shipped_model(), latents).clip(-1.0, 1.0)
    psnr = 10 * np.log10(2.0**2 / np.mean((decoded - images) ** 2))
    assert psnr > 32.5  # 33.2 dB over 512 images, 33.3 to 33.5 over three draws of 64
    # Exact over the training images; six draws of 48 came within 0.15 and 0.05.
    np.testing.assert_allclose(np.mean(latents, (0, 1, 2, 3)), 0.0, atol=0.2)
    np.testing.assert_allclose(np.std(latents, (0, 1, 2, 3)), 1.0, atol=0.1)


def test_the_shipped_vae_sees_a_video_as_every_fourth_frame():
    video = draw_images(5, np.random.default_rng(1)).swapaxes(0, 1)
    latents = encode(*shipped_model(), video)
    kept = encode(*shipped_model(), video[0, ::4, None])[:, 0]
    assert peak_error(latents[0], kept) < FLOAT32
