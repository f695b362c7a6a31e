"""Serve images over HTTP: `python -m anima_jax.serve --transformer … --port 8000`."""

if __name__ == "__main__":
    from anima_jax import launch

    launch.serve()  # which imports this module under its own name

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import jax

from anima_jax.adapters.merge import parse_lora_argument
from anima_jax.checkpoints.models import open_dit
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.data.images import set_up_pillow
from anima_jax.errors import ArgumentParser, UserError, command_line, os_reason, program
from anima_jax.parallel.mesh import check_mesh, make_mesh
from anima_jax.sampling.arguments import mesh_sizes
from anima_jax.sampling.flags import add_devices, add_networks, check_files
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.recipe import Recipe
from anima_jax.serving import extra
from anima_jax.serving.engine import Engine
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.training.model_files import networks
from anima_jax.training.profiling import use_compilation_cache

if TYPE_CHECKING:
    from anima_jax.serving.http.server import ServerConfig

KEY = "ANIMA_API_KEY"
"""The environment variable that may hold the key."""


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Serve images of the networks named by flags or a training configuration."""
    arguments = parse_arguments(argv)
    if missing := extra.missing():
        raise UserError(f"{', '.join(missing)}: not installed, expected the extra: pip install 'anima-jax[serve]'")
    from anima_jax.serving.app import create_app
    from anima_jax.serving.http.http_server import HttpServer, listen

    set_up_pillow()
    config = load_config(arguments.config, arguments.set, i_know_what_i_am_doing=True) if arguments.config else None
    files = networks(arguments, config, Recipe())
    library = library_of(arguments)
    settings = server_config(arguments, config, files, first_settings(arguments, library))
    mesh = make_mesh(mesh_sizes(arguments, config))
    with open_dit(
        files["transformer"],
        adapter_path=files["adapter"],
        variant=files["variant"],
        allow_unused=arguments.allow_unused,
    ) as checkpoint:
        check_mesh(mesh.shape, checkpoint.config.width, checkpoint.config.heads)
    use_compilation_cache(config.compilation_cache_dir if config else None)
    app, listening = create_app(None, settings), listen(settings)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host

    def load() -> Engine:
        with jax.set_mesh(mesh):
            pipeline = AnimaPipeline.load(**files, allow_unused=arguments.allow_unused, offload=arguments.offload)
            names = "slots", "max_waiting", "lora_slots", "lora_rank"
            options: dict[str, Any] = {name: getattr(arguments, name) for name in names} | {"mesh": mesh}
            # As many as any other sampler takes for `max_steps`.
            return Engine(pipeline, library=library, max_evaluations=3 * settings.limits.max_steps, **options)

    def ready() -> None:
        if not settings.is_local and settings.api_key is None:
            print(
                f"--host {settings.host}: whoever reaches this machine may use the server; --api_key", file=sys.stderr
            )
        print(f"serving at http://{shown}:{port}/", flush=True)

    HttpServer(app, load, arguments.drain_timeout, ready, warm_up=arguments.warm_up).serve_on(listening)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError if it is not valid."""
    parser = ArgumentParser(prog=program("anima_jax.serve"), description="Serve images of Anima over HTTP.")
    add_networks(parser)
    add_server(parser)
    add_limits(parser)
    devices = add_devices(parser)
    devices.add_argument("--slots", type=int, default=8, help="images that share an evaluation (default: 8)")
    add = devices.add_argument
    add("--lora_rank", type=int, default=64, help="rank that an image's LoRAs may have without merging (default: 64)")
    add("--lora_slots", type=int, default=4, help="how many times that rank is on the devices (default: 4)")
    wait = "let the first image wait for the compiler (default: compile for the default size when the model is loaded)"
    add("--no_warm_up", dest="warm_up", action="store_false", help=wait)
    parser.set_defaults(models=[])
    arguments = parser.parse_args(argv)
    check_files(parser, arguments)
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port {arguments.port}, expected 0 to 65535")
    for origin in arguments.cors:
        parts = urlsplit(origin)
        if f"{parts.scheme}://{parts.netloc}" != origin or not parts.scheme or not parts.netloc:
            parser.error(f"--cors {origin}: expected an origin, such as https://example.org")
    for flag, lowest in LOWEST.items():
        if not getattr(arguments, flag) >= lowest:  # NaN is not, either
            parser.error(f"--{flag} {getattr(arguments, flag)}, expected at least {lowest}")
    return arguments


LOWEST = {
    "slots": 1,
    "lora_rank": 1,
    "lora_slots": 1,
    "max_size": 64,
    "max_steps": 1,
    "max_batch": 1,
    "max_body": 1024,
    "max_waiting": 1,
    "job_timeout": 1,
    "drain_timeout": 0,
}
"""Flag → its lowest value."""


