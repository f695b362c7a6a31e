"""Our graphs are valid for ComfyUI, and say what the image's request says."""

import dataclasses
import json
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES, percent_to_sigma
from anima_jax.sampling.controls import Control
from anima_jax.sampling.image_text import from_text, to_text
from anima_jax.sampling.images import save_image
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.golden_files import GOLDEN

NODES = json.loads((GOLDEN / "comfyui_nodes.json").read_text())
PYTHON_TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}

FILES = {
    "transformer": "a/anima.safetensors",
    "vae": "hf://b/c/vae.safetensors",
    "text_encoder": "C:\\d\\qwen.safetensors",
}
IMAGE, MASK = {"image": "x/start.png"}, {"image": "x/start.png", "mask": "mask.png"}
BATCH = ImageRequest("a, (b:1.2)\n猫", 64, 128, 2**64 - 1, 3, 2)
PARTS = {"start_at_step": 3, "end_at_step": 20, "return_with_leftover_noise": True}
GUIDANCE = {"rescale_cfg": 0.6, "cfg_norm": 0.9, "apg": True, "apg_eta": 0.5, "apg_norm_threshold": 2.0}

REQUESTS = [
    *((ImageRequest("a"), {"sampler": name}, {}) for name in SAMPLERS),
    *((ImageRequest("a"), {"schedule": name}, {}) for name in SCHEDULES),
    (BATCH, {"negative_prompt": "ugly", "steps": 7, "guidance_scale": 3.3, "shift": 2.5}, {}),
    (BATCH, {"denoise": 0.3}, IMAGE),
    (BATCH, {"denoise": 0.3}, MASK),
    (BATCH, {"paste": 0}, MASK),
    (BATCH, {"denoise": 0.0}, IMAGE),
    (BATCH, {"cfg_zero_star": True}, {"vae": "a/anima.safetensors", "text_encoder": "a/anima.safetensors"}),
    (BATCH, {"negative_prompt": "b", **GUIDANCE, "apg_momentum": -0.5}, {}),
    (BATCH, {"cache": "easy:0.05", "cache_interval": (0.0, 0.713)}, {}),
    (BATCH, {"cache": "easy:2.5"}, {}),
    (BATCH, {"negative_prompt": "b", "guidance_interval": (0.213, 1.0)}, {}),
    (BATCH, {"negative_prompt": "b", "guidance_interval": (0.0, 0.713)}, {}),
    (BATCH, {"negative_prompt": "b", "guidance_interval": (0.213, 0.713)}, {}),
    (BATCH, PARTS, {}),
    (BATCH, {"start_at_step": 3, "add_noise": False}, IMAGE),
    (BATCH, {"sigmas": (1.0, 0.7, 1 / 1024, 0.0)}, {}),
    (BATCH, {"sampler": "euler_ancestral", "sampler_options": {"eta": 0.5}, "denoise": 0.5}, IMAGE),
    (BATCH, {"sampler": "sa_solver", "sampler_options": {"eta": 0.5}, "schedule": "beta57"}, {}),
    (BATCH, {"sampler": "dpmpp_sde_gpu", "sampler_options": {"r": 0.4}, "sigmas": (1.0, 0.5, 0.0)}, {}),
]
LORAS = [("l/one.safetensors", 0.5), ("two.safetensors", {"": 0.5, "text_encoder": 0.25})]


def text_of(request, params, files):
    return to_text(request, SamplingParams(**params), FILES | files | {"loras": LORAS})


