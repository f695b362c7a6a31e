"""The bodies of A1111's API, and what of them this server refuses.

Source: modules/api/models.py of AUTOMATIC1111/stable-diffusion-webui, which takes a null as a field that is not there,
and ignores fields that it does not know.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anima_jax.errors import UserError, show_value
from anima_jax.sampling.request import RANDOM_SEED
from anima_jax.sampling.webui_text import split_text
from anima_jax.serving.http.routes import read_model

MAX_REPEATS = 4096


LENIENT = {"integer": ("string", "boolean"), "number": ("string", "boolean"), "boolean": ("string", "integer")}
"""JSON type of a field → other types that are read as it, such as "20" and 1, which clients send."""


def _lenient(schema: dict[str, Any]) -> None:
    """Say in the OpenAPI document what else is taken for a field: null, unless it is needed, and `LENIENT` types."""
    for name, field in schema.get("properties", {}).items():
        given = {one.get("type") for one in field.get("anyOf", [field])}
        others = {other for kind in given for other in LENIENT.get(kind, ())}
        others |= {"null"} if name not in schema.get("required", ()) else set()
        schema["properties"][name] = {"anyOf": [field, *({"type": other} for other in sorted(others - given))]}


class WebuiBody(BaseModel):
    """A body whose nulls are as if they were not there."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_lenient)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return {name: value for name, value in values.items() if value is not None}
        return values


class WebuiRequest(WebuiBody):
    """What `txt2img` and `img2img` share. What is not given has this server's default, not A1111's."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(RANDOM_SEED, description="−1 for a random one; the following images have the following seeds")
    batch_size: int = Field(1, ge=1, le=MAX_REPEATS)
    n_iter: int = Field(1, ge=1, le=MAX_REPEATS)
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    sampler_name: str | None = None
    sampler_index: str | None = Field(None, description="older name of sampler_name")
    scheduler: str | None = None
    eta: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] = {}
    override_settings_restore_afterwards: bool = True
    alwayson_scripts: dict[str, Any] = Field({}, description="args of ControlNet: its units")
    disable_extra_networks: bool = False
    send_images: bool = True
    save_images: bool = False
    infotext: str | None = Field(
        None, max_length=100_000, description="A1111's text of an image, for what is not given"
    )
    script_name: str | None = None


class Txt2ImgRequest(WebuiRequest):
    """A body of `/sdapi/v1/txt2img`."""

    enable_hr: bool = Field(False, description="draw, scale up, and draw again with denoising_strength")
    denoising_strength: float = Field(0.75, ge=0.0, le=1.0)
    hr_scale: float = Field(2.0, gt=0.0)
    hr_resize_x: int = Field(0, ge=0)
    hr_resize_y: int = Field(0, ge=0)
    hr_upscaler: str = "Lanczos"
    hr_second_pass_steps: int = Field(0, ge=0)
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_cfg: float | None = None


class Img2ImgRequest(WebuiRequest):
    """A body of `/sdapi/v1/img2img`."""

    init_images: list[str] = Field([], description="base64 text or data URLs: one, or one for each image")
    denoising_strength: float = Field(0.75, ge=0.0, le=1.0)
    resize_mode: int = Field(0, ge=0, le=3)
    mask: str | None = Field(None, description="white where the image is redrawn")
    mask_blur: int | None = Field(None, ge=0, le=1000)
    mask_blur_x: int = Field(4, ge=0, le=1000)
    mask_blur_y: int = Field(4, ge=0, le=1000)
    inpainting_fill: int = Field(0, ge=0, le=3)
    inpaint_full_res: bool = Field(True, description="draw only the masked part, at width × height")
    inpaint_full_res_padding: int = Field(0, ge=0, le=2**14)
    inpainting_mask_invert: bool = False
    include_init_images: bool = False


REFUSED = {
    "styles": "this server has no styles",
    "subseed_strength": "there is no variation of the noise",
    "seed_resize_from_w": "noise is not resized",
    "seed_resize_from_h": "noise is not resized",
    "restore_faces": "there is no face restoration",
    "tiling": "there are no tileable images",
    "refiner_checkpoint": "there is one model only",
    "hr_checkpoint_name": "there is one model only",
    "s_min_uncond": "every step has its negative prompt",
    "s_churn": "no sampler here adds noise in that way",
    "firstphase_width": "give width, height, hr_resize_x and hr_resize_y",
    "firstphase_height": "give width, height, hr_resize_x and hr_resize_y",
    "initial_noise_multiplier": "noise is not scaled",
    "latent_mask": "give mask",
}
"""Field that a body may have, too → why a value that asks for something is an error."""

ASKS_FOR_NOTHING = (None, "", "None", "none", "Use same checkpoint", [], ["None"], 0, -1, False)

TAKEN = (
    *("subseed", "comments", "force_task_id", "do_not_save_samples", "do_not_save_grid", "script_args", "s_tmin"),
    *("image_cfg_scale", "s_tmax", "refiner_switch_at", "hr_additional_modules", "distilled_cfg_scale"),
    *("hr_distilled_cfg", "inpainting_mask_weight", "batch_count", "url", "auth"),
)
"""Fields that ask for nothing by themselves, or that front ends leave in the body."""

FROM_TEXT = {
    "Steps": "steps",
    "Sampler": "sampler_name",
    "Schedule type": "scheduler",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Denoising strength": "denoising_strength",
    "Hires upscale": "hr_scale",
    "Hires upscaler": "hr_upscaler",
    "Hires steps": "hr_second_pass_steps",
}
"""Name of a value in A1111's text → field."""

Body = TypeVar("Body", bound=WebuiRequest)


def with_infotext(body: Body) -> Body:
    """Return the body with what it does not give from its `infotext`. Raises UserError for values of another type."""
    if not body.infotext:
        return body
    prompt, negative, pairs = split_text(body.infotext)
    found: dict[str, Any] = {FROM_TEXT[name]: value for name, value in pairs.items() if name in FROM_TEXT}
    found |= {"prompt": prompt, "negative_prompt": negative, "enable_hr": "Hires upscale" in pairs}
    if size := re.fullmatch(r"(\d{1,6})x(\d{1,6})", pairs.get("Size", "")):
        found |= {"width": size[1], "height": size[2]}
    known = {name: value for name, value in found.items() if name in type(body).model_fields}
    return read_model(type(body), known | body.model_dump(exclude_unset=True))  # pyright: ignore[reportReturnType]


def notes_of(body: WebuiRequest) -> list[str]:
    """Return what the body asks for and cannot be followed, though images can be drawn without it.

    Raises UserError for what changes the image and does not exist here.
    """
    extra = body.model_extra or {}
    for name, reason in REFUSED.items():
        value = extra.get(name)
        if value not in (1, None) if name == "initial_noise_multiplier" else value not in ASKS_FOR_NOTHING:
            raise UserError(f"{name} {show_value(value)}: {reason}")
    if body.script_name not in ASKS_FOR_NOTHING:
        raise UserError(f"Script '{show_value(body.script_name)}' not found")
    unknown = [show_value(name) for name in extra if name not in (*REFUSED, *TAKEN)]
    notes = [f"not known here: {', '.join(unknown[:20])}"] if unknown else []
    if body.save_images:
        notes.append("save_images: images are in the gallery; no request writes a file")
    return notes
