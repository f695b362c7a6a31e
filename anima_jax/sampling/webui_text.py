"""Generation parameters as A1111's web UI and Forge write them into images; Civitai shows them.

The prompt, the negative prompt and a line of `name: value` pairs that starts with "Steps: " (`modules/processing.py`,
create_infotext, and `modules/infotext_utils.py` of both). Values that contain a comma, a colon or a newline are quoted
as in JSON. A tag `<lora:NAME:WEIGHT>` in the prompt applies a LoRA.
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from anima_jax.adapters.merge import Weight
from anima_jax.data.images import IMAGE_SUFFIXES
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import UserError
from anima_jax.sampling.controls import Control
from anima_jax.sampling.recipe import Recipe, file_name, lora_weight, model_and_text_encoder, quoted
from anima_jax.sampling.regions import Region

SAMPLER_NAMES = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "lms": "LMS",
    "dpm_fast": "DPM fast",
    "dpm_adaptive": "DPM adaptive",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "ddim": "DDIM",
    "uni_pc": "UniPC",
    "lcm": "LCM",
    "er_sde": "ER SDE",
    "res_multistep": "Res Multistep",
    "gradient_estimation": "Gradient Estimation",
    "euler_cfg_pp": "Euler CFG++",
    "euler_ancestral_cfg_pp": "Euler a CFG++",
}
"""Sampler → its name in A1111 or Forge. The others are written as they are."""

OTHER_SAMPLERS = {"dpmpp2sarf": "dpmpp_2s_ancestral", "extendedreversesde": "er_sde", "ddimcfgpp": "euler_cfg_pp"}

OPTION_NAMES = {"Eta": "eta", "Sigma noise": "s_noise"}
"""A1111's name of an option → ours."""

SCHEDULE_NAMES = {
    "simple": "Simple",
    "sgm_uniform": "SGM Uniform",
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "linear_quadratic": "Linear Quadratic",
    "kl_optimal": "KL Optimal",
}

OTHER_SCHEDULES = {"uniform": "normal", "polyexponential": "exponential"}

AUTOMATIC = {
    "karras": ("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm_2", "dpm_2_ancestral"),
    "exponential": ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"),
}
"""Schedule → the samplers that A1111 uses it for if the schedule type is "Automatic"; for the others it is Uniform."""

IGNORED = re.compile(
    r"(model|vae|lora|ti) hash(es)?|hashes|version|rng|clip skip|emphasis|created date|civitai .*|module \d+|"
    r"batch (size|pos)|diffusion in low bits|user|beta schedule (alpha|beta)|npw|size|"
    r"discard penultimate sigma|sgm noise multiplier",
    re.IGNORECASE,
)
"""Names of values that do not change the image here."""

