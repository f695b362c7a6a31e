"""What a picture is made from: its own prompt, size and seed, and the settings that it shares with others.

Both are written into the text chunks of its PNG, from which it can be drawn again.
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.data.media import eight_bit
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES, TABLE_SIZE
from anima_jax.diffusion.step_noise import NoiseKind
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.dit import PATCH

PIXELS_PER_LATENT = 8
SIZE_STEP = PIXELS_PER_LATENT * PATCH

MAX_SIZE = 16384
"""Pixels of a side at most, as in ComfyUI's nodes."""

MIN_DENOISE = 0.001


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One picture. Its noise is row `batch_index` of what `seed` gives for `batch_size` pictures, as in ComfyUI."""

    prompt: str
    width: int = 1024
    height: int = 1024
    seed: int = 0
    batch_size: int = 1
    batch_index: int = 0

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    def check(self) -> None:
        """Raise UserError for a size, seed or place in the batch that there cannot be."""
        for name in ("width", "height"):
            size = getattr(self, name)
            if size < SIZE_STEP or size % SIZE_STEP:
                raise UserError(f"{name} {size}, expected a positive multiple of {SIZE_STEP}{_nearest(size)}")
            if size > MAX_SIZE:
                raise UserError(f"{name} {size}, expected at most {MAX_SIZE}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}, expected a whole number ≥ 0 and < 2⁶⁴")
        if self.batch_size < 1:
            raise UserError(f"batch_size {self.batch_size}, expected at least 1")
        if not 0 <= self.batch_index < self.batch_size:
            raise UserError(f"batch_index {self.batch_index}, expected 0 to {self.batch_size - 1}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How pictures are sampled; docs/sampling.md explains each."""

    negative_prompt: str = ""
    steps: int = 30
    guidance_scale: float = 4.0
    sampler: str = "er_sde"
    schedule: str = "simple"
    shift: float = 3.0
    denoise: float = 1.0
    noise: str = "torch-cpu"
    cfg_zero_star: bool = False
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def check(self) -> None:
        """Raise UserError for a value out of range or an unknown name."""
        for what, table in (("sampler", SAMPLERS), ("schedule", SCHEDULES)):
            name = getattr(self, what)
            if name not in table:
                raise UserError(f"{what} '{name}', expected one of {', '.join(table)}{did_you_mean(name, table)}")
        if not 1 <= self.steps <= TABLE_SIZE:
            raise UserError(f"steps {self.steps}, expected 1 to {TABLE_SIZE}")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale {self.guidance_scale}, expected a finite number")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift {self.shift}, expected a number above 0")
        if self.denoise != 0 and not MIN_DENOISE <= self.denoise <= 1:
            raise UserError(f"denoise {self.denoise}, expected 0, or {MIN_DENOISE} to 1")
        first, last = self.guidance_interval
        if not 0 <= first <= last <= 1:
            raise UserError(f"guidance_interval {first} {last}, expected two ascending numbers from 0 to 1")
        NoiseKind.parse(self.noise)


def save_picture(image: Image.Image, path: pathlib.Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG with these text chunks; it appears under its name only when it is whole."""
    chunks, data = PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)  # the international kind: UTF-8
    image.save(data, format="PNG", pnginfo=chunks)
    with writing_to(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data.getbuffer())


def read_picture(path: str) -> Image.Image:
    """A picture, turned as its camera says. Raises UserError for what is none."""
    try:
        with Image.open(path) as image:
            image.load()
            return eight_bit(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture: {error}") from None


def to_images(pixels: Iterable[np.ndarray]) -> list[Image.Image]:
    """Pictures of the first frames of (t, y, x, 3); cut off at [−1, 1] and rounded down, as ComfyUI does."""
    return [Image.fromarray(np.clip((x[0] + 1.0) * 127.5, 0.0, 255.0).astype(np.uint8)) for x in pixels]


def to_pixels(image: Image.Image) -> np.ndarray:
    """The picture as (1, y, x, 3) in [−1, 1], float32, without its transparency."""
    return np.asarray(image.convert("RGB"), np.float32)[None] / 127.5 - 1.0


def mask_values(mask: Image.Image) -> np.ndarray:
    """Where a new picture is drawn, and how much, (1, y, x, 1) in [0, 1], float32.

    White is drawn anew; of a picture with transparency what is transparent, as of ComfyUI's Load Image.
    """
    if mask.has_transparency_data:
        values = 255.0 - np.asarray(mask.convert("RGBA").getchannel("A"), np.float32)
    else:
        values = np.asarray(mask.convert("L"), np.float32)
    return values[None, ..., None] / np.float32(255.0)


def latent_mask(values_1yx1: np.ndarray) -> np.ndarray:
    """`mask_values` over latents: the bilinear value at the centre of each, as in ComfyUI's SetLatentNoiseMask.

    It is the mean of the four pixels there.
    """
    step, middle = PIXELS_PER_LATENT, PIXELS_PER_LATENT // 2
    corners = [values_1yx1[:, y::step, x::step] for y in (middle - 1, middle) for x in (middle - 1, middle)]
    return np.stack(corners).mean(axis=0)


def _nearest(size: int) -> str:
    below = max(SIZE_STEP, size // SIZE_STEP * SIZE_STEP)
    return f" (nearest: {below} and {below + SIZE_STEP})" if size > SIZE_STEP else ""


def _interval(text: str) -> tuple[float, float]:
    first, last = map(float, text.split())
    return first, last


_READERS: dict[Any, Callable[[str], Any]] = {
    str: str,
    int: int,
    float: float,
    bool: {"True": True, "False": False}.__getitem__,
    tuple[float, float]: _interval,
}


def to_text(picture: ImageRequest, settings: SamplingParams) -> dict[str, str]:
    """Text chunks of a PNG that say how the picture was made; numbers in full."""
    values = dataclasses.asdict(picture) | dataclasses.asdict(settings)
    return {name: " ".join(map(repr, x)) if isinstance(x, tuple) else str(x) for name, x in values.items()}


def from_text(path: str, text: Mapping[str, str]) -> tuple[ImageRequest, SamplingParams]:
    """The inverse of `to_text`; what no chunk says is the default. Raises UserError that names the file `path`."""
    if "prompt" not in text or "seed" not in text:
        raise UserError(f"{path}: holds no settings in its text chunks, expected a PNG that anima_jax.generate wrote")
    found = []
    for kind in (ImageRequest, SamplingParams):
        values = {}
        for field in dataclasses.fields(kind):
            if field.name in text:
                try:
                    values[field.name] = _READERS[field.type](text[field.name])
                except (ValueError, KeyError):
                    raise UserError(f"{path}: {field.name} '{text[field.name]}' in its text chunks") from None
        found.append(kind(**values))
        found[-1].check()
    return found[0], found[1]