def strict_json(text):
    """JSON as JavaScript's JSON.parse accepts it: no NaN, no infinity."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def check_value(graph, value, expected):
    if isinstance(value, list):
        key, index = value
        assert NODES[graph[key]["class_type"]]["outputs"][index] == expected["type"]
    elif expected["type"] == "COMBO":
        assert value in expected.get("options", [value])
    else:
        assert isinstance(value, PYTHON_TYPES[expected["type"]])
        assert isinstance(value, bool) == (expected["type"] == "BOOLEAN")
        assert expected.get("min", value) <= value <= expected.get("max", value)


def check_graph(graph):
    for node in graph.values():
        expected = NODES[node["class_type"]]["inputs"]
        assert {name for name, row in expected.items() if "optional" not in row} <= set(node["inputs"]) <= set(expected)
        for name, value in node["inputs"].items():
            check_value(graph, value, expected[name])


@pytest.mark.parametrize(("request_", "params", "files"), REQUESTS, ids=str)
def test_graphs_are_valid_and_say_what_the_request_says(request_, params, files):
    text = text_of(request_, params, files)
    check_graph(strict_json(text["prompt"]))
    assert "left_out_for_comfyui" not in text["anima_jax"]
    recipe = from_text("x.png", {"prompt": text["prompt"]})
    defaults = ImageRequest("").settings() | dataclasses.asdict(SamplingParams())
    assert defaults | recipe.values == request_.settings() | dataclasses.asdict(SamplingParams(**params))
    names = {name: re.split(r"[\\/]", file)[-1] for name, file in (FILES | files).items()}
    assert (recipe.files, recipe.messages) == (names, [])
    assert recipe.loras == [(name.split("/")[-1], weight) for name, weight in LORAS]


@pytest.mark.parametrize(
    ("params", "files", "left_out"),
    [
        ({"paste": 4}, MASK, "the 4 blended pixels of paste"),
        ({"noise": "jax"}, {}, "noise jax: ComfyUI's is that of the device that it runs on"),
        ({"guidance_scale": -1.5}, {}, "guidance_scale -1.5, which is outside of ComfyUI's 0 to 100"),
        ({"sampler": "seeds_3", "sampler_options": {"r_1": 0.25}}, {}, "options of the sampler: r_1"),
        ({"cache": "first_block:0.08"}, {}, "cache first_block:0.08"),
        ({"cache": "easy:4"}, {}, "cache easy:4"),
        (
            {"guidance_interval": (0.0, 0.5)},
            {"regions": (Region("0,0,512,512", "b"),)},
            "the guidance interval for regions that are areas or have a range",
        ),
        ({}, {"adapter": "llm_adapter.safetensors"}, "the LLM adapter's own file"),
        ({}, {"loras": [("x.safetensors", {"blocks.0-3": 0.5})]}, "the weights of parts of x.safetensors"),
    ],
)
def test_what_no_node_does_is_named(params, files, left_out):
    regions = files.get("regions", ())
    text = to_text(ImageRequest("a", regions=regions), SamplingParams(**params), FILES | files)
    assert json.loads(text["anima_jax"])["left_out_for_comfyui"] == [left_out]


def test_control_networks_act_in_their_order_with_the_masks_of_their_files(tmp_path):
    for name, mode in {"opaque": "RGB", "hole": "RGBA", "mask": "L"}.items():
        Image.new(mode, (8, 8)).save(tmp_path / f"{name}.png")
    opaque, hole, mask = (tmp_path / f"{name}.png" for name in ("opaque", "hole", "mask"))
    controls = Control("n/one.safetensors", opaque, 0.5, 0.0, 0.75), Control("two.safetensors", hole, -1.0)
    controls += (Control("two.safetensors", opaque, 10.0, 0.25, 1.0, mask),)
    text = to_text(ImageRequest("a", controls=controls), SamplingParams(shift=2.0), FILES)
    check_graph(graph := strict_json(text["prompt"]))
    found, node = [], next(node for node in graph.values() if node["class_type"] == "KSampler")
    while (node := graph[node["inputs"]["model"][0]])["class_type"] == "AnimaLLLiteApply":
        own = node["inputs"]
        network, image = (graph[own[part][0]]["inputs"] for part in ("model_patch", "image"))
        masked = (graph[own["mask"][0]]["class_type"], own["mask"][1]) if "mask" in own else None
        numbers = own["strength"], own["start_percent"], own["end_percent"]
        found.insert(0, (network["name"], image["image"], *numbers, masked))
    # The patch of the node nearest to the loader is the first of its list.
    assert found == [
        ("one.safetensors", "opaque.png", 0.5, 0.0, 0.75, None),
        ("two.safetensors", "hole.png", -1.0, 0.0, 1.0, ("LoadImage", 1)),
        ("two.safetensors", "opaque.png", 10.0, 0.25, 1.0, ("LoadImageMask", 0)),
    ]
    assert node["class_type"] == "ModelSamplingAuraFlow"  # ComfyUI takes the levels from the model it is given


@pytest.mark.parametrize(("mode", "channel"), [("L", "red"), ("RGB", "red"), ("LA", "alpha"), ("RGBA", "alpha")])
def test_a_masks_values_are_where_its_file_has_them(mode, channel):
    """White of a file without transparency, transparent parts of one with it."""
    text = to_text(ImageRequest("a"), SamplingParams(), FILES | MASK, mask=Image.new(mode, (8, 8)))
    (node,) = (node for node in json.loads(text["prompt"]).values() if node["class_type"] == "LoadImageMask")
    assert node["inputs"] == {"image": "mask.png", "channel": channel}


def test_levels_between_schedules_are_listed_exactly():
    """float32's numbers, without an exponent: ComfyUI reads 1e-05 as 1 and 5."""
    params = SamplingParams(schedule="beta57", denoise=0.5, steps=400)
    graph = json.loads(to_text(ImageRequest("a"), params, FILES | IMAGE)["prompt"])
    (words,) = (node["inputs"]["sigmas"] for node in graph.values() if node["class_type"] == "ManualSigmas")
    found = [float(word) for word in re.findall(r"[-+]?(?:\d*\.*\d+)", words)]
    np.testing.assert_array_equal(np.array(found, np.float32), params.levels())


