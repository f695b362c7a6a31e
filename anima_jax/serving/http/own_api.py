"""Our own JSON API, on which the page is built: jobs with every setting, their events, the gallery, and the models."""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

import anima_jax
from anima_jax.data.preprocessors import KINDS
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.samplers.options import Option
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import UserError
from anima_jax.sampling.exif import encodable, read_text, short_texts
from anima_jax.sampling.image_text import SIZE, from_text
from anima_jax.sampling.recipe import file_name, quoted
from anima_jax.sampling.request import SIZE_STEP, ImageRequest, SamplingParams
from anima_jax.serving.http.gallery import GalleryImage
from anima_jax.serving.http.job_body import Inputs, JobBody, orders_of, settings_of
from anima_jax.serving.http.jobs import Job, JobState, error_line
from anima_jax.serving.http.pictures import decode_picture
from anima_jax.serving.http.routes import (
    STILL_HERE,
    MediaTypeError,
    NotFoundError,
    api_route,
    events_or_silence,
    finished_or_gone,
    media_type,
    read_body,
    read_form,
)
from anima_jax.serving.http.server import Server, server_of

SIZES = ((1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1152, 896), (1216, 832), (1344, 768), (512, 512))
"""Sizes that the page offers, as far as the server draws them."""

PICTURES = ("image/png", "image/jpeg", "image/webp")


class Health(BaseModel):
    """Whether the server can draw."""

    status: Literal["ok", "loading", "draining", "failed"]
    version: str
    waiting: int = Field(description="images that wait to be drawn")
    drawing: int


class JobCreated(BaseModel):
    """A job that was accepted."""

    id: str
    images: int
    position: int
    seed: int


class ImageLink(BaseModel):
    """An image of a job."""

    id: str
    url: str
    seed: int
    width: int
    height: int


class JobAnswer(BaseModel):
    """The state of a job."""

    id: str
    state: JobState
    position: int
    done: int
    total: int
    prompt: str
    count: int
    created: float
    images: list[ImageLink]
    error: str | None


class JobList(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobAnswer]


class WaitQuery(BaseModel):
    """How to answer."""

    wait: bool = Field(False, description="answer when the job is finished; it is cancelled if the client goes away")


class PageQuery(BaseModel):
    """A part of the gallery."""

    limit: int = Field(50, ge=1, le=500)
    before: str | None = Field(None, description="the id of an image: only older ones")


class GalleryEntry(ImageLink):
    """An image of the gallery; `created` is in seconds since 1970."""

    thumbnail: str
    prompt: str
    created: float


class GalleryPage(BaseModel):
    """Images, newest first."""

    images: list[GalleryEntry]


class PictureForm(BaseModel):
    """A form with one file."""

    file: bytes


class SettingsAnswer(BaseModel):
    """Settings for `POST /api/jobs`, and what the picture says but cannot be followed."""

    settings: dict[str, Any]
    notes: list[str]


class SamplerOption(BaseModel):
    """An option of a sampler; a bound is None where there is none."""

    kind: Literal["bool", "float", "int", "str"]
    default: Any
    low: float | None
    high: float | None
    choices: tuple[str, ...]


class Models(BaseModel):
    """What the server has and allows."""

    model: dict[str, Any]
    samplers: list[str]
    sampler_options: dict[str, dict[str, SamplerOption]]
    schedules: list[str]
    loras: list[dict[str, Any]]
    controls: list[dict[str, Any]]
    control_kinds: list[str] = Field(description="what makes a control picture of an ordinary one")
    defaults: dict[str, Any]
    limits: dict[str, float]
    sizes: list[tuple[int, int]]
    run: bool
    dataset: bool


class Deleted(BaseModel):
    """What was deleted."""

    id: str


async def health(request: Request) -> Response:
    server = server_of(request)
    engine = server.jobs.engine
    counts = engine.statistics() if engine else None
    answer = Health(
        status=server.state,
        version=anima_jax.__version__,
        waiting=counts.waiting if counts else 0,
        drawing=counts.drawing if counts else 0,
    )
    status = 200 if server.state == "ok" else 503
    return Response(answer.model_dump_json(), status, media_type="application/json")


async def create_job(request: Request, body: Inputs, query: WaitQuery) -> Response:
    server = server_of(request)
    _ = server.engine  # before pictures are decoded
    orders = await server.decoding(orders_of, body, server)
    job = server.jobs.submit(orders)
    if query.wait:
        await finished_or_gone(request, job)
        return _json(job_answer(job), 200)
    return _json(
        JobCreated(id=job.id, images=job.count, position=job.position, seed=job.seed),
        202,
    )


