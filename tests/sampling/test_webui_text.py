"""A1111's text: ours is read by A1111's rules, and theirs by ours."""

import hashlib
import json
import re

import pytest

from anima_jax.errors import UserError
from anima_jax.sampling.file_hashes import FileHashes
from anima_jax.sampling.image_text import from_text, to_text
from anima_jax.sampling.request import ImageRequest, SamplingParams

FILES = {
    "transformer": "a/anima-base-v1.0.safetensors",
    "vae": "v.safetensors",
    "text_encoder": "C:\\m\\qwen, b.safetensors",
}


def as_a1111_reads(text: str) -> dict[str, str]:
    """The grammar of A1111's parse_generation_parameters: the last line holds the pairs, if there are three of them."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    found = {"Prompt": [], "Negative prompt": []}
    name = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            name = "Negative prompt"
        found[name].append(line.removeprefix("Negative prompt:").strip())
    read = {name: json.loads(value) if value[:1] == '"' else value for name, value in pairs}
    return read | {name: "\n".join(lines) for name, lines in found.items()}


def test_files_have_a1111s_hashes(tmp_path):
    header = b'{"__metadata__":{}}'
    data = len(header).to_bytes(8, "little") + header + b"values"
    model, lora = tmp_path / "model.safetensors", tmp_path / "style.safetensors"
    model.write_bytes(data)
    lora.write_bytes(data)
    files = {"transformer": model, "loras": [(lora, 1.0), ("hf://a/b/c.safetensors", 1.0)]}
    hashes = FileHashes(str(model), [str(lora), "hf://a/b/c.safetensors"]).wait()
    found = as_a1111_reads(to_text(ImageRequest("a"), SamplingParams(), files, hashes=hashes)["parameters"])
    # A checkpoint's is that of the file, a LoRA's that of its values.
    assert found["Model hash"] == hashlib.sha256(data).hexdigest()[:10]
    assert found["Lora hashes"] == f"style: {hashlib.sha256(b'values').hexdigest()[:12]}"


def test_our_text_has_a1111s_layout():
    request = ImageRequest("1girl, (red:1.2) ü猫\nrain", 832, 1216, 2**64 - 1)
    params = SamplingParams("bad: worse,\nworst", 30, 4.5, "dpmpp_2m_sde_gpu", "karras", 2.5, 0.75)
    loras = [("b/x.safetensors", 0.8), ("y, z.safetensors", {"": 1.0, "text_encoder": 0.5})]
    text = to_text(request, params, FILES | {"loras": loras, "image": "i.png"})["parameters"]
    found = as_a1111_reads(text)
    assert found["Prompt"] == "1girl, (red:1.2) ü猫\nrain <lora:x:0.8> <lora:y z:0.5:1>"
    assert found["Negative prompt"] == "bad: worse,\nworst"
    expected = {"Steps": "30", "Sampler": "DPM++ 2M SDE", "Schedule type": "Karras", "CFG scale": "4.5", "Shift": "2.5"}
    expected |= {"Seed": str(2**64 - 1), "Size": "832x1216", "Model": "anima-base-v1.0", "Denoising strength": "0.75"}
    expected |= {"VAE": "v.safetensors", "Module 1": "v", "Module 2": "qwen b"}
    assert expected.items() <= found.items()
    assert text.splitlines()[-1].startswith("Steps: 30, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 4.5, ")


def test_eta_and_noise_are_options_of_the_samplers_that_have_them():
    params = SamplingParams(sampler="euler_ancestral", sampler_options={"eta": 0.5, "s_noise": 1.003})
    text = to_text(ImageRequest("a"), params, FILES)["parameters"]
    assert {"Eta": "0.5", "Sigma noise": "1.003"}.items() <= as_a1111_reads(text).items()
    assert from_text("x.png", {"parameters": text}).values["sampler_options"] == params.sampler_options
    bad = from_text("x.png", {"parameters": text.replace("Eta: 0.5", "Eta: x")})
    assert bad.values["sampler_options"] == {"s_noise": 1.003}
    assert "Eta 'x' is not a number from 0 to 100" in bad.messages
    assert "sampler_options" not in from_text("x.png", {"parameters": text.replace("Euler a", "Euler")}).values


@pytest.mark.parametrize(
    ("sampler", "schedule", "ours"),
    [
        ("Euler a", None, ("euler_ancestral", "normal")),
        ("Euler", "Simple", ("euler", "simple")),
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE", "Karras", ("dpmpp_2m_sde", "karras")),
        ("DPM++ 2M SDE", None, ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE Heun Exponential", None, ("dpmpp_2m_sde_heun", "exponential")),
        ("DPM++ 3M SDE", "Polyexponential", ("dpmpp_3m_sde", "exponential")),
        ("DPM++ SDE", "SGM Uniform", ("dpmpp_sde", "sgm_uniform")),
        ("DPM++ 2S a", "DDIM", ("dpmpp_2s_ancestral", "ddim_uniform")),
        ("DPM++ 2s a RF", "Beta", ("dpmpp_2s_ancestral", "beta")),
        ("DPM2 a", "KL Optimal", ("dpm_2_ancestral", "kl_optimal")),
        ("DPM2", "Uniform", ("dpm_2", "normal")),
        ("DPM fast", "Normal", ("dpm_fast", "normal")),
        ("DPM adaptive", None, ("dpm_adaptive", "normal")),
        ("Heun", "Linear Quadratic", ("heun", "linear_quadratic")),
        ("LMS", "Beta57", ("lms", "beta57")),
        ("UniPC", None, ("uni_pc", "normal")),
        ("LCM", "Simple", ("lcm", "simple")),
        ("DDIM", "Simple", ("ddim", "simple")),
        ("ER SDE", "Simple", ("er_sde", "simple")),
        ("Res Multistep", "Simple", ("res_multistep", "simple")),
        ("Euler A CFG++", "Simple", ("euler_ancestral_cfg_pp", "simple")),
        ("IPNDM_V", "Simple", ("ipndm_v", "simple")),
        ("er_sde", "sgm_uniform", ("er_sde", "sgm_uniform")),
        ("Nobody's", "Bong Tangent", ("Nobody's", "Bong Tangent")),
    ],
)
def test_samplers_and_schedules_have_our_names(sampler, schedule, ours):
    kind = f", Schedule type: {schedule}" if schedule else ""
    values = from_text("x", {"parameters": f"a\nSteps: 20, Sampler: {sampler}{kind}, Seed: 1"}).values
    assert (values["sampler"], values["schedule"]) == ours


def test_every_name_that_we_write_is_read_back():
    from anima_jax.diffusion.samplers import SAMPLERS
    from anima_jax.diffusion.schedules import SCHEDULES

    for sampler in SAMPLERS:
        for schedule in SCHEDULES:
            text = to_text(ImageRequest("a"), SamplingParams(sampler=sampler, schedule=schedule), {})
            values = from_text("x", {"parameters": text["parameters"]}).values
            assert (values["sampler"], values["schedule"]) == (sampler.removesuffix("_gpu"), schedule)


FORGE = """masterpiece, <lora:style:0.8>(cat:1.3), <lora:other_v2:0.5:0.25> <lora:third> \\(x\\), [a|b]
second line
Negative prompt: bad, <lora:none:1>
worse
Steps: 28, Sampler: Euler a, Schedule type: SGM Uniform, CFG scale: 4.5, Shift: 5, Seed: 965400086, Size: 832x1216, \
Model hash: bd43b7cf00, Model: anima_baseV10, Denoising strength: 0.4, Hires upscale: 2, Hires steps: 10, \
Hires upscaler: "a, b: \\"c\\"", Lora hashes: "style: 1234567890ab, other_v2: ba0987654321", Version: neo, \
Module 1: qwen_image_vae, Module 2: qwen_3_06b_base"""


def test_a_forge_image_is_read():
    recipe = from_text("x", {"parameters": FORGE})
    assert recipe.values == {
        "prompt": "masterpiece, (cat:1.3),   \\(x\\), [a|b]\nsecond line",
        "negative_prompt": "bad, \nworse",
        "steps": 28,
        "seed": 965400086,
        "guidance_scale": 4.5,
        "shift": 5.0,
        "width": 832,
        "height": 1216,
        "sampler": "euler_ancestral",
        "schedule": "sgm_uniform",
    }
    # A tag with two numbers: the text encoder's, then the model's. Ours: the model's first.
    assert recipe.loras == [("style", 0.8), ("other_v2", {"": 0.25, "text_encoder": 0.5}), ("third", 1.0)]
    files = {"transformer": "anima_baseV10", "vae": "qwen_image_vae", "text_encoder": "qwen_3_06b_base"}
    assert recipe.files == files
    hires, brackets, noise = recipe.messages
    assert hires == "not followed: 'Hires upscale: 2', 'Hires steps: 10', 'Hires upscaler: a, b: \"c\"'"
    assert ("plain text here" in brackets, "RNG" in noise) == (True, True)


def test_other_programs_json_is_named():
    with pytest.raises(UserError, match=r"x\.png: its parameters are another program's JSON, expected A1111's text"):
        from_text("x.png", {"parameters": '{"sui_image_params": {"prompt": "a"}}'})


BETA57 = "Beta schedule alpha: 0.5, Beta schedule beta: 0.7"


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("just words", {"prompt": "just words", "negative_prompt": ""}, None),
        ("", {"prompt": "", "negative_prompt": ""}, None),
        ("a\nSteps: many, CFG scale: nan, Seed: 1e400", {"prompt": "a"}, "CFG scale 'nan' is not a number"),
        ("a\nSteps: 20, Seed: 3, RNG: CPU, Size: 64x64\nTemplate: b", {"seed": 3, "width": 64, "height": 64}, None),
        ("Steps: 20, Seed: 3, RNG: CPU, CFG scale: 7.0", {"prompt": "", "steps": 20}, None),
        ("a\nSteps: 20, Denoising strength: 0.5, RNG: CPU", {"denoise": 0.5}, None),
        (f"a\nSteps: 20, Sampler: Euler, Schedule type: Beta, {BETA57}, RNG: CPU", {"schedule": "beta57"}, None),
        ("a" * 300_000, {"negative_prompt": ""}, None),
    ],
)
def test_odd_texts_are_read_as_far_as_they_go(text, values, message):
    recipe = from_text("x", {"parameters": text})
    assert values.items() <= recipe.values.items()
    assert (message in recipe.messages) if message else not recipe.messages