_PAIR = re.compile(r'(\w[\w /-]{1,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
_LORA = re.compile(r"<(?:lora|lyco):([^:<>]+)((?::[^:<>]*)*)>")


def to_webui(
    values: Mapping[str, Any], files: Mapping[str, Any], loras: Sequence[tuple[str, Weight]], hashes: Mapping[str, str]
) -> str:
    """Return A1111's text for an image.

    `values` are the fields of `ImageRequest` and `SamplingParams`, `files` and `loras` names of files (a LoRA's weight
    is a number or numbers by part), and `hashes` the hashes of some of these files by name.
    """
    tags = "".join(f" <lora:{_stem(name)}:{_weights(weight)}>" for name, weight in loras)
    sampler = values["sampler"]
    pairs = {
        "Steps": values["steps"],
        "Sampler": SAMPLER_NAMES.get(sampler.removesuffix("_gpu"), sampler),
        "Schedule type": SCHEDULE_NAMES.get(values["schedule"], values["schedule"]),
        "CFG scale": _number(values["guidance_scale"]),
        "Shift": _number(values["shift"]),
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model hash": hashes.get(files.get("transformer", "")),
        "Model": _stem(files.get("transformer", "")),
        "Denoising strength": _number(values["denoise"]) if files.get("image") else None,
        **{name: values["sampler_options"].get(option) for name, option in OPTION_NAMES.items()},
        **{f"ControlNet {n}": _control(own, hashes) for n, own in enumerate(values.get("controls", ()))},
        "Regions": json.dumps(list(map(str, values["regions"])), ensure_ascii=False) if values.get("regions") else None,
        "Base strength": _number(values["base_strength"]) if values.get("regions") else None,
        "VAE": file_name(files.get("vae", "")),
        "Module 1": _stem(files.get("vae", "")),
        "Module 2": _stem(files.get("text_encoder", "")),
        "Lora hashes": ", ".join(f"{_stem(name)}: {hashes[name]}" for name, _ in loras if name in hashes),
        "Version": "anima_jax",
    }
    lines = [values["prompt"] + tags]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {values['negative_prompt']}")
    lines.append(
        ", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items() if value not in (None, ""))
    )
    return "\n".join(lines)


def _control(control: Control, hashes: Mapping[str, str]) -> str:
    """Return Forge's text for a control network, which does not name the picture (`ControlNetUnit`)."""
    name = _stem(control.name) + (f" [{hashes[control.name]}]" if control.name in hashes else "")
    numbers = f"Guidance Start: {float(control.start_percent)}, Guidance End: {float(control.end_percent)}"
    return f"Module: {control.kind or 'none'}, Model: {name}, Weight: {float(control.strength)}, {numbers}"


def from_webui(path: str, text: str) -> Recipe:
    """Return what A1111's text says; messages name values that this package does not have.

    Raises UserError for the JSON that other programs write under the same name.
    """
    if text.lstrip().startswith("{") and '"' in text:
        raise UserError(f"{path}: its parameters are another program's JSON, expected A1111's text")
    prompt, negative, pairs = split_text(text)
    recipe = Recipe(path)
    prompt, recipe.loras = split_loras(prompt)
    recipe.values |= {"prompt": prompt, "negative_prompt": split_loras(negative)[0]}
    known = {"Sampler", "Schedule type", "Model", "VAE", "Denoising strength"} | _add_regions(recipe, pairs)
    for name, (field, kind) in _NUMBERS.items():
        if name in pairs:
            known.add(name)
            try:
                recipe.values[field] = kind(pairs[name])
            except (ValueError, OverflowError):
                recipe.messages.append(f"{name} {quoted(pairs[name])} is not a number")
    if match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs.get("Size", "")):
        recipe.values |= {"width": int(match[1]), "height": int(match[2])}
    recipe.values |= sampler_and_schedule(pairs)
    known |= _add_options(recipe, pairs)
    _add_files(recipe, pairs)
    if "Denoising strength" in pairs and "Hires upscale" not in pairs and "Hires resize" not in pairs:
        with contextlib.suppress(ValueError):
            recipe.values["denoise"] = float(pairs["Denoising strength"])
    left = [f"{name}: {value}" for name, value in pairs.items() if name not in known and not IGNORED.fullmatch(name)]
    if left:
        recipe.messages.append(f"not followed: {quoted(*left)}")
    if re.search(r"\[[^\[\]]*\]|\b(BREAK|AND)\b", prompt + negative):
        recipe.messages.append("[…], BREAK and AND in its prompt are plain text here, as in ComfyUI")
    if pairs and pairs.get("RNG") != "CPU":
        recipe.messages.append("its web UI draws other starting noise than ComfyUI unless its RNG is CPU")
    return recipe


def _add_options(recipe: Recipe, pairs: Mapping[str, str]) -> set[str]:
    """Add the options that the sampler has, and return their names in the text."""
    sampler = SAMPLERS.get(recipe.values.get("sampler", ""))
    known = {name for name, option in OPTION_NAMES.items() if name in pairs and sampler and option in sampler.options}
    options: dict[str, Any] = {}
    for name in sorted(known):
        assert sampler
        try:
            options[OPTION_NAMES[name]] = sampler.options[OPTION_NAMES[name]].read(pairs[name])
        except ValueError:
            recipe.messages.append(
                f"{name} {quoted(pairs[name])} is not {sampler.options[OPTION_NAMES[name]].expected}"
            )
    recipe.values |= {"sampler_options": options} if options else {}
    return known


def _add_regions(recipe: Recipe, pairs: Mapping[str, str]) -> set[str]:
    """Add the regions that our own texts have, and return their name if they can be read. Opens no file."""
    try:
        recipe.regions += [Region.parse(text, _is_image_name).named() for text in json.loads(pairs["Regions"])]
    except (KeyError, ValueError, TypeError, RecursionError, UserError):
        return set()
    return {"Regions"}


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _integer(text: str) -> int:
    return int(text) if re.fullmatch(r"-?\d+", text) else int(float(text))


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


