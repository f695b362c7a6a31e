"""The command line: what it generates, what it writes next to the pixels, and its error messages."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file

from anima_jax import generate
from anima_jax.checkpoints import locations
from anima_jax.config.load import load_config
from anima_jax.convert.__main__ import main as convert
from anima_jax.sampling.arguments import older_image
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.image_text import from_text, read_recipe, to_text
from anima_jax.sampling.images import save_image
from anima_jax.sampling.recipe import Recipe
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.disks import fill, small_disk
from tests.models.networks import normal
from tests.small_run import ASSETS, CONFIG, write_config, write_transformer


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "base.safetensors"
    write_transformer(path)
    files = {"transformer": path, "vae": ASSETS / "tiny_vae.safetensors"}
    files |= {"text_encoder": ASSETS / "tiny_qwen3.safetensors", "tokenizers": ASSETS / "tokenizers"}
    return [word for name, file in files.items() for word in (f"--{name}", str(file))] + ["--dtype", "float32"]


SMALL = ["--width", "32", "--height", "48", "--steps", "4"]


def run(*arguments: object) -> None:
    generate.main([str(argument) for argument in arguments])


def error_of(capsys, *arguments: object, code: int = 2) -> str:
    """The one-line error of these arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    *bar, line = capsys.readouterr().err.splitlines()
    assert (ended.value.code, any("Traceback" in line for line in bar)) == (code, False)
    assert code == 1 or not bar  # a run that has begun shows its progress first
    return line.removeprefix("error: ")


