"""The command line of the converters, run as a user runs it."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anima_jax.checkpoints.safetensors import TensorInfo, write
from convert.__main__ import main
from tests.golden_files import GOLDEN, golden

DIT_FILE = str(GOLDEN / "dit_image.model.safetensors")


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "convert", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def refusal(capsys, *arguments):
    """The one line of error for these arguments."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def inspect(capsys, path):
    main(["inspect", str(path)])
    return capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2_in_a_real_process(tmp_path):
    result = convert("inspect", tmp_path / "absent.safetensors")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path}/absent.safetensors: no such file\n"


def test_transformer_changes_prefix_and_nothing_else_in_a_real_process(tmp_path):
    save_file(golden("dit_image.model"), tmp_path / "in.safetensors", {"format": "pt", "title": "ours"})
    out = tmp_path / "out.safetensors"
    result = convert("checkpoint", tmp_path / "in.safetensors", out, "--prefix", "model.diffusion_model.")
    assert (result.returncode, result.stderr) == (0, "")
    written, original = load_file(out), golden("dit_image.model")
    assert written.keys() == {name.replace("net.", "model.diffusion_model.", 1) for name in original}
    for name, array in original.items():
        assert written[name.replace("net.", "model.diffusion_model.", 1)].tobytes() == array.tobytes()
    with safe_open(out, "np") as file:
        assert file.metadata() == {"format": "pt", "title": "ours"}


def test_there_and_back_gives_the_same_bytes(tmp_path, capsys):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    main(["checkpoint", DIT_FILE, str(tmp_path / "start.safetensors"), "--prefix", "net."])
    main(["checkpoint", DIT_FILE, str(there), "--prefix", "none"])
    main(["checkpoint", str(there), str(back), "--prefix", "net."])
    assert all(not name.startswith("net.") for name in load_file(there))
    assert back.read_bytes() == (tmp_path / "start.safetensors").read_bytes()


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16), ("f32", np.float32)])
def test_dtype_is_converted(tmp_path, flag, dtype):
    out = tmp_path / "out.safetensors"
    main(["checkpoint", DIT_FILE, str(out), "--prefix", "net.", "--dtype", flag])
    with safe_open(out, "np") as file:
        for name, array in golden("dit_image.model").items():
            assert file.get_tensor(name).tobytes() == array.astype(dtype).tobytes()


def test_what_is_left_out_is_printed(tmp_path, capsys):
    tensors = golden("dit_image.model") | {"net.pos_embedder.seq": np.zeros(4), "vae.conv1.bias": np.zeros(4)}
    save_file(tensors, tmp_path / "in.safetensors")
    main(["checkpoint", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--prefix", "net."])
    printed = capsys.readouterr().out
    assert "left out 1 extra buffer: net.pos_embedder.seq" in printed
    assert "left out 1 tensor of other networks: vae.conv1.bias" in printed
    assert load_file(tmp_path / "out.safetensors").keys() == golden("dit_image.model").keys()


def test_existing_output_is_kept_unless_forced(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    assert "already exists" in refusal(capsys, "checkpoint", DIT_FILE, out, "--prefix", "net.")
    assert out.read_bytes() == b"precious"
    main(["checkpoint", DIT_FILE, str(out), "--prefix", "net.", "--force"])
    assert load_file(out).keys() == golden("dit_image.model").keys()


def test_input_is_never_the_output(tmp_path, capsys):
    path, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(golden("dit_image.model"), path)
    link.symlink_to(path)
    before = path.read_bytes()
    assert "is IN itself" in refusal(capsys, "checkpoint", path, link, "--prefix", "none", "--force")
    assert path.read_bytes() == before


def test_overflow_is_refused_and_nan_is_reported(tmp_path, capsys):
    tensors = golden("dit_image.model")
    name = "net.final_layer.linear.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][0, :3] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    convert_to_f16 = ("--prefix", "net.", "--dtype", "f16")
    main(["checkpoint", str(tmp_path / "nan.safetensors"), str(tmp_path / "out.safetensors"), *convert_to_f16])
    assert f"warning: {name}: 3 NaN or infinite values" in capsys.readouterr().err
    tensors[name][0, :3] = 1e6
    save_file(tensors, tmp_path / "big.safetensors")
    line = refusal(capsys, "checkpoint", tmp_path / "big.safetensors", tmp_path / "no.safetensors", *convert_to_f16)
    assert f"{name}: 3 values overflow in float16, the largest is 1e+06" in line
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["inspekt"], "invalid choice: 'inspekt'"),
        (["inspect"], "FILE"),
        (["checkpoint", DIT_FILE, "x"], "--prefix"),
        (["checkpoint", DIT_FILE, "x", "--prefix", "nett."], "invalid choice: 'nett.'"),
        (["checkpoint", DIT_FILE, "x", "--prefix", "net.", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["checkpoint", DIT_FILE, "absent/x", "--prefix", "net."], "does not exist"),
        (["checkpoint", "absent", "x", "--prefix", "net."], "no such file"),
        (["checkpoint", str(GOLDEN / "lora_rank4.safetensors"), "x", "--prefix", "net."], "it looks like: LoRA"),
    ],
)
def test_wrong_command_lines_are_one_line(capsys, arguments, expected):
    assert expected in refusal(capsys, *arguments)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "dit_image.model",
            [
                "kind Anima transformer",
                "prefix net.",
                "width 64, 3 blocks, 4 heads of 16, MLP 256, context width 48",
                "16 latent channels",
                "adapter width 48, 2 blocks",
                "109, 1.35 MB, F32",
                "metadata format = pt",
            ],
        ),
        ("qwen3.model", ["kind Qwen3 text encoder", "prefix model.", "3 layers, 4 query and 2 key heads of 16"]),
        ("vae.model", ["kind Wan VAE", "prefix none", "widths 8, 16, 32, 32"]),
        (
            "lora_rank4",
            ["kind LoRA", "prefix diffusion_model.", "68 modules, rank 4, no alpha", "20 of the text adapter"],
        ),
        ("lokr_rank4", ["kind LoKr", "prefix diffusion_model.", "68 modules, rank 4, no alpha"]),
        ("samplers", ["kind unknown", "unknown 104 tensors"]),
    ],
)
def test_inspect_describes_a_file(capsys, file, expected):
    printed = " ".join(inspect(capsys, GOLDEN / f"{file}.safetensors").split())
    for words in expected:
        assert words in printed
    assert "problem" not in printed


