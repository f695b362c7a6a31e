"""Requests of A1111's API as orders.

Source: modules/processing.py of AUTOMATIC1111/stable-diffusion-webui, and `ControlNetUnit` of
Mikubill/sd-webui-controlnet.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from anima_jax.adapters.merge import Weight
from anima_jax.data.images import over_white
from anima_jax.data.preprocessors import KINDS
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.errors import UserError, did_you_mean, shorten, show_value
from anima_jax.sampling.controls import Control
from anima_jax.sampling.prompt_loras import without_tags
from anima_jax.sampling.request import MAX_SIZE, RANDOM_SEED, SIZE_STEP, ImageRequest, SamplingParams
from anima_jax.sampling.webui_text import sampler_and_schedule, split_loras
from anima_jax.serving.compatible.webui_models import Img2ImgRequest, Txt2ImgRequest, WebuiRequest, notes_of
from anima_jax.serving.compatible.webui_pictures import UPSCALERS, Inpainting, inpainting, redrawn_mask, resized_by
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.routes import NotFoundError
from anima_jax.serving.orders import Order

SAME = (None, "", "None", "Use same sampler", "Use same scheduler")
"""What front ends send for the second pass's settings that are those of the first."""

MODULES = {
    "tile_resample": "tile",
    "scribble_xdog": "scribble",
    "inpaint": "mask",
    "inpaint_only": "mask",
    "inpaint_global_harmonious": "mask",
}
"""ControlNet's name of a preprocessor → ours, where they differ."""

RESIZE_MODES = {
    **{"just resize": 0, "scale to fit (inner fit)": 1, "crop and resize": 1, "resize and fill": 2},
    **{"envelope (outer fit)": 2, "0": 0, "1": 1, "2": 2},
}
"""ControlNet's name of a way to resize → A1111's `resize_mode`."""


@dataclasses.dataclass(frozen=True)
class WebuiDrawing:
    """The orders of a request, and for each how its image is put back. `notes` name what was not followed."""

    orders: Sequence[Order]
    inpaintings: Sequence[Inpainting | None]
    notes: Sequence[str]

    def finish(self, index: int, image: Image.Image) -> Image.Image:
        """Return the result of the drawn image of the order `index`."""
        found = self.inpaintings[index]
        return image if found is None else found.finish(image)


