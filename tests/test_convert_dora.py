"""`convert lora --base`: a DoRA for ComfyUI. Oracle: its norm as `comfyui_dora` has it, which ComfyUI's files test."""

import numpy as np
from safetensors.numpy import load_file, save_file

from anima_jax.adapters.file import open_adapter
from tests.adapters.adapter_files import LORA
from tests.golden_files import golden, relative_error
from tests.models.networks import normal
from tests.test_convert_adapters import DIT_FILE, convert, refusal


def dora(path, modules=("blocks.0.self_attn.q_proj", "llm_adapter.blocks.0.self_attn.q_proj")):
    """A DoRA by output on some of the golden model's layers."""
    tensors = {}
    for module in modules:
        outputs, inputs = golden("dit_image.model")[f"net.{module}.weight"].shape
        tensors |= {f"diffusion_model.{module}.lora_A.weight": 0.1 * normal(3, inputs)}
        tensors |= {f"diffusion_model.{module}.lora_B.weight": normal(outputs, 3, seed=1)}
        tensors |= {f"diffusion_model.{module}.dora_scale": 1 + np.abs(normal(outputs, 1, seed=2))}
    save_file(tensors, path)
    return path


def with_adapter(path, **options) -> dict[str, np.ndarray]:
    """The golden model's weights with a file's adapter, with or without ComfyUI's arithmetic."""
    base = golden("dit_image.model")
    with open_adapter(path) as adapter:
        patches = adapter.patches.items()
        return {name: patch.applied(base[f"net.{name}.weight"], 1.0, **options) for name, patch in patches}


def test_a_dora_for_comfyui_gives_the_trained_weights_by_comfyuis_norm_and_comes_back(tmp_path, capsys):
    source = dora(tmp_path / "a.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "comfyui", "stripped", "diffusers")}
    convert("lora", source, paths["plain"], "--to", "comfyui")
    assert "ComfyUI divides the DoRA of 2 modules by the norm of W" in capsys.readouterr().out
    convert("lora", source, paths["comfyui"], "--to", "comfyui", "--base", DIT_FILE)
    assert "ComfyUI divides" not in capsys.readouterr().out
    save_file(load_file(paths["comfyui"]), paths["stripped"])  # as ComfyUI reads it, which heeds no metadata
    assert "--base FILE" in refusal(capsys, "lora", paths["comfyui"], paths["diffusers"], "--to", "diffusers")
    convert("checkpoint", DIT_FILE, tmp_path / "folder", "--to", "diffusers")
    convert("lora", paths["comfyui"], paths["diffusers"], "--to", "diffusers", "--base", tmp_path / "folder")
    trained = with_adapter(source)
    found = {name: with_adapter(path, comfyui_dora=name == "stripped") for name, path in paths.items()}
    for name in ("plain", "comfyui", "stripped", "diffusers"):
        assert all(relative_error(found[name][module], trained[module]) < 1e-6 for module in trained), name
    differing = with_adapter(source, comfyui_dora=True)
    assert all(relative_error(differing[module], trained[module]) > 0.01 for module in trained)


def test_a_base_that_does_not_fit_a_dora_is_named(tmp_path, capsys):
    small = {name: array for name, array in golden("dit_image.model").items() if "llm_adapter." not in name}
    save_file(small, tmp_path / "small.safetensors")
    arguments = ("lora", dora(tmp_path / "a.safetensors"), tmp_path / "no", "--to", "comfyui", "--base")
    assert "--base lacks the weights of 1 module: llm_adapter" in refusal(
        capsys, *arguments, tmp_path / "small.safetensors"
    )
    assert "has no Anima transformer; it looks like: LoRA" in refusal(capsys, *arguments, LORA)
    convert("lora", LORA, tmp_path / "out", "--to", "comfyui", "--base", DIT_FILE)
    assert "--base changes nothing" in capsys.readouterr().out