def test_inspect_knows_an_adapter_alone_and_a_kohya_lora(tmp_path, capsys):
    inside = "net.llm_adapter."
    adapter = {n.removeprefix(inside): a for n, a in golden("dit_image.model").items() if n.startswith(inside)}
    save_file(adapter, tmp_path / "adapter.safetensors")
    printed = inspect(capsys, tmp_path / "adapter.safetensors")
    assert "Anima text adapter" in printed
    assert "all 42 tensors" in printed
    kohya = {}
    for name, array in golden("lora_rank4").items():
        module, side = name.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".lora_", 1)
        module = "lora_unet_" + module.replace(".", "_")
        kohya[f"{module}.lora_{'down' if side == 'A' else 'up'}.weight"] = array
        kohya[f"{module}.alpha"] = np.array(2.0, np.float32)
    save_file(kohya, tmp_path / "kohya.safetensors")
    printed = inspect(capsys, tmp_path / "kohya.safetensors")
    assert "kohya's" in printed
    assert "68 modules, rank 4, with alpha" in printed
    assert "unknown" not in printed


def test_inspect_reports_what_is_wrong_with_a_file(tmp_path, capsys):
    tensors = golden("dit_image.model")
    tensors["net.blocks.0.odd"] = tensors.pop("net.blocks.0.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "odd.safetensors")
    printed = inspect(capsys, tmp_path / "odd.safetensors")
    assert "1 unknown in the file: net.blocks.0.odd" in printed
    assert "1 missing for the model: blocks.0.self_attn.q_proj.weight" in printed


# ---- values and folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("dit_image.model", "net.final_layer.linear.weight"),
        ("lora_rank4", "diffusion_model.blocks.1.mlp.layer1.lora_B.weight"),
    ],
)
def test_inspect_names_the_tensors_with_nan_or_infinity(tmp_path, capsys, file, key, dtype, value):
    tensors = {name: array.astype(dtype) for name, array in golden(file).items()}
    tensors[key][0, :3] = value
    write(tmp_path / "odd.safetensors", [TensorInfo(n, a.dtype, a.shape) for n, a in tensors.items()], tensors.get)
    assert f"problem   NaN or infinite values in 1 tensor: {key} (3)" in inspect(capsys, tmp_path / "odd.safetensors")


