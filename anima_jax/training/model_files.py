"""Which files a command line of `generate` or `serve` names, with those of a configuration, a run or an older image."""

import argparse
import os
import pathlib
from collections import ChainMap
from collections.abc import Sequence, Set
from typing import Any

import jax.numpy as jnp

from anima_jax.adapters.kinds import adapter_kind
from anima_jax.adapters.merge import Weight, parse_lora_argument
from anima_jax.checkpoints import folders
from anima_jax.checkpoints.control import holds_control
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError
from anima_jax.sampling.arguments import given
from anima_jax.sampling.flags import DTYPES
from anima_jax.sampling.recipe import Recipe
from anima_jax.training.export import find_export


def newest_network(text: str) -> str:
    """Return a value of --control with the newest control network of a run in place of the run's folder."""
    ends = [index for index, character in enumerate(text) if character == "="]
    folder = next((text[:end] for end in ends if os.path.isdir(text[:end])), None)
    return text if folder is None else f"{find_export(folder)}{text.removeprefix(folder)}"


def networks(arguments: argparse.Namespace, config: MainConfig | None, like: Recipe) -> dict[str, Any]:
    """Return the arguments of `AnimaPipeline.load` from the flags, else the configuration, else the older image.

    A transformer comes with its own LLM adapter file and LoRAs: they are never taken from a later source than the
    transformer, except that `--models` applies the older image's LoRAs to any transformer. Raises UserError if no
    source names a required file.
    """
    loras: list[tuple[Any, Weight]] = [parse_lora_argument(text) for text in arguments.lora]
    exported = {}
    if arguments.checkpoint:
        file = find_export(arguments.checkpoint)
        if holds_control(file):
            raise UserError(f"{file}: is a control network, expected --control {arguments.checkpoint}=PICTURE")
        if is_adapter_file(file):
            loras.append((file, 1.0))
        else:
            exported = transformer_files(file)
    if arguments.models and not loras:
        loras = like.found_loras(arguments.models)
    named = ("vae", "text_encoder", "tokenizers", "embeddings", "dtype", "variant")
    # How weights are stored and how they are multiplied belong together, so that both are of one source.
    stored = {name: getattr(arguments, name) for name in ("transformer_dtype", "compute")}
    layers = [given(loras=loras), given(**{name: getattr(arguments, name) for name in named})]
    layers.append(stored if any(stored.values()) else {})
    layers += [exported, transformer_files(arguments.transformer)]
    if config:
        model = config.model
        layers += [
            given(vae=model.vae_path, text_encoder=model.llm_path, tokenizers=model.tokenizer_path),
            given(embeddings=config.sample and config.sample.embeddings),
            {"dtype": config.compute_dtype, "transformer_dtype": model.transformer_dtype, "compute": model.compute},
        ]
        if own := model.transformer_path:
            layers.append(
                {"transformer": own, "adapter": model.llm_adapter_path, "loras": (), "variant": model.variant}
            )
    layers.append(older_files(like, arguments.models, set(ChainMap(*layers))))
    unset = ("tokenizers", "embeddings", "variant", "transformer_dtype", "compute")
    files = ChainMap(*layers, {"dtype": DTYPES[0], **dict.fromkeys(unset)})
    if missing := [f"--{name}" for name in ("transformer", "vae", "text_encoder") if not files.get(name)]:
        raise UserError(f"missing files: give {', '.join(missing)}, or --config")
    names = ("transformer", "vae", "text_encoder", "adapter", "loras", *unset)
    comfyui_dora = arguments.comfyui_dora or like.loading.get("comfyui_dora", False)
    return {name: files[name] for name in names} | {"dtype": jnp.dtype(files["dtype"]), "comfyui_dora": comfyui_dora}


def transformer_files(
    transformer: Any, adapter: Any = None, loras: Sequence[tuple[Any, Weight]] = ()
) -> dict[str, Any]:
    """Return a transformer with its LLM adapter file, its LoRAs, and the other networks of a diffusers folder.

    Returns nothing if there is no transformer. A variant that a later source names is of its own transformer.
    Tokenizers of a diffusers folder are found when it is loaded.
    """
    if not transformer:
        return {}
    others = {name: path for name, path in folders.beside(transformer).items() if name != "tokenizers"}
    return {"transformer": transformer, "adapter": adapter, "loras": loras, "variant": None, **others}


def older_files(like: Recipe, models: Sequence[str], given: Set[str]) -> dict[str, Any]:
    """Return the files of an older image that are not `given`. Raises UserError if one of them is not found."""
    files = dict[str, Any](like.loading)
    for name in ("vae", "text_encoder", "tokenizers"):
        if name not in given and (path := like.find(name, models)):
            files[name] = path
    if "transformer" not in given and (path := like.find("transformer", models)):
        loras = [] if "loras" in given else like.found_loras(models)
        files = transformer_files(path, like.find("adapter", models), loras) | files
    if "embeddings" not in given and (folder := like.embeddings_folder(models)):
        files["embeddings"] = folder
    return files


def is_adapter_file(path: pathlib.Path) -> bool:
    """Return whether a safetensors file contains an adapter rather than a model."""
    with open_tensors(path) as file:
        return adapter_kind(file.tensors) is not None