def add_server(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add("--api_key", metavar="KEY", help=f"what clients must give; better in a file or the variable {KEY}")
    add("--api_key_file", metavar="FILE", help="a file with the key")
    add("--control_dir", metavar="FOLDER", help="control networks that requests may name")
    add("--gallery", metavar="FOLDER", help="where images are written (default: they stay in memory)")
    add("--run", metavar="FOLDER", help="a training run, or a folder of runs, that the page shows")
    add("--dataset", metavar="FILE.toml", help="a data set, or a folder of images, that the page shows and edits")
    add("--page_lora", metavar="NAME[:WEIGHT]", help="a LoRA of --lora_dir that the page begins with")
    add("--page_prompt", metavar="TEXT", help="the prompt that the page begins with")
    allow = "another name by which clients call a server on this machine, such as a proxy's; * is any"
    add("--allow_host", action="append", default=[], metavar="NAME", help=allow)
    add("--cors", action="append", default=[], metavar="ORIGIN", help="another site whose pages may use the server")
    add("--drain_timeout", type=float, default=600.0, metavar="SECONDS", help="for jobs at the end (default: 600)")


def add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits of a request").add_argument
    for name, meaning in (
        ("max_size", "pixels of width and height"),
        ("max_steps", "steps"),
        ("max_batch", "images of one request"),
        ("max_body", "bytes of a request"),
        ("max_waiting", "images that may wait"),
    ):
        add(
            f"--{name}",
            type=int,
            default=getattr(RequestLimits, name),
            help=f"{meaning} (default: {getattr(RequestLimits, name)})",
        )
    seconds = f"for a request, from its arrival (default: {RequestLimits.job_timeout:g})"
    add("--job_timeout", type=float, default=RequestLimits.job_timeout, metavar="SECONDS", help=seconds)


def library_of(arguments: argparse.Namespace) -> LoraLibrary | None:
    """Return the LoRAs and control networks that requests may name. Raises UserError if one is no folder."""
    folders = [folder for folder in (arguments.lora_dir,) if folder]
    controls = [folder for folder in (arguments.control_dir,) if folder]
    if not folders and not controls and not arguments.run:  # whose exports become LoRAs
        return None
    options = {"allow_unused": arguments.allow_unused, "comfyui_dora": arguments.comfyui_dora}
    return LoraLibrary(*folders, controls=controls, **options)


def first_settings(arguments: argparse.Namespace, library: LoraLibrary | None) -> dict[str, Any]:
    """Return the settings that the page begins with. Raises UserError if the library has no such LoRA."""
    settings: dict[str, Any] = {} if arguments.page_prompt is None else {"prompt": arguments.page_prompt}
    if arguments.page_lora is not None:
        name, weight = parse_lora_argument(arguments.page_lora)
        if library is None:
            raise UserError(f"--page_lora {name}: expected --lora_dir with its folder")
        library.lora(name)
        settings["loras"] = [{"name": name, "weight": weight}]
    return settings


def server_config(
    arguments: argparse.Namespace, config: MainConfig | None, files: dict[str, Any], page: dict[str, Any]
) -> "ServerConfig":
    """Return what the server is told. Raises UserError for a folder or file that cannot be used."""
    from anima_jax.serving.http.server import ServerConfig

    paths: dict[str, Any] = {
        name: pathlib.Path(value) if (value := getattr(arguments, name)) else None
        for name in ("gallery", "run", "dataset")
    }
    if paths["run"] and paths["run"].exists() and not paths["run"].is_dir():
        raise UserError(f"--run {paths['run']}: is a file, expected the folder of a run, or of several")
    sample, defaults = config.sample if config else None, dict[str, Any]()
    if config:
        defaults |= dict(zip(("width", "height"), config.sample_size_wh, strict=True))
    if sample:
        defaults |= sample.sampling
    limits = {name: getattr(arguments, name) for name in LOWEST if name in RequestLimits.__dataclass_fields__}
    return ServerConfig(
        host=arguments.host,
        port=arguments.port,
        api_key=api_key(arguments),
        limits=RequestLimits(**limits),
        files=files,
        defaults=defaults,
        page=page,
        cors=tuple(arguments.cors),
        hosts=tuple(arguments.allow_host),
        **paths,
    )


def api_key(arguments: argparse.Namespace) -> str | None:
    """Return the key from the flag, the file or the environment. Raises UserError if it cannot be read or is empty."""
    key = arguments.api_key
    if key is None and arguments.api_key_file:
        try:
            key = pathlib.Path(arguments.api_key_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--api_key_file {arguments.api_key_file}: cannot be read: {os_reason(error)}") from None
    if key is None:
        key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise UserError("the API key is empty")
    return None if key is None else key.strip()