def _json(answer: BaseModel, status: int) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


async def list_jobs(request: Request) -> JobList:
    return JobList(jobs=[job_answer(job) for job in server_of(request).jobs.newest_first()])


async def show_job(request: Request) -> JobAnswer:
    return job_answer(found_job(request))


async def cancel_job(request: Request) -> JobAnswer:
    job = found_job(request)
    job.cancel()
    return job_answer(job)


def found_job(request: Request) -> Job:
    """Return the job of the address. Raises NotFoundError."""
    job = server_of(request).jobs.get(request.path_params["id"])
    if job is None:
        raise NotFoundError("there is no such job, or no longer")
    return job


def job_answer(job: Job) -> JobAnswer:
    """Return what clients are told of a job."""
    return JobAnswer(
        id=job.id,
        state=job.state,
        position=job.position,
        done=job.done,
        total=job.total,
        prompt=job.prompt,
        count=job.count,
        created=job.created,
        images=[ImageLink(**one) for one in links(job.ordered_images())],
        error=None if job.error is None else error_line(job.error),
    )


def links(images: Sequence[GalleryImage]) -> list[dict[str, Any]]:
    """Return what clients are told of a job's images; those between two passes have no id and no address."""
    return [link(image) for image in images if image.id]


def link(image: GalleryImage) -> dict[str, Any]:
    """Return what clients are told of an image of a job."""
    url = f"/api/images/{image.id}.png"
    return {"id": image.id, "url": url, "seed": image.seed, "width": image.width, "height": image.height}


async def job_events(request: Request) -> Response:
    job, heartbeat = found_job(request), server_of(request).config.heartbeat
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(job, heartbeat), media_type="text/event-stream", headers=headers)


async def stream(job: Job, heartbeat: float) -> AsyncGenerator[str]:
    """Yield a job's events as server-sent ones, and a comment after each `heartbeat` seconds without any."""
    yield "retry: 2000\n\n"
    async with contextlib.aclosing(events_or_silence(job, heartbeat)) as events:
        async for event in events:
            if event is None:
                yield STILL_HERE
                continue
            match event:
                case "image", {"kept": GalleryImage(id="")}:
                    continue
                case "done" as name, {"images": images}:
                    shown = {"images": links(images)}
                case "image" as name, {"image": index, "kept": image}:
                    shown = {"image": index, **link(image)}
                case name, shown:
                    pass
            yield f"event: {name}\ndata: {json.dumps(shown, allow_nan=False)}\n\n"


async def gallery(request: Request, query: PageQuery) -> GalleryPage:
    images = server_of(request).gallery.page(query.limit, query.before)
    return GalleryPage(
        images=[
            GalleryEntry(
                **link(image),
                thumbnail=f"/api/images/{image.id}/thumbnail.jpg",
                prompt=image.prompt,
                created=image.created,
            )
            for image in images
        ]
    )


def found_image(request: Request) -> GalleryImage:
    """Return the image of the address. Raises NotFoundError."""
    image = server_of(request).gallery.get(request.path_params["id"])
    if image is None:
        raise NotFoundError("there is no such image, or no longer")
    return image


async def show_image(request: Request) -> Response:
    return await _file(server_of(request).gallery.png, found_image(request), "image/png")


async def show_thumbnail(request: Request) -> Response:
    return await _file(server_of(request).gallery.thumbnail, found_image(request), "image/jpeg")


async def _file(read: Any, image: GalleryImage, kind: str) -> Response:
    data = await asyncio.to_thread(read, image)
    if data is None:
        raise NotFoundError("the image's file is gone")
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=31536000, immutable"})


async def delete_image(request: Request) -> Deleted:
    image = found_image(request)
    await asyncio.to_thread(server_of(request).gallery.remove, image.id)
    return Deleted(id=image.id)


async def read_settings(request: Request) -> SettingsAnswer:
    kind = media_type(request)
    if kind == "multipart/form-data":
        parts = [part for values in (await read_form(request)).values() for part in values if isinstance(part, bytes)]
        if len(parts) != 1:
            raise UserError(f"{len(parts)} files in the form, expected one picture")
        data = parts[0]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        data = await read_body(request)
    else:
        raise MediaTypeError(f"content-type '{kind[:80]}', expected multipart/form-data or a picture")
    server = server_of(request)
    return await server.decoding(settings_in, data, server)


