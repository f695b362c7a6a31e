"""Generate images from prompts: `python -m anima_jax.generate --prompt "…" -o out.png`."""

if __name__ == "__main__":
    from anima_jax import launch

    launch.generate()  # which imports this module under its own name

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from anima_jax.checkpoints.control import network_for
from anima_jax.checkpoints.models import open_dit
from anima_jax.config.load import load_config
from anima_jax.data.images import set_up_pillow
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.errors import command_line
from anima_jax.parallel import hosts
from anima_jax.parallel.mesh import check_mesh, make_mesh, replicas
from anima_jax.sampling.arguments import (
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
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.image_text import to_text
from anima_jax.sampling.images import check_room, read_image, save_image
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.prompt_loras import apply_tags, shared_loras
from anima_jax.sampling.recipe import IMAGES
from anima_jax.sampling.request import SamplingParams, batches, check_requests
from anima_jax.training.model_files import networks, newest_network
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


def report_dropped(path: pathlib.Path, dropped: Sequence[str]) -> None:
    if dropped:
        print(f"{path}: has no room for {', '.join(dropped)}; a PNG has", file=sys.stderr)