@dataclasses.dataclass(frozen=True)
class Reader:
    """What requests are read with.

    `defaults` are the server's values of `ImageRequest` and `SamplingParams`, `settings` those of `WebuiSettings` for
    this request. `picture` opens base64 text and takes the field's name for its errors. `controls` returns the names of
    control networks, and `control` the file of one.
    """

    defaults: Mapping[str, Any]
    settings: Mapping[str, Any]
    picture: Callable[[str, str], Image.Image]
    limits: RequestLimits
    controls: Callable[[], Sequence[str]] = tuple
    control: Callable[[str], str] = str

    def read(self, body: WebuiRequest) -> WebuiDrawing:
        """Return the drawing of a request. Raises UserError for what it cannot be, NotFoundError for unknown names."""
        notes = notes_of(body)
        params = self._params(body)
        self.limits.check_count(body.batch_size * body.n_iter)
        images = self._images(body)
        size_wh = self._size(body, images[0] if images else None)
        self.limits.check([Order(ImageRequest("", *size_wh), params)])  # before pictures are scaled to the size
        prompt, loras = _prompt_and_loras(body, body.prompt)
        negative, more = _prompt_and_loras(body, body.negative_prompt)
        params = dataclasses.replace(params, negative_prompt=negative)
        seed = secrets.randbelow(2**32 - 1) if body.seed == RANDOM_SEED else body.seed
        controls = self._controls(body, size_wh, images[0] if images else None)
        requests = [
            ImageRequest(prompt, *size_wh, seed + index, controls=controls)
            for index in range(body.batch_size * body.n_iter)
        ]
        every = self.settings["show_progress_every_n_steps"] if self.settings["live_previews_enable"] else 0
        orders = [Order(one, params, (*loras, *more), preview_every=max(int(every), 0)) for one in requests]
        if not isinstance(body, Img2ImgRequest):
            return WebuiDrawing(orders, [None] * len(orders), notes)
        masked = self._masked(body, images, seed, size_wh, notes)
        params = dataclasses.replace(params, denoise=body.denoising_strength)
        pasted = dataclasses.replace(params, paste=0)
        for index, one in enumerate(masked):
            if one is not None:
                orders[index] = dataclasses.replace(orders[index], params=pasted, image=one.image, mask=one.mask)
                continue
            image = resized_by(body.resize_mode, over_white(images[index % len(images)]), size_wh)
            orders[index] = dataclasses.replace(orders[index], params=params, image=image)
        return WebuiDrawing(orders, masked, notes)

    def second_pass(self, body: Txt2ImgRequest, first: WebuiDrawing, images: Sequence[Image.Image]) -> WebuiDrawing:
        """Return the second drawing of `enable_hr` from the images of the first."""
        notes, upscaler = list(first.notes), body.hr_upscaler
        if upscaler not in UPSCALERS:
            notes.append(f"hr_upscaler {show_value(upscaler)}: Lanczos in its place")
            upscaler = "Lanczos"
        request = first.orders[0].request
        size_wh = hires_size(body, (request.width, request.height))
        named = {"sampler_name": body.hr_sampler_name, "scheduler": body.hr_scheduler}
        own = {name: value for name, value in named.items() if value not in SAME}
        steps = body.hr_second_pass_steps or first.orders[0].params.steps
        changed = body.model_copy(update={**own, "steps": steps, "cfg_scale": body.hr_cfg or body.cfg_scale})
        prompt, loras = _prompt_and_loras(body, body.hr_prompt or body.prompt)
        negative, more = _prompt_and_loras(body, body.hr_negative_prompt or body.negative_prompt)
        params = dataclasses.replace(self._params(changed), negative_prompt=negative, denoise=body.denoising_strength)
        self.limits.check([Order(ImageRequest("", *size_wh), params)])
        orders = [
            dataclasses.replace(
                order,
                request=dataclasses.replace(order.request, prompt=prompt, width=size_wh[0], height=size_wh[1]),
                params=params,
                loras=(*loras, *more),
                image=resized_by(1, image, size_wh, UPSCALERS[upscaler]),
            )
            for order, image in zip(first.orders, images, strict=True)
        ]
        return WebuiDrawing(orders, [None] * len(orders), notes)

    def _images(self, body: WebuiRequest) -> list[Image.Image]:
        if not isinstance(body, Img2ImgRequest):
            return []
        if not body.init_images:
            raise NotFoundError("Init image not found")
        count = body.batch_size * body.n_iter
        if len(body.init_images) not in (1, count):
            found = f"bad number of images passed: {len(body.init_images)}"
            raise UserError(f"{found}; expecting 1 or {count}, the number of images to draw")
        return [self.picture(text, f"init_images[{index}]") for index, text in enumerate(body.init_images)]

    def _size(self, body: WebuiRequest, image: Image.Image | None) -> tuple[int, int]:
        """Return width and height: multiples of 8 below those that are asked for, as A1111's latents have."""
        own = image.size if image else (self.defaults["width"], self.defaults["height"])
        width, height = (given or other for given, other in zip((body.width, body.height), own, strict=True))
        return max(width // SIZE_STEP, 1) * SIZE_STEP, max(height // SIZE_STEP, 1) * SIZE_STEP

    def _params(self, body: WebuiRequest) -> SamplingParams:
        fields = {field.name for field in dataclasses.fields(SamplingParams)}
        values = {name: value for name, value in self.defaults.items() if name in fields}
        given = {"steps": body.steps, "guidance_scale": body.cfg_scale}
        values |= {name: value for name, value in given.items() if value is not None}
        values |= _sampler_and_schedule(body.sampler_name or body.sampler_index, body.scheduler)
        options = SAMPLERS[values["sampler"]].options
        asked = {"eta": self.settings["eta_ancestral"], "s_noise": self.settings["s_noise"]}
        asked |= {
            name: value for name, value in {"eta": body.eta, "s_noise": body.s_noise}.items() if value is not None
        }
        # 1 is A1111's default of both, and what clients send that know no other.
        found = {name: value for name, value in asked.items() if name in options and value != 1.0}
        values["sampler_options"] = (values.get("sampler_options") or {} if not body.sampler_name else {}) | found
        return SamplingParams(**values)

    def _masked(
        self,
        body: Img2ImgRequest,
        images: Sequence[Image.Image],
        seed: int,
        size_wh: tuple[int, int],
        notes: list[str],
    ) -> list[Inpainting | None]:
        count = body.batch_size * body.n_iter
        if body.resize_mode == 3:
            notes.append("resize_mode 3: pixels are resized in place of latents")
        if not body.mask:
            return [None] * count
        if body.inpainting_fill in (2, 3):
            notes.append(f"inpainting_fill {body.inpainting_fill}: noise or grey in pixels in place of latents")
        given = self.picture(body.mask, "mask")
        blur_xy = (body.mask_blur_x, body.mask_blur_y) if body.mask_blur is None else (body.mask_blur, body.mask_blur)
        made = [
            inpainting(
                image,
                redrawn_mask(given, image.size, invert=body.inpainting_mask_invert, blur_xy=blur_xy),
                size_wh,
                resize_mode=body.resize_mode,
                padding=body.inpaint_full_res_padding if body.inpaint_full_res else None,
                fill=body.inpainting_fill,
                seed=seed,
            )
            for image in images
        ]
        if None in made:
            notes.append("mask: nothing of it is white, so that the whole image is redrawn")
        return _repeated(made, count)

    def _controls(self, body: WebuiRequest, size_wh: tuple[int, int], image: Image.Image | None) -> tuple[Control, ...]:
        found: list[Control] = []
        for name, script in body.alwayson_scripts.items():
            given: Any = script.get("args") if isinstance(script, Mapping) else None
            arguments: list[Any] = given if isinstance(given, list) else [given]
            if name.casefold() == "controlnet":
                found += [
                    self._control(unit, f"alwayson_scripts.{name}.args[{index}]", size_wh, image)
                    for index, unit in enumerate(arguments)
                    if _is_on(unit)
                ]
            elif arguments and arguments[0] not in (False, None, "", {}, []):
                raise UserError(f"always on script {show_value(name)} not found")
        return tuple(found)

    def _control(
        self, unit: Mapping[str, Any], what: str, size_wh: tuple[int, int], image: Image.Image | None
    ) -> Control:
        controls = self.controls()
        names = {_plain(name): name for name in controls}
        if (given := _plain(unit.get("model"))) not in names:
            shown = f"found {show_value(unit.get('model'))}, expected one of {shorten(controls, 20)}"
            raise NotFoundError(f"{what}: model not found: {shown if controls else 'this server has no networks'}")
        mode = unit.get("control_mode", 0)
        mode = mode[0] if isinstance(mode, list) and mode else mode
        if mode not in (0, "0", "Balanced", None):
            raise UserError(f"{what}: control_mode {show_value(mode)}, expected Balanced")
        shown, mask = unit.get("input_image") or unit.get("image"), unit.get("mask_image") or unit.get("mask")
        if isinstance(shown, Mapping):
            shown, mask = shown.get("image"), mask or shown.get("mask")
        picture = self.picture(shown, f"{what}.image") if isinstance(shown, str) and shown else image
        if picture is None:
            raise UserError(f"{what}: no image, expected base64 text")
        way = str(unit.get("resize_mode", 1)).casefold()
        if way not in RESIZE_MODES:
            raise UserError(f"{what}: resize_mode {show_value(way)}, expected one of {', '.join(RESIZE_MODES)}")
        masked = self.picture(mask, f"{what}.mask") if isinstance(mask, str) and mask else None
        if RESIZE_MODES[way] != 1:  # A control network covers the image by itself.
            picture = resized_by(RESIZE_MODES[way], picture, size_wh)
            masked = masked and resized_by(RESIZE_MODES[way], masked, size_wh)
        numbers = {"strength": unit.get("weight"), "start_percent": unit.get("guidance_start")}
        numbers["end_percent"] = unit.get("guidance_end", unit.get("guidance"))
        own = {name: value for name, value in numbers.items() if value is not None}
        kind, title = control_kind(unit, what), f"control '{names[given]}'"
        return Control(self.control(names[given]), picture, **own, mask=masked, kind=kind, title=title)


def hires_size(body: Txt2ImgRequest, first_wh: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the second pass of `enable_hr`, in multiples of 8."""
    width, height = first_wh
    x, y = body.hr_resize_x, body.hr_resize_y
    if not x and not y:
        x, y = int(width * min(body.hr_scale, MAX_SIZE)), int(height * min(body.hr_scale, MAX_SIZE))
    x, y = x or y * width // height, y or x * height // width
    return max(x // SIZE_STEP, 1) * SIZE_STEP, max(y // SIZE_STEP, 1) * SIZE_STEP


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    return [values[index % len(values)] for index in range(count)]


def _prompt_and_loras(body: WebuiRequest, prompt: str) -> tuple[str, list[tuple[str, Weight]]]:
    """Return a prompt without its LoRA tags, and what they name."""
    loras = split_loras(prompt)[1]
    return (without_tags(prompt) if loras else prompt), ([] if body.disable_extra_networks else loras)


def _sampler_and_schedule(sampler: str | None, schedule: str | None) -> dict[str, str]:
    """Return sampler and schedule by our names, those that are given. Raises NotFoundError for unknown ones."""
    if sampler and sampler.startswith("k_"):  # an alias, as in k_euler_a and k_dpmpp_2m_ka
        sampler = re.sub(r" ka$", " Karras", sampler[2:].replace("_", " "))
    automatic = (schedule or "automatic").casefold() == "automatic"
    pairs = {"Sampler": sampler or "Euler", "Schedule type": "Automatic" if automatic else str(schedule)}
    found = sampler_and_schedule(pairs)
    if not sampler:
        del found["sampler"]
        if automatic:
            return {}
    for what, table, given in (("sampler", SAMPLERS, sampler), ("schedule", SCHEDULES, schedule)):
        if what in found and found[what] not in table:
            name = {"sampler": "Sampler", "schedule": "Scheduler"}[what]
            raise NotFoundError(f"{name} not found: {show_value(given)}{did_you_mean(found[what], table)}")
    return found


def _is_on(unit: Any) -> bool:
    """Return whether a unit of ControlNet asks for something. Raises UserError for one that is no object."""
    if not isinstance(unit, Mapping):
        if unit in (None, False, "", []):
            return False
        raise UserError(f"alwayson_scripts: a unit of ControlNet is {show_value(unit)}, expected an object")
    module = str(unit.get("module") or "none").casefold()
    return bool(unit.get("enabled", True)) and (_plain(unit.get("model")) not in ("", "none") or module != "none")


def _plain(name: Any) -> str:
    """Return a network's name in lower case, without its hash and its ending."""
    return str(name or "").rpartition(" [")[0].casefold() or str(name or "").casefold().removesuffix(".safetensors")


def control_kind(unit: Mapping[str, Any], what: str) -> str | None:
    """Return the kind of control picture that a unit's module means. Raises UserError for one that is not here."""
    module = str(unit.get("module") or "none").casefold()
    kind = MODULES.get(module, module)
    if kind == "none":
        return None
    if kind not in KINDS:
        raise UserError(f"{what}: module '{show_value(module)}' not found, expected none, {', '.join(KINDS)}")
    options = (unit.get(name) for name in ("threshold_a", "threshold_b"))
    limits = KINDS[kind][1].values()
    given = [
        f"{name}={int(value)}"
        for (name, limit), value in zip(KINDS[kind][1].items(), options, strict=False)
        if isinstance(value, int | float) and 0 < value <= limit.most and value >= limit.least
        if not limit.is_power_of_2 or value in (2, 4, 8)
    ]
    return ":".join([kind, *given]) if limits else kind
