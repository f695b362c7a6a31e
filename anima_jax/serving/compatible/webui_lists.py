"""What A1111's API lists of a server, and what it does with pictures without drawing.

Source: modules/api/api.py of AUTOMATIC1111/stable-diffusion-webui and scripts/api.py of Mikubill/sd-webui-controlnet.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import jax
from pydantic import BaseModel, Field, RootModel
from starlette.requests import Request
from starlette.routing import Route

from anima_jax.data.preprocessors import KINDS, control_picture
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import UserError, show_value
from anima_jax.parallel.devices import device_bytes
from anima_jax.sampling.embeddings import Embeddings
from anima_jax.sampling.exif import PARAMETERS, read_text
from anima_jax.sampling.recipe import file_name
from anima_jax.sampling.webui_text import SAMPLER_NAMES, SCHEDULE_NAMES, split_text
from anima_jax.serving.compatible.webui_models import WebuiBody
from anima_jax.serving.compatible.webui_pictures import UPSCALERS, resized_by
from anima_jax.serving.compatible.webui_requests import control_kind
from anima_jax.serving.http.metrics import resident_bytes
from anima_jax.serving.http.pictures import decode_picture, png_text
from anima_jax.serving.http.routes import NotFoundError, api_route
from anima_jax.serving.http.server import Server, server_of

MAX_UPSCALED = 8192
"""Largest side of an image that is only scaled up; all images of an answer have at most the pixels of its square."""


class WebuiError(BaseModel):
    """What is wrong, in one line."""

    error: str
    detail: str
    body: str = ""
    errors: str


def webui_error(status: int, message: str) -> dict[str, Any]:
    """Return the JSON of an error of A1111's API."""
    kind = "RequestValidationError" if status in (400, 422) else "HTTPException"
    return WebuiError(error=kind, detail=message, errors=message).model_dump()


SHARED: Mapping[str, Any] = {"tag": "a1111", "shape": webui_error, "error_model": WebuiError}


def get(path: str, handler: Callable[..., Any], summary: str, answer: Any, **described: Any) -> Route:
    """Return a route of A1111's API; `described` are other fields of `Operation`."""
    return api_route(path, "GET", handler, summary, answer=answer, **{**SHARED, **described})


def post(path: str, handler: Callable[..., Any], summary: str, answer: Any, **described: Any) -> Route:
    """Return a route of A1111's API; `described` are other fields of `Operation`."""
    return api_route(path, "POST", handler, summary, answer=answer, **{**SHARED, **described})


class Empty(BaseModel):
    """Done."""


class Listed(RootModel[list[dict[str, Any]]]):
    """A list of objects."""


class Named(RootModel[dict[str, Any]]):
    """An object."""


class InfoBody(WebuiBody):
    """A picture whose text is asked for."""

    image: str


class ScaleBody(WebuiBody):
    """How to scale a picture up."""

    resize_mode: int = Field(0, ge=0, le=1)
    show_extras_results: bool = True
    gfpgan_visibility: float = 0.0
    codeformer_visibility: float = 0.0
    upscaling_resize: float = Field(2.0, gt=0.0, le=64.0)
    upscaling_resize_w: int = Field(512, ge=1)
    upscaling_resize_h: int = Field(512, ge=1)
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: float = Field(0.0, ge=0.0, le=1.0)


class SingleBody(ScaleBody):
    """A picture to scale up."""

    image: str


class FileBody(WebuiBody):
    """A file of a batch."""

    data: str
    name: str = ""


class BatchBody(ScaleBody):
    """Pictures to scale up."""

    imageList: list[FileBody]  # noqa: N815 - A1111's name


