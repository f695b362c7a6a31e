"""`convert checkpoint --dtype FORMAT`: codes equal to those of ComfyUI's kernels and bitsandbytes, files that load."""

import io
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anima_jax.checkpoints.quantised.comfyui_write import QUANTISERS
from anima_jax.checkpoints.quantised.quantiser import quantise
from anima_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo, write
from anima_jax.checkpoints.tensor_files import open_tensors
from convert.__main__ import main
from tests.golden_files import GOLDEN, golden

DIT_FILE = str(GOLDEN / "dit_image.model.safetensors")
TEXT_FILE = str(GOLDEN / "qwen3.model.safetensors")

SETTINGS = {
    "fp8_scaled": {"format": "float8_e4m3fn"},
    "int8": {"format": "int8_tensorwise"},
    "int8_tensorwise": {"format": "int8_tensorwise"},
    "int8_convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    "mxfp8": {"format": "mxfp8"},
    "nvfp4": {"format": "nvfp4"},
}
"""What ComfyUI's `_load_quantized_module` (comfy/ops.py) reads from `comfy_quant`."""

LARGEST_ERRORS = {
    **{"fp8_scaled": 2**-4, "int8": 0.5 / 127, "int8_tensorwise": 0.5 / 127, "int8_convrot": 0.5 / 127},
    **{"mxfp8": 2**-4, "nvfp4": 1 / 6, "nf4": 0.16},
}
"""Format → largest error of one value, by the largest magnitude that shares its scale: half of the widest step."""


@pytest.fixture(scope="module")
def reference():
    with SafetensorsFile(GOLDEN / "quantised_by_comfyui.safetensors") as file:
        return {name: file.read(name) for name in file.tensors}


def converted(folder, source, *arguments):
    out = folder / "out.safetensors"
    main(["checkpoint", str(source), str(out), *arguments])
    return out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", *map(str, arguments)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", [*SETTINGS, "nf4"])
def test_codes_and_scales_are_those_of_the_reference(reference, name):
    values, quantiser = reference["values"], QUANTISERS[name]
    parts, _ = quantise(values, quantiser)
    expected = {key.removeprefix(f"{name}."): array for key, array in reference.items() if key.startswith(f"{name}.")}
    assert {part: (array.dtype, array.shape) for part, array in parts.items()} == {
        part: (dtype, shape_of(*values.shape)) for part, (dtype, shape_of) in quantiser.parts.items()
    }
    for part, array in parts.items():
        if name == "int8_convrot":  # sums of 256 products, in another order: one more or less is a rounding
            np.testing.assert_allclose(array.astype(float), expected[part], rtol=2e-6, atol=float(part == "weight"))
            assert np.mean(array != expected[part]) < 1e-3 or part != "weight"
        else:
            assert array.tobytes() == expected[part].tobytes(), part
    if name == "nf4":
        assert quantiser.constants(values.shape)["weight.quant_map"].tobytes() == expected["weight.quant_map"].tobytes()


@pytest.mark.parametrize("name", [*SETTINGS, "nf4"])
@pytest.mark.parametrize("factor", [0.0, -0.0, 1e-44, 1e-38, 1e-20, 1e15])
def test_zeros_and_the_ends_of_the_range_lose_no_more_than_others(reference, name, factor):
    # 1e-38: blocks of numbers that are not normal in float32; the reference has NaN for zeros.
    values = (reference["values"] * np.float32(factor)).astype(np.float32)
    parts, loss = quantise(values, QUANTISERS[name])
    assert all(np.isfinite(array.astype(np.float32)).all() for array in parts.values())
    largest = np.abs(values).max()
    found = QUANTISERS[name].dequantise(parts, values.shape)
    # Scales that would not be normal numbers are larger than needed.
    assert np.abs(found - values).max() <= 1.1 * LARGEST_ERRORS[name] * 4 * largest + 2**-117
    assert loss.error <= loss.size or largest < 1e-30


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_weight_of_another_dtype_is_quantised_as_its_values_in_float32(reference, dtype):
    values = (reference["values"] * np.float32(100)).astype(dtype)
    parts, _ = quantise(values, QUANTISERS["fp8_scaled"])
    expected, _ = quantise(values.astype(np.float32), QUANTISERS["fp8_scaled"])
    assert all(array.tobytes() == expected[part].tobytes() for part, array in parts.items())


