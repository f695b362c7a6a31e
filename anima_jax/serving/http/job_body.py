"""The body of `POST /api/jobs`: every setting of an image by its name in `ImageRequest` and `SamplingParams`."""

import dataclasses
import json
import secrets
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Optional, get_type_hints

from PIL import Image, ImageOps
from pydantic import BeforeValidator, Field, JsonValue, create_model

from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES, TABLE_SIZE
from anima_jax.errors import UserError, show_value
from anima_jax.sampling.controls import Control
from anima_jax.sampling.exif import encodable
from anima_jax.sampling.recipe import Recipe, file_name, quoted
from anima_jax.sampling.references import Reference
from anima_jax.sampling.regions import MAX_STRENGTH, Area, Region, StoredRegion
from anima_jax.sampling.request import (
    INPUTS,
    MAX_BATCH,
    MAX_SIZE,
    RANDOM_SEED,
    RANGES,
    SIZE_STEP,
    ImageRequest,
    SamplingParams,
)
from anima_jax.serving.http.pictures import decode_picture
from anima_jax.serving.http.routes import Strict
from anima_jax.serving.http.server import Server
from anima_jax.serving.orders import Order

PICTURE = "a picture as base64 text or a data URL"


def _whole(value: Any) -> Any:
    """Return 20 for 20.0, which JSON does not tell apart."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class LoraBody(Strict):
    """A LoRA in the server's folder, by its name; `weight` is a number, or one for each part of the network."""

    name: str
    weight: Number | dict[str, Number] = 1.0


class ControlBody(Strict):
    """A control network in the server's folder, with its picture; `kind` makes the picture from an ordinary one."""

    name: str
    image: str = Field(description=PICTURE)
    strength: Number = 1.0
    start: Number = Field(0.0, ge=0, le=1)
    end: Number = Field(1.0, ge=0, le=1)
    mask: str | None = Field(None, description=PICTURE)
    kind: str | None = None


class RegionBody(Strict):
    """A prompt for a part of the image: an `area` in pixels or with %, or a `mask`, which is white there."""

    prompt: str
    area: str | tuple[Number, Number, Number, Number] | None = Field(None, description="x, y, width, height")
    mask: str | None = Field(None, description=PICTURE)
    strength: Number = Field(1.0, ge=0, le=MAX_STRENGTH)
    bounds: bool = False
    start_percent: Number = Field(0.0, ge=0, le=1)
    end_percent: Number = Field(1.0, ge=0, le=1)


_TYPES: Mapping[Any, Any] = {int: Whole, int | None: Optional[Whole], float: Number}  # noqa: UP045

_CONSTRAINTS: Mapping[str, Mapping[str, Any]] = {
    "width": {"ge": SIZE_STEP, "le": MAX_SIZE, "multiple_of": SIZE_STEP},
    "height": {"ge": SIZE_STEP, "le": MAX_SIZE, "multiple_of": SIZE_STEP},
    "seed": {"ge": RANDOM_SEED, "lt": 2**64, "description": f"{RANDOM_SEED} for any; the answer has the one drawn"},
    "batch_size": {"ge": 1, "le": MAX_BATCH},
    "steps": {"ge": 1, "le": TABLE_SIZE},
    "sampler": {"examples": ["er_sde"], "json_schema_extra": {"enum": list(SAMPLERS)}},
    "schedule": {"json_schema_extra": {"enum": list(SCHEDULES)}},
    **{name: {"ge": low, "le": high} for name, (low, high) in RANGES.items()},
}


def _fields() -> dict[str, Any]:
    """Return the fields of `ImageRequest` and `SamplingParams` for `create_model`."""
    found: dict[str, Any] = {}
    for kind in (ImageRequest, SamplingParams):
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.name in INPUTS or field.name == "batch_index":
                continue
            annotation = _TYPES.get(hints[field.name], hints[field.name])
            default = field.default if field.default is not dataclasses.MISSING else ...
            options = dict(_CONSTRAINTS.get(field.name, {}))
            found[field.name] = (annotation, Field(default, **options))
    found["prompt"] = (str, Field(""))
    found["seed"] = (Whole, Field(RANDOM_SEED, **_CONSTRAINTS["seed"]))
    found["sampler_options"] = (dict[str, JsonValue], Field(default_factory=dict))
    return found


class Inputs(Strict):
    """What a job has besides words and numbers."""

    loras: list[LoraBody] = Field(default_factory=list[LoraBody])
    image: str | None = Field(None, description=f"{PICTURE}, to start from (with denoise below 1)")
    mask: str | None = Field(None, description=f"{PICTURE}: what to redraw of the image, white or transparent")
    controls: list[ControlBody] = Field(default_factory=list[ControlBody])
    references: list[str] = Field(default_factory=list[str], description=f"{PICTURE}, each")
    regions: list[RegionBody] = Field(default_factory=list[RegionBody])
    preview_every: Whole = Field(0, ge=0, le=10_000, description="evaluations between two previews; 0: none")


JobBody: type[Inputs] = create_model("JobBody", __base__=Inputs, **_fields())
"""Every setting of a job; what is not given is the server's default."""