class DetectBody(WebuiBody):
    """Pictures of which control pictures are made."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str]
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1


def model_entry(server: Server) -> dict[str, Any]:
    path = str(server.files.get("transformer") or "anima")
    name = file_name(path)
    stem = name.rpartition(".")[0] or name
    shown = path if server.config.is_local else name
    return {"title": name, "model_name": stem, "hash": None, "sha256": None, "filename": shown, "config": None}


def _samplers(server: Server) -> list[dict[str, Any]]:
    return [
        {"name": SAMPLER_NAMES.get(name, name), "aliases": [name, f"k_{name}"], "options": dict[str, str]()}
        for name in SAMPLERS
    ]


def _schedulers(server: Server) -> list[dict[str, Any]]:
    labels = {"automatic": "Automatic"} | {name: SCHEDULE_NAMES.get(name, name) for name in SCHEDULES}
    return [
        {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
        for name, label in labels.items()
    ]


def _loras(server: Server) -> list[dict[str, Any]]:
    paths = server.library.lora_paths() if server.library and server.config.is_local else {}
    return [
        {
            "name": entry.name,
            "alias": entry.name.rpartition("/")[2],
            "path": paths.get(entry.name, entry.name),
            "metadata": {"modelspec.trigger_phrase": ", ".join(entry.trigger)} if entry.trigger else {},
        }
        for entry in (server.library.loras() if server.library else ())
    ]


def _upscalers(server: Server) -> list[dict[str, Any]]:
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0} for name in UPSCALERS
    ]


def _vaes(server: Server) -> list[dict[str, Any]]:
    path = str(server.files.get("vae") or "")
    shown = path if server.config.is_local else file_name(path)
    return [{"model_name": file_name(path), "filename": shown}] if path else []


def _nothing(server: Server) -> list[dict[str, Any]]:
    return []


LISTS: dict[str, Callable[[Server], list[dict[str, Any]]]] = {
    "samplers": _samplers,
    "schedulers": _schedulers,
    "loras": _loras,
    "sd-models": lambda server: [model_entry(server)],
    "sd-vae": _vaes,
    "sd-modules": _vaes,
    "upscalers": _upscalers,
    **dict.fromkeys(
        ("latent-upscale-modes", "prompt-styles", "hypernetworks", "face-restorers", "realesrgan-models"), _nothing
    ),
    **dict.fromkeys(("script-info", "extensions"), _nothing),
}
"""Name of a route → its list. Front ends ask at their start for lists of what this server does not have, too."""

REFRESHED = ("refresh-loras", "refresh-checkpoints", "refresh-vae", "refresh-embeddings")


async def png_info(request: Request, body: InfoBody) -> Named:
    """Return the texts of a picture; A1111's also as its parts."""
    server = server_of(request)
    picture = await server.decoding(decode_picture, body.image.strip(), "image", server.limits)
    texts = read_text(picture)
    info = texts.pop(PARAMETERS, "")
    prompt, negative, pairs = split_text(info) if len(info) <= server.limits.max_text else ("", "", {})
    parameters = {"Prompt": prompt, "Negative prompt": negative, **pairs} if info else {}
    if size := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        parameters |= {"Size-1": size[1], "Size-2": size[2]}
    return Named({"info": info, "items": texts, "parameters": parameters})


def _scaled(text: str, body: ScaleBody, server: Server, what: str, most: int = MAX_UPSCALED**2) -> tuple[str, int]:
    """Return a picture that was scaled up, and its pixels. Raises UserError for more than `most` of them."""
    if body.gfpgan_visibility or body.codeformer_visibility:
        raise UserError("gfpgan_visibility, codeformer_visibility: there is no face restoration")
    if body.extras_upscaler_2_visibility and body.upscaler_2 != "None":
        raise UserError("upscaler_2: there is one upscaler at a time")
    if body.upscaler_1 not in UPSCALERS:
        raise NotFoundError(f"upscaler_1 {show_value(body.upscaler_1)} not found, expected {', '.join(UPSCALERS)}")
    picture = decode_picture(text, what, server.limits)
    size = body.upscaling_resize_w, body.upscaling_resize_h
    if body.resize_mode == 0:
        size = round(picture.width * body.upscaling_resize), round(picture.height * body.upscaling_resize)
    if not body.upscaling_crop and body.resize_mode == 1:
        scale = max(size[0] / picture.width, size[1] / picture.height)
        size = round(picture.width * scale), round(picture.height * scale)
    if max(size) > MAX_UPSCALED:
        raise UserError(f"{size[0]}×{size[1]} pixels, expected at most {MAX_UPSCALED} a side")
    size = max(size[0], 1), max(size[1], 1)
    if (pixels := size[0] * size[1]) > most:
        raise UserError(f"{what}: {size[0]}×{size[1]} pixels, expected at most {MAX_UPSCALED}² of all together")
    return png_text(resized_by(1, picture, size, UPSCALERS[body.upscaler_1])), pixels


async def scale_one(request: Request, body: SingleBody) -> Named:
    """Scale a picture up."""
    data, _ = await server_of(request).decoding(_scaled, body.image, body, server_of(request), "image")
    return Named({"html_info": "", "image": data if body.show_extras_results else None})


async def scale_all(request: Request, body: BatchBody) -> Named:
    """Scale pictures up."""
    server = server_of(request)
    server.limits.check_count(len(body.imageList))
    images, left = list[str](), MAX_UPSCALED**2
    for index, file in enumerate(body.imageList):
        image, pixels = await server.decoding(_scaled, file.data, body, server, f"imageList[{index}]", left)
        images.append(image)
        left -= pixels
    return Named({"html_info": "", "images": images if body.show_extras_results else []})


async def interrogate(request: Request) -> Empty:
    """Say that pictures are not described."""
    raise NotFoundError("Model not found: this server describes no pictures")


async def embeddings(request: Request) -> Named:
    """Return the textual inversions, under the names by which prompts call them."""
    folder = server_of(request).files.get("embeddings")
    found = await asyncio.to_thread(Embeddings(folder, 0).listed)
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    loaded = {
        f"embedding:{name}": {**unknown, "shape": width, "vectors": count} for name, (count, width) in found.items()
    }
    return Named({"loaded": loaded, "skipped": {}})


async def scripts(request: Request) -> Named:
    """Return the names for alwayson_scripts."""
    names = ["controlnet"] if await asyncio.to_thread(control_names, server_of(request)) else []
    return Named({"txt2img": names, "img2img": names})


async def cmd_flags(request: Request) -> Named:
    """Return A1111's flags that this server has, too."""
    config = server_of(request).config
    return Named({"api": True, "listen": not config.is_local, "server_name": config.host, "port": config.port})


