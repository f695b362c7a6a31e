"""What our images say about how they were made, in our own words."""

import dataclasses
import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.sampling.arguments import given_regions
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.image_text import from_text, read_recipe, to_text
from anima_jax.sampling.images import save_image
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import ImageRequest, SamplingParams

REQUEST = ImageRequest("a (cat:1.2)\n猫 🌸", 512, 768, 2**64 - 1, 3, 2)
PARAMS = SamplingParams(
    "ugly",
    7,
    3.3,
    "seeds_2",
    "beta57",
    2.5,
    0.1 + 0.2,
    "torch-cuda:rtx3060",
    True,
    (0.1, 1 / 3),
    paste=0,
    tile=512,
    sampler_options={"eta": 1 / 3, "solver_type": "phi_2"},
    rescale_cfg=0.6,
    cfg_norm=1.1,
    apg=True,
    apg_eta=0.1 + 0.2,
    apg_norm_threshold=0.0,
    apg_momentum=-0.5,
    sigmas=(0.9, 0.1 + 0.2, 0.0),
    start_at_step=1,
    end_at_step=2,
    add_noise=False,
    return_with_leftover_noise=True,
    cache="easy:0.3",
    cache_interval=(0.1, 1 / 3),
    base_strength=0.1 + 0.2,
)
LORAS = [
    ("a/l1.safetensors", 0.7),
    ("l2.safetensors", {"": 0.5, "text_encoder": 0.25}),
    ("l3.safetensors", {"": 2.0, "blocks.0-3": 0.0}),
]
FILES = {"transformer": "a/base.safetensors", "vae": "vae.safetensors", "text_encoder": "qwen.safetensors"}
FILES |= {"tokenizers": "folder", "adapter": None, "image": "start.png", "mask": None}
LOADING = {"dtype": "float32", "comfyui_dora": True}


def values_of(request: ImageRequest, params: SamplingParams) -> dict[str, object]:
    return request.settings() | dataclasses.asdict(params)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp"])
def test_a_file_keeps_every_setting_in_a_folder_that_is_made(tmp_path, suffix):
    path = tmp_path / "a" / f"b{suffix}"
    text = to_text(REQUEST, PARAMS, FILES | LOADING | {"loras": LORAS})
    assert not save_image(Image.new("RGB", (16, 16), "red"), path, text)
    recipe = read_recipe(str(path))
    assert recipe.values == values_of(REQUEST, PARAMS)
    assert recipe.files == {name: file for name, file in FILES.items() if file}
    assert (recipe.loras, recipe.loading, recipe.messages) == (LORAS, LOADING, [])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_setting_of_these_tests_is_a_default():
    defaults = values_of(ImageRequest(""), SamplingParams())
    assert all(value != defaults[name] for name, value in values_of(REQUEST, PARAMS).items())


@given(st.floats(0.001, 1.0), st.text(), st.integers(0, 2**64 - 1))
def test_numbers_and_text_survive_exactly(number, words, seed):
    request = ImageRequest(words, seed=seed)
    params = SamplingParams(words, shift=number, guidance_interval=(0.0, number))
    assert from_text("x", to_text(request, params, {})).values == values_of(request, params)


OLD = {"prompt": "a\n猫", "width": "512", "height": "768", "seed": "18446744073709551615", "batch_size": "3"}
OLD |= {"batch_index": "2", "negative_prompt": "", "steps": "7", "guidance_scale": "3.3", "sampler": "heun"}
OLD |= {"schedule": "beta57", "shift": "2.5", "denoise": "0.30000000000000004", "noise": "jax", "cfg_zero_star": "True"}
OLD |= {"guidance_interval": "0.1 0.3333333333333333", "transformer": "base.safetensors", "dtype": "bfloat16"}
OLD |= {"lora": "C:\\a.safetensors:0.7\nb.safetensors:1.0", "image": "start.png"}
"""The text chunks of a PNG that version 0.1 wrote."""


