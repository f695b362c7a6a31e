"""Hostile TOMLs, command lines, and the texts in images that say how they were made."""

import functools
import json
import pathlib
import tomllib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from anima_jax import generate, train
from anima_jax.config.load import load_config
from anima_jax.config.summary import summary
from anima_jax.diffusion.samplers import SAMPLERS, sampler_plan
from anima_jax.sampling.arguments import sampling_params
from anima_jax.sampling.exif import text_chunks
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.image_text import read_recipe, to_text
from anima_jax.sampling.recipe import Recipe
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.training import optimizers
from tests.fuzz.data_files import PICTURES, indexes
from tests.fuzz.model_files import choice, command, networks
from tests.fuzz.mutations import CODECS, Files
from tests.sampling.test_comfyui_reader import BASE, CHANGES
from tests.small_run import ASSETS, write_transformer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# ---- TOMLs -----------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "max_steps": 10,
    "micro_batch_size_per_gpu": [[64, 2], [128, 1]],
    "gradient_accumulation_steps": 2,
    "warmup_steps": 3,
    "lr_scheduler": "cosine",
    "save_every_n_steps": 100,
    "checkpoint_every_n_minutes": 5.0,
    "eval_every_n_epochs": 1,
    "eval_datasets": [{"name": "x", "config": "eval.toml"}],
    "pseudo_huber_c": 0.1,
    "uncond_fraction": 0.1,
    "ema_decay": 0.99,
    "seed": 3,
    "sample": {"prompts": ["a cat"], "every_n_steps": 10, "steps": 4},
    "adapter": {"type": "lora", "rank": 8, "dropout": 0.1, "dtype": "float32"},
}


def _work_folder() -> None:
    """Make in the current folder what the TOMLs name."""
    indexes()
    if not pathlib.Path("base.safetensors").exists():
        write_transformer(pathlib.Path("base.safetensors"))
    pathlib.Path("tiny.safetensors").write_bytes(networks()["transformer"])


@functools.cache
def tomls() -> list[Files]:
    """The shipped configurations and one with many keys, for the tiny networks, with their data sets."""
    _work_folder()
    model = {
        **{"type": "anima", "transformer_path": "base.safetensors", "vae_path": str(ASSETS / "tiny_vae.safetensors")},
        **{"llm_path": str(ASSETS / "tiny_qwen3.safetensors"), "tokenizer_path": str(ASSETS / "tokenizers")},
    }
    found = list[Files]()
    for path in (*sorted(CONFIGS.glob("*.toml")), None):
        main = tomllib.loads((path or CONFIGS / "anima_lora.toml").read_text(encoding="utf-8"))
        if "model" not in main:
            continue
        main |= {"dataset": "dataset.toml", "output_dir": "runs"} | ({} if path else EVERYTHING)
        main.pop("mesh", None)
        main["model"] = {key: value for key, value in main["model"].items() if "path" not in key} | model
        data = {
            "resolutions": [64, [96, 48]],
            "enable_ar_bucket": True,
            "min_ar": 0.5,
            "max_ar": 2.0,
            "num_ar_buckets": 3,
        }
        data |= {"frame_buckets": [1, 5], "num_repeats": 2, "shuffle_tags": True, "caption_prefix": "x, "}
        data["directory"] = [{"path": PICTURES, "num_repeats": 1.5}, {"path": PICTURES, "ar_buckets": [1.0, [64, 96]]}]
        files = {
            "main.toml": main,
            "dataset.toml": data,
            "eval.toml": {"resolutions": [64], "directory": [{"path": PICTURES}]},
        }
        found.append({name: CODECS[".toml"][1](tree) for name, tree in files.items()})
    return found


def read_toml(folder: pathlib.Path) -> None:
    if choice(folder, 20) == 0:
        dry_run("--config", str(folder / "main.toml"))
        return
    config = load_config(folder / "main.toml", check_optimizer=optimizers.check)
    summary(config)


def dry_run(*words: str) -> None:
    train.main.__wrapped__([*words, "--dry_run"])


# ---- command lines ---------------------------------------------------------------------------------------------------


def command_lines() -> list[Files]:
    """Words of `generate`, `train` and `convert`; they name no transformer that exists, so that nothing is drawn."""
    folder = pathlib.Path("line")
    folder.mkdir(exist_ok=True)
    for name, data in tomls()[0].items():
        (folder / name).write_bytes(data)
    seen = "--prompt", "a (cat:1.2) <lora:x:0.5>", "--seed", "3", "--steps", "20", "--width", "512", "--height", "768"
    more = "--guidance_scale", "4", "--sampler", "euler", "--schedule", "beta", "--shift", "3", "--batch_size", "2"
    apg = "--apg_momentum", "-0.5", "--guidance_interval", "0.1", "0.9", "--sigmas", "1,0.5", "0", "--cfg_norm", "1"
    files = "--transformer", "gone.safetensors", "--vae", "v.safetensors", "--lora", "l.safetensors:0.5", "-o", "o.png"
    image = "--image", f"{PICTURES}/a.png", "--denoise", "0.5", "--mask", f"{PICTURES}/b.png", "--paste", "4"
    training = "--config", "line/main.toml", "--set", "optimizer.lr=1e-5", "--set", "epochs=3"
    dry = "--devices", "8", "--device_kind", "H100", "--profile", "3:5"
    lines: list[Sequence[str]] = [
        ("generate", *seen, *more, *files),
        ("generate", *seen, *apg, *files),
        ("generate", *seen[:4], "--width", "16", "--height", "16", *image, *files),
        ("generate", "--prompts", f"{PICTURES}/a.txt", "--mesh", "data=1", "--at_once", "4", "--tile", "512", *files),
        ("train", *training),
        ("train", *training, *dry),
        ("convert", "inspect", "tiny.safetensors"),
        ("convert", "lora", "tiny.safetensors", "o.safetensors", "--to", "kohya", "--remap", "28:40"),
        (
            "convert",
            "extract",
            "tiny.safetensors",
            "tiny.safetensors",
            "o.safetensors",
            "--rank",
            "4",
            "--dtype",
            "f32",
        ),
    ]
    return [{"line.json": json.dumps(line).encode()} for line in lines]