async def memory(request: Request) -> Named:
    """Return the memory of the machine and of the first device, in bytes."""
    total = device_bytes(jax.local_devices(backend="cpu")[0]) or 0
    used = resident_bytes()
    stats = jax.local_devices()[0].memory_stats() or {}
    cuda: dict[str, Any] = {"error": "unavailable"}
    if "bytes_limit" in stats:
        limit, now, peak = (stats.get(name, 0) for name in ("bytes_limit", "bytes_in_use", "peak_bytes_in_use"))
        cuda = {
            "system": {"free": limit - now, "used": now, "total": limit},
            "allocated": {"current": now, "peak": peak},
        }
    return Named({"ram": {"free": max(total - used, 0), "used": used, "total": total}, "cuda": cuda})


def control_names(server: Server) -> list[str]:
    """Return the names of the server's control networks."""
    return [entry.name for entry in server.library.controls()] if server.library else []


async def controlnet_version(request: Request) -> Named:
    """Return the version of ControlNet's API that this one follows."""
    return Named({"version": 2})


async def controlnet_models(request: Request) -> Named:
    """Return the names of control networks."""
    return Named({"model_list": await asyncio.to_thread(control_names, server_of(request))})


async def controlnet_types(request: Request) -> Named:
    """Return what front ends offer together; here it is all of one type."""
    models = await asyncio.to_thread(control_names, server_of(request))
    every = {"module_list": ["none", *KINDS], "model_list": ["None", *models]}
    return Named({"control_types": {"All": {**every, "default_option": "none", "default_model": "None"}}})


async def controlnet_settings(request: Request) -> Named:
    """Return how many units a request may have."""
    return Named({"control_net_unit_count": server_of(request).limits.max_controls})


async def queue_status(request: Request) -> Named:
    """Return the queue as Gradio does, which plugins ask to see whether the server is there."""
    waiting = len(server_of(request).jobs.unfinished())
    return Named({"msg": "estimation", "rank": None, "queue_size": waiting, "avg_event_process_time": None})


async def controlnet_modules(request: Request) -> Named:
    """Return the kinds of control pictures that are made from ordinary ones."""
    return Named({"module_list": ["none", *KINDS]})


async def detect(request: Request, body: DetectBody) -> Named:
    """Make control pictures."""
    server = server_of(request)
    server.limits.check_count(len(body.controlnet_input_images))
    unit = {
        "module": body.controlnet_module,
        "threshold_a": body.controlnet_threshold_a,
        "threshold_b": body.controlnet_threshold_b,
    }

    def made(text: str, what: str) -> str:
        kind, picture = control_kind(unit, "controlnet_module"), decode_picture(text, what, server.limits)
        return png_text(picture if kind is None else control_picture(picture, kind))

    images = [
        await server.decoding(made, text, f"controlnet_input_images[{index}]")
        for index, text in enumerate(body.controlnet_input_images)
    ]
    return Named({"images": images, "info": "Success"})


def _list(listed: Callable[[Server], list[dict[str, Any]]]) -> Callable[[Request], Awaitable[Listed]]:
    async def handler(request: Request) -> Listed:
        return Listed(await asyncio.to_thread(listed, server_of(request)))

    return handler


async def _done(request: Request) -> Empty:
    return Empty()


def routes() -> list[Route]:
    """Return the routes of lists and of tools that draw nothing."""
    v1, missing = "/sdapi/v1", (404,)
    return [
        *(get(f"{v1}/{name}", _list(listed), "A list", Listed) for name, listed in LISTS.items()),
        *(post(f"{v1}/{name}", _done, "Nothing: lists are always new", Empty) for name in REFRESHED),
        get(f"{v1}/embeddings", embeddings, "Textual inversions", Named),
        get(f"{v1}/scripts", scripts, "What alwayson_scripts may name", Named),
        get(f"{v1}/cmd-flags", cmd_flags, "How the server was started", Named),
        get(f"{v1}/memory", memory, "Memory of the machine and of its devices", Named),
        post(f"{v1}/png-info", png_info, "The text of a picture", Named, body=InfoBody),
        post(f"{v1}/extra-single-image", scale_one, "Scale a picture up", Named, body=SingleBody, errors=missing),
        post(f"{v1}/extra-batch-images", scale_all, "Scale pictures up", Named, body=BatchBody, errors=missing),
        post(f"{v1}/interrogate", interrogate, "Nothing: pictures are not described", Empty, errors=missing),
        get("/controlnet/version", controlnet_version, "The version of ControlNet's API", Named),
        get("/controlnet/model_list", controlnet_models, "Control networks", Named),
        get("/controlnet/control_types", controlnet_types, "Both, by type", Named),
        get("/controlnet/settings", controlnet_settings, "How many units a request may have", Named),
        get("/queue/status", queue_status, "The queue", Named),
        get("/controlnet/module_list", controlnet_modules, "Kinds of control pictures", Named),
        post("/controlnet/detect", detect, "Make control pictures", Named, body=DetectBody, errors=missing),
    ]
