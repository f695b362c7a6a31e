"""A1111's API, as front ends use it: `/sdapi/v1/…`, and the lists of the ControlNet extension.

Source: modules/api/api.py of AUTOMATIC1111/stable-diffusion-webui and scripts/api.py of Mikubill/sd-webui-controlnet.
"""

import asyncio
import base64
import dataclasses
import datetime
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import BaseModel, RootModel
from starlette.requests import Request
from starlette.routing import Route

from anima_jax.sampling.exif import PARAMETERS
from anima_jax.sampling.recipe import file_name
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.sampling.webui_text import SAMPLER_NAMES, split_text
from anima_jax.serving.compatible import webui_lists
from anima_jax.serving.compatible.webui_lists import Empty, Named, control_names, get, model_entry, post
from anima_jax.serving.compatible.webui_models import Img2ImgRequest, Txt2ImgRequest, WebuiRequest, with_infotext
from anima_jax.serving.compatible.webui_pictures import UPSCALERS
from anima_jax.serving.compatible.webui_requests import Reader, WebuiDrawing
from anima_jax.serving.compatible.webui_settings import FORMATS, WebuiSettings
from anima_jax.serving.http.gallery import GalleryImage
from anima_jax.serving.http.jobs import Finish, Job, JobCancelledError, Keep
from anima_jax.serving.http.pictures import converted, decode_picture, png_text
from anima_jax.serving.http.routes import NotFoundError, finished_or_gone
from anima_jax.serving.http.server import Server, server_of
from anima_jax.serving.orders import Order


