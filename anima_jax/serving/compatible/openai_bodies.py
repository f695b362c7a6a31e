"""The bodies of OpenAI's images API, as JSON and as forms, and its errors.

Beside OpenAI's fields a body may have every setting of `POST /api/jobs` (the client's `extra_body`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

from PIL import Image
from pydantic import BaseModel, Field, create_model

from anima_jax.data.images import is_transparent
from anima_jax.errors import UserError, show_value
from anima_jax.sampling.request import SIZE_STEP
from anima_jax.serving.http.job_body import Inputs, JobBody, Whole
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.pictures import decode_picture
from anima_jax.serving.http.routes import MOST_VALUES, NotFoundError

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
"""output_format → PIL's name."""

SHARE_OF_STEPS = {"low": 0.5, "high": 1.5, "hd": 1.5, "xhigh": 1.5, "max": 1.5}
"""quality → share of the server's steps; the others have all of them."""

DENOISE = {"high": 0.5, "low": 0.75}
"""input_fidelity → denoise of an edit without a mask."""

FEATHER = 8
"""Pixels over which a masked edit fades into the image."""

MOST_PICTURES = 16

SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"


class OpenAiFields(Inputs):
    """OpenAI's fields of a generation. `user` and what follows it change nothing."""

    prompt: str = Field(min_length=1, max_length=32_000)
    model: str | None = None
    n: Whole | None = Field(None, ge=1, le=10)
    size: str | None = Field(None, description="auto or WIDTHxHEIGHT", json_schema_extra={"pattern": SIZE})
    quality: Literal["auto", "low", "medium", "high", "standard", "hd", "xhigh", "max"] | None = Field(
        None, description="low: half of the steps; high: half as many again"
    )
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Whole | None = Field(None, ge=0, le=100, description="quality of jpeg and webp")
    response_format: Literal["url", "b64_json"] | None = None
    stream: bool | None = None
    partial_images: Whole | None = Field(None, ge=0, le=3)
    user: str | None = None
    safety_identifier: str | None = None
    moderation: Literal["auto", "low"] | None = None
    style: Literal["vivid", "natural"] | None = None


class ImageReference(BaseModel):
    """A picture in a JSON body: a data URL."""

    image_url: str


class EditFields(OpenAiFields):
    """OpenAI's fields of an edit, besides the pictures."""

    input_fidelity: Literal["high", "low"] | None = Field(None, description="how close to stay without a mask")
    image_role: Literal["start", "reference"] = Field(
        "start", description="start from the first picture, or show all of them to the model as references"
    )


class EditForm(BaseModel):
    """A form of an edit; it has all fields of a generation, too."""

    image: list[bytes] = Field(description="also as image[]; the first is edited, the others are references")
    mask: bytes | None = Field(None, description="transparent where the image is redrawn")
    prompt: str = Field(min_length=1)


GenerationBody = cast(type[OpenAiFields], create_model("GenerationBody", __base__=(OpenAiFields, JobBody)))

EditBody = cast(type[EditFields], create_model("EditBody", __base__=(EditFields, JobBody)))
"""What an edit asks for, without its pictures."""


def settings_of_form(fields: Mapping[str, Sequence[str | bytes]], model: type[BaseModel]) -> dict[str, Any]:
    """Return a form's settings as the values that JSON would have: numbers, lists and objects are read from their text.

    `a[]=1&a[]=2` is a list, `a[b]=1` an object, and `a[][b]=1&a[][b]=2` a list of objects. Raises UserError for a field
    that is there twice or in two forms, and for lists of objects whose fields differ.
    """
    found: dict[str, Any] = {}
    objects: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, list[Any]]] = {}
    for name, values in fields.items():
        texts = [value if isinstance(value, str) else value.decode("utf-8", "replace") for value in values]
        match = re.fullmatch(r"(\w+)(\[\])?(?:\[(\w+)\])?", name)
        base, is_list, key = match.groups() if match else (name, None, None)
        if is_list and key:
            rows.setdefault(base, {})[key] = list(map(_read, texts))
        elif is_list:
            found[base] = list(map(_read, texts))
        elif len(texts) > 1:
            raise UserError(f"{show_value(name)} is there {len(texts)} times, expected once")
        elif key:
            objects.setdefault(base, {})[key] = _read(texts[0])
        else:
            found[base] = texts[0] if _is_text(model, name) else _read(texts[0])
    if twice := found.keys() & objects.keys() | (found.keys() | objects.keys()) & rows.keys():
        raise UserError(f"{show_value(min(twice))} is there in two forms, expected one")
    found |= objects
    for base, columns in rows.items():
        count = max(map(len, columns.values()))
        if any(len(column) != count for column in columns.values()):
            raise UserError(f"{show_value(base)}: its objects have different fields; give it as one JSON text")
        found[base] = [{key: column[index] for key, column in columns.items()} for index in range(count)]
    return found


def _is_text(model: type[BaseModel], name: str) -> bool:
    field = model.model_fields.get(name)
    return field is None or field.annotation is str or str in get_args(field.annotation)


def _read(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str) if text.count(",") < MOST_VALUES else text
    except (ValueError, RecursionError):
        return text