def orders_of(body: Inputs, server: Server) -> list[Order]:
    """Return the orders of a job, one for each image of its batch. It decodes pictures, so it runs in a thread.

    Raises UserError for a value that is not allowed.
    """
    limits = server.limits
    given = {name: getattr(body, name) for name in body.model_fields_set}
    image, mask = (
        None if (text := getattr(body, name)) is None else decode_picture(text, name, limits)
        for name in ("image", "mask")
    )
    values = {**server.config.defaults, **given}
    if image is not None and not {"width", "height"} & given.keys():
        values |= {
            name: max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP)
            for name, side in zip(("width", "height"), image.size, strict=True)
        }
    seed = values.get("seed", RANDOM_SEED)
    values["seed"] = drawn_seed() if seed == RANDOM_SEED else seed
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    params = SamplingParams(**{name: value for name, value in values.items() if name in names})
    plain = ("prompt", "width", "height", "seed", "batch_size")
    size = {name: values[name] for name in plain if name in values}
    base = ImageRequest(**{"prompt": "", **size})
    _check_size(base, server)
    base = dataclasses.replace(
        base,
        controls=tuple(_control(control, server, index) for index, control in enumerate(body.controls)),
        references=tuple(
            Reference.of(decode_picture(text, f"references[{index}]", limits))
            for index, text in enumerate(body.references[: limits.max_references + 1])
        ),
        regions=tuple(
            _region(region, server, index) for index, region in enumerate(body.regions[: limits.max_regions + 1])
        ),
    )
    loras = tuple((lora.name, lora.weight) for lora in body.loras)
    image, mask = fitted(image, base), fitted(mask, base)
    return [
        Order(dataclasses.replace(base, batch_index=index), params, loras, image, mask, body.preview_every)
        for index in range(base.batch_size)
    ]


def drawn_seed() -> int:
    """Return a random seed of 32 bits, which all programs that read our images take."""
    return secrets.randbits(32)


def fitted(part: Image.Image | None, request: ImageRequest) -> Image.Image | None:
    """Return an image or a mask, cropped and scaled to the size of `request`, which has been checked."""
    size = request.width, request.height
    return part if part is None or part.size == size else ImageOps.fit(part, size, Image.Resampling.LANCZOS)


def _check_size(request: ImageRequest, server: Server) -> None:
    """Raise UserError for a size or a batch that is not allowed: before pictures are scaled to it."""
    server.limits.check([Order(request, SamplingParams(steps=1))])
    request.check()


def _control(body: ControlBody, server: Server, index: int) -> Control:
    what, limits = f"controls[{index}]", server.limits
    if index > limits.max_controls:  # more are not decoded; `RequestLimits.check` counts them
        return Control(body.name, Image.new("RGB", (1, 1)))
    if server.library is None:
        raise UserError(f"{what}: the server has no folder of control networks")
    path = server.library.control(body.name)
    image = decode_picture(body.image, f"{what}.image", limits)
    mask = None if body.mask is None else decode_picture(body.mask, f"{what}.mask", limits)
    return Control(path, image, body.strength, body.start, body.end, mask, body.kind, f"control '{body.name}'")


def _region(body: RegionBody, server: Server, index: int) -> Region:
    """Return the region. A text is an area and nothing else, because `Region` takes other texts for files."""
    what = f"regions[{index}]"
    if (body.area is None) == (body.mask is None):
        raise UserError(f"{what}: expected an area or a mask")
    if body.mask is not None:
        where = decode_picture(body.mask, f"{what}.mask", server.limits)
    else:
        where = Area.parse(body.area) if isinstance(body.area, str) else _area(body.area)
        if where is None:
            raise UserError(f"{what}.area {show_value(repr(body.area))}, expected x,y,width,height in pixels or with %")
    rest = body.prompt, body.strength, body.bounds, body.start_percent, body.end_percent
    return Region(where, *rest)


def _area(numbers: tuple[float, float, float, float] | None) -> Area | None:
    return None if numbers is None else Area(*numbers)


def settings_of(values: Mapping[str, Any], recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """Return those settings of a recipe that a job may have, and a line for each that it may not.

    `values` are the recipe's, with what it does not say. A stranger may have written them: numbers out of range,
    unknown names, half of a surrogate pair.
    """
    loras = [(file_name(name).removesuffix(".safetensors"), weight) for name, weight in recipe.loras]
    areas = [_area_settings(one) for one in recipe.regions if one.is_area]
    given = {name: value for name, value in values.items() if name in JobBody.model_fields}
    given |= {"loras": [{"name": name, "weight": weight} for name, weight in loras]} if loras else {}
    given |= {"regions": areas} if areas else {}
    found: dict[str, Any] = {}
    notes = [*_missing_pictures(recipe)]
    for name, value in given.items():
        try:
            text = encodable(json.dumps({name: value}, ensure_ascii=False, allow_nan=False))
            JobBody.model_validate_json(text)
            if name in _TABLES and value not in _TABLES[name]:
                raise ValueError
        except ValueError:
            notes.append(f"its {name} {quoted(value)} is left out")
        else:
            found |= json.loads(text)
    return found, notes


def _area_settings(region: StoredRegion) -> dict[str, Any]:
    names = ("prompt", "strength", "start_percent", "end_percent")
    return {"area": region.where} | {name: getattr(region, name) for name in names}


def _missing_pictures(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each kind of picture that an image was made from: its file has only their names."""
    started = recipe.values.get("denoise", 1.0) != 1.0
    controls, masks = recipe.controls, [one.mask for one in recipe.controls if one.mask is not None]
    for kind, names in {
        "start image": [recipe.files["image"]] if "image" in recipe.files else [""] * started,
        "mask": [recipe.files["mask"]] if "mask" in recipe.files else [],
        "control picture": [f"{file_name(one.image)} for {file_name(one.path)}" for one in controls],
        "control mask": masks,
        "reference picture": [name for name, _ in recipe.references],
        "region's mask": [one.where for one in recipe.regions if not one.is_area],
    }.items():
        if names:
            shown = "" if names == [""] else f" {quoted(*map(file_name, names))}"
            one, them = ("is", "it") if len(names) == 1 else ("are", "them")
            yield f"the {kind}{'s' * (len(names) > 1)}{shown} {one} not in the file: give {them} again"


_TABLES: Mapping[str, Any] = {"sampler": SAMPLERS, "schedule": SCHEDULES}