_NUMBERS = {
    "Steps": ("steps", _integer),
    "Seed": ("seed", _integer),
    "CFG scale": ("guidance_scale", _finite),
    "Shift": ("shift", _finite),
    "Base strength": ("base_strength", _finite),
}


def split_text(text: str) -> tuple[str, str, dict[str, str]]:
    """Return prompt, negative prompt and pairs. What follows the line of pairs is dropped."""
    lines = text.strip().split("\n")
    starts = [index for index, line in enumerate(lines) if re.match(r"\s*Steps:\s*\d", line)]
    last = starts[-1] if starts else len(lines) - 1
    found = _PAIR.findall(lines[last])
    if starts or len(found) >= 3:
        lines = lines[:last]
    else:
        found = []
    lines = [line.strip() for line in lines]
    cut = next((index for index, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[cut:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:cut]), negative, {name.strip(): _unquoted(value.strip()) for name, value in found}


def sampler_and_schedule(pairs: Mapping[str, str]) -> dict[str, str]:
    """Return sampler and schedule by our names; an unknown name stays as it is."""
    if "Sampler" not in pairs:
        return {}
    name, kind = pairs["Sampler"], pairs.get("Schedule type", "Automatic")
    for schedule in ("Karras", "Exponential"):
        if name.endswith(f" {schedule}"):  # as before version 1.9
            name, kind = name.removesuffix(f" {schedule}"), schedule
    samplers = {_key(known): known for known in (*SAMPLERS, *SAMPLER_NAMES)} | OTHER_SAMPLERS
    key = re.sub(r"(?<=[\w+]) a\b", " ancestral", name, flags=re.IGNORECASE)
    sampler = samplers.get(_key(key)) or samplers.get(_key(name), name)
    schedules = {_key(known): known for known in SCHEDULES} | OTHER_SCHEDULES
    schedules |= {_key(label): known for known, label in SCHEDULE_NAMES.items()}
    if _key(kind) == "beta" and (pairs.get("Beta schedule alpha"), pairs.get("Beta schedule beta")) == ("0.5", "0.7"):
        kind = "beta57"
    automatic = next((schedule for schedule, users in AUTOMATIC.items() if sampler in users), "normal")
    return {"sampler": sampler, "schedule": automatic if kind == "Automatic" else schedules.get(_key(kind), kind)}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold().replace("++", "pp").removeprefix("k_"))


def _add_files(recipe: Recipe, pairs: Mapping[str, str]) -> None:
    if model := pairs.get("Model"):
        recipe.files["transformer"] = model
    if (vae := pairs.get("VAE", "None")) not in ("None", "Automatic"):
        recipe.files["vae"] = vae
    for name, module in pairs.items():  # of Forge: the VAE and the text encoder, in any order
        if re.fullmatch(r"Module \d+", name):
            is_vae = re.search(r"vae|(^|[^a-z])ae([^a-z]|$)", module, re.IGNORECASE)
            recipe.files.setdefault("vae" if is_vae else "text_encoder", module)


def split_loras(prompt: str) -> tuple[str, list[tuple[str, Weight]]]:
    """Return the prompt without its LoRA tags, and their names and weights, which are (text encoder, model) if two."""
    loras = list[tuple[str, Weight]]()
    for name, arguments in _LORA.findall(prompt):
        weights: dict[str, float] = {}
        for index, argument in enumerate(arguments.split(":")[1:]):
            key, equals, value = argument.rpartition("=")
            with contextlib.suppress(ValueError):
                weights[key if equals else ("te", "unet")[index] if index < 2 else ""] = _finite(value)
        text_encoder = weights.get("te", 1.0)
        model = weights.get("unet", text_encoder)
        loras.append((name, lora_weight(model, text_encoder)))
    return _LORA.sub("", prompt), loras


def _weights(weight: Weight) -> str:
    model, text_encoder = model_and_text_encoder(weight)
    return _number(model) if model == text_encoder else f"{_number(text_encoder)}:{_number(model)}"


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _stem(path: Any) -> str:
    """Return the file's name without its ending, and without what would end a tag or a value."""
    return re.sub(r"[:,<>]", "", re.sub(r"\.(safetensors|sft|gguf|ckpt)$", "", file_name(path)))


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n]", value) else value


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == '"':
        with contextlib.suppress(ValueError):
            return str(json.loads(value))
    return value