def test_a_weight_of_many_ranges_of_rows_is_quantised_as_in_one(reference):
    values = np.tile(reference["values"], (45, 4)).astype(ml_dtypes.bfloat16)  # three ranges, the last one ragged
    values *= np.linspace(0.5, 1, 1440)[:, None].astype(values.dtype)
    for name in ("fp8_scaled", "nvfp4", "nf4"):
        parts, _ = quantise(values, QUANTISERS[name])
        whole = QUANTISERS[name].rows(values.astype(np.float32), float(np.abs(values.astype(np.float32)).max()))
        assert all(array.tobytes() == whole[part].tobytes() for part, array in parts.items())


@pytest.mark.parametrize("name", [*SETTINGS, "nf4"])
def test_a_file_has_what_comfyui_reads_and_reads_back_with_the_reported_error(tmp_path, capsys, name):
    out = converted(tmp_path, DIT_FILE, "--dtype", name, "--to", "comfyui", "--keep", "blocks.0.,llm_adapter")
    printed, prefix, original = capsys.readouterr().out, "model.diffusion_model.", golden("dit_image.model")
    written = SafetensorsFile(out)
    squares = np.zeros(2)
    with written, open_tensors(out) as file:
        for key, values in original.items():
            new = key.replace("net.", prefix, 1)
            if file.storage(new) is None:
                assert file.read(new).tobytes() == values.tobytes()
                continue
            squares += [np.square(x, dtype=float).sum() for x in (file.read(new) - values, values)]
            if name in SETTINGS:
                settings = written.read(f"{new.removesuffix('weight')}comfy_quant").tobytes()
                assert json.loads(settings) == SETTINGS[name]
    assert file.storage(f"{prefix}blocks.1.mlp.layer2.weight") is not None
    assert file.storage(f"{prefix}blocks.0.mlp.layer2.weight") is None
    (total,) = (line for line in printed.splitlines() if line.startswith("all "))
    assert float(total.split()[2]) == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=5e-3)  # of 3 digits
    assert max(map(len, printed.splitlines()[:-1])) <= 80


@pytest.mark.parametrize("name", SETTINGS)
def test_comfy_kitchen_loads_the_file(tmp_path, name):
    torch = pytest.importorskip("torch")
    tensor = pytest.importorskip("comfy_kitchen.tensor")
    out = converted(tmp_path, DIT_FILE, "--dtype", name, "--prefix", "none", "--keep", "none")
    layout = tensor.get_layout_class(
        {"fp8": "TensorCoreFP8Layout", "int8": "TensorWiseINT8Layout", "mxfp8": "TensorCoreMXFP8Layout"}.get(
            name.split("_")[0], "TensorCoreNVFP4Layout"
        )
    )
    with safe_open(out, "pt") as peer, open_tensors(out) as ours:
        keys = [key for key in ours.tensors if ours.storage(key)]
        for key in keys:
            shape = ours.tensors[key].shape
            parts = {part: peer.get_tensor(info.name) for part, info in ours.parts(key).items()}
            scales = {"scale": parts.get("weight_scale_2", parts["weight_scale"])}
            if name == "mxfp8":
                scales["scale"] = scales["scale"].view(torch.float8_e8m0fnu)
            if name == "nvfp4":
                scales["block_scale"] = parts["weight_scale"]
            if name == "int8_convrot":
                scales |= {"convrot": True, "convrot_groupsize": 256}
            params = layout.Params(**scales, orig_dtype=torch.float32, orig_shape=shape)
            weight = tensor.QuantizedTensor(parts["weight"], layout.__name__, params)
            # A rotation's sums are rounded in another order.
            tolerance = 1e-6 if name == "int8_convrot" else 0
            np.testing.assert_allclose(ours.read(key), weight.dequantize().numpy(), rtol=tolerance, atol=tolerance)
    assert len(keys) > 1


def test_what_quantisers_keep_is_kept_by_default(tmp_path):
    with open_tensors(converted(tmp_path, DIT_FILE, "--dtype", "int8")) as file:
        quantised = {key for key in file.tensors if file.storage(key)}
    kept = ("llm_adapter", "x_embedder", "t_embedder", "final_layer", ".blocks.0.", ".blocks.1.adaln_modulation")
    expected = {
        key
        for key, array in golden("dit_image.model").items()
        if array.ndim == 2 and not any(part in key for part in kept)
    }
    assert quantised == expected  # with the prefix of IN, which no flag changes