def test_like_generates_the_same_image_and_flags_override_its_parameters(networks, tmp_path, capsys):
    first, again, other = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    flags = ["--negative_prompt", "ugly", "--guidance_scale", "2.5", "--sampler", "heun", "--schedule", "beta"]
    flags += ["--shift", "1.7", "--guidance_interval", "0.1", "0.9", "--cfg_zero_star", "--noise", "jax"]
    flags += ["--rescale_cfg", "--cfg_norm", "1.2", "--apg_momentum", "-0.5", "--sigmas", "1,0.8", "0.3", "0"]
    run(*networks, *SMALL, *flags, "--prompt", "a (red:1.3) circle", "--seed", 2**63 + 1, "-o", first)
    run("--like", first, "-o", again)
    np.testing.assert_array_equal(Image.open(again), Image.open(first))
    assert Image.open(again).text == Image.open(first).text
    run("--like", first, "-o", other, "--seed", 4, "--no-cfg_zero_star", "--no-apg")
    assert np.any(np.asarray(Image.open(other)) != np.asarray(Image.open(first)))
    values = from_text("c.png", Image.open(other).text).values
    expected = {
        "seed": 4,
        "apg": False,
        "apg_momentum": 0.0,
        "cfg_zero_star": False,
        "shift": 1.7,
        "rescale_cfg": 0.7,
        "sigmas": (1.0, 0.8, 0.3, 0.0),
    }
    assert {name: values[name] for name in expected} == expected
    assert capsys.readouterr().out.split() == [str(first), str(again), str(other)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_full_disk_is_noticed_before_anything_is_drawn(networks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate.AnimaPipeline, "load", None)  # which would take minutes
    with small_disk(tmp_path / "disk", 128) as disk:
        fill(disk, leave=8192)
        found = error_of(capsys, *networks, *SMALL, "--prompt", "a", "-o", disk / "new" / "a.png")
        assert found == f"{disk}/new/a.png: may need 9 kB, but only 8 kB are free on the disk of {disk}/new"
        fill(disk, leave=0)
        found = error_of(capsys, *networks, *SMALL, "--prompt", "a", "-o", disk / "a.png")
        assert found == f"{disk}/a.png: cannot be written: the disk is full"


def test_a_dora_is_applied_as_trained_or_as_in_comfyui_and_like_does_the_same(networks, tmp_path):
    module, width = "diffusion_model.blocks.0.mlp.layer1", CONFIG.width
    factors = {"lora_A.weight": (4, width), "lora_B.weight": (CONFIG.mlp_width, 4), "dora_scale": (CONFIG.mlp_width, 1)}
    tensors = {f"{module}.{name}": np.abs(normal(*shape)) for name, shape in factors.items()}
    save_file(tensors, tmp_path / "dora.safetensors")
    trained, comfyui, again = paths = [tmp_path / f"{name}.png" for name in ("trained", "comfyui", "again")]
    flags = [*networks, *SMALL, "--prompt", "red", "--lora", tmp_path / "dora.safetensors"]
    run(*flags, "-o", trained)
    run(*flags, "--comfyui_dora", "-o", comfyui)
    run("--like", comfyui, "-o", again)
    images = [np.asarray(Image.open(path), int) for path in paths]
    assert np.any(images[0] != images[1])
    np.testing.assert_array_equal(images[1], images[2])


def test_embeddings_change_the_image_and_like_finds_their_folder(networks, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    save_file({"x": np.full((2, 64), 0.5, np.float32)}, tmp_path / "sub" / "foo.safetensors")
    names = first, again, positive, unknown, plain = [tmp_path / f"{name}.png" for name in "abcde"]
    flags = [*networks, *SMALL, "--embeddings", tmp_path]
    run(*flags, "--prompt", "red", "--negative_prompt", "(embedding:foo:1.3), blue", "-o", first)
    run("--like", first, "-o", again)
    run(*flags, "--prompt", "red embedding:foo", "-o", positive)
    assert "ignored" not in capsys.readouterr().err
    run(*flags, "--prompt", "red embedding:bar", "-o", unknown)
    assert "embedding:bar is ignored" in capsys.readouterr().err
    run(*networks, *SMALL, "--prompt", "red ", "-o", plain)
    images = [np.asarray(Image.open(name)).tobytes() for name in names]
    assert (images[0], images[3]) == (images[1], images[4])
    assert len(set(images)) == 3


def test_the_configurations_embeddings_count_unless_a_flag_names_others(networks, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(pathlib.Path(networks[1]).read_bytes())
    (tmp_path / "own").mkdir()
    config = write_config(tmp_path, tmp_path, "epochs = 1", sample=f"prompts = ['x']\nembeddings = '{tmp_path}'")
    flags = ["--config", str(config), "--prompt", "x", "-o", "x.png"]
    for more, expected in (([], tmp_path), (["--embeddings", str(tmp_path / "own")], tmp_path / "own")):
        arguments = parse_arguments([*flags, *more])
        files = generate.networks(arguments, load_config(config, i_know_what_i_am_doing=True), Recipe())
        assert files["embeddings"] == str(expected)


def test_previews_are_written_next_to_the_output(networks, tmp_path):
    run(*networks, *SMALL, "--sampler", "heun", "--prompt", "x", "--preview", 3, "-o", tmp_path / "a.png")
    # Four steps of Heun are seven evaluations; the last is the image itself.
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.png", "a.step003.png", "a.step006.png"]
    assert Image.open(tmp_path / "a.step006.png").size == (32, 48)


def test_every_prompt_is_generated_in_every_size_with_every_seed(networks, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffa red circle\r\n\r\n  猫 \r\n".encode())
    flags = ["--width", 32, 48, "--height", 48, 32, "--seed", 1, 2, "--steps", 1, "--sampler", "euler", "--at_once", 8]
    run(*networks, "--prompts", prompts, *flags, "-o", tmp_path / "x.png")
    found = [from_text("x", Image.open(tmp_path / f"x_{index}.png").text).values for index in range(1, 9)]
    expected = [(p, w, h, s) for p in ("a red circle", "猫") for w, h in ((32, 48), (48, 32)) for s in (1, 2)]
    assert [(x["prompt"], x["width"], x["height"], x["seed"]) for x in found] == expected
    assert len({np.asarray(Image.open(tmp_path / f"x_{index}.png")).tobytes() for index in range(1, 9)}) == 8


def test_an_image_of_a_batch_is_generated_again_alone(networks, tmp_path):
    run(*networks, *SMALL, "--prompt", "x", "--batch_size", 2, "-o", tmp_path / "a.png")
    run("--like", tmp_path / "a_2.png", "-o", tmp_path / "b.png")
    first, second, again = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("a_1", "a_2", "b"))
    # Sums over a batch are rounded differently; a random network amplifies that to one level.
    assert np.abs(again - second).max() <= 1 < np.abs(again - first).max()


def test_an_image_starts_from_another_one_and_keeps_what_the_mask_covers(networks, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    Image.fromarray(small).resize((32, 48)).save(tmp_path / "image.png")
    Image.new("L", (32, 48)).save(tmp_path / "mask.png")
    flags = ["--prompt", "x", "--steps", 4, "--image", tmp_path / "image.png"]
    run(*networks, *flags, "--denoise", 0, "-o", tmp_path / "vae.png")
    run(*networks, *flags, "--mask", tmp_path / "mask.png", "-o", tmp_path / "kept.png")
    # Nothing is white in this mask: the result is the VAE's reconstruction.
    np.testing.assert_array_equal(Image.open(tmp_path / "kept.png"), Image.open(tmp_path / "vae.png"))
    run("--like", tmp_path / "kept.png", "-o", tmp_path / "again.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "again.png"), Image.open(tmp_path / "kept.png"))
    run(*networks, *flags, "--width", 48, "--height", 32, "--denoise", 0, "-o", tmp_path / "turned.png")
    assert Image.open(tmp_path / "turned.png").size == (48, 32)
    run("--like", tmp_path / "turned.png", "-o", tmp_path / "again.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "again.png"), Image.open(tmp_path / "turned.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "eulr"], "sampler 'eulr', expected one of euler, "),
        (["--steps", "-3"], "steps -3, expected 1 to 1000"),
        (["--width", "44", "--height", "48"], "width 44, expected a positive multiple of 8 (nearest: 40 and 48)"),
        (
            ["--width", "32", "48", "64", "--height", "32", "48"],
            "3 values of --width, 2 of --height, expected one or equally many",
        ),
        (["--seed", "-2"], "seed -2, expected a whole number ≥ 0"),
        (["--s", "5"], "ambiguous option: --s could match --set, --seed, --steps, --sampler"),
        (["--pr", "x"], "ambiguous option: --pr could match --prompt, --prompts, "),
        (["--cf", "x"], "ambiguous option: --cf could match --cfg, --cfg_zero_star"),
        (["--denoise", "0.5"], "denoise 0.5 needs an image to start from"),
        (["--noise", "torch-gpu"], "noise 'torch-gpu', expected one of torch-cpu, torch-cuda, jax"),
        (["--set", "model.dtype=x"], "--set model.dtype=x: without --config there is no key to replace"),
        (["--batch_size", "0"], "--batch_size 0, expected at least 1"),
        (["--image", "missing.png"], "missing.png: no such file"),
        (["--transformer", "hf://owner"], "hf://owner: expected hf://owner/repo, with a file or folder in it"),
        (["--like", "missing.png"], "missing.png: no such file"),
        (
            ["--transformer", "https://example.com/x.safetensors"],
            "https://example.com/x.safetensors: is a web address; ",
        ),
        (["--lora", "https://example.com/x.safetensors:0.5"], "https://example.com/x.safetensors: is a web address; "),
        (
            ["--vae", "https://huggingface.co/datasets/a/b/resolve/main/x"],
            "https://huggingface.co/datasets/a/b/resolve",
        ),
        (
            ["--image", "https://example.com/x.png"],
            "--image https://example.com/x.png: is an address, expected",
        ),
        (["--config", "s3://bucket/x.toml"], "--config s3://bucket/x.toml: is an address, expected a path on this"),
        (["-o", "gs://bucket/x.png"], "--output gs://bucket/x.png: is an address, expected a path on this machine"),
        (["--negative_prompt", "caf\udce9"], "'caf\\udce9': is not UTF-8 text (byte 0xe9)"),
        (["--prompts", "a.txt"], "argument --prompts: not allowed with argument --prompt"),
    ],
)
def test_errors_are_one_line(networks, tmp_path, capsys, flags, message):
    line = error_of(capsys, *networks, "--prompt", "x", "-o", tmp_path / "x.png", *flags)
    assert line.startswith(message), line
    assert not list(tmp_path.iterdir())


def test_errors_name_the_files(networks, tmp_path, capsys):
    output = ["-o", tmp_path / "x.png"]
    (tmp_path / "latin1.txt").write_bytes("a cat\nein Kätzchen\n".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "words.png").write_text("no image")
    Image.new("RGB", (32, 48)).save(tmp_path / "image.png")
    Image.new("L", (48, 32)).save(tmp_path / "mask.png")
    Image.new("RGB", (70, 50)).save(tmp_path / "odd.png")
    image = ["--prompt", "x", "--image", tmp_path / "image.png"]
    for flags, message in (
        (["--prompts", tmp_path / "latin1.txt"], "latin1.txt: line 2 is not UTF-8 (byte 0xe4)"),
        (["--prompts", tmp_path / "empty.txt"], "empty.txt: contains no prompt, expected one per line"),
        (["--prompts", tmp_path / "none.txt"], "none.txt: cannot be read: No such file or directory"),
        (["--like", tmp_path / "words.png"], "words.png: cannot be read as an image"),
        (["--like", tmp_path / "image.png"], "image.png: no parameters in its text chunks"),
        ([*image, "--mask", tmp_path / "mask.png"], "the mask is 48×32, expected the image's 32×48"),
        (["--prompt", "x", "--mask", tmp_path / "mask.png"], "a mask without an image"),
        (
            ["--prompt", "x", "--image", tmp_path / "odd.png"],
            "odd.png: 70×50 pixels, expected multiples of 8 (nearest: 72×48); ",
        ),
    ):
        assert message in error_of(capsys, *networks, *output, *flags)
    assert "one of --prompt, --prompts and --like is required" in error_of(capsys, *networks, *output)
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file, expected a folder" in error_of(
        capsys, *networks, "--prompt", "x", "-o", tmp_path / "file" / "folder" / "x.png"
    )
    assert "x.gif: images are written as .png, .jpg, .jpeg, .webp, found '.gif'" in error_of(
        capsys, *networks, "--prompt", "x", "-o", "x.gif"
    )
    (tmp_path / "x_2.png").mkdir()
    batch = ["--prompt", "x", "--batch_size", 2]
    assert "x_2.png is a folder, expected a .png file" in error_of(capsys, *networks, *output, *batch)
    assert "give --transformer, --vae, --text_encoder, or --config" in error_of(capsys, "--prompt", "x", *output)


def test_an_address_in_an_image_is_not_opened_without_its_flag(networks, tmp_path, capsys, monkeypatch):
    files = {"transformer": "hf://owner/repo/a.safetensors", "loras": [("https://example.com/b.safetensors", 1.0)]}
    for name, text in to_text(ImageRequest("a", 32, 48), SamplingParams(steps=1), files).items():
        if name != "parameters":
            save_image(Image.new("RGB", (32, 48)), tmp_path / f"{name}.png", {name: text})
    monkeypatch.setattr(socket, "socket", None)
    message = "names the transformer 'hf://owner/repo/a.safetensors': an address that an image names is not opened"
    line = error_of(capsys, *networks[2:], "--like", tmp_path / "anima_jax.png", "-o", tmp_path / "x.png")
    assert line == f"{tmp_path / 'anima_jax.png'}: {message}; give it with --transformer"
    # ComfyUI's graph has the names alone, which are looked for here.
    line = error_of(capsys, *networks[2:], "--like", tmp_path / "prompt.png", "-o", tmp_path / "x.png")
    assert "names the transformer 'a.safetensors': there is no such file here; --models DIR says where to look" in line
    older_image(parse_arguments([*networks, "--like", str(tmp_path / "anima_jax.png"), "-o", "x.png"]))
    assert (
        "its LoRA 'https://example.com/b.safetensors' at 1.0 belongs to its own transformer" in capsys.readouterr().err
    )


def test_models_applies_an_images_loras_to_another_transformer(networks, tmp_path):
    text = WEBUI.replace("circle", "circle <lora:style:0.5>", 1)
    (tmp_path / "image.txt").write_text(text)
    (tmp_path / "style.safetensors").write_bytes(b"")
    flags = [*networks, "--like", tmp_path / "image.txt", "--models", tmp_path, "-o", "x.png"]
    for more, expected in (([], [(str(tmp_path / "style.safetensors"), 0.5)]), (["--lora", "a:2"], [("a", 2.0)])):
        arguments = parse_arguments([str(flag) for flag in [*flags, *more]])
        files = generate.networks(arguments, None, older_image(arguments))
        assert (files["transformer"], list(files["loras"])) == (str(networks[1]), expected)


def test_what_belongs_to_a_transformer_comes_from_its_source(networks, tmp_path):
    """Of a configuration and of an older image: the variant, storage with product, and an image's other networks."""
    folder, other = tmp_path / "folder", tmp_path / "other.safetensors"
    for part in ("transformer", "vae"):
        (folder / part).mkdir(parents=True)
        save_file({"x": np.zeros(1, np.float32)}, folder / part / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["a", "b"], "vae": ["a", "b"]}))
    model = f"transformer_path = '{folder}'\nvariant = 'fp16'\ntransformer_dtype = 'int8'\ncompute = 'int8'"
    config = write_config(tmp_path, tmp_path, "epochs = 1", model=model, adapter="type = 'lora'\nrank = 4")
    config.write_text(config.read_text().replace(f"transformer_path = '{tmp_path / 'base.safetensors'}'\n", "", 1))
    written = dict(zip(("transformer", "vae", "text_encoder"), (folder, networks[3], networks[5]), strict=True))
    written |= {"dtype": "float32", "variant": "fp16", "transformer_dtype": "int8", "compute": "int8"}
    own = to_text(ImageRequest("a", 32, 48), SamplingParams(steps=1), written)
    save_image(Image.new("RGB", (32, 48)), tmp_path / "a.png", own)
    cases = {
        (): (str(folder), "fp16", "int8", "int8"),
        ("--transformer", str(other)): (str(other), None, "int8", "int8"),
        ("--transformer", str(other), "--variant", "fp8"): (str(other), "fp8", "int8", "int8"),
        ("--transformer_dtype", "nf4"): (str(folder), "fp16", "nf4", None),
        ("--compute", "fp8"): (str(folder), "fp16", None, "fp8"),
    }
    for source in (["--config", str(config), "--prompt", "x"], ["--like", str(tmp_path / "a.png")]):
        for flags, expected in cases.items():
            arguments = parse_arguments([*source, *flags, "-o", "x.png"])
            loaded = load_config(config, i_know_what_i_am_doing=True) if "--config" in source else None
            files = generate.networks(arguments, loaded, older_image(arguments))
            found = *(files[name] for name in ("transformer", "variant", "transformer_dtype", "compute")), files["vae"]
            assert tuple(value and str(value) for value in found) == (*expected, networks[3]), (source, flags)