class WebuiImages(BaseModel):
    """Images as base64 text, what was asked for, and what A1111 says of them, as JSON text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class OptionsBody(RootModel[dict[str, Any]]):
    """Settings to change for all requests that follow."""


class ProgressQuery(BaseModel):
    """What of the progress to leave out."""

    skip_current_image: bool = False


@dataclasses.dataclass
class Running:
    """A job that a client of this API waits for: its address, and when it began, in seconds."""

    job: Job
    client: str
    began: float


class WebuiApi:
    """The handlers, and what they share: the settings of the server and the jobs that clients wait for."""

    def __init__(self) -> None:
        self._settings = WebuiSettings()
        self._running: list[Running] = []

    def routes(self) -> list[Route]:
        """Return the routes that draw, and those that say or change how."""
        drawing: dict[str, Any] = {"answer": WebuiImages, "errors": (404, 409, 429, 503)}
        v1 = "/sdapi/v1"
        return [
            post(f"{v1}/txt2img", self.txt2img, "Draw images", body=Txt2ImgRequest, **drawing),
            post(f"{v1}/img2img", self.img2img, "Redraw an image", body=Img2ImgRequest, **drawing),
            get(f"{v1}/options", self.options, "The settings", Named),
            post(f"{v1}/options", self.set_options, "Change settings", Empty, body=OptionsBody, errors=(404,)),
            get(f"{v1}/progress", self.progress, "The progress of the oldest request", Named, query=ProgressQuery),
            post(f"{v1}/interrupt", self.interrupt, "Cancel the oldest request of this client", Empty),
            post(f"{v1}/skip", self.skip, "Cancel the first unfinished image of that request", Empty),
        ]

    def settings(self, server: Server) -> WebuiSettings:
        """Return the settings, which all clients share, for the model that the server draws with now."""
        model, vae = model_entry(server), file_name(server.files.get("vae") or "")
        names = (model["title"], model["model_name"], model["filename"], file_name(model["filename"]), model["hash"])
        self._settings.name("sd_model_checkpoint", names)
        self._settings.name("sd_vae", (vae, vae.rpartition(".")[0]))
        self._settings.name("sd_checkpoint_hash", (model["hash"] or "",))
        return self._settings

    async def txt2img(self, request: Request, body: Txt2ImgRequest) -> WebuiImages:
        """Draw, and with `enable_hr` draw again at a larger size."""
        server, reader, body, notes = self._read(request, body)
        drawing = await server.decoding(reader.read, body)
        if not body.enable_hr:
            return await self._answer(request, server, body, drawing, notes)
        blank = [Image.new("RGB", (drawing.orders[0].request.width, drawing.orders[0].request.height))]
        one = dataclasses.replace(drawing, orders=drawing.orders[:1])
        for order in reader.second_pass(body, one, blank).orders:  # What is wrong with it is said before drawing.
            order.check()
        drawn: dict[int, Image.Image] = {}

        def finish(index: int, image: Image.Image) -> Image.Image:
            drawn[index] = image
            return image

        with server.jobs.following():
            await self._draw(request, server, body, drawing, _not_kept, finish)
            first = dataclasses.replace(drawing, orders=[drawing.orders[index] for index in sorted(drawn)])
            if not drawn:
                return _images_answer(body, [], [], first, [*notes, "interrupted"])
            images = [drawn[index] for index in sorted(drawn)]
            second = await server.decoding(reader.second_pass, body, first, images)
            return await self._answer(request, server, body, second, notes, first)

    async def img2img(self, request: Request, body: Img2ImgRequest) -> WebuiImages:
        """Redraw images."""
        server, reader, body, notes = self._read(request, body)
        drawing = await server.decoding(reader.read, body)
        return await self._answer(request, server, body, drawing, notes)

    def _read(self, request: Request, body: Any) -> tuple[Server, Reader, Any, list[str]]:
        """Return what a request is read with, its body with what its infotext says, and notes about settings."""
        server = server_of(request)
        _ = server.engine  # before pictures are decoded
        settings = self.settings(server)
        values, notes = settings.changed(body.override_settings)
        library = server.library
        reader = Reader(
            defaults={
                **dataclasses.asdict(ImageRequest("")),
                **dataclasses.asdict(SamplingParams()),
                **server.config.defaults,
            },
            settings=values,
            picture=lambda text, what: decode_picture(text, what, server.limits),
            limits=server.limits,
            controls=functools.partial(control_names, server),
            control=library.control if library else str,
        )
        return server, reader, with_infotext(body), notes

    async def _draw(
        self,
        request: Request,
        server: Server,
        body: WebuiRequest,
        drawing: WebuiDrawing,
        keep: Keep,
        finish: Finish,
        *,
        follows: bool = False,
    ) -> tuple[list[int], list[GalleryImage], bool]:
        """Draw, and return the indices of the orders that were drawn, their images, and whether it was interrupted."""
        job = server.jobs.submit(drawing.orders, keep, finish=finish, may_skip=True, follows=follows)
        if not body.override_settings_restore_afterwards:  # Now nothing of the request can be wrong any more.
            self.settings(server).change(body.override_settings)
        running = Running(job, _address(request), time.monotonic())
        self._running.append(running)
        try:
            await finished_or_gone(request, job)
        except JobCancelledError:
            pass
        finally:
            self._running.remove(running)
        return sorted(job.images), job.ordered_images(), len(job.images) < job.count

    async def _answer(
        self,
        request: Request,
        server: Server,
        body: WebuiRequest,
        drawing: WebuiDrawing,
        notes: Sequence[str],
        first: WebuiDrawing | None = None,
    ) -> WebuiImages:
        keep = server.jobs.keep
        if first is not None and isinstance(body, Txt2ImgRequest):
            keep = server.keep_changed(functools.partial(_hires_text, body, first.orders[0]))
        drawn = await self._draw(request, server, body, drawing, keep, drawing.finish, follows=first is not None)
        indices, images, interrupted = drawn
        settings = self.settings(server).changed(body.override_settings)[0]
        files = [await asyncio.to_thread(_file, server, image, settings) for image in images]
        texts = [text for _, text in files]
        shown = [data for data, _ in files] if body.send_images else []
        orders = dataclasses.replace(drawing, orders=[drawing.orders[index] for index in indices])
        return _images_answer(body, shown, texts, orders, [*notes, *["interrupted"] * interrupted])

    async def options(self, request: Request) -> Named:
        """Return all settings."""
        return Named(self.settings(server_of(request)).all())

    async def set_options(self, request: Request, body: OptionsBody) -> Empty:
        """Change settings."""
        self.settings(server_of(request)).change(body.root)
        return Empty()

    async def progress(self, request: Request, query: ProgressQuery) -> Named:
        """Return how far the oldest request is; all zeros if there is none."""
        now = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
        state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0}
        state |= {"job_timestamp": now, "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
        answer: dict[str, Any] = {"progress": 0.0, "eta_relative": 0.0, "current_image": None, "textinfo": None}
        if (running := next(iter(self._running), None)) is None:
            return Named(answer | {"state": state})
        job, steps = running.job, max(running.job.total // running.job.count, 1)
        state |= {"job": job.id, "job_count": job.count, "job_no": len(job.images)}
        state |= {"sampling_step": job.done % steps, "sampling_steps": steps}
        share = min(0.01 + 0.99 * job.done / max(job.total, 1), 1.0)
        passed = time.monotonic() - running.began
        answer |= {"progress": share, "eta_relative": passed / share - passed}
        if not query.skip_current_image and (preview := job.preview()) is not None:
            answer["current_image"] = await asyncio.to_thread(png_text, preview.convert("RGB"))
        return Named(answer | {"state": state})

    async def interrupt(self, request: Request) -> Empty:
        """Cancel the oldest request from the address of this client."""
        if (found := self._own(request)) is not None:
            found.job.cancel()
        return Empty()

    async def skip(self, request: Request) -> Empty:
        """Cancel the first unfinished image of the oldest request from the address of this client."""
        if (found := self._own(request)) is not None:
            found.job.skip()
        return Empty()

    def _own(self, request: Request) -> Running | None:
        return next((running for running in self._running if running.client == _address(request)), None)


def routes() -> list[Route]:
    """Return the routes of A1111's API."""
    return [*WebuiApi().routes(), *webui_lists.routes()]


