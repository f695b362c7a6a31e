"""Generate images from prompts: `python -m anima_jax.generate --prompt "…" -o out.png`."""

if __name__ == "__main__":
    from anima_jax import launch

    launch.generate()  # which imports this module under its own name

import argparse
import dataclasses
import os
import pathlib
import sys
from collections import ChainMap
from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from anima_jax.adapters.kinds import adapter_kind
from anima_jax.adapters.merge import Weight, parse_lora_argument
from anima_jax.checkpoints import folders
from anima_jax.checkpoints.control import holds_control, network_for
from anima_jax.checkpoints.models import open_dit
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.images import set_up_pillow
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.errors import UserError, command_line
from anima_jax.parallel import hosts
from anima_jax.parallel.mesh import check_mesh, make_mesh, replicas
from anima_jax.sampling.arguments import (
    given,
    given_controls,
    given_regions,
    image_requests,
    mesh_sizes,
    older_image,
    output_paths,
    reference_pictures,
    resized,
    sampling_params,
)
from anima_jax.sampling.callbacks import progress
from anima_jax.sampling.file_hashes import FileHashes
from anima_jax.sampling.flags import DTYPES, parse_arguments
from anima_jax.sampling.image_text import to_text
from anima_jax.sampling.images import check_room, read_image, save_image
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.prompt_loras import apply_tags, shared_loras
from anima_jax.sampling.recipe import IMAGES, Recipe
from anima_jax.sampling.request import SamplingParams, batches, check_requests
from anima_jax.training.export import find_export
from anima_jax.training.profiling import use_compilation_cache


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Generate images from prompts, with networks named by flags, a training configuration or an older image."""
    arguments = parse_arguments(argv)
    hosts.join(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    with hosts.abort_all_on_error():
        generate(arguments)


def generate(arguments: argparse.Namespace) -> None:
    """Generate the images that the flags describe, on the mesh given by the flags or the configuration."""
    set_up_pillow()
    config = load_config(arguments.config, arguments.set, i_know_what_i_am_doing=True) if arguments.config else None
    like = older_image(arguments)
    params = sampling_params(arguments, config, like)
    sources = {name: getattr(arguments, name) or like.find(name, arguments.models) for name in IMAGES}
    image, mask = (read_image(path) if path else None for path in sources.values())
    check_requests([], SamplingParams(), image, mask)
    arguments.control = arguments.control and list(map(newest_network, arguments.control))
    controls, steering = given_controls(arguments, like)
    inputs: dict[str, tuple[Any, ...]] = {"controls": controls}
    inputs |= {"references": reference_pictures(arguments, like), "regions": given_regions(arguments, like)}
    requests = image_requests(arguments, config, like, image, **inputs)
    image, mask = (resized(part, requests[0]) for part in (image, mask))
    check_requests(requests, params, image, mask)
    requests, params, tagged = apply_tags(requests, params, arguments.lora_dir)
    paths = output_paths(pathlib.Path(arguments.output), len(requests))
    if hosts.is_process_0():
        check_room(paths, [(request.width, request.height) for request in requests])
    files = networks(arguments, config, like)
    mesh = make_mesh(sizes := mesh_sizes(arguments, config))
    with open_dit(
        files["transformer"],
        adapter_path=files["adapter"],
        variant=files["variant"],
        allow_unused=arguments.allow_unused,
    ) as checkpoint:
        check_mesh(mesh.shape, checkpoint.config.width, checkpoint.config.heads)
        for network in steering:  # for another transformer: better before that is loaded
            network_for(network, width=checkpoint.config.width, blocks=checkpoint.config.blocks)
    flags = {"--mesh": sizes, "--at_once": arguments.at_once, "dtype": str(files["dtype"])}
    numbered = {f"image {number}": str(request) for number, request in enumerate(requests, 1)}
    hosts.assert_same_on_all_processes(
        lambda: {"jax": jax.__version__, **flags, **dataclasses.asdict(params), **numbered}
    )
    use_compilation_cache(config.compilation_cache_dir if config else None)
    loras, (own_files, weights) = list(files["loras"]), shared_loras(tagged)
    files["loras"] = [*loras, *((path, 0.0) for path in own_files)]
    with jax.set_mesh(mesh):
        pipeline = AnimaPipeline.load(**files, allow_unused=arguments.allow_unused, offload=arguments.offload)
        hashes = FileHashes(
            str(files["transformer"]), [str(path) for path, _ in files["loras"]], [one.name for one in controls]
        )
        at_once = arguments.at_once * replicas(mesh.shape)
        if SAMPLERS[params.sampler].controller:  # It draws whole batches, each of which should be drawn once.
            at_once = max(1, at_once // requests[0].batch_size) * requests[0].batch_size
        for batch in batches(weights, at_once):
            if own_files:
                pipeline.set_lora_weights([*(weight for _, weight in loras), *weights[batch.start]])
            with progress(pipeline.decode, paths[batch], arguments.preview) as callback:
                images = pipeline.draw(requests[batch], params, image=image, mask=mask, callback=callback)
            for drawn, request, path, own in zip(images, requests[batch], paths[batch], tagged[batch], strict=True):
                if hosts.is_process_0():
                    named = files | sources | {"loras": [*loras, *own]}
                    text = to_text(request, params, named, mask=mask, hashes=hashes.wait())
                    report_dropped(path, save_image(drawn, path, text, arguments.quality))
                print(path)
        if params.step_cache and hosts.is_process_0():
            print(f"cache {params.step_cache}: {pipeline.savings}", file=sys.stderr)


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


def report_dropped(path: pathlib.Path, dropped: Sequence[str]) -> None:
    if dropped:
        print(f"{path}: has no room for {', '.join(dropped)}; a PNG has", file=sys.stderr)


def is_adapter_file(path: pathlib.Path) -> bool:
    """Return whether a safetensors file contains an adapter rather than a model."""
    with open_tensors(path) as file:
        return adapter_kind(file.tensors) is not None