def test_images_of_early_versions_are_read():
    recipe = from_text("x.png", OLD)
    request = ImageRequest("a\n猫", 512, 768, 2**64 - 1, 3, 2)
    params = SamplingParams("", 7, 3.3, "heun", "beta57", 2.5, 0.1 + 0.2, "jax", True, (0.1, 1 / 3))
    assert values_of(request, params) | recipe.values == values_of(request, params)
    assert set(recipe.values) == set(OLD) & set(values_of(request, params))
    assert recipe.files == {"transformer": "base.safetensors", "image": "start.png"}
    assert recipe.loras == [("C:\\a.safetensors", 0.7), ("b.safetensors", 1.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "no parameters in its text chunks"),
        (OLD | {"seed": "1\n2"}, "seed '1\\n2'"),
        (OLD | {"cfg_zero_star": "yes"}, "cfg_zero_star 'yes'"),
        (OLD | {"guidance_interval": "0.5"}, "guidance_interval '0.5'"),
        ({"anima_jax": "[1]"}, "its anima_jax is not a JSON object"),
        ({"anima_jax": "{"}, "its anima_jax is not JSON"),
        ({"anima_jax": "[" * 100_000}, "its anima_jax is not JSON"),
        ({"anima_jax": json.dumps({"steps": "many\x1b[31m"})}, "steps 'many\\x1b[31m'"),
        ({"anima_jax": json.dumps({"loras": [["a", "b"]]})}, "loras"),
        ({"anima_jax": json.dumps({"vae": 3})}, "vae '3'"),
        ({"anima_jax": json.dumps({"dtype": "int4"})}, "dtype 'int4'"),
    ],
)
def test_texts_that_cannot_be_read_are_named_in_one_line(text, message):
    with pytest.raises(UserError, match=re.escape(f"x.png: {message}")) as error:
        from_text("x.png", text)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["\\\\host\\a.png", "//host/a=b.png", "hf://a/b/c.png", "http://host/a.png", "NUL", "a=b.png"]
)
def test_reading_regions_touches_no_file_and_addresses_are_refused(tmp_path, monkeypatch, name):
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    options = parse_arguments(["--like", str(tmp_path / "x.png"), "-o", "y.png"])
    texts = {"parameters": f"x\nSteps: 1, Regions: {json.dumps(json.dumps([f'{name}=a cat']))}"}
    own = {"anima_jax": json.dumps({"prompt": "x", "regions": [{"where": name, "prompt": "a cat"}]})}
    for function in ("stat", "lstat", "open"):
        monkeypatch.setattr(os, function, None)
    for text in (texts, own):
        recipe = from_text(str(tmp_path / "x.png"), text)
        assert [(region.where, region.prompt) for region in recipe.regions] == [(name, "a cat")]
        if name != "a=b.png":
            with pytest.raises(UserError, match="an address that an image names is not opened; give it with --region"):
                given_regions(options, recipe)


def test_regions_are_in_every_text_of_an_image(tmp_path):
    """Also in ComfyUI's graph and A1111's text, which other programs show."""
    mask = tmp_path / "a=b:1.png"
    Image.new("L", (64, 128), 99).save(mask)
    regions = (
        Region(str(mask), "a=b, c:2", 1.5),
        Region("50%,0%,50%,100%", "猫", 0.1 + 0.2),
        Region("8,16,32,64", 'a "b"\n', start_percent=0.25, end_percent=0.75),
        Region(str(mask), "d", bounds=True),
    )
    request, params = ImageRequest("x", 64, 128, regions=regions), SamplingParams(base_strength=0.5)
    text = to_text(request, params, {"transformer": "a"})
    recipe = from_text("x.png", {"anima_jax": text["anima_jax"]})
    assert (recipe.regions, recipe.values) == ([region.stored() for region in regions], values_of(request, params))

    recipe = from_text("x.png", {"parameters": text["parameters"]})
    assert ([(one.where, one.prompt, one.strength) for one in recipe.regions], recipe.values["base_strength"]) == (
        [(str(region.where), region.prompt, region.strength) for region in regions],
        0.5,
    )

    recipe = from_text("x.png", {"prompt": text["prompt"]})
    pixels = {"50%,0%,50%,100%": "32,0,32,128", str(mask): mask.name}
    named = [
        dataclasses.replace(region.named(), where=pixels.get(str(region.where), region.where)) for region in regions
    ]
    assert (recipe.regions, recipe.values["base_strength"], recipe.messages) == (named, 0.5, [])
    assert json.loads(text["anima_jax"])["left_out_for_comfyui"] == [
        f"region {area}, which is smaller than ComfyUI's 64 pixels" for area in ("50%,0%,50%,100%", "8,16,32,64")
    ]