def _not_kept(order: Order, image: Image.Image) -> GalleryImage:
    """Stand for an image that does not go into the gallery."""
    return GalleryImage("", *image.size, order.request.seed, order.request.prompt, time.time(), b"")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _file(server: Server, image: GalleryImage, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the file of an image as base64 text, as the settings say, and A1111's text about it."""
    if (png := server.gallery.png(image)) is None:
        raise NotFoundError("the image is no longer there")
    kind, with_text = FORMATS[settings["samples_format"].casefold()], settings["enable_pnginfo"]
    quality = None if settings["webp_lossless"] and kind == "WEBP" else settings["jpeg_quality"]
    data, text = converted(png, kind, quality, with_text=with_text)
    return base64.b64encode(data).decode(), text.get(PARAMETERS, "")


def _hires_text(body: Txt2ImgRequest, first: Order, text: Mapping[str, str]) -> dict[str, str]:
    """Return A1111's text of an image of `enable_hr`: the first pass, and how the second differs.

    Our own text has no word for it, so it is left out.
    """
    *lines, pairs = text[PARAMETERS].split("\n")
    pairs = re.sub(r"Size: \d+x\d+", f"Size: {first.request.width}x{first.request.height}", pairs)
    pairs = re.sub(r"^Steps: \d+", f"Steps: {first.params.steps}", pairs)
    resize = f"Hires resize: {body.hr_resize_x}x{body.hr_resize_y}"
    more = [
        f"Denoising strength: {body.denoising_strength}",
        resize if body.hr_resize_x or body.hr_resize_y else f"Hires upscale: {body.hr_scale}",
        *([f"Hires steps: {body.hr_second_pass_steps}"] if body.hr_second_pass_steps else ()),
        f"Hires upscaler: {body.hr_upscaler if body.hr_upscaler in UPSCALERS else 'Lanczos'}",
    ]
    return {PARAMETERS: "\n".join([*lines, f"{pairs}, {', '.join(more)}"])}


def _images_answer(
    body: WebuiRequest, images: Sequence[str], texts: Sequence[str], drawing: WebuiDrawing, notes: Sequence[str]
) -> WebuiImages:
    """Return the answer of a request, with what A1111 says of images (`Processed.js` in modules/processing.py)."""
    orders = drawing.orders
    seeds = [order.request.seed for order in orders]
    first = orders[0] if orders else None
    info = {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * len(orders),
        "negative_prompt": body.negative_prompt,
        "all_negative_prompts": [body.negative_prompt] * len(orders),
        "seed": seeds[0] if seeds else body.seed,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(orders),
        "subseed_strength": 0,
        "width": first.request.width if first else 0,
        "height": first.request.height if first else 0,
        "sampler_name": SAMPLER_NAMES.get(first.params.sampler, first.params.sampler) if first else "",
        "cfg_scale": first.params.guidance_scale if first else 0.0,
        "steps": first.params.steps if first else 0,
        "batch_size": body.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": _pair(texts, "Model"),
        "sd_model_hash": _pair(texts, "Model hash"),
        "sd_vae_name": _pair(texts, "VAE"),
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": getattr(body, "denoising_strength", None),
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": list(texts),
        "styles": [],
        "job_timestamp": datetime.datetime.now().strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": "anima_jax",
        "notes": [*drawing.notes, *notes],
    }
    parameters = body.model_dump(mode="json")
    if isinstance(body, Img2ImgRequest) and not body.include_init_images:
        parameters |= {"init_images": None, "mask": None}
    return WebuiImages(images=list(images), parameters=parameters, info=json.dumps(info))


def _pair(texts: Sequence[str], name: str) -> str | None:
    return split_text(texts[0])[2].get(name) if texts else None
