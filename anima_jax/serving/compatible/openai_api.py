"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`.

Source: the types of openai-python (src/openai/types/image_generate_params.py, image_edit_params.py, images_response.py
and the events of a stream).
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from anima_jax.data.images import over_white
from anima_jax.errors import UserError
from anima_jax.sampling.images import encoded
from anima_jax.sampling.recipe import file_name
from anima_jax.sampling.references import Reference
from anima_jax.sampling.request import SamplingParams
from anima_jax.serving.compatible.openai_bodies import (
    FEATHER,
    FORMATS,
    EditBody,
    EditFields,
    EditForm,
    GenerationBody,
    ImageReference,
    OpenAiErrorAnswer,
    OpenAiFields,
    check_body,
    drawn_size,
    edit_denoise,
    edit_pictures,
    openai_error,
    settings_of_body,
    settings_of_form,
    size_of_edit,
)
from anima_jax.serving.http.gallery import GalleryImage
from anima_jax.serving.http.job_body import fitted, orders_of
from anima_jax.serving.http.jobs import Job, error_line
from anima_jax.serving.http.pictures import converted, decode_picture
from anima_jax.serving.http.routes import (
    STILL_HERE,
    NotFoundError,
    api_route,
    events_or_silence,
    finished_or_gone,
    media_type,
    read_form,
    read_json,
    read_model,
)
from anima_jax.serving.http.server import Server, server_of
from anima_jax.serving.orders import Order

PATCH = 16
"""Pixels along each side of one of the transformer's tokens."""


class OpenAiImage(BaseModel):
    """An image: its file as base64 text, or its address."""

    b64_json: str | None = None
    url: str | None = None


class TokenDetails(BaseModel):
    """Tokens of text and of pictures."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens that went through the networks."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    """The images of a request."""

    created: int
    data: list[OpenAiImage]
    background: Literal["opaque"] = "opaque"
    output_format: str
    quality: str
    size: str
    usage: Usage
    safety_identifier: str | None = None


class OpenAiModel(BaseModel):
    """The model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "anima_jax"


class OpenAiModels(BaseModel):
    """The models of this server."""

    object: Literal["list"] = "list"
    data: list[OpenAiModel]


class FileQuery(BaseModel):
    """How to compress a JPEG or WebP."""

    compression: int = Field(100, ge=0, le=100)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call: its body, its orders, and the size of the images that it gets, which may be cut from larger ones."""

    kind: Literal["image_generation", "image_edit"]
    body: OpenAiFields
    orders: Sequence[Order]
    size_wh: tuple[int, int]
    usage: Usage

    @property
    def format(self) -> str:
        return self.body.output_format or "png"

    def finish(self, _: int, image: Image.Image) -> Image.Image:
        left, top = ((drawn - wanted) // 2 for drawn, wanted in zip(image.size, self.size_wh, strict=True))
        return image.crop((left, top, left + self.size_wh[0], top + self.size_wh[1]))

    def described(self) -> dict[str, Any]:
        """Return what answers and events say of the images."""
        quality = {"standard": "medium", "hd": "high", None: "medium", "auto": "medium"}
        return {
            "background": "opaque",
            "output_format": self.format,
            "quality": quality.get(self.body.quality, self.body.quality),
            "size": "{}x{}".format(*self.size_wh),
        }


def routes() -> list[Route]:
    """Return the routes of OpenAI's API."""
    shared: dict[str, Any] = {"tag": "openai", "shape": openai_error, "error_model": OpenAiErrorAnswer, "invalid": 400}
    drawing: dict[str, Any] = {**shared, "answer": ImagesAnswer, "errors": (404, 409, 429, 503)}
    named: dict[str, Any] = {**shared, "errors": (404,)}
    return [
        api_route("/v1/images/generations", "POST", generate, "Draw images", body=GenerationBody, **drawing),
        api_route(
            "/v1/images/edits", "POST", edit, "Redraw a picture", form=EditForm, raw=("application/json",), **drawing
        ),
        api_route("/v1/images/files/{name}", "GET", show_file, "An image", query=FileQuery, answer="image/*", **named),
        api_route("/v1/models", "GET", list_models, "The model", answer=OpenAiModels, **shared),
        api_route("/v1/models/{name:path}", "GET", show_model, "The model", answer=OpenAiModel, **named),
    ]


def model_names(server: Server) -> list[str]:
    """Return the names by which the server's model may be called."""
    name = file_name(server.files.get("transformer") or "anima")
    return list(dict.fromkeys([name.rpartition(".")[0] or name, name, "anima"]))


def _model(server: Server, name: str) -> OpenAiModel:
    created = 0
    with contextlib.suppress(OSError):
        created = int(os.path.getmtime(str(server.files.get("transformer"))))
    return OpenAiModel(id=name, created=created)


