"""Networks are read from files of every dialect and written bit for bit; files that do not fit get a clear error."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import anima_jax
from anima_jax.checkpoints import models
from anima_jax.checkpoints.copying import cast, contiguous
from anima_jax.checkpoints.names import diffusers
from anima_jax.checkpoints.names.networks import DIT, QWEN3, WAN_VAE, locate
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from anima_jax.models import parameters
from tests.golden_files import GOLDEN, golden

DIT_FILE = GOLDEN / "dit_image.model.safetensors"
DIT_PREFIXES = ("net.", "model.diffusion_model.", "model.diffusion_model.net.", "diffusion_model.", "model.", "")
QWEN_IN_BUNDLE = "text_encoders.qwen3_06b.transformer."


def dit_tensors(prefix="net."):
    return {prefix + name.removeprefix("net."): array for name, array in golden("dit_image.model").items()}


def saved(tmp_path, tensors, name="model.safetensors"):
    save_file(tensors, tmp_path / name, {"format": "pt"})
    return tmp_path / name


def assert_same_files(actual, expected):
    with safe_open(actual, "np") as a, safe_open(expected, "np") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        assert a.metadata() == b.metadata()
        for key in sorted(b.keys()):
            assert a.get_slice(key).get_shape() == b.get_slice(key).get_shape()
            assert a.get_tensor(key).tobytes() == b.get_tensor(key).tobytes(), key


def params_of(model):
    return parameters.split(model)[1]


def assert_same_params(actual, expected):
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(actual[path]), np.asarray(array), err_msg=path)


@pytest.fixture(scope="module")
def dit_params():
    return params_of(anima_jax.load_dit(DIT_FILE))


# --- there and back ---


def test_transformer_file_is_written_bit_for_bit_as_read(tmp_path, dit_params):
    models.save_dit(tmp_path / "out.safetensors", dit_params)
    assert_same_files(tmp_path / "out.safetensors", DIT_FILE)


def test_text_encoder_file_is_written_bit_for_bit_as_read(tmp_path):
    path = GOLDEN / "qwen3.model.safetensors"
    models.save_network(QWEN3, tmp_path / "out.safetensors", params_of(anima_jax.load_text_encoder(path)))
    assert_same_files(tmp_path / "out.safetensors", path)


def test_vae_file_is_written_bit_for_bit_as_read(tmp_path):
    path = GOLDEN / "vae.model.safetensors"
    with models.open_network(WAN_VAE, path) as checkpoint:
        params = checkpoint.load()
    models.save_network(WAN_VAE, tmp_path / "out.safetensors", params, config=checkpoint.config)
    assert_same_files(tmp_path / "out.safetensors", path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_stored_dtype_is_kept_and_written_bit_for_bit(tmp_path, dtype):
    tensors = {name: array.astype(dtype) for name, array in dit_tensors().items()}
    models.save_dit(tmp_path / "in.safetensors", params_of(anima_jax.load_dit(DIT_FILE, dtype)))
    with SafetensorsFile(tmp_path / "in.safetensors") as file:
        assert all(file.read(name).tobytes() == array.tobytes() for name, array in tensors.items())
    models.save_dit(tmp_path / "out.safetensors", params_of(anima_jax.load_dit(tmp_path / "in.safetensors")))
    assert (tmp_path / "in.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()


def test_given_metadata_is_written(tmp_path, dit_params):
    models.save_dit(tmp_path / "out.safetensors", dit_params, metadata={"step": "12", "ü": "\n"})
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == {"step": "12", "ü": "\n"}


def test_kernels_are_the_files_matrices_transposed_and_stacked(dit_params):
    file = golden("dit_image.model")
    for layer in range(3):
        kernel = dit_params["blocks.self_attn.q_proj.kernel"][layer]
        np.testing.assert_array_equal(kernel, file[f"net.blocks.{layer}.self_attn.q_proj.weight"].T)


def test_dtypes_may_differ_from_parameter_to_parameter():
    frozen = {"blocks.mlp.layer1.kernel": jnp.bfloat16}
    params = params_of(anima_jax.load_dit(DIT_FILE, frozen))
    assert params["blocks.mlp.layer1.kernel"].dtype == jnp.bfloat16
    assert params["blocks.mlp.layer2.kernel"].dtype == jnp.float32


def test_layers_stored_in_different_dtypes_keep_their_values(tmp_path):
    tensors = dit_tensors()
    key = "net.blocks.1.self_attn.q_proj.weight"
    tensors[key] = tensors[key].astype(np.float16)
    kernel = params_of(anima_jax.load_dit(saved(tmp_path, tensors)))["blocks.self_attn.q_proj.kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[1], tensors[key].astype(np.float32).T)


def test_shardings_say_where_each_parameter_goes(dit_params):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    path = "blocks.self_attn.q_proj.kernel"
    with models.open_dit(DIT_FILE) as checkpoint:
        params = checkpoint.load(shardings={path: sharding})
    assert params[path].sharding == sharding
    assert_same_params(params, dit_params)


# --- dialects ---


@pytest.mark.parametrize("prefix", DIT_PREFIXES)
def test_transformer_is_read_under_every_prefix(tmp_path, dit_params, prefix):
    assert_same_params(params_of(anima_jax.load_dit(saved(tmp_path, dit_tensors(prefix)))), dit_params)


OTHER_PREFIXES = ("pipe.dit.", "transformer.net.", "base_model.model.net.", "module.model.", "ema_model.x.")


@pytest.mark.parametrize("prefix", OTHER_PREFIXES)
def test_every_network_is_found_under_any_prefix(prefix):
    for network, file in ((DIT, "dit_image.model"), (QWEN3, "qwen3.model"), (WAN_VAE, "vae.model")):
        names = {name.removeprefix(network.saved_prefix) for name in golden(file)}
        located = locate(network, [prefix + name for name in names] + ["vae_scale"])
        assert located is not None
        assert located.keys == {name: prefix + name for name in names}
        assert (located.prefix, located.unknown) == (prefix, ("vae_scale",))


def test_modules_that_pytorch_puts_between_are_removed(tmp_path, dit_params):
    tensors = {}
    for name, array in dit_tensors("").items():
        wrapped = re.sub(r"^(blocks\.\d+)", r"\1._orig_mod._checkpoint_wrapped_module", name)
        tensors["_orig_mod.net." + wrapped.replace("q_proj.", "q_proj.base_layer.")] = array
    assert_same_params(params_of(anima_jax.load_dit(saved(tmp_path, tensors))), dit_params)
    both = {"net.final_layer._orig_mod.linear.weight": tensors["_orig_mod.net.final_layer.linear.weight"]}
    assert "1 unknown in the file: net.final_layer._orig_mod" in refusal(saved(tmp_path, dit_tensors() | both))


@pytest.mark.parametrize("core", ["", "transformer.", "transformer.core.", "model.diffusion_model."])
def test_transformer_with_diffusers_names_is_read(tmp_path, dit_params, core):
    tensors = {}
    for name, array in dit_tensors("").items():
        inside = name.startswith("llm_adapter.")
        tensors[f"transformer.{name}" if inside else core + diffusers.transformer(name)] = array
    assert_same_params(params_of(anima_jax.load_dit(saved(tmp_path, tensors))), dit_params)


def test_vae_with_diffusers_names_is_read(tmp_path):
    tensors = {f"vae.{diffusers.vae(name, 2)}": array for name, array in golden("vae.model").items()}
    expected = params_of(anima_jax.load_vae(GOLDEN / "vae.model.safetensors"))
    assert_same_params(params_of(anima_jax.load_vae(saved(tmp_path, tensors))), expected)


@pytest.mark.parametrize("prefix", [*DIT_PREFIXES, *(f"{prefix}llm_adapter." for prefix in DIT_PREFIXES)])
def test_adapter_in_its_own_file_is_read_under_every_prefix(tmp_path, dit_params, prefix):
    inside = "net.llm_adapter."
    tensors = dit_tensors()
    bare = {name: array for name, array in tensors.items() if not name.startswith(inside)}
    adapter = {prefix + name.removeprefix(inside): a for name, a in tensors.items() if name.startswith(inside)}
    loaded = anima_jax.load_dit(saved(tmp_path, bare), adapter_path=saved(tmp_path, adapter, "adapter.safetensors"))
    assert_same_params(params_of(loaded), dit_params)


def test_transformer_without_adapter_has_none(tmp_path):
    bare = {name: array for name, array in dit_tensors().items() if "llm_adapter" not in name}
    params = params_of(anima_jax.load_dit(saved(tmp_path, bare)))
    assert params
    assert not any("llm_adapter" in path for path in params)


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_adapter_of_another_transformer_replaces_the_own_one(tmp_path, dit_params, prefix):
    other = saved(tmp_path, {name: array + 1 for name, array in dit_tensors(prefix).items()})
    params = params_of(anima_jax.load_dit(DIT_FILE, adapter_path=other))
    for path, array in params.items():
        np.testing.assert_array_equal(array, dit_params[path] + 1 if "llm_adapter" in path else dit_params[path])


def test_all_in_one_file_gives_each_network(tmp_path, dit_params):
    qwen, vae = golden("qwen3.model"), golden("vae.model")
    bundle = dit_tensors("model.diffusion_model.")
    bundle |= {QWEN_IN_BUNDLE + name: array for name, array in qwen.items()}
    bundle |= {f"vae.{name}": array for name, array in vae.items()}
    path = saved(tmp_path, bundle)
    assert_same_params(params_of(anima_jax.load_dit(path)), dit_params)
    for load, name in ((anima_jax.load_text_encoder, "qwen3.model"), (anima_jax.load_vae, "vae.model")):
        assert_same_params(params_of(load(path)), params_of(load(GOLDEN / f"{name}.safetensors")))


def test_text_encoder_is_read_without_prefix_and_with_a_language_model_head(tmp_path):
    qwen = golden("qwen3.model")
    expected = params_of(anima_jax.load_text_encoder(GOLDEN / "qwen3.model.safetensors"))
    bare = saved(tmp_path, {name.removeprefix("model."): array for name, array in qwen.items()})
    assert_same_params(params_of(anima_jax.load_text_encoder(bare)), expected)
    headed = saved(tmp_path, {**qwen, "lm_head.weight": qwen["model.embed_tokens.weight"]})
    assert_same_params(params_of(anima_jax.load_text_encoder(headed)), expected)


BUFFERS = (
    *("pos_embedder.seq", "pos_embedder.dim_spatial_range", "accum_iteration", "blocks.0.mlp._extra_state"),
    *("model_sampling.sigmas", "blocks.0.self_attn.rotary_emb.inv_freq", "rope.inv_freq", "alphas_cumprod"),
)


@pytest.mark.parametrize("prefix", ["net.", "model.", "", "model.diffusion_model."])
def test_buffers_that_change_nothing_are_named_and_skipped(tmp_path, capsys, dit_params, prefix):
    tensors = dit_tensors(prefix) | {f"{prefix}{name}": np.zeros(3, np.int64) for name in BUFFERS}
    tensors |= {name: np.zeros(1, np.float32) for name in ("accum_image_sample_counter", "model.model_sampling.sigmas")}
    assert_same_params(params_of(anima_jax.load_dit(saved(tmp_path, tensors))), dit_params)
    extra, printed = tensors.keys() - dit_tensors(prefix).keys(), capsys.readouterr().out
    assert f"skipped {len(extra)} harmless extra tensors: " in printed
    assert all(name in printed for name in extra)


@pytest.mark.parametrize(
    "prefix", ["text_encoders.qwen3_06b.transformer.model.", "text_encoders.transformer.model.", "model."]
)
def test_text_encoder_of_a_bundle_is_read_with_its_head_and_its_logit_scale(tmp_path, prefix):
    tensors = {prefix + name.removeprefix("model."): array for name, array in golden("qwen3.model").items()}
    tensors[prefix.removesuffix("model.") + "lm_head.weight"] = np.zeros((4, 4), np.float32)
    tensors["text_encoders.qwen3_06b.logit_scale"] = np.zeros((), np.float32)
    tensors["text_encoders.t5xxl.transformer.shared.weight"] = np.zeros((2, 2), np.float32)
    expected = params_of(anima_jax.load_text_encoder(GOLDEN / "qwen3.model.safetensors"))
    assert_same_params(params_of(anima_jax.load_text_encoder(saved(tmp_path, tensors))), expected)


def test_an_unknown_tensor_is_left_out_only_if_that_is_allowed(tmp_path, capsys, dit_params):
    path = saved(tmp_path, dit_tensors() | {"net.odd": np.zeros(2, np.float32)})
    line = refusal(path)
    assert "1 unknown in the file: net.odd; --allow_unused (allow_unused=True) goes on without them" in line
    assert_same_params(params_of(anima_jax.load_dit(path, allow_unused=True)), dit_params)
    assert f"{path}: skipped 1 unknown tensor: net.odd" in capsys.readouterr().out


@pytest.mark.parametrize("removed", ["net.llm_adapter.out_proj.weight", "net.x_embedder.proj.1.weight"])
def test_allow_unused_is_no_advice_where_a_part_of_the_model_would_be_lost(tmp_path, removed):
    tensors = {name: array for name, array in dit_tensors().items() if name != removed}
    path = saved(tmp_path, tensors | {"net.odd": np.zeros(2, np.float32)})
    assert "--allow_unused" not in refusal(path)


def test_the_base_of_the_anima_3_8b_bundle_is_read_with_a_message(tmp_path, capsys, dit_params):
    parts = (
        "semantic_resampler.blocks.0.attn.q_proj.weight",
        "quality_anchor.layer_mix_logits",
        "blocks.0.mlp.layer1.weight",
    )
    tensors = dit_tensors() | {f"net.anima_v2_connector.{name}": np.zeros((2, 2), np.float32) for name in parts}
    save_file(tensors, tmp_path / "v11.safetensors", {"anima_v2_bundle_format": "1"})
    assert_same_params(params_of(anima_jax.load_dit(tmp_path / "v11.safetensors")), dit_params)
    printed = capsys.readouterr().out
    assert "a bundle of Anima-3.8B v1.1: its base transformer is used alone, without the semantic connector" in printed
    assert "3 tensors: net.anima_v2_connector." in printed


# --- files that do not fit ---


def refusal(path, load=anima_jax.load_dit):
    with pytest.raises(UserError) as caught:
        load(path)
    (line,) = caught.value.messages
    assert str(path) in line
    assert len(line) < 1500
    return line


def test_error_lists_what_is_unknown_missing_and_misshapen(tmp_path):
    tensors = dit_tensors()
    tensors["net.blocks.0.self_attn.surprise"] = tensors.pop("net.blocks.0.self_attn.q_proj.weight")
    tensors["net.final_layer.linear.weight"] = np.zeros((64, 65), np.float32)
    line = refusal(saved(tmp_path, tensors))
    assert "1 unknown in the file: net.blocks.0.self_attn.surprise" in line
    assert "1 missing for the model: blocks.0.self_attn.q_proj.weight" in line
    assert "net.final_layer.linear.weight is (64, 65), expected (64, 64)" in line


def test_long_lists_are_shortened_with_a_count(tmp_path):
    tensors = dit_tensors() | {f"net.extra.{number}": np.zeros(1, np.float32) for number in range(50)}
    assert "50 unknown in the file: " in (line := refusal(saved(tmp_path, tensors)))
    assert "and 46 more" in line


def test_tensor_under_a_second_prefix_is_unknown(tmp_path):
    tensors = dit_tensors() | {"diffusion_model.x_embedder.proj.1.weight": np.zeros((64, 68), np.float32)}
    assert "1 unknown in the file: diffusion_model.x_embedder" in refusal(saved(tmp_path, tensors))


@pytest.mark.parametrize(
    "name", sorted(name for name in golden("dit_image.model") if not re.search(r"blocks\.[12]", name))
)
def test_every_missing_tensor_is_named(tmp_path, name):
    tensors = dit_tensors()
    del tensors[name]
    path = saved(tmp_path, tensors)
    if name == "net.llm_adapter.out_proj.weight":  # what says that there is an adapter
        assert "unknown in the file: net.llm_adapter" in refusal(path)
    else:
        assert re.search(rf"missing for the [\w ]+: {re.escape(name.removeprefix('net.'))}", refusal(path))


@pytest.mark.parametrize("name", sorted(golden("dit_image.model"))[::9])
@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (3, 5), (2, 2, 2)])
def test_every_misshapen_tensor_is_refused(tmp_path, name, shape):
    refusal(saved(tmp_path, {**dit_tensors(), name: np.zeros(shape, np.float32)}))


def test_gap_in_the_block_numbers_is_named(tmp_path):
    tensors = {name: array for name, array in dit_tensors().items() if not name.startswith("net.blocks.1.")}
    assert "no blocks.1" in refusal(saved(tmp_path, tensors))


def test_a_file_without_blocks_is_refused(tmp_path):
    tensors = {name: array for name, array in dit_tensors().items() if not name.startswith("net.blocks.")}
    assert "has 0 blocks" in refusal(saved(tmp_path, tensors))


def test_integer_weights_are_refused(tmp_path):
    tensors = dit_tensors()
    tensors["net.final_layer.linear.weight"] = np.zeros((64, 64), np.int8)
    assert "expected floating-point" in refusal(saved(tmp_path, tensors))


def test_the_error_names_the_kind_of_another_file():
    assert "it looks like: Qwen3 text encoder" in refusal(GOLDEN / "qwen3.model.safetensors")
    assert "it looks like: Wan VAE" in refusal(GOLDEN / "vae.model.safetensors")
    assert "it looks like: LoRA" in refusal(GOLDEN / "lora_rank4.safetensors")
    assert "it looks like: Anima transformer" in refusal(DIT_FILE, anima_jax.load_vae)
    assert "it contains 104 tensors" in refusal(GOLDEN / "samplers.safetensors", anima_jax.load_text_encoder)


def test_value_beyond_float16_is_refused_and_infinity_is_not(tmp_path, dit_params):
    kernel = dit_params["final_layer.linear.kernel"]
    params = dit_params | {"final_layer.linear.kernel": kernel.at[0, 0].set(-70000.0)}
    with pytest.raises(UserError, match=r"net\.final_layer\.linear\.weight: 1 values overflow in float16.*70000"):
        models.save_dit(tmp_path / "out.safetensors", params, dtype=np.float16)
    assert not any(tmp_path.iterdir())
    params = dit_params | {"final_layer.linear.kernel": kernel.at[0, 0].set(jnp.inf)}
    models.save_dit(tmp_path / "out.safetensors", params, dtype=np.float16)
    assert np.isinf(load_file(tmp_path / "out.safetensors")["net.final_layer.linear.weight"][0, 0])


# --- copying ---


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (16, 64), (0, 3), (33, 100)])
def test_contiguous_copy_equals_the_view(dtype, shape):
    view = np.random.default_rng(0).standard_normal(shape).astype(dtype).T
    copy = contiguous(view)
    assert copy.flags.c_contiguous
    assert copy.tobytes() == np.ascontiguousarray(view).tobytes()


def test_cast_rounds_to_nearest_even():
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # exactly between two bfloat16
    assert cast(halves, np.dtype(ml_dtypes.bfloat16), "a").astype(np.float32).tolist() == [1.0, 1 + 2**-6]


def test_a_component_of_a_diffusers_folder_with_other_tensors_is_named(tmp_path):
    (tmp_path / "vae").mkdir()
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "vae" / "model.safetensors")
    with pytest.raises(UserError, match=r"vae/model.safetensors: has no Wan VAE; it contains 1 tensor: x"):
        anima_jax.load_vae(tmp_path)