@pytest.mark.parametrize("interval", [(0.2, 0.7), (0.05, 0.95), (0.3, 0.3), (0.0, 0.65)])
def test_guidance_changes_at_no_step_itself(interval):
    """Both prompts would count at a step that is exactly at the end of their ranges."""
    params = SamplingParams(guidance_interval=interval, steps=20, negative_prompt="b")
    graph = json.loads(to_text(ImageRequest("a"), params, FILES)["prompt"])
    levels = params.levels()[:-1]
    counting = {}
    for node in graph.values():
        if node["class_type"] == "ConditioningSetTimestepRange":
            row = node["inputs"]
            high, low = (np.float32(percent_to_sigma(row[end], 3.0)) for end in ("start", "end"))
            text = graph[row["conditioning"][0]]["inputs"]["text"]
            counting[text] = counting.get(text, 0) + ((low <= levels) & (levels <= high))
    # ComfyUI's comparison of the interval itself, in which a step at an end is inside or not by float32's rounding.
    high, low = (np.float32(percent_to_sigma(end, 3.0)) for end in interval)
    np.testing.assert_array_equal(counting["b"], (low <= levels) & (levels <= high))
    np.testing.assert_array_equal(counting["a"] + counting["b"], 1)


def png_chunks(data):
    """Type and bytes of each chunk, and what ComfyUI's frontend makes of the texts (`getFromPngBuffer`): UTF-8."""
    at, types, texts = 8, {}, {}
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        if kind in (b"tEXt", b"iTXt"):
            name, rest = body.split(b"\0", 1)
            if kind == b"iTXt":
                assert rest[:1] == b"\0"  # not compressed
                rest = rest[2:].split(b"\0", 2)[2]
            types[name.decode()], texts[name.decode()] = kind, rest.decode("utf-8")
        at += 12 + size
    return types, texts


@pytest.mark.parametrize("prompt", ["a cat", "Kätzchen: ü", "猫 🌸\n()", "\udce4"])
def test_a_png_is_read_by_comfyuis_frontend_and_by_pil(tmp_path, prompt):
    text = to_text(ImageRequest(prompt), SamplingParams(), FILES)
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", text)
    types, found = png_chunks((tmp_path / "a.png").read_bytes())
    # Old frontends read tEXt only, and none reads Latin-1.
    assert types["prompt"] == types["anima_jax"] == b"tEXt"
    graph = strict_json(found["prompt"])
    assert [node["inputs"]["text"] for node in graph.values() if "text" in node["inputs"]] == [prompt, ""]
    shown = prompt.encode("utf-8", "replace").decode()
    assert found["parameters"].startswith(f"{shown}\nSteps: 30, ")
    assert Image.open(tmp_path / "a.png").info["parameters"] == found["parameters"]