async def list_models(request: Request) -> OpenAiModels:
    server = server_of(request)
    return OpenAiModels(data=[_model(server, model_names(server)[0])])


async def show_model(request: Request) -> OpenAiModel:
    name, known = request.path_params["name"], model_names(server_of(request))
    if name not in known:
        raise NotFoundError(f"The model '{name}' does not exist: this server has '{known[0]}'")
    return _model(server_of(request), name)


async def generate(request: Request, body: OpenAiFields) -> Response | ImagesAnswer:
    server = server_of(request)
    call = await server.decoding(_generation, body, server)
    return await _answered(request, server, call)


def _generation(body: OpenAiFields, server: Server) -> _Call:
    """Return the call of a generation. It decodes pictures, so it runs in a thread."""
    check_body(body, model_names(server))
    return _call("image_generation", body, server, {}, lambda order: order)


async def edit(request: Request) -> Response | ImagesAnswer:
    server = server_of(request)
    _ = server.engine  # before pictures are decoded
    kind = media_type(request)
    if kind == "application/json":
        body, pictures, mask = _edit_of_json(json.loads(await read_json(request)))
    else:
        body, pictures, mask = _edit_of_form(await read_form(request))
    call = await server.decoding(_edit, body, pictures, mask, server)
    return await _answered(request, server, call)


def _edit_of_form(fields: dict[str, list[str | bytes]]) -> tuple[EditFields, list[bytes | str], bytes | str | None]:
    pictures = [*fields.pop("image", ()), *fields.pop("image[]", ())]
    masks = fields.pop("mask", None) or [None]
    if len(masks) > 1:
        raise UserError(f"mask is there {len(masks)} times, expected once")
    return _edit_body(settings_of_form(fields, EditBody)), pictures, masks[0]


def _edit_of_json(values: Any) -> tuple[EditFields, list[bytes | str], bytes | str | None]:
    """Return the parts of a JSON body, in which `images` and `mask` are objects with data URLs."""
    values = dict(values) if isinstance(values, dict) else {}
    given, mask = values.pop("images", []), values.pop("mask", None)
    pictures: list[bytes | str] = [_data_of(one) for one in (given if isinstance(given, list) else [given])]
    return _edit_body(values), pictures, None if mask is None else _data_of(mask)


def _data_of(reference: Any) -> str:
    found = read_model(ImageReference, reference if isinstance(reference, dict) else {})
    assert isinstance(found, ImageReference)
    return found.image_url


def _edit_body(values: dict[str, Any]) -> EditFields:
    body = read_model(EditBody, values)
    assert isinstance(body, EditFields)
    return body


def _edit(body: EditFields, pictures: Sequence[bytes | str], mask: bytes | str | None, server: Server) -> _Call:
    """Return the call of an edit. It decodes pictures, so it runs in a thread."""
    check_body(body, model_names(server))
    images, mask_image = edit_pictures(body, pictures, mask, server.limits)
    is_start = body.image_role == "start"
    own = {"denoise": edit_denoise(body, mask_image is not None)} if is_start else {}
    if mask_image is not None and getattr(body, "paste", None) is None:
        own["paste"] = FEATHER
    update: dict[str, Any] = {}
    if body.size in (None, "auto") and not {"width", "height"} & body.model_fields_set:
        default_wh = server.default_size
        size_wh = size_of_edit(images[0], server.limits.max_size, default_wh[0] * default_wh[1])
        update = {"width": size_wh[0], "height": size_wh[1]}

    def edited(order: Order) -> Order:
        shown = images[1:] if is_start else images
        references = (*order.request.references, *map(Reference.of, shown))
        request = dataclasses.replace(order.request, references=references)
        params = dataclasses.replace(order.params, **own)
        start = fitted(over_white(images[0]), request) if is_start else None
        return dataclasses.replace(order, request=request, params=params, image=start, mask=fitted(mask_image, request))

    return _call("image_edit", body, server, update, edited)


def _call(
    kind: Literal["image_generation", "image_edit"],
    body: OpenAiFields,
    server: Server,
    update: dict[str, Any],
    changed: Callable[[Order], Order],
) -> _Call:
    size_wh, drawn_wh = drawn_size(body, server.default_size)
    steps = int(server.config.defaults.get("steps", SamplingParams.steps))
    update = update | settings_of_body(body, steps, server.limits.max_steps)
    if body.size not in (None, "auto"):
        update |= {"width": drawn_wh[0], "height": drawn_wh[1]}
    orders = [changed(order) for order in orders_of(body.model_copy(update=update), server)]
    request, params = orders[0].request, orders[0].params
    if server.library is not None:
        for name, _ in orders[0].loras:
            server.library.lora(name)  # An unknown name is said before a stream begins.
    if body.size in (None, "auto"):
        size_wh = request.width, request.height
    if body.stream and body.partial_images:
        orders = [
            dataclasses.replace(order, preview_every=max(1, math.ceil(params.steps / (body.partial_images + 1))))
            for order in orders
        ]
    tokenizers = server.engine.pipeline.tokenizers
    text = sum(len(tokenizers.prompt_ids(each).qwen_ids) for each in (request.prompt, params.negative_prompt))
    per_image = math.ceil(request.width / PATCH) * math.ceil(request.height / PATCH)
    shown = per_image * (len(request.references) + (orders[0].image is not None))
    drawn = per_image * len(orders)
    usage = Usage(
        input_tokens=text + shown,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=shown),
        output_tokens=drawn,
        total_tokens=text + shown + drawn,
    )
    return _Call(kind, body, orders, size_wh, usage)