def read_command_line(folder: pathlib.Path) -> None:
    try:
        words = json.loads((folder / "line.json").read_bytes())
        words = [word for each in words for word in (each if isinstance(each, list) else [each])]
        words = [
            str(word).replace("\0", "").encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
            for word in words
        ]
    except (ValueError, TypeError, OSError, RecursionError):
        return
    # No word starts several processes, which would wait for each other, or replaces an existing file.
    words = [word for word in words if not word.startswith(("--coord", "--num_p", "--proc", "--force"))]
    match words:
        case ["generate", *rest]:
            generate.main.__wrapped__([*rest, "--transformer", "gone.safetensors"])
        case ["train", *rest]:
            dry_run(*rest)
        case ["convert", name, *rest] if name in ("inspect", "lora", "extract", "diff", "resize"):
            command(name, *rest)


def sampler_lines() -> list[Files]:
    """Every sampler with each of its options."""
    found = []
    for name, row in SAMPLERS.items():
        options = [f"{option}={each.default}" for option, each in row.options.items()]
        line = ["--sampler", name, "--steps", "9", "--shift", "3.0", "--schedule", "karras", "--guidance_scale", "4"]
        found.append({"line.json": json.dumps([*line, *(["--sampler_options", *options] if options else [])]).encode()})
    return found


def read_sampler_line(folder: pathlib.Path) -> None:
    try:
        words = [str(word).replace("\0", "") for word in json.loads((folder / "line.json").read_bytes())]
    except (ValueError, TypeError, RecursionError, OSError):
        return
    arguments = parse_arguments([*words, "--prompt", "x", "-o", "x.png"])
    params = sampling_params(arguments, None, Recipe())
    params.check()
    levels = params.levels()
    if len(levels) > 1:
        sampler_plan(params.sampler, levels, params.shift, params.sampler_options)


# ---- texts in images -------------------------------------------------------------------------------------------------


def recipes() -> list[Files]:
    """Our text, ComfyUI's graphs and A1111's texts; each file is an image's chunks, or stands alone."""
    files = {"transformer": "base.safetensors", "vae": "v.safetensors", "text_encoder": "t.safetensors"}
    loras = [("l.safetensors", 0.5), ("m.safetensors", {"": 1.0, "text_encoder": 0.25})]
    found = list[dict[str, Any]]()
    for params in (
        SamplingParams("bad", 20, 4.5, "dpmpp_2m_sde_gpu", "karras", 2.5, 0.75),
        SamplingParams(apg=True, apg_momentum=-0.5, sigmas=(1.0, 0.5, 0.0), noise="jax"),
        SamplingParams(sampler="euler_ancestral", sampler_options={"eta": 0.5, "s_noise": 1.003}),
    ):
        text = to_text(ImageRequest("a (cat:1.2)", 512, 768, 2**63), params, files | {"loras": loras, "image": "i.png"})
        own = json.loads(text["anima_jax"])
        found += [{"anima_jax": own}, {"prompt": json.loads(text["prompt"])}, {"parameters": text["parameters"]}]
    graphs = [BASE, *(BASE | change[0] for change in CHANGES.values())]
    found += [{"prompt": graph} for graph in graphs]
    early = {"prompt": "a cat", "seed": "3", "width": "512", "height": "512", "steps": "20", "sigmas": "1.0 0.5"}
    return [{"chunks.json": json.dumps(chunks).encode()} for chunks in (*found, early)]


def read_image_text(folder: pathlib.Path) -> None:
    try:
        chunks = json.loads((folder / "chunks.json").read_bytes())
    except (ValueError, RecursionError, OSError):
        return
    if not isinstance(chunks, dict):
        return
    texts = {key[:79]: value if isinstance(value, str) else json.dumps(value) for key, value in chunks.items()}
    path = folder / "image.png"
    if choice(folder, 3) == 0 and len(texts) == 1:  # a graph or a text alone
        ((name, text),) = texts.items()
        path = folder / f"alone.{'txt' if name == 'parameters' else 'json'}"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        try:
            Image.new("RGB", (64, 48)).save(path, pnginfo=text_chunks(texts))
        except (ValueError, UnicodeError):  # no PNG can hold it
            return
    read_recipe(str(path))
    generate.main.__wrapped__(["--like", str(path), "--models", PICTURES, "-o", str(folder / "o.png")])


FORMATS: dict[str, tuple[Callable[[], list[Files]], Callable[[pathlib.Path], None]]] = {
    "toml": (tomls, read_toml),
    "command_line": (command_lines, read_command_line),
    "sampler": (sampler_lines, read_sampler_line),
    "image_text": (recipes, read_image_text),
}
