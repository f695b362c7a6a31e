"""ComfyUI's graphs as a request: the nodes that people use, and graphs that cannot be followed."""

import json

import pytest

from anima_jax.errors import UserError
from anima_jax.sampling.image_text import from_text
from anima_jax.sampling.regions import StoredRegion


def graph(**nodes: tuple[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """A graph of nodes: id=(class, inputs). Ids in links are written as in `["model", 0]`."""
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


KSAMPLER = {"seed": 7, "steps": 28, "cfg": 4.5, "sampler_name": "er_sde", "scheduler": "simple", "denoise": 1.0}
ENDS = {"model": ["model", 0], "positive": ["pos", 0], "negative": ["neg", 0], "latent_image": ["latent", 0]}

BASE = graph(
    model=("UNETLoader", {"unet_name": "anima\\base.safetensors", "weight_dtype": "default"}),
    clip=("CLIPLoader", {"clip_name": "qwen.safetensors", "type": "stable_diffusion", "device": "default"}),
    vae=("VAELoader", {"vae_name": "vae.safetensors"}),
    pos=("CLIPTextEncode", {"text": "a (cat:1.2)", "clip": ["clip", 0]}),
    neg=("CLIPTextEncode", {"text": "ugly", "clip": ["clip", 0]}),
    latent=("EmptyLatentImage", {"width": 832, "height": 1216, "batch_size": 1}),
    sampler=("KSampler", KSAMPLER | ENDS),
    decode=("VAEDecode", {"samples": ["sampler", 0], "vae": ["vae", 0]}),
    save=("SaveImage", {"images": ["decode", 0], "filename_prefix": "x"}),
)

VALUES = {"prompt": "a (cat:1.2)", "negative_prompt": "ugly", "width": 832, "height": 1216, "batch_size": 1, "seed": 7}
VALUES |= {"steps": 28, "guidance_scale": 4.5, "sampler": "er_sde", "schedule": "simple", "denoise": 1.0}
FILES = {"transformer": "anima\\base.safetensors", "text_encoder": "qwen.safetensors", "vae": "vae.safetensors"}


def read(nodes):
    return from_text("x.png", {"prompt": json.dumps(nodes)})


def model_through(**nodes):
    """The sampler's model comes from the node `last`."""
    return graph(sampler=("KSampler", KSAMPLER | ENDS | {"model": ["last", 0]}), **nodes)


def sampled_by(kind, inputs, **nodes):
    return graph(sampler=(kind, inputs), **nodes)


CUSTOM = {"model": ["model", 0], "positive": ["pos", 0], "negative": ["neg", 0], "latent_image": ["latent", 0]}
CUSTOM |= {"sampler": ["select", 0], "sigmas": ["levels", 0], "cfg": 3.0, "add_noise": True, "noise_seed": 2**64 - 1}
ADVANCED = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["select", 0], "sigmas": ["levels", 0]}
ADVANCED |= {"latent_image": ["latent", 0]}
SELECT = ("KSamplerSelect", {"sampler_name": "dpmpp_2m"})
BASIC = ("BasicScheduler", {"model": ["model", 0], "scheduler": "beta", "steps": 12, "denoise": 1.0})
LORA = {"lora_name": "l.safetensors", "strength_model": 0.8, "model": ["model", 0]}

CHANGES = {
    "a checkpoint with everything": (
        graph(
            model=("CheckpointLoaderSimple", {"ckpt_name": "all.safetensors"}),
            pos=("CLIPTextEncode", {"text": "a (cat:1.2)", "clip": ["model", 1]}),
            decode=("VAEDecode", {"samples": ["sampler", 0], "vae": ["model", 2]}),
        ),
        {"files": dict.fromkeys(FILES, "all.safetensors")},
    ),
    "a chain of LoRAs": (
        model_through(
            one=("LoraLoader", LORA | {"strength_clip": 0.8, "clip": ["clip", 0]}),
            last=("LoraLoaderModelOnly", {"lora_name": "m.safetensors", "strength_model": -1, "model": ["one", 0]}),
            pos=("CLIPTextEncode", {"text": "a (cat:1.2)", "clip": ["one", 1]}),
        ),
        {"loras": [("l.safetensors", 0.8), ("m.safetensors", {"": -1.0, "text_encoder": 0.0})]},
    ),
    "a LoRA whose text encoder is not used": (
        model_through(last=("LoraLoader", LORA | {"strength_clip": 1.0, "clip": ["clip", 0]})),
        {"loras": [("l.safetensors", {"": 0.8, "text_encoder": 0.0})]},
    ),
    "rgthree's list of LoRAs": (
        model_through(
            last=(
                "Power Lora Loader (rgthree)",
                {
                    "PowerLoraLoaderHeaderWidget": {"type": "PowerLoraLoaderHeaderWidget"},
                    "lora_1": {"on": True, "lora": "l.safetensors", "strength": 0.5},
                    "lora_2": {"on": False, "lora": "m.safetensors", "strength": 1},
                    "model": ["model", 0],
                    "clip": ["clip", 0],
                },
            ),
            pos=("CLIPTextEncode", {"text": "a (cat:1.2)", "clip": ["last", 1]}),
        ),
        {"loras": [("l.safetensors", 0.5)]},
    ),
    "shift and CFG-Zero*": (
        model_through(
            shift=("ModelSamplingAuraFlow", {"shift": 5, "model": ["model", 0]}),
            last=("CFGZeroStar", {"model": ["shift", 0]}),
        ),
        {"shift": 5.0, "cfg_zero_star": True},
    ),
    "the last shift counts": (
        model_through(
            shift=("ModelSamplingSD3", {"shift": 5.0, "model": ["model", 0]}),
            last=("ModelSamplingAuraFlow", {"shift": 2.0, "model": ["shift", 0]}),
        ),
        {"shift": 2.0},
    ),
    "values of other nodes": (
        graph(
            sampler=("KSampler", KSAMPLER | ENDS | {"seed": ["seed", 0], "steps": ["switch", 0], "cfg": ["float", 0]}),
            seed=("Seed (rgthree)", {"seed": 5}),
            float=("PrimitiveFloat", {"value": 2.5}),
            switch=("ComfySwitchNode", {"switch": ["bool", 0], "on_false": ["a", 0], "on_true": ["b", 0]}),
            bool=("PrimitiveBoolean", {"value": True}),
            a=("PrimitiveInt", {"value": 30}),
            b=("PrimitiveInt", {"value": 8}),
            pos=("CLIPTextEncode", {"text": ["join", 0], "clip": ["reroute", 0]}),
            reroute=("Reroute", {"": ["clip", 0]}),
            join=("StringConcatenate", {"string_a": "one", "string_b": ["words", 0], "delimiter": ", "}),
            words=("PrimitiveStringMultiline", {"value": "two\nthree"}),
            latent=("EmptySD3LatentImage", {"width": ["size", 0], "height": ["size", 1], "batch_size": 4}),
            size=("SizePicker", {"width": 64, "height": 96}),
        ),
        {"seed": 5, "steps": 8, "guidance_scale": 2.5, "prompt": "one, two\nthree", "width": 64, "height": 96}
        | {"batch_size": 4},
    ),
    "KSamplerAdvanced": (
        sampled_by(
            "KSamplerAdvanced",
            {"noise_seed": 9, "steps": 20, "cfg": 1, "sampler_name": "euler", "scheduler": "karras"}
            | {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
            | ENDS,
        ),
        {"seed": 9, "steps": 20, "guidance_scale": 1.0, "sampler": "euler", "schedule": "karras"},
    ),
    "KSamplerAdvanced, a part": (
        sampled_by(
            "KSamplerAdvanced",
            {"noise_seed": 9, "steps": 20, "cfg": 1, "sampler_name": "euler", "scheduler": "karras"}
            | {"add_noise": "disable", "start_at_step": 4, "end_at_step": 9, "return_with_leftover_noise": "enable"}
            | ENDS,
        ),
        {"seed": 9, "steps": 20, "guidance_scale": 1.0, "sampler": "euler", "schedule": "karras"}
        | {"start_at_step": 4, "end_at_step": 9, "add_noise": False, "return_with_leftover_noise": True},
    ),
    "ManualSigmas and variants of guidance": (
        sampled_by(
            "SamplerCustom",
            CUSTOM | {"model": ["apg", 0]},
            select=SELECT,
            levels=("ManualSigmas", {"sigmas": "1, 0.5 .25,0.0"}),
            norm=("CFGNorm", {"model": ["model", 0], "strength": 1.2}),
            rescale=("RescaleCFG", {"model": ["norm", 0], "multiplier": 0.7}),
            apg=("APG", {"model": ["rescale", 0], "eta": 0.5, "norm_threshold": 15, "momentum": -0.5}),
        ),
        {"seed": 2**64 - 1, "guidance_scale": 3.0, "sampler": "dpmpp_2m", "sigmas": (1.0, 0.5, 0.25, 0.0)}
        | {"cfg_norm": 1.2, "rescale_cfg": 0.7, "apg": True, "apg_eta": 0.5, "apg_norm_threshold": 15.0}
        | {"apg_momentum": -0.5, "steps": None, "schedule": None},
    ),
    "EasyCache, the nearest to the sampler": (
        model_through(
            last=("EasyCache", {"model": ["one", 0], "reuse_threshold": 0.3, "start_percent": 0, "end_percent": 0.9}),
            one=("EasyCache", {"model": ["model", 0], "reuse_threshold": 0.1, "start_percent": 0.15}),
        ),
        {"cache": "easy:0.3", "cache_interval": (0.0, 0.9)},
    ),
    "EasyCache that is off": (
        model_through(last=("EasyCache", {"model": ["model", 0], "reuse_threshold": 0.0})),
        {"cache": "off"},
    ),
    "WaveSpeed's First Block Cache": (
        model_through(
            last=(
                "ApplyFBCacheOnModel",
                {"model": ["model", 0], "object_to_patch": "diffusion_model", "residual_diff_threshold": 0.07}
                | {"start": 0.0, "end": 1.0, "max_consecutive_cache_hits": -1},
            )
        ),
        {"cache": "first_block:0.07"},
    ),
    "SamplerCustom": (
        sampled_by("SamplerCustom", CUSTOM, select=SELECT, levels=BASIC),
        {"seed": 2**64 - 1, "steps": 12, "guidance_scale": 3.0, "sampler": "dpmpp_2m", "schedule": "beta"},
    ),
    "SamplerCustomAdvanced": (
        sampled_by(
            "SamplerCustomAdvanced",
            ADVANCED,
            select=SELECT,
            levels=BASIC,
            noise=("RandomNoise", {"noise_seed": 11}),
            guider=("CFGGuider", {"model": ["last", 0], "positive": ["pos", 0], "negative": ["neg", 0], "cfg": 2}),
            last=("ModelSamplingAuraFlow", {"shift": 6, "model": ["model", 0]}),
        ),
        {"seed": 11, "steps": 12, "guidance_scale": 2.0, "sampler": "dpmpp_2m", "schedule": "beta", "shift": 6.0},
    ),
    "BasicGuider": (
        sampled_by(
            "SamplerCustomAdvanced",
            ADVANCED,
            select=SELECT,
            levels=BASIC,
            noise=("RandomNoise", {"noise_seed": 11}),
            guider=("BasicGuider", {"model": ["model", 0], "conditioning": ["pos", 0]}),
        ),
        {"seed": 11, "steps": 12, "guidance_scale": 1.0, "sampler": "dpmpp_2m", "schedule": "beta"}
        | {"negative_prompt": ""},
    ),
    "an interval of guidance": (
        graph(
            sampler=("KSampler", KSAMPLER | ENDS | {"negative": ["both", 0]}),
            part=("ConditioningSetTimestepRange", {"conditioning": ["neg", 0], "start": 0.2, "end": 1.0}),
            first=("ConditioningSetTimestepRange", {"conditioning": ["pos", 0], "start": 0.0, "end": 0.2}),
            both=("ConditioningCombine", {"conditioning_1": ["first", 0], "conditioning_2": ["part", 0]}),
        ),
        {"guidance_interval": (0.2, 1.0)},
    ),
    "an image to start from and a mask": (
        graph(
            image=("LoadImage", {"image": "start.png [input]"}),
            scale=("ImageScale", {"image": ["image", 0], "width": 96, "height": 64, "crop": "center"}),
            encode=("VAEEncode", {"pixels": ["scale", 0], "vae": ["vae", 0]}),
            mask=("LoadImageMask", {"image": "clipspace/m.png", "channel": "alpha"}),
            latent=("SetLatentNoiseMask", {"samples": ["encode", 0], "mask": ["mask", 0]}),
            sampler=("KSampler", KSAMPLER | ENDS | {"denoise": 0.5}),
        ),
        {"width": 96, "height": 64, "denoise": 0.5, "batch_size": None}
        | {"files": FILES | {"image": "start.png", "mask": "clipspace/m.png"}},
    ),
    "one image of a batch": (
        graph(
            latent=("EmptyLatentImage", {"width": 832, "height": 1216, "batch_size": 3}),
            pick=("ImageFromBatch", {"image": ["decode", 0], "batch_index": 2, "length": 1}),
            save=("SaveImage", {"images": ["pick", 0]}),
        ),
        {"batch_size": 3, "batch_index": 2},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_graphs_are_followed(name):
    nodes, changed = CHANGES[name]
    changed = dict(changed)
    files, loras = changed.pop("files", FILES), changed.pop("loras", [])
    if "latent_image" in dict(nodes.get("sampler", {}).get("inputs", {})) and "denoise" not in str(nodes):
        changed.setdefault("denoise", None)
    recipe = read(BASE | nodes)
    assert recipe.values == {key: value for key, value in (VALUES | changed).items() if value is not None}
    assert (recipe.files, recipe.loras, recipe.messages) == (files, loras, [])
    assert recipe.loading == ({"comfyui_dora": True} if loras else {})


def upscaled(**more):
    again = KSAMPLER | ENDS | {"latent_image": ["up", 0], "denoise": 0.4, "seed": 99}
    return graph(
        up=("LatentUpscaleBy", {"samples": ["sampler", 0], "upscale_method": "bislerp", "scale_by": 1.5}),
        again=("KSampler", again),
        decode=("VAEDecode", {"samples": ["again", 0], "vae": ["vae", 0]}),
        sharp=("ImageSharpen", {"image": ["decode", 0], "sigma": 1.0}),
        save=("SaveImage", {"images": ["sharp", 0]}),
        **more,
    )


@pytest.mark.parametrize(
    ("nodes", "named"),
    [
        (upscaled(), ["again (KSampler)", "up (LatentUpscaleBy)", "sharp (ImageSharpen)"]),
        (model_through(last=("UNETLoader", {"unet_name": "a", "weight_dtype": "fp8_e4m3fn"})), ["last (UNETLoader)"]),
        (model_through(last=("LazyCache", {"model": ["model", 0]})), ["last (LazyCache)"]),
        (
            graph(
                control=("ControlNetApplyAdvanced", {"positive": ["pos", 0], "negative": ["neg", 0], "strength": 1}),
                sampler=("KSampler", KSAMPLER | ENDS | {"positive": ["control", 0], "negative": ["control", 1]}),
            ),
            ["control (ControlNetApplyAdvanced)"],
        ),
        (
            graph(
                pos=("ConditioningConcat", {"conditioning_to": ["p", 0], "conditioning_from": ["neg", 0]}),
                p=("CLIPTextEncode", {"text": "a (cat:1.2)", "clip": ["clip", 0]}),
            ),
            ["pos (ConditioningConcat)"],
        ),
        (
            graph(
                sampler=("KSampler", KSAMPLER | ENDS | {"positive": ["ask", 0]}),
                ask=("CLIPTextEncode", {"text": ["llm", 0], "clip": ["clip", 0]}),
                llm=("AskALanguageModel", {"question": ["a", 0], "image": ["b", 0]}),
                a=("X", {}),
                b=("X", {}),
            ),
            ["llm (AskALanguageModel)"],
        ),
    ],
)
def test_what_cannot_be_followed_is_named_and_the_rest_is_read(nodes, named):
    recipe = read(BASE | nodes)
    assert (recipe.values["seed"], recipe.values["steps"], recipe.values["width"]) == (7, 28, 832)
    for name in named:
        assert any(name in message for message in recipe.messages), (name, recipe.messages)


def prompts(**nodes):
    """The sampler's prompt is that of the node `all`; `one` and `two` are texts, `file` is a mask's file."""
    texts = {name: ("CLIPTextEncode", {"text": name, "clip": ["clip", 0]}) for name in ("one", "two")}
    file = ("LoadImageMask", {"image": "m.png", "channel": "red"})
    return graph(sampler=("KSampler", KSAMPLER | ENDS | {"positive": ["all", 0]}), file=file, **texts, **nodes)


def combined(one, two):
    return ("ConditioningCombine", {"conditioning_1": [one, 0], "conditioning_2": [two, 0]})


def set_mask(conditioning, mask, strength=1.0, bounds="default"):
    inputs = {"conditioning": [conditioning, 0], "mask": [mask, 0], "strength": strength, "set_cond_area": bounds}
    return ("ConditioningSetMask", inputs)


def set_area(conditioning, kind="", **inputs):
    return (f"ConditioningSetArea{kind}", {"conditioning": [conditioning, 0], **inputs})


QUARTER = {"x": 0.5, "y": 0.0, "width": 0.5, "height": 0.25}


@pytest.mark.parametrize(
    ("nodes", "prompt", "base_strength", "regions", "named"),
    [
        (
            prompts(
                all=combined("left", "right"),
                left=set_mask("one", "file", 2.0),
                right=set_mask("two", "file", 1.0, "mask bounds"),
            ),
            "",
            0.0,
            [StoredRegion("m.png", "one", 2.0), StoredRegion("m.png", "two", bounds=True)],
            "",
        ),
        (
            prompts(
                all=combined("base", "part"),
                base=set_area("one", "Strength", strength=0.5),
                part=set_area("two", x=64, y=0, width=128, height=512, strength=3.0),
            ),
            "one",
            0.5,
            [StoredRegion("64,0,128,512", "two", 3.0)],
            "",
        ),
        (  # What is nearest to the sampler counts.
            prompts(
                all=combined("again", "one"),
                again=set_area("first", "Percentage", strength=1.5, **QUARTER),
                first=set_area("two", x=8, y=8, width=64, height=64, strength=9.0),
            ),
            "one",
            None,
            [StoredRegion("50%,0%,50%,25%", "two", 1.5)],
            "",
        ),
        (
            prompts(
                all=combined("early", "late"),
                early=("ConditioningSetTimestepRange", {"conditioning": ["one", 0], "start": 0.0, "end": 0.4}),
                late=("ConditioningSetTimestepRange", {"conditioning": ["two", 0], "start": 0.4, "end": 1.0}),
            ),
            "",
            0.0,
            [
                StoredRegion("0%,0%,100%,100%", "one", end_percent=0.4),
                StoredRegion("0%,0%,100%,100%", "two", start_percent=0.4),
            ],
            "",
        ),
        (prompts(all=combined("one", "two")), "one", None, [StoredRegion("0%,0%,100%,100%", "two")], ""),
        (
            prompts(
                all=combined("one", "part"),
                part=set_mask("two", "solid"),
                solid=("SolidMask", {"value": 1.0, "width": 64, "height": 64}),
            ),
            "one",
            None,
            [],
            "solid (SolidMask)",
        ),
        (
            prompts(
                all=combined("one", "part"),
                part=set_mask("area", "file"),
                area=set_area("two", "Percentage", strength=1.0, **QUARTER),
            ),
            "one",
            None,
            [],
            "two (CLIPTextEncode)', whose prompt has an area and a mask",
        ),
    ],
)
def test_prompts_for_parts_are_regions(nodes, prompt, base_strength, regions, named):
    recipe = read(BASE | nodes)
    found = recipe.values["prompt"], recipe.values.get("base_strength"), recipe.regions
    assert found == (prompt, base_strength, regions)
    assert [named in message for message in recipe.messages] == [True] * bool(named)


def test_nan_and_values_of_wrong_kinds_are_not_read():
    text = json.dumps(BASE).replace('"cfg": 4.5', '"cfg": NaN').replace('"steps": 28', '"steps": {"a": []}')
    recipe = from_text(
        "x.png", {"prompt": text.replace('"class_type": "VAEDecode"', '"is_changed": [NaN], "class_type": "VAEDecode"')}
    )
    assert not {"guidance_scale", "steps"} & set(recipe.values)
    assert recipe.values["prompt"] == "a (cat:1.2)"
    assert len(recipe.messages) == 2


LOOP = graph(pos=("Reroute", {"": ["pos", 0]}), neg=("ConditioningCombine", {"conditioning_1": ["neg", 0]}))
DIAMONDS = {
    f"n{i}": {"class_type": "ConditioningCombine", "inputs": {"a": [f"n{i + 1}", 0], "b": [f"n{i + 1}", 0]}}
    for i in range(60)
}
DIAMONDS |= graph(n60=("CLIPTextEncode", {"text": "x", "clip": ["clip", 0]}), pos=("Reroute", {"": ["n0", 0]}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no sampler leads to a saved image in its ComfyUI graph"),
        ("a cat", "its prompt is not JSON"),
        ('{"1": 2, "2": {"class_type": 3}, "3": {"class_type": "A", "inputs": []}}', "no sampler leads to"),
        ('{"nodes": [], "links": []}', "a workflow of ComfyUI's editor, expected its API format"),
        (json.dumps(BASE | DIAMONDS), "its ComfyUI graph has too many links"),
        ('{"a":' * 50_000, "its prompt is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "its prompt is not JSON"),
    ],
)
def test_graphs_that_cannot_be_read_end_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        from_text("x.png", {"prompt": text})
    assert len(str(error.value).splitlines()) == 1


def test_a_circular_graph_ends():
    recipe = read(BASE | LOOP)
    assert "its prompt is not in its ComfyUI graph" in recipe.messages
    assert recipe.values["seed"] == 7