def seeds_of(folder, capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seed ")]
    said = [int(line.removeprefix("seed ")) for line in lines]
    stored = [read_recipe(str(path)).values["seed"] for path in sorted(folder.glob("*.png"))]
    return said, stored


def test_a_random_seed_is_said_and_stored_and_each_is_another_one(networks, tmp_path, capsys):
    flags = ["--prompt", "x", "--width", 32, "--height", 32, "--steps", 1, "--cfg", 2.5, "-o", tmp_path / "a.png"]
    run(*networks, *flags, "--seed", "random", "7", "-1")
    said, stored = seeds_of(tmp_path, capsys)
    assert stored == [said[0], 7, said[1]]
    assert len({*said, 7}) == 3
    assert all(0 <= seed < 2**32 for seed in said)
    run("--like", tmp_path / "a_1.png", "-o", tmp_path / "b.png")
    first, again = (np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("a_1", "b"))
    assert np.abs(first - again).max() <= 1  # sums over a batch are rounded differently
    assert read_recipe(str(tmp_path / "b.png")).values["guidance_scale"] == 2.5


COMFYUI = {
    "3": (
        "KSampler",
        {"seed": 5, "steps": 4, "cfg": 2.0, "sampler_name": "heun", "scheduler": "karras", "denoise": 1.0},
    ),
    "4": ("UNETLoader", {"unet_name": "base.safetensors", "weight_dtype": "default"}),
    "5": ("EmptyLatentImage", {"width": 32, "height": 48, "batch_size": 1}),
    "6": ("CLIPTextEncode", {"text": "a (red:1.3) circle", "clip": ["10", 0]}),
    "7": ("CLIPTextEncode", {"text": "ugly", "clip": ["10", 0]}),
    "8": ("VAEDecode", {"samples": ["3", 0], "vae": ["11", 0]}),
    "9": ("SaveImage", {"filename_prefix": "ComfyUI", "images": ["8", 0]}),
    "10": ("CLIPLoader", {"clip_name": "tiny_qwen3.safetensors", "type": "stable_diffusion"}),
    "11": ("VAELoader", {"vae_name": "tiny_vae.safetensors"}),
}
COMFYUI["3"][1].update(model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["5", 0])
WEBUI = """a (red:1.3) circle
Negative prompt: ugly
Steps: 4, Sampler: Heun, Schedule type: Karras, CFG scale: 2, Seed: 5, Size: 32x48, Model: base, \
Module 1: tiny_vae, Module 2: tiny_qwen3, RNG: CPU"""


def write_exif(path, tag, text):
    """An image with one text, as piexif writes A1111's and PIL ComfyUI's."""
    exif = Image.Exif()
    if tag == "UserComment":
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    else:
        exif[0x0110] = f"{tag}:{text}"
    Image.new("RGB", (32, 48)).save(path, exif=exif)


def test_a_gguf_file_draws_what_its_values_draw_and_comfyui_graphs_name_it(networks, tmp_path):
    transformer, text_encoder = networks[1], networks[networks.index("--text_encoder") + 1]
    for path, name in ((transformer, "base"), (text_encoder, "text")):
        gguf, values = tmp_path / f"{name}-Q8_0.gguf", tmp_path / f"{name}.safetensors"
        convert(["checkpoint", path, str(gguf), "--dtype", "gguf:q8_0", "--keep", "none"])
        convert(["checkpoint", str(gguf), str(values), "--dtype", "f32"])
    flags = [*SMALL, "--prompt", "a (red:1.3) circle", "--negative_prompt", "ugly", "--guidance_scale", 2, "--seed", 5]
    flags += ["--sampler", "heun", "--schedule", "karras"]
    both = ["--transformer", tmp_path / "base.safetensors", "--text_encoder", tmp_path / "text.safetensors"]
    run(*networks, *both, *flags, "-o", tmp_path / "expected.png")
    graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in COMFYUI.items()}
    graph["4"] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "base-Q8_0.gguf"}}
    graph["10"] = {"class_type": "CLIPLoaderGGUF", "inputs": {"clip_name": "text-Q8_0.gguf", "type": "anima"}}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    models = ["--models", tmp_path, "--models", ASSETS, "--tokenizers", ASSETS / "tokenizers"]
    run("--like", tmp_path / "graph.json", *models, "--dtype", "float32", "-o", tmp_path / "drawn.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "drawn.png"), Image.open(tmp_path / "expected.png"))


def test_images_of_comfyui_and_a1111_are_drawn_in_every_format(networks, tmp_path):
    text = json.dumps({key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in COMFYUI.items()})
    for name, words in (("prompt", text), ("parameters", WEBUI)):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(name, words)
        Image.new("RGB", (32, 48)).save(tmp_path / f"{name}.png", pnginfo=chunks)
    write_exif(tmp_path / "a1111.jpg", "UserComment", WEBUI)
    write_exif(tmp_path / "a1111.webp", "UserComment", WEBUI)
    write_exif(tmp_path / "comfyui.webp", "prompt", text)
    (tmp_path / "graph.json").write_text(text)
    names = ["prompt.png", "parameters.png", "a1111.jpg", "a1111.webp", "comfyui.webp", "graph.json"]
    flags = ["--prompt", "a (red:1.3) circle", "--negative_prompt", "ugly", "--guidance_scale", 2, "--sampler", "heun"]
    run(*networks, *SMALL, *flags, "--schedule", "karras", "--seed", 5, "-o", tmp_path / "expected.png")
    expected = np.asarray(Image.open(tmp_path / "expected.png"))
    models = ["--models", pathlib.Path(networks[1]).parent, "--models", ASSETS, "--tokenizers", ASSETS / "tokenizers"]
    for name in names:
        run("--like", tmp_path / name, *models, "--dtype", "float32", "-o", tmp_path / "folder" / f"{name}.webp")
        np.testing.assert_array_equal(Image.open(tmp_path / "folder" / f"{name}.webp"), expected, name)
    run("--like", tmp_path / "folder" / "a1111.jpg.webp", "-o", tmp_path / "again.jpg", "--quality", 100)
    difference = np.asarray(Image.open(tmp_path / "again.jpg"), int) - expected
    assert np.abs(difference).mean() < 3  # JPEG's loss; the random network's image is noise


def broken_copy(source, folder, value, part="weight"):
    """A copy of a file of which one number is `value`, and the name of that number's tensor."""
    tensors = load_file(source)
    name = sorted(name for name in tensors if part in name)[0]
    tensors[name].flat[-1] = value  # of a kernel, the last tap in time: the only one that single frames use
    save_file(tensors, folder / "broken.safetensors")
    return folder / "broken.safetensors", name


@pytest.mark.parametrize(
    ("flag", "value", "part"),
    [
        ("--transformer", np.nan, "blocks.1.self_attn.q_proj"),
        ("--transformer", np.inf, "llm_adapter.blocks.0.mlp"),
        ("--text_encoder", np.nan, "layers.0.mlp.up_proj"),
        ("--vae", -np.inf, "decoder.conv1.bias"),
        ("--lora", np.nan, "lora_up"),
    ],
)
def test_nan_and_infinity_name_the_file_and_never_become_an_image(networks, tmp_path, capsys, flag, value, part):
    if flag == "--lora":
        lora = {"lora_down": np.ones((2, 64), np.float32), "lora_up": np.ones((64, 2), np.float32)}
        source = tmp_path / "lora.safetensors"
        save_file({f"lora_unet_blocks_0_self_attn_q_proj.{name}.weight": x for name, x in lora.items()}, source)
    else:
        source = networks[networks.index(flag) + 1]
    path, name = broken_copy(source, tmp_path, value, part)
    line = error_of(capsys, *networks, flag, path, *SMALL, "--prompt", "x", "-o", tmp_path / "x.png", code=1)
    assert line == f"{path}: NaN or infinite values in 1 tensor: {name} (1)"
    assert not (tmp_path / "x.png").exists()


def test_nan_in_the_vaes_encoder_is_told_for_an_image_to_start_from(networks, tmp_path, capsys):
    path, _ = broken_copy(networks[networks.index("--vae") + 1], tmp_path, np.nan, "encoder.conv1.weight")
    Image.new("RGB", (32, 48)).save(tmp_path / "image.png")
    start = ["--image", tmp_path / "image.png", "--denoise", 0.5, "-o", tmp_path / "x.png"]
    line = error_of(capsys, *networks, "--vae", path, *SMALL, "--prompt", "x", *start, code=1)
    assert line == f"{path}: NaN or infinite values in 1 tensor: encoder.conv1.weight (1)"


def test_an_overflow_names_the_evaluation_and_what_to_do(networks, tmp_path, capsys):
    tensors = load_file(networks[1])
    save_file({name: 1e37 * x if "final_layer" in name else x for name, x in tensors.items()}, tmp_path / "large")
    flags = ["--transformer", tmp_path / "large", "--guidance_scale", 1000, "--sampler", "euler"]
    line = error_of(capsys, *networks, *flags, *SMALL, "--prompt", "x", "-o", tmp_path / "x.png", code=1)
    assert line.startswith("evaluation 1 of 4: NaN or infinite values, but none in the files: float32 overflowed; ")


def test_a_web_address_of_the_hub_is_the_hubs_file(monkeypatch):
    monkeypatch.setattr("anima_jax.checkpoints.hub.fetch", tuple)
    for address, expected in (
        ("https://huggingface.co/o/r/resolve/main/a/b.safetensors?download=true", ("o/r", "a/b.safetensors", "main")),
        ("https://huggingface.co/o/r/blob/v1/b.safetensors", ("o/r", "b.safetensors", "v1")),
        ("hf://o/r/b.safetensors", ("o/r", "b.safetensors", "main")),
    ):
        assert locations.resolve(address) == expected


def test_postscript_that_is_named_as_an_image_is_not_run(networks, tmp_path, capsys):
    code = "(" + str(tmp_path / "run") + ") (w) file closefile"
    (tmp_path / "x.png").write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 48\n%%EndComments\n{code}\n")
    for flag in ("--image", "--like"):
        line = error_of(capsys, *networks, "--prompt", "x", flag, tmp_path / "x.png", "-o", tmp_path / "y.png")
        assert "x.png: cannot be read as an image" in line
    assert not (tmp_path / "run").exists()


def test_the_end_of_a_pipe_is_quiet(tmp_path):
    command = "from convert.__main__ import main; main(['inspect', 'x.safetensors'])"
    save_file({f"{number}.weight": np.zeros(1, np.float32) for number in range(9)}, tmp_path / "x.safetensors")
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(generate.__file__).parents[1])}
    reader, writer = os.pipe()
    os.close(reader)
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": writer, "stderr": subprocess.PIPE}
    found = subprocess.run([sys.executable, "-c", command], check=False, **options)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")


def test_a_diffusers_folder_draws_with_its_own_networks_and_tokenizers(networks, tmp_path):
    files = dict(zip(networks[::2], networks[1::2], strict=True))
    folder, pictures = tmp_path / "anima", [tmp_path / f"{name}.png" for name in ("files", "folder", "again")]
    arguments = ["checkpoint", files["--transformer"], str(folder), "--to", "diffusers"]
    named = ("--text_encoder", "--vae", "--tokenizers")
    convert([*arguments, *(word for flag in named for word in (flag, files[flag]))])
    request = ["--prompt", "a red circle", "--dtype", "float32", *SMALL]
    run(*networks, *request, "-o", pictures[0])
    run("--transformer", folder, *request, "-o", pictures[1])
    run("--like", pictures[1], "-o", pictures[2])
    first, *others = (np.asarray(Image.open(picture)) for picture in pictures)
    assert all(np.array_equal(first, other) for other in others)
    with pytest.raises(SystemExit):
        run("--transformer", folder, "--variant", "fp16", *request, "-o", tmp_path / "x.png")
