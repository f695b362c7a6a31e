"""Quantised files of ComfyUI and bitsandbytes are read as the weights that their own libraries compute from them."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import anima_jax
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.errors import UserError
from anima_jax.models import parameters
from convert.__main__ import main
from tests.checkpoints.test_models import DIT_FILE, dit_tensors, saved
from tests.golden_files import GOLDEN, golden

QUANTISED = GOLDEN / "quantised.safetensors"
with SafetensorsFile(QUANTISED) as file_of_weights:
    NAMES = list(file_of_weights.tensors)

FLOAT8 = ml_dtypes.float8_e4m3fn


def is_quantised(key, array):
    return array.ndim == 2 and ".blocks." in key and key.endswith("layer1.weight")


def fp8_scaled(tensors, scale_name="weight_scale", per_row=False):
    """Return tensors with float8 codes and scales, and the weights that they stand for."""
    stored, values = {}, {}
    for key, array in tensors.items():
        stored[key] = values[key] = array
        if is_quantised(key, array):
            peak = np.abs(array).max(axis=1 if per_row else None, keepdims=per_row)
            scale = np.float32(peak / 448)
            stored[key] = (array / scale).astype(FLOAT8)
            stored[key.removesuffix("weight") + scale_name] = np.asarray(scale)
            values[key] = stored[key].astype(np.float32) * scale
    return stored, values


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_a_transformer_with_scaled_float8_weights_has_their_values(tmp_path, name, per_row):
    stored, values = fp8_scaled(dit_tensors("model.diffusion_model."), name, per_row)
    stored["model.diffusion_model.scaled_fp8"] = np.zeros(2, FLOAT8)
    params = parameters.split(anima_jax.load_dit(saved(tmp_path, stored)))[1]
    key = "model.diffusion_model.blocks.1.mlp.layer1.weight"
    np.testing.assert_array_equal(np.asarray(params["blocks.mlp.layer1.kernel"][1]), values[key].T)


def test_rows_are_read_alone(tmp_path):
    stored, values = fp8_scaled(dit_tensors(), per_row=True)
    with open_tensors(saved(tmp_path, stored)) as file:
        key = "net.blocks.0.mlp.layer1.weight"
        assert file.storage(key) == "fp8_scaled"
        assert file.storage("net.x_embedder.proj.1.weight") is None
        np.testing.assert_array_equal(file.read(key, slice(5, 9)), values[key][5:9])


def test_values_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path):
    stored, values = fp8_scaled(dit_tensors())
    params = parameters.split(anima_jax.load_dit(saved(tmp_path, stored), jnp.bfloat16))[1]
    expected = values["net.blocks.0.mlp.layer1.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["blocks.mlp.layer1.kernel"][0]), expected.T)


@pytest.mark.parametrize("name", [name.removeprefix("values|") for name in NAMES if name.startswith("values|")])
def test_golden_weights_have_the_values_of_the_libraries_that_wrote_them(name):
    with open_tensors(QUANTISED) as file:
        values, expected = file.read(f"{name}.weight"), file.read(f"values|{name}")
        last = file.read(f"{name}.weight", slice(3, len(values)))
    if name.startswith("convrot"):  # comfy_kitchen rounds each of 64 or 256 sums
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(last, values[3:])


@pytest.mark.parametrize(
    "part",
    ["llm_int8.SCB", "nf4_nested.weight.nested_quant_map", "nf4_nested.weight.nested_absmax", "nf4.weight.absmax"],
)
def test_a_column_of_scales_is_read_as_a_vector_of_them(tmp_path, part):
    name = part.partition(".")[0]
    with open_tensors(QUANTISED) as file:
        expected = file.read(f"{name}.weight")
    with SafetensorsFile(QUANTISED) as file:
        stored = {key: file.read(key) for key in file.tensors if key.startswith(f"{name}.")}
    with open_tensors(saved(tmp_path, stored | {part: stored[part][:, None]})) as file:
        np.testing.assert_array_equal(file.read(f"{name}.weight"), expected)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_a_weight_without_rows_has_no_values(tmp_path, name):
    with SafetensorsFile(QUANTISED) as file:
        stored = {key: file.read(key) for key in file.tensors if key.startswith(f"{name}.")}
    stored |= {f"{name}.{part}": stored[f"{name}.{part}"][:0] for part in ("weight", "weight_scale")}
    with open_tensors(saved(tmp_path, stored)) as file:
        assert file.read(f"{name}.weight").shape == file.tensors[f"{name}.weight"].shape


def test_a_convolution_with_scales_has_their_values(tmp_path):
    stored, expected = dict(golden("vae.model")), {}
    key = next(key for key, array in stored.items() if array.ndim == 5 and key.startswith("decoder.conv1"))
    codes = stored[key].astype(FLOAT8)
    expected = stored | {key: codes.astype(np.float32) * np.float32(0.5)}
    stored |= {key: codes, key.replace("weight", "weight_scale"): np.float32([0.5])}
    found, wanted = (
        parameters.split(anima_jax.load_vae(saved(tmp_path, tensors, name)))[1]
        for tensors, name in ((stored, "a.safetensors"), (expected, "b.safetensors"))
    )
    assert all(np.array_equal(found[path], value) for path, value in wanted.items())


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("TensorCoreFP8Layout", "float8_e4m3fn"),
        ("TensorCoreMXFP8Layout", "mxfp8"),
        ("TensorCoreNVFP4Layout", "nvfp4"),
    ],
)
def test_random_weights_are_those_of_comfy_kitchen(tmp_path, layout, name):
    torch = pytest.importorskip("torch")
    layout = getattr(pytest.importorskip("comfy_kitchen.tensor"), layout)
    weight = torch.randn(300, 224, generator=torch.manual_seed(1))
    codes, settings = layout.quantize(weight.clone())
    stored = {f"m.weight{end}": part for end, part in layout.state_dict_tensors(codes, settings).items()}
    stored["m.comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    pytest.importorskip("safetensors.torch").save_file(stored, tmp_path / "file.safetensors")
    with open_tensors(tmp_path / "file.safetensors") as file:
        expected = layout.dequantize(codes, settings)[:300].numpy()
        np.testing.assert_array_equal(file.read("m.weight"), expected)
        np.testing.assert_array_equal(file.read("m.weight", slice(127, 260)), expected[127:260])


# ---- what the commands do --------------------------------------------------------------------------------------------


def run(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def contents(path):
    with SafetensorsFile(path) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
def test_a_change_of_prefix_keeps_codes_and_scales(tmp_path, capsys, name):
    stored, _ = fp8_scaled(dit_tensors(), name)
    stored["net.scaled_fp8"] = np.zeros(2, FLOAT8)
    out = tmp_path / "out.safetensors"
    printed = run(capsys, "checkpoint", saved(tmp_path, stored), out, "--to", "comfyui")
    assert "quantised tensors kept as they are: fp8_scaled" in printed
    found = contents(out)
    assert found.keys() == {key.replace("net.", "model.diffusion_model.") for key in stored}
    for key, array in stored.items():
        assert found[key.replace("net.", "model.diffusion_model.")].tobytes() == array.tobytes(), key


@pytest.mark.parametrize("dtype", ["int8_convrot", "mxfp8", "nvfp4", "nf4"])
def test_a_change_of_prefix_keeps_every_format(tmp_path, capsys, dtype):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(capsys, "checkpoint", DIT_FILE, first, "--prefix", "net.", "--dtype", dtype, "--keep", "none")
    run(capsys, "checkpoint", first, second, "--to", "comfyui")
    renamed = {key.replace("net.", "model.diffusion_model.", 1): array for key, array in contents(first).items()}
    found = contents(second)
    assert found.keys() == renamed.keys()
    assert all(found[key].tobytes() == array.tobytes() for key, array in renamed.items())


def test_the_marker_of_a_text_encoder_stays_beside_its_model(tmp_path, capsys):
    stored = dict(golden("qwen3.model")) | {"scaled_fp8": np.zeros(2, FLOAT8)}
    for name in ("q_proj", "k_proj"):
        key = f"model.layers.0.self_attn.{name}."
        stored |= {f"{key}weight": stored[f"{key}weight"].astype(FLOAT8), f"{key}scale_weight": np.float32([0.5])}
    out = tmp_path / "out.safetensors"
    run(capsys, "checkpoint", saved(tmp_path, stored), out, "--prefix", "none")
    found = contents(out)
    assert found.keys() == {key.removeprefix("model.") for key in stored}
    with open_tensors(out) as file:
        expected = stored["model.layers.0.self_attn.q_proj.weight"].astype(np.float32) / 2
        np.testing.assert_array_equal(file.read("layers.0.self_attn.q_proj.weight"), expected)


def test_settings_in_the_metadata_become_tensors_under_the_new_names(tmp_path, capsys):
    stored, values = fp8_scaled(dit_tensors())
    layers = {key.removeprefix("net.").removesuffix(".weight"): {"format": "float8_e4m3fn"} for key in stored}
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    named = {name: one for name, one in layers.items() if f"net.{name}.weight_scale" in stored}
    save_file(stored, path, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": named})})
    run(capsys, "checkpoint", path, out, "--prefix", "none")
    assert bytes(contents(out)["blocks.0.mlp.layer1.comfy_quant"]) == b'{"format": "float8_e4m3fn"}'
    with open_tensors(out) as file:
        np.testing.assert_array_equal(file.read("blocks.0.mlp.layer1.weight"), values["net.blocks.0.mlp.layer1.weight"])
        assert file.metadata == {}


def test_settings_in_the_metadata_replace_those_in_a_tensor(tmp_path, capsys):
    with SafetensorsFile(QUANTISED) as file:
        stored = {f"m.{name[5:]}": file.read(name) for name in file.tensors if name.startswith("int8.")}
    stored["m.comfy_quant"] = settings("not JSON")
    layers = {"layers": {"m": {"format": "int8_tensorwise"}}}
    save_file(stored, tmp_path / "file.safetensors", {"_quantization_metadata": json.dumps(layers)})
    with open_tensors(tmp_path / "file.safetensors") as file:
        assert file.read_part("m.weight", "comfy_quant").tobytes() == b'{"format": "int8_tensorwise"}'


def test_dtypes_and_diffusers_folders_get_the_values(tmp_path, capsys):
    stored, values = fp8_scaled(dit_tensors())
    path, plain = saved(tmp_path, stored), tmp_path / "plain.safetensors"
    printed = run(capsys, "checkpoint", path, plain, "--prefix", "net.", "--dtype", "bf16")
    assert "quantised tensors dequantised to bfloat16: fp8_scaled" in printed
    expected = values["net.blocks.2.mlp.layer1.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(contents(plain)["net.blocks.2.mlp.layer1.weight"], expected)
    run(capsys, "checkpoint", path, tmp_path / "folder", "--to", "diffusers")
    found = contents(tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(found["transformer_blocks.2.ff.net.0.proj.weight"], expected)


def test_an_adapter_is_merged_into_the_values(tmp_path, capsys):
    stored, values = fp8_scaled(dit_tensors())
    quantised, plain = saved(tmp_path, stored), saved(tmp_path, values, "plain.safetensors")
    for path, out in ((quantised, "a.safetensors"), (plain, "b.safetensors")):
        run(capsys, "merge", path, GOLDEN / "lora_rank4.safetensors", tmp_path / out, "--dtype", "f32")
    merged, expected = contents(tmp_path / "a.safetensors"), contents(tmp_path / "b.safetensors")
    assert merged.keys() == expected.keys()
    assert all(np.array_equal(merged[key], array) for key, array in expected.items())
    assert "equal: 109 tensors" in run(capsys, "diff", quantised, plain)
    run(capsys, "merge", quantised, GOLDEN / "lora_rank4.safetensors", tmp_path / "c.safetensors")
    assert contents(tmp_path / "c.safetensors")["net.blocks.0.mlp.layer1.weight"].dtype == ml_dtypes.bfloat16


def test_inspect_says_what_is_quantised(tmp_path, capsys):
    printed = run(capsys, "inspect", saved(tmp_path, fp8_scaled(dit_tensors())[0]))
    assert "quantised fp8_scaled × 3, 8.00 bits per weight" in printed
    assert "kept      final_layer, llm_adapter, t_embedder, x_embedder; " in printed
    assert "F32 × 106, fp8_scaled × 3" in printed


# ---- what is wrong with a file ---------------------------------------------------------------------------------------

LAYER = "net.blocks.1.mlp.layer1."


def settings(text):
    return np.frombuffer(text if isinstance(text, bytes) else text.encode(), np.uint8)


def comfy(**values):
    return {f"{LAYER}comfy_quant": settings(json.dumps(values))}


def nested(**values):
    """Return the tensors of an nf4 weight with double quantisation, with these settings changed."""
    with SafetensorsFile(QUANTISED) as file:
        parts = {name.replace("nf4_nested.", LAYER): file.read(name) for name in NAMES if name.startswith("nf4_nested")}
    state = f"{LAYER}weight.quant_state.bitsandbytes__nf4"
    parts[state] = settings(json.dumps(json.loads(parts[state].tobytes()) | values))
    return parts | {f"{LAYER}weight_scale": None}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({f"{LAYER}weight_scale": None}, r"layer1\.weight_scale is missing"),
        ({f"{LAYER}weight": None}, r"layer1\.weight, which is missing"),
        ({f"{LAYER}weight_scale": np.ones((2, 2), np.float32)}, r"weight_scale is \(2, 2\), expected one scale"),
        ({f"{LAYER}weight_scale": np.array(1, np.int32)}, "weight_scale is I32, expected F32 or BF16 or F16"),
        (
            {f"{LAYER}weight_scale": np.array(np.nan, np.float32)},
            "layer1.weight: its weight_scale has nan, expected finite",
        ),
        (
            {f"{LAYER}weight_scale": np.array(-1, np.float32)},
            "its weight_scale has -1.0, expected finite numbers of at least 0",
        ),
        (comfy(format="svdquant_w4a4"), r"'svdquant_w4a4', which is not supported; known: float8_e4m3fn, .*nvfp4"),
        (comfy(format="float8_e4m3"), "did you mean"),
        (comfy(), "quantised as None"),
        (comfy(format="mxfp8"), "weight_scale is F32, expected F8_E8M0 or U8"),
        (comfy(format="nvfp4"), "weight is F8_E4M3, expected U8"),
        (comfy(format="int8_tensorwise"), "weight is F8_E4M3, expected I8"),
        ({f"{LAYER}comfy_quant": settings(b"\xff\xfe{}")}, "comfy_quant is not JSON"),
        ({f"{LAYER}comfy_quant": settings("[1]")}, r"comfy_quant is \[1\], expected a JSON object"),
        ({f"{LAYER}comfy_quant": settings("[" * 4000)}, "comfy_quant is not JSON"),
        ({f"{LAYER}comfy_quant": settings(" " * 5000)}, "expected JSON of at most 4096 bytes"),
        (
            {f"{LAYER}qweight": np.ones(4, np.int32)},
            "as SVDQuant, GPTQ or AWQ, which is not supported; known: ",
        ),
        ({f"net.{number}.scaled_fp8": np.zeros(2, FLOAT8) for number in range(65)}, "has 65 tensors scaled_fp8"),
        (nested(nested_offset=10**400), "nested_offset is 1000.*, expected a finite number"),
        (nested(nested_offset=True), "nested_offset is True, expected a finite number"),
        (
            {f"{LAYER}weight": np.ones((256, 64), np.int8), f"{LAYER}weight_scale": np.ones((256, 1), np.float32)}
            | comfy(format="int8_tensorwise", convrot=True),
            "groups of 256 inputs do not divide",
        ),
        (
            {f"{LAYER}weight": np.ones((256, 64), np.int8), f"{LAYER}weight_scale": np.ones((256, 1), np.float32)}
            | comfy(format="int8_tensorwise", convrot=True, convrot_groupsize=32),
            "convrot_groupsize is 32, expected a power of 4",
        ),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, changed, expected):
    stored = {key: array for key, array in (fp8_scaled(dit_tensors())[0] | changed).items() if array is not None}
    with pytest.raises(UserError, match=expected) as error:
        anima_jax.load_dit(saved(tmp_path, stored))
    assert len(error.value.messages) == 1


def test_integers_whose_settings_are_missing_are_not_taken_for_unrotated_ones(tmp_path):
    with SafetensorsFile(QUANTISED) as file:
        parts = {name: file.read(name) for name in file.tensors if name.startswith("convrot.")}
    stored = {name.replace("convrot", f"m.{number}"): part for number in range(2) for name, part in parts.items()}
    del stored["m.1.comfy_quant"]
    with pytest.raises(UserError, match=r"m\.1\.comfy_quant is missing, which m\.0\.weight has"):
        open_tensors(saved(tmp_path, stored))


def test_settings_of_layers_that_the_file_has_not_are_not_passed_over(tmp_path):
    with SafetensorsFile(QUANTISED) as file:
        stored = {f"net.{name}": file.read(name) for name in ("convrot.weight", "convrot.weight_scale")}
    layers = {"layers": {"model.convrot": {"format": "int8_tensorwise", "convrot": True}}}
    save_file(stored, tmp_path / "file.safetensors", {"_quantization_metadata": json.dumps(layers)})
    with pytest.raises(UserError, match=r"convrot\.comfy_quant is missing, which _quantization_metadata has"):
        open_tensors(tmp_path / "file.safetensors")


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_the_order_of_codes_and_scales_is_not_guessed(tmp_path, name):
    with SafetensorsFile(QUANTISED) as file:
        stored = {key: file.read(key) for key in file.tensors if key.startswith(f"{name}.weight")}
    with pytest.raises(UserError, match=f"is quantised as {name}, but {name}.comfy_quant is missing"):
        open_tensors(saved(tmp_path, stored))


def test_a_truncated_block_of_codes_is_named(tmp_path):
    with SafetensorsFile(QUANTISED) as file:
        stored = {f"m.{name[4:]}": file.read(name) for name in file.tensors if name.startswith("nf4.")}
    stored["m.weight"] = stored["m.weight"][:-3]
    with pytest.raises(UserError, match=r"m\.weight is \(637, 1\), expected 640 values"):
        open_tensors(saved(tmp_path, stored))


def test_inspect_reports_a_scale_that_is_not_a_number(tmp_path, capsys):
    stored = fp8_scaled(dit_tensors())[0] | {f"{LAYER}weight_scale": np.array(np.inf, np.float32)}
    printed = run(capsys, "inspect", saved(tmp_path, stored))
    assert f"problem   {LAYER}weight: its weight_scale has inf" in printed
    del stored[f"{LAYER}weight_scale"]
    printed = run(capsys, "inspect", saved(tmp_path, stored))
    assert "kind      Anima transformer" in printed
    assert "weight_scale is missing" in printed