def test_a_folder_gives_quantised_files_except_of_the_vae(tmp_path):
    flags = {"--text_encoder": TEXT_FILE, "--vae": str(GOLDEN / "vae.model.safetensors")}
    main(["checkpoint", DIT_FILE, str(tmp_path / "folder"), "--to", "diffusers", *sum(flags.items(), ())])
    parts = {flag: str(tmp_path / f"{flag[2:]}.safetensors") for flag in flags}
    out = converted(tmp_path, tmp_path / "folder", *sum(parts.items(), ()), "--dtype", "int8", "--keep", "blocks.0.")
    quantised = {}
    for path in (out, *parts.values()):
        with open_tensors(path) as file:
            quantised[path] = [key for key in file.tensors if file.storage(key)]
    assert "net.blocks.1.adaln_modulation_mlp.1.weight" in quantised[out]
    assert len(quantised[parts["--text_encoder"]]) == 21
    assert not quantised[parts["--vae"]]


def test_a_plain_float8_file_is_scaled_and_its_other_tensors_are_not_float8(tmp_path):
    with SafetensorsFile(DIT_FILE) as file:
        plain = {name: file.read(name).astype(ml_dtypes.float8_e4m3fn) for name in file.tensors}
    source = tmp_path / "plain.safetensors"
    write(source, [TensorInfo(name, array.dtype, array.shape) for name, array in plain.items()], plain.__getitem__)
    with open_tensors(converted(tmp_path, source, "--dtype", "fp8_scaled")) as file:
        dtypes = {file.tensors[key].dtype for key in file.tensors if not file.storage(key)}
        values = file.read("net.blocks.2.mlp.layer1.weight")
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}
    before = plain["net.blocks.2.mlp.layer1.weight"].astype(np.float32)
    np.testing.assert_allclose(values, before, rtol=2**-4, atol=2**-10 * np.abs(before).max())


def test_a_text_encoder_keeps_its_embedding_and_its_names(tmp_path):
    original = load_file(TEXT_FILE)
    with open_tensors(converted(tmp_path, TEXT_FILE, "--dtype", "fp8_scaled", "--to", "comfyui")) as file:
        assert {key for key in file.tensors if file.storage(key)} == {key for key in original if "_proj." in key}
        assert file.tensors.keys() == original.keys()
        for key in original:
            np.testing.assert_allclose(
                file.read(key), original[key], rtol=2**-4, atol=1e-3 * np.abs(original[key]).max()
            )


def test_a_quantised_file_is_quantised_again_from_its_values(tmp_path, capsys):
    first = converted(tmp_path, DIT_FILE, "--dtype", "int8")
    (tmp_path / "again").mkdir()
    second = converted(tmp_path / "again", first, "--dtype", "nvfp4", "--keep", "blocks.0,self_attn")
    with open_tensors(first) as before, open_tensors(second) as after:
        key = "net.blocks.1.mlp.layer1.weight"
        assert after.storage(key) == "nvfp4"
        assert np.abs(after.read(key) - before.read(key)).max() <= np.abs(before.read(key)).max() / 6
        key = "net.blocks.1.self_attn.q_proj.weight"  # kept: as bfloat16
        assert after.read(key).tobytes() == before.read(key).astype(ml_dtypes.bfloat16).tobytes()
    assert "IN is quantised already (int8 × 26): its errors add to these" in capsys.readouterr().out
    assert "are int8 already" in refusal(capsys, first, tmp_path / "same", "--dtype", "int8")


def test_a_terminal_without_the_reports_characters_gets_others(tmp_path, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="ascii"))
    converted(tmp_path, DIT_FILE, "--dtype", "fp8_scaled")
    assert b"\\u2016" in screen.getvalue()  # ‖


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "fp8_scale"], "did you mean 'fp8_scaled'?"),
        (["--dtype", "nvfp4", "--to", "diffusers"], "--to diffusers: cannot hold nvfp4"),
        (["--dtype", "int8", "--keep", "attention"], "--keep attention: is in no name"),
        (["--dtype", "int8", "--keep", "weight"], "--keep names every matrix"),
        (["--dtype", "bf16", "--keep", "none"], "--keep: needs a quantised --dtype"),
    ],
)
def test_wrong_requests_are_one_line(tmp_path, capsys, arguments, expected):
    assert expected in refusal(capsys, DIT_FILE, tmp_path / "out", *arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path, capsys, value):
    name, tensors = "net.blocks.2.mlp.layer1.weight", golden("dit_image.model")
    tensors[name] = tensors[name].copy()
    tensors[name][1, 2] = value
    save_file(tensors, tmp_path / "in.safetensors")
    line = refusal(capsys, tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--dtype", "int8")
    assert f"{name}: NaN or infinite values" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