async def _answered(request: Request, server: Server, call: _Call) -> Response | ImagesAnswer:
    """Draw the images of a call, and return its answer or its stream of events."""
    job = server.jobs.submit(call.orders, finish=call.finish)
    if call.body.stream:
        return _Stream(server, job, call)
    images = await finished_or_gone(request, job)
    quality = call.body.output_compression
    data: list[OpenAiImage] = []
    for image in images:
        if call.body.response_format == "url":
            query = f"?compression={quality}" if quality is not None and call.format != "png" else ""
            data.append(OpenAiImage(url=f"{request.base_url}v1/images/files/{image.id}.{call.format}{query}"))
        else:
            data.append(OpenAiImage(b64_json=await asyncio.to_thread(_base64, server, image, call)))
    user = call.body.safety_identifier or call.body.user
    about = {**call.described(), "usage": call.usage, "safety_identifier": user}
    return ImagesAnswer(created=int(time.time()), data=data, **about)


class _Stream(StreamingResponse):
    """The events of a call. Its job is cancelled if nobody listens, also if the client left before the first event."""

    def __init__(self, server: Server, job: Job, call: _Call):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(server, job, call), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()  # which changes nothing if it is finished


async def _events(server: Server, job: Job, call: _Call) -> AsyncIterator[str]:
    """Yield partial images and then the images, as server-sent events."""
    shown = dict.fromkeys(range(job.count), 0)
    about = call.described()
    heartbeat = server.config.heartbeat
    try:
        async with contextlib.aclosing(events_or_silence(job, heartbeat)) as events:
            async for event in events:
                if event is None:
                    yield STILL_HERE
                    continue
                name, data = event
                if name == "preview" and shown[data["image"]] < (call.body.partial_images or 0):
                    file = await asyncio.to_thread(_partial, data["data"], call, server)
                    yield _event(
                        f"{call.kind}.partial_image",
                        {**about, "b64_json": file, "partial_image_index": shown[data["image"]]},
                    )
                    shown[data["image"]] += 1
                elif name == "done":
                    user = call.body.safety_identifier or call.body.user
                    for image in data["images"]:
                        file = await asyncio.to_thread(_base64, server, image, call)
                        one = {**about, "b64_json": file, "usage": call.usage.model_dump(), "safety_identifier": user}
                        yield _event(f"{call.kind}.completed", one)
                elif name in ("failed", "cancelled"):
                    yield _event("error", openai_error(500, data.get("error") or "the job was cancelled"))
    except UserError as error:
        yield _event("error", openai_error(500, error_line(error)))


def _event(name: str, data: dict[str, Any]) -> str:
    shown = data if name == "error" else {"type": name, "created_at": int(time.time()), **data}
    return f"event: {name}\ndata: {json.dumps(shown)}\n\n"


def _base64(server: Server, image: GalleryImage, call: _Call) -> str:
    return base64.b64encode(_file(server, image, call.format, call.body.output_compression)).decode()


def _file(server: Server, image: GalleryImage, format: str, compression: int | None) -> bytes:
    """Return the file of an image in a format. Raises NotFoundError if it is no longer there."""
    if (png := server.gallery.png(image)) is None:
        raise NotFoundError("the image is no longer there")
    return converted(png, FORMATS[format], max(1, 100 if compression is None else compression))[0]


def _partial(preview: str, call: _Call, server: Server) -> str:
    large = decode_picture(preview, "preview", server.limits).resize(call.size_wh, Image.Resampling.BICUBIC)
    data, _ = encoded(large, FORMATS[call.format], quality=call.body.output_compression or 90)
    return base64.b64encode(data).decode()


async def show_file(request: Request, query: FileQuery) -> Response:
    server = server_of(request)
    id, _, format = request.path_params["name"].rpartition(".")
    image = server.gallery.get(id)
    if image is None or format not in FORMATS:
        raise NotFoundError("there is no such image, or no longer")
    data = await asyncio.to_thread(_file, server, image, format, query.compression)
    return Response(data, media_type=f"image/{format}")