def settings_in(data: bytes, server: Server) -> SettingsAnswer:
    """Return the settings of a picture's texts; what they do not say is as everywhere, not as this server is set up.

    Raises UserError if it has none, or cannot be read.
    """
    image = decode_picture(data, "the picture", server.limits)
    texts, long = short_texts(read_text(image), server.limits.max_text)
    too_long = f"its {quoted(*long)} is not read: its texts have more than {server.limits.max_text} characters"
    if long and not texts:
        raise UserError(f"the picture: {too_long}")
    recipe = from_text("the picture", texts)
    sizes = {name: max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP) for name, side in zip(SIZE, image.size, strict=True)}
    notes = [*recipe.messages, *[too_long] * bool(long)]
    values = dataclasses.asdict(SamplingParams()) | sizes | recipe.values
    settings, left_out = settings_of(values, recipe)
    return SettingsAnswer(settings=settings, notes=[encodable(note) for note in (*notes, *left_out)])


async def models(request: Request) -> Models:
    return await asyncio.to_thread(models_of, server_of(request))


def models_of(server: Server) -> Models:
    """Return what a server has and allows. Raises UnavailableError while the model is loading."""
    library = server.library
    config, limits = server.config, server.limits
    plain = {name: value for name, value in ImageRequest("").settings().items() if name != "batch_index"}
    defaults = plain | dataclasses.asdict(SamplingParams()) | {**config.defaults, **config.page, "seed": -1}
    files = {
        name: file_name(path) for name, path in server.files.items() if path and isinstance(path, str | os.PathLike)
    }
    files |= {"dtype": str(server.files["dtype"])} if "dtype" in server.files else {}
    return Models(
        model=files,
        samplers=list(SAMPLERS),
        sampler_options={name: _described(row.options) for name, row in SAMPLERS.items()},
        schedules=list(SCHEDULES),
        loras=[dataclasses.asdict(entry) for entry in library.loras()] if library else [],
        controls=[dataclasses.asdict(entry) for entry in library.controls()] if library else [],
        control_kinds=list(KINDS),
        defaults=defaults,
        limits={name: float(value) for name, value in dataclasses.asdict(limits).items() if name.startswith("max_")},
        sizes=[size for size in SIZES if max(size) <= limits.max_size],
        run=config.run is not None,
        dataset=config.dataset is not None,
    )


def _described(options: Mapping[str, Option]) -> dict[str, SamplerOption]:
    """Return a sampler's options for clients."""
    found: dict[str, SamplerOption] = {}
    for name, option in options.items():
        low, high = (bound if math.isfinite(bound) else None for bound in (option.low, option.high))
        values: dict[str, Any] = {"kind": option.kind.__name__, "default": option.default, "choices": option.choices}
        found[name] = SamplerOption(low=low, high=high, **values)
    return found


def routes() -> list[Route]:
    """Return the routes of our own API."""
    job, image = "/api/jobs/{id}", "/api/images/{id}"
    return [
        api_route(
            "/health", "GET", health, "Whether the server can draw", answer=Health, others={503: Health}, is_open=True
        ),
        api_route("/api/models", "GET", models, "Models, samplers, limits and defaults", answer=Models, errors=(503,)),
        api_route(
            *("/api/jobs", "POST", create_job, "Draw images"),
            body=JobBody,
            query=WaitQuery,
            answer=JobCreated,
            status=202,
            others={200: JobAnswer},
            errors=(409, 429, 503),
        ),
        api_route("/api/jobs", "GET", list_jobs, "All jobs, newest first", answer=JobList),
        api_route(job, "GET", show_job, "The state of a job", answer=JobAnswer, errors=(404,)),
        api_route(job, "DELETE", cancel_job, "Cancel a job", answer=JobAnswer, errors=(404,)),
        api_route(
            *(f"{job}/events", "GET", job_events, "A job's events as they happen"),
            answer="text/event-stream",
            errors=(404,),
        ),
        api_route("/api/images", "GET", gallery, "Images, newest first", query=PageQuery, answer=GalleryPage),
        api_route(f"{image}.png", "GET", show_image, "An image", answer="image/png", errors=(404,)),
        api_route(
            *(f"{image}/thumbnail.jpg", "GET", show_thumbnail, "A small image"), answer="image/jpeg", errors=(404,)
        ),
        api_route(image, "DELETE", delete_image, "Delete an image", answer=Deleted, errors=(404,)),
        api_route(
            *("/api/settings", "POST", read_settings, "The settings with which a picture was made"),
            form=PictureForm,
            raw=PICTURES,
            answer=SettingsAnswer,
        ),
    ]