def test_inspect_names_zeros(tmp_path, capsys):
    lora, zero = golden("lora_rank4"), lambda array: 0 * array
    idle = {name: zero(array) if ".lora_B." in name else array for name, array in lora.items()}
    save_file(idle, tmp_path / "idle.safetensors")
    assert "problem   it changes nothing: every update is zero" in inspect(capsys, tmp_path / "idle.safetensors")
    key = "diffusion_model.blocks.1.mlp.layer1.lora_B.weight"
    save_file(lora | {key: zero(lora[key])}, tmp_path / "half.safetensors")
    printed = inspect(capsys, tmp_path / "half.safetensors")
    assert "zeros     1 module with an update of zero: blocks.1.mlp.layer1" in printed
    assert "problem" not in printed
    model = golden("dit_image.model")
    save_file(
        model | {"net.t_embedding_norm.weight": zero(model["net.t_embedding_norm.weight"])}, tmp_path / "m.safetensors"
    )
    assert "zeros     1 tensor of zeros only: net.t_embedding_norm.weight" in inspect(
        capsys, tmp_path / "m.safetensors"
    )


def lines_of(capsys, folder):
    first, *rest = inspect(capsys, folder).splitlines()
    return first, {line.split()[0]: line for line in rest}


def test_inspect_describes_every_file_of_a_folder(tmp_path, capsys):
    (tmp_path / "loras" / "old").mkdir(parents=True)
    for name in ("lora_rank4", "lokr_rank4", "vae.model"):
        save_file(golden(name), tmp_path / "loras" / f"{name}.safetensors")
    idle = {name: 0 * array for name, array in golden("lora_rank4").items()}
    save_file(idle, tmp_path / "loras" / "old" / "zero.safetensors")
    flux = {f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{x}.weight": np.ones((4, 4), "f4") for x in "AB"}
    save_file(flux, tmp_path / "loras" / "flux.safetensors")
    cut = (tmp_path / "loras" / "lora_rank4.safetensors").read_bytes()[:-9]
    (tmp_path / "loras" / "cut.safetensors").write_bytes(cut)
    (tmp_path / "loras" / "notes.txt").write_text("trigger words of my adapters")
    first, lines = lines_of(capsys, tmp_path / "loras")
    assert first == f"{tmp_path}/loras: a folder, 7 files"
    expected = {
        "lora_rank4.safetensors": "LoRA (adapter); 68 modules, rank 4",
        "lokr_rank4.safetensors": "LoKr (adapter)",
        "vae.model.safetensors": "Wan VAE",
        "flux.safetensors": "Flux (LoRA), not Anima's",
        "cut.safetensors": "is cut off or damaged",
        "notes.txt": "a text file",
        "old/zero.safetensors": "problem: it changes nothing",
    }
    assert {name: words for name, words in expected.items() if words not in lines[name]} == {}


def test_inspect_describes_diffusers_folders_and_runs(tmp_path, capsys):
    main(["checkpoint", DIT_FILE, str(tmp_path / "anima"), "--to", "diffusers"])
    capsys.readouterr()
    first, lines = lines_of(capsys, tmp_path / "anima")
    assert "a diffusers folder" in first
    assert "Anima transformer" in lines["transformer/diffusion_pytorch_model.safetensors"]
    assert "Anima text adapter" in lines["text_conditioner/diffusion_pytorch_model.safetensors"]
    assert "the settings of a model" in lines["transformer/config.json"]
    run = tmp_path / "run"
    (run / "epoch1").mkdir(parents=True)
    save_file(golden("lora_rank4"), run / "epoch1" / "my_style.safetensors")
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    first, lines = lines_of(capsys, run)
    assert "the folder of a training run" in first
    assert lines["checkpoints/4"].endswith("a checkpoint to resume from")


@pytest.mark.parametrize("allowed", [False, True])
def test_checkpoint_leaves_unknown_tensors_out_only_if_that_is_allowed(tmp_path, capsys, allowed):
    save_file(golden("dit_image.model") | {"net.odd": np.zeros(4)}, tmp_path / "in.safetensors")
    arguments = ["checkpoint", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--to", "comfyui"]
    if not allowed:
        assert "1 unknown in the file: net.odd; --allow_unused" in refusal(capsys, *arguments)
        return
    main([*map(str, arguments), "--allow_unused"])
    assert "left out 1 unknown tensor: net.odd" in capsys.readouterr().out
    assert len(load_file(tmp_path / "out.safetensors")) == len(golden("dit_image.model"))
