"""Adapter files for tests: the golden LoRA in every dialect, and random adapters of every kind."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from anima_jax.adapters import modules, planning
from anima_jax.adapters.dialects import LAYOUTS, module_names
from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.kinds import FACTORS, SCALE
from anima_jax.adapters.merge import AdapterStack
from anima_jax.models import parameters
from tests.golden_files import GOLDEN, channel_last, golden
from tests.models.networks import quick_jit

LORA = GOLDEN / "lora_rank4.safetensors"
LOKR = GOLDEN / "lokr_rank4.safetensors"

TO_DIFFUSERS = (
    ("blocks.", "transformer_blocks."),
    (".self_attn.output_proj", ".attn1.to_out.0"),
    (".cross_attn.output_proj", ".attn2.to_out.0"),
    *((f".self_attn.{x}_proj", f".attn1.to_{x}") for x in "qkv"),
    *((f".cross_attn.{x}_proj", f".attn2.to_{x}") for x in "qkv"),
    (".mlp.layer1", ".ff.net.0.proj"),
    (".mlp.layer2", ".ff.net.2"),
    (".adaln_modulation_self_attn.", ".norm1.linear_"),
    (".adaln_modulation_cross_attn.", ".norm2.linear_"),
    (".adaln_modulation_mlp.", ".norm3.linear_"),
)
"""Name of a module of a block in the original files → in diffusers."""


def split(key: str) -> tuple[str, str]:
    """The module and the part of a key of the trainer's."""
    for part in (".lora_A.weight", ".lora_B.weight"):
        if key.endswith(part):
            return key.removeprefix("diffusion_model.").removesuffix(part), part[6]
    module, _, part = key.removeprefix("diffusion_model.").rpartition(".")
    return module, part


def diffusers_name(module: str) -> str:
    if module.startswith("llm_adapter."):
        return "text_conditioner." + module.removeprefix("llm_adapter.")
    for original, peer in TO_DIFFUSERS:
        module = module.replace(original, peer)
    return "transformer." + module


def flat(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


SPELLINGS = {
    "trainer": (lambda m: f"diffusion_model.{m}", ".lora_A.weight", ".lora_B.weight"),
    "up and down": (lambda m: f"diffusion_model.{m}", ".lora_down.weight", ".lora_up.weight"),
    "kohya": (flat, ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (diffusers_name, ".lora_A.weight", ".lora_B.weight"),
    "peft": (lambda m: f"base_model.model.{m}", ".lora_A.weight", ".lora_B.weight"),
    "peft of diffusers": (
        lambda m: "base_model.model." + diffusers_name(m).removeprefix("transformer."),
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
    "net": (lambda m: f"net.{m}", ".lora_A.weight", ".lora_B.weight"),
    "net of ComfyUI": (lambda m: f"diffusion_model.net.{m}", ".lora_A.weight", ".lora_B.weight"),
    "net of kohya": (lambda m: flat(f"net.{m}"), ".lora_down.weight", ".lora_up.weight"),
    "bare": (lambda m: m, ".lora_A.weight", ".lora_B.weight"),
}
"""How each dialect spells a module, and what it calls A and B."""


def lora_as(dialect: str, path: pathlib.Path, alpha: float | None = None) -> pathlib.Path:
    """The golden LoRA in another dialect. With `alpha`, its B is larger by rank / alpha, so that it does the same."""
    spell, a, b = SPELLINGS[dialect]
    tensors = {}
    for key, array in load_file(LORA).items():
        module, part = split(key)
        tensors[spell(module) + (a if part == "A" else b)] = array if part == "A" or not alpha else array * (4 / alpha)
        if alpha:
            tensors[spell(module) + ".alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, {"format": "pt"})
    return path


def peft_config(path: pathlib.Path, **values) -> None:
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, **values}))


@quick_jit
def reference_velocity(model, inputs):
    context = model.llm_adapter(inputs["qwen"], inputs["t5_ids"], inputs["qwen_mask"], inputs["t5_mask"])
    return model(inputs["x_t"], inputs["t"], context)


def velocity(model) -> np.ndarray:
    """A model's for the inputs of the golden picture."""
    inputs = golden("dit_image.io")
    inputs["x_t"] = channel_last(inputs["x_t"])
    wanted = ("qwen", "t5_ids", "qwen_mask", "t5_mask", "x_t", "t")
    return np.asarray(reference_velocity(model, {key: jnp.asarray(inputs[key]) for key in wanted}))


def updates(path) -> dict[str, np.ndarray]:
    """Module → ΔW of an adapter's file."""
    with open_adapter(path) as adapter:
        return {module: patch.update() for module, patch in adapter.patches.items()}


def rank_axes(factor: str) -> list[int]:
    """The axes of a factor of one layer that are the rank."""
    return [number for number, axis in enumerate(FACTORS[factor].axes) if axis == "rank"]


def merged(path, model, **options):
    """`model` with a file's adapter in its weights, as the pipeline loads it."""
    graphdef, params = parameters.split(model)
    return parameters.merge(graphdef, params | AdapterStack([path], params, {}, **options).params_for([1.0])[0])


def beside(path, model):
    """The structure and parameters of `model` with a file's adapter beside its weights, as a run starts from it."""
    layers = {target: shape[0] for target, shape in modules.target_shapes(model).items()}
    places, specs, scales = module_names(layers), {}, {}
    with open_adapter(path) as adapter:
        for module, patch in adapter.patches.items():
            target, layer = places[module]
            names = {f.part: f.name for f in patch.kind.factors}
            own = {
                names[n]: LAYOUTS[names[n]].to_model(part.read()).shape for n, part in patch.parts.items() if n in names
            }
            spec = specs.get(target) or modules.AdapterSpec(patch.kind.name, own, (0,) * layers[target])
            shapes = {name: tuple(map(max, shape, spec.shapes[name])) for name, shape in own.items()}
            ranks = [patch.rank or 1 if n == layer else rank for n, rank in enumerate(spec.ranks)]
            specs[target] = spec._replace(shapes=shapes, ranks=tuple(ranks))
            scales.setdefault(f"{target}.{SCALE}", np.zeros(layers[target], np.float32))[layer] = patch.scale
        modules.attach(model, specs)
        graphdef, params = parameters.split(model)
        params |= {name: jnp.asarray(value) for name, value in scales.items()}
        return graphdef, params | planning.factors_of(adapter, specs, scales, params, str(path)), specs
