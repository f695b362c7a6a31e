"""What is not Anima's is named for what it is: models and adapters of other families, and files of other types."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import anima_jax
from anima_jax.adapters.file import open_adapter
from anima_jax.checkpoints.families import family
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from convert.__main__ import main
from tests.golden_files import GOLDEN, golden

FAMILIES = json.loads((GOLDEN / "families.json").read_text())
WITH_ADAPTERS = [row for row in FAMILIES if row["has_adapters"]]


def titled(row):
    return f"{row['expected']} ({row['program']})"


def refusal(load, path):
    with pytest.raises(UserError) as caught:
        load(path)
    (line,) = caught.value.messages
    assert str(path) in line
    assert "--allow_unused" not in line
    return line


def zeros(shapes, path):
    save_file({name: np.zeros([min(size, 8) for size in shape], np.float16) for name, shape in shapes.items()}, path)
    return path


# ---- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FAMILIES, ids=titled)
def test_a_model_of_another_family_is_named(row):
    found = family({name: tuple(shape) for name, shape in row["tensors"].items()})
    assert found is not None
    assert row["expected"] in found


SPELLINGS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", False),
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", False),
    "PEFT": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight", False),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", True),
    "SimpleTuner": ("lycoris_{}.lora_down.weight", "lycoris_{}.lora_up.weight", True),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("row", WITH_ADAPTERS, ids=titled)
def test_an_adapter_of_another_family_is_named(row, spelling):
    *names, flat = SPELLINGS[spelling]
    shapes = {}
    for name, shape in row["tensors"].items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and ("attn" in name or "attention" in name):
            module = module.replace(".", "_") if flat else module
            shapes |= {names[0].format(module): (4, shape[1]), names[1].format(module): (shape[0], 4)}
    assert shapes
    assert family(shapes) == f"{row['expected']} (LoRA)"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["lllite_dit_blocks_0_self_attn_q_proj.down.weight", "lllite_conditioning1.conv1.weight"],
            "Anima ControlNet-LLLite",
        ),
        (["lllite_unet_input_blocks_4_1.down.0.weight"], "SDXL ControlNet-LLLite"),
        (["lllite_modules.0.down.weight", "lllite_conditioning1.conv1.weight"], "older Anima ControlNet-LLLite"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["control_all_x_embedder.2-1.weight", "control_layers.0.after_proj.weight"], "a ControlNet"),
        (["controlnet_patch_embedding.weight", "proj_out.0.weight"], "a ControlNet"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["emb_params"], "textual-inversion"),
        (["clip_l", "clip_g"], "textual-inversion"),
        (["model.layers.3.linear_attn.in_proj_qkv.weight"], "Qwen3.5 text encoder"),
        (["net.anima_v2_connector.semantic_resampler.blocks.0.attn.q.weight"], "semantic connector of Anima-3.8B"),
        (["blocks.0.cross_attn.kv_linear.weight", "y_embedder.y_embedding"], "PixArt"),
    ],
)
def test_other_files_are_named(tmp_path, names, expected):
    path = zeros(dict.fromkeys(names, (8, 8)), tmp_path / "other.safetensors")
    assert expected in refusal(anima_jax.load_dit, path)


def test_the_names_of_animas_own_networks_and_adapters_belong_to_no_other_family():
    for name in ("dit_image.model", "vae.model", "lora_rank4", "lokr_rank4"):
        assert family({key: array.shape for key, array in golden(name).items()}) is None
    assert family({key: array.shape for key, array in golden("qwen3.model").items()}) == "a Qwen3 text encoder"


LOADERS = {
    "Anima transformer": anima_jax.load_dit,
    "Qwen3 text encoder": anima_jax.load_text_encoder,
    "Wan VAE": anima_jax.load_vae,
}
OWN = {
    "dit_image.model": "Anima transformer",
    "qwen3.model": "Qwen3 text encoder",
    "vae.model": "Wan VAE",
    "lora_rank4": "LoRA",
}


@pytest.mark.parametrize("wanted", LOADERS)
@pytest.mark.parametrize("given", OWN)
def test_swapped_files_are_named(wanted, given):
    if OWN[given] != wanted:
        line = refusal(LOADERS[wanted], GOLDEN / f"{given}.safetensors")
        assert f"has no {wanted}; it looks like: {OWN[given]}" in line


@pytest.mark.parametrize(
    ("expected", "load"),
    [
        ("T5 text encoder", anima_jax.load_text_encoder),
        ("CLIP text encoder", anima_jax.load_text_encoder),
        ("Llama or Mistral", anima_jax.load_text_encoder),
        ("VAE of Stable Diffusion or Flux", anima_jax.load_vae),
        ("VAE of Wan 2.2", anima_jax.load_vae),
        ("SDXL", anima_jax.load_dit),
        ("Flux", open_adapter),
    ],
)
def test_a_foreign_network_is_refused_by_its_name(tmp_path, expected, load):
    row = next(row for row in FAMILIES if row["expected"] == expected)
    path = zeros(row["tensors"], tmp_path / "foreign.safetensors")
    entered = (lambda path: load(path).__enter__()) if load is open_adapter else load
    assert expected in refusal(entered, path)


# ---- other types of files --------------------------------------------------------------------------------------------


def saved_image(kind):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    return out.getvalue()


def zipped(name):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, b"x" * 100)
    return out.getvalue()


TYPES = {
    "workflow": (b'{"last_node_id": 3, "nodes": [], "links": []}', "a ComfyUI workflow"),
    "API workflow": (b'{\n  "3": {"class_type": "KSampler", "inputs": {}}}', "a ComfyUI workflow"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "the index of a model in several files"),
    "PEFT": (b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4}', "PEFT's settings"),
    "JSON": (b'[1, 2, {"a": "bcdefgh"}]', "a file in JSON"),
    "text": ("Trigger words: 1girl, 日本語 …".encode(), "a text file"),
    "PNG": (saved_image("PNG"), "an image"),
    "WebP": (saved_image("WEBP"), "an image"),
    "PyTorch": (zipped("archive/data.pkl"), "a pickle"),
    "zip": (zipped("my_lora.safetensors"), "a zip archive"),
    "unfinished": (bytes(4096), "an unfinished download"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
    "HTML": (b"<!DOCTYPE html><html>login</html>", "a web page"),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_file_of_another_type_is_named_by_loading_and_by_inspect(tmp_path, capsys, case):
    content, expected = TYPES[case]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    assert expected in refusal(SafetensorsFile, path)
    main(["inspect", str(path)])
    assert f"kind      {expected}" in capsys.readouterr().out or expected in (
        "git-lfs pointer",
        "an unfinished download",
    )