def drawn_size(body: OpenAiFields, default_wh: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size of the answer's image, and the size to draw: the next multiples of 8."""
    size_wh = default_wh
    if body.size is not None and not re.match(SIZE, body.size):
        raise UserError(f"size '{show_value(body.size)}', expected auto or WIDTHxHEIGHT in pixels, such as 1024x1024")
    if body.size not in (None, "auto"):
        width, height = map(int, str(body.size).split("x"))
        size_wh = width, height
    return size_wh, (math.ceil(size_wh[0] / SIZE_STEP) * SIZE_STEP, math.ceil(size_wh[1] / SIZE_STEP) * SIZE_STEP)


def size_of_edit(image: Image.Image, most: int, pixels: int) -> tuple[int, int]:
    """Return the size at which an image is edited if nothing else is asked for.

    It is the image's own, or that of the same shape with at most about `pixels`, and with sides of at most `most`; in
    multiples of 8.
    """
    scale = min(1.0, most / max(image.size), math.sqrt(pixels / (image.width * image.height)))
    width, height = (max(round(side * scale) // SIZE_STEP, 1) * SIZE_STEP for side in image.size)
    return width, height


def settings_of_body(body: OpenAiFields, steps: int, most_steps: int) -> dict[str, Any]:
    """Return settings of a job that OpenAI's own fields mean; `steps` are those of the server."""
    found: dict[str, Any] = {"batch_size": body.n} if body.n else {}
    if body.quality in SHARE_OF_STEPS and "steps" not in body.model_fields_set:
        found["steps"] = max(1, min(most_steps, round(steps * SHARE_OF_STEPS[str(body.quality)])))
    return found


def check_body(body: OpenAiFields, models: Sequence[str]) -> None:
    """Raise UserError for values that do not go together; `models` are names of the server's model."""
    if (
        body.model
        and body.model.casefold() not in map(str.casefold, models)
        and not OPENAI_MODELS.fullmatch(body.model)
    ):
        raise NotFoundError(f"The model '{show_value(body.model)}' does not exist: this server has '{models[0]}'")
    if body.output_compression not in (None, 100) and (body.output_format or "png") == "png":
        raise UserError(f"output_compression {body.output_compression}: only for output_format jpeg and webp")
    if body.stream and body.response_format == "url":
        raise UserError("response_format url: a stream has b64_json only")


OPENAI_MODELS = re.compile(r"(dall-e|gpt-image|chatgpt-image)[\w.-]*")
"""Names of OpenAI's models, which clients send that cannot be told another one."""


def edit_pictures(
    body: EditFields, pictures: Sequence[bytes | str], mask: bytes | str | None, limits: RequestLimits
) -> tuple[list[Image.Image], Image.Image | None]:
    """Return an edit's pictures and its mask, transparent where the first picture is redrawn.

    Without a mask it is what is transparent in the first picture. Raises UserError for a picture that cannot be read, a
    mask of another size, or one without transparency.
    """
    if not pictures:
        raise UserError("image is missing")
    if len(pictures) > MOST_PICTURES:
        raise UserError(f"image: {len(pictures)} pictures, expected at most {MOST_PICTURES}")
    images = [decode_picture(data, f"image[{index}]", limits) for index, data in enumerate(pictures)]
    if mask is None:
        is_mask = body.image_role == "start" and is_transparent(images[0])
        return images, images[0].convert("RGBA") if is_mask else None
    opened = decode_picture(mask, "mask", limits)
    if opened.size != images[0].size:
        size = f"{images[0].width}×{images[0].height}"
        raise UserError(f"mask: is {opened.width}×{opened.height}, expected the image's {size}")
    if not opened.has_transparency_data:
        raise UserError("mask: has no alpha channel, which says what to redraw: transparent is redrawn")
    if body.image_role == "reference":
        raise UserError("mask: nothing is kept with image_role reference")
    return images, opened.convert("RGBA")


def edit_denoise(body: EditFields, has_mask: bool) -> float:
    """Return how much of the first picture is redrawn."""
    if "denoise" in body.model_fields_set:
        return getattr(body, "denoise")  # noqa: B009 - it is a field of JobBody
    return 1.0 if has_mask else DENOISE[body.input_fidelity or "low"]


CODES = (
    (r"The model .* does not exist", "model", "model_not_found"),
    (r"lora '", "loras", "invalid_value"),
    (r"\d+ images?, expected", "n", "invalid_value"),
    (r"a prompt of", "prompt", "string_above_max_length"),
    (r"there is no setting '(\w+)", None, "unknown_parameter"),
    (r"(\w+) is missing", None, "missing_required_parameter"),
    (r"(\w+)(\[|\.| |:)", None, "invalid_value"),
)
"""Beginning of a message, its parameter (None: the first group), and its code."""

TYPES = {401: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}

STATUS_CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded", 503: "server_unavailable"}


class OpenAiError(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAiErrorAnswer(BaseModel):
    """An error of OpenAI's API."""

    error: OpenAiError


def openai_error(status: int, message: str) -> dict[str, Any]:
    """Return the JSON of an error of OpenAI's API; parameter and code are found in our message."""
    param, code = None, STATUS_CODES.get(status)
    if status in (400, 404, 422):
        for pattern, name, its_code in CODES:
            match = re.match(pattern, message)
            if match and (name or match[1] in KNOWN or its_code == "unknown_parameter"):
                param, code = name or match[1], its_code
                break
    kind = TYPES.get(status, "invalid_request_error")
    return OpenAiErrorAnswer(error=OpenAiError(message=message, type=kind, param=param, code=code)).model_dump()


KNOWN = {*EditBody.model_fields, "image", "mask"}
"""Names that the message of an error may begin with."""
