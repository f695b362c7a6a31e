"""Sampling requests: each image's prompt, size and seed, and the parameters that all images of a run share.

`sampling.image_text` writes both into the image's file, from which the image can be sampled again.
"""

import dataclasses
import itertools
import math
import numbers
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from anima_jax.diffusion.guidance import Variants
from anima_jax.diffusion.samplers import OPTIONS, SAMPLERS, check_options
from anima_jax.diffusion.schedules import SCHEDULES, TABLE_SIZE, part, sigmas
from anima_jax.diffusion.step_cache import OFF, StepCache
from anima_jax.diffusion.step_noise import NoiseKind
from anima_jax.errors import UserError, check_names, did_you_mean, show_value
from anima_jax.sampling.controls import Control, check_controls
from anima_jax.sampling.images import PIXELS_PER_LATENT
from anima_jax.sampling.references import Reference
from anima_jax.sampling.regions import MAX_STRENGTH, Region, check_regions

SIZE_STEP = PIXELS_PER_LATENT
"""Widths and heights are multiples of this many pixels."""

MAX_SIZE = 16384
"""Largest width and height in pixels, as in ComfyUI's nodes."""

MAX_BATCH = 4096
"""Largest batch of one prompt and seed, as in ComfyUI's nodes: the noise of all its images is drawn for any of them."""

MAX_BATCH_LATENTS = 2**25
"""Largest batch in latent pixels: noise of 2 GB, of 2048 images of 1024×1024 pixels."""

LARGEST = 1e6
"""Largest guidance scale and shift; with larger ones, and with smaller shifts than 1 / this, float32 overflows."""

MIN_DENOISE = 0.001

MAX_LEVEL = 1.00001
"""Largest noise level: with some shifts, ComfyUI's first level is rounded to just above 1."""

RANGES = {
    "rescale_cfg": (0.0, 1.0),
    "cfg_norm": (0.0, 100.0),
    "apg_eta": (-10.0, 10.0),
    "apg_norm_threshold": (0.0, 50.0),
    "apg_momentum": (-5.0, 1.0),
    "base_strength": (0.0, MAX_STRENGTH),
}
"""Parameter → the range of ComfyUI's node."""

APG = ("apg_eta", "apg_norm_threshold", "apg_momentum")
"""Parameters that change nothing without `apg`."""

RANDOM_SEED = -1
"""What stands for a random seed on the command line, as in A1111."""

MIN_TILE = 64


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """One image. Its noise is item `batch_index` of the noise of `seed` for `batch_size` images, as in ComfyUI.

    The fields after `batch_index` are `INPUTS`.
    """

    prompt: str
    width: int = 1024
    height: int = 1024
    seed: int = 0
    batch_size: int = 1
    batch_index: int = 0
    controls: tuple[Control, ...] = ()
    references: tuple[Reference, ...] = ()
    regions: tuple[Region, ...] = ()

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of the latents."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    def settings(self) -> dict[str, Any]:
        """Return the fields that are words and numbers, by name."""
        return {name: getattr(self, name) for name in PLAIN}

    def check(self) -> None:
        """Raise UserError if the size, seed or position in the batch is out of range."""
        _check_types(self)
        for name in ("width", "height"):
            size = getattr(self, name)
            if size < SIZE_STEP or size % SIZE_STEP:
                raise UserError(f"{name} {size}, expected a positive multiple of {SIZE_STEP}{_nearest(size)}")
            if size > MAX_SIZE:
                raise UserError(f"{name} {size}, expected at most {MAX_SIZE}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed {self.seed}, expected a whole number ≥ 0 and < 2⁶⁴")
        _check_batch(self.batch_size)
        if self.batch_size * math.prod(self.latent_size) > MAX_BATCH_LATENTS:
            size = f"{self.width}×{self.height}"
            fits = MAX_BATCH_LATENTS // math.prod(self.latent_size)
            raise UserError(
                f"batch_size {self.batch_size} of {size} pixels, expected at most {fits} images of that size"
            )
        if not 0 <= self.batch_index < self.batch_size:
            raise UserError(f"batch_index {self.batch_index}, expected 0 to {self.batch_size - 1}")
        check_regions(self.regions, self.latent_size)
        check_controls(self.controls)
        if self.controls and self.references:
            raise UserError("controls and references: control networks steer single images, without further frames")


INPUTS = ("controls", "references", "regions")
"""Fields of `ImageRequest` for what guides its sampling besides the prompt, each a tuple."""

PLAIN = tuple(field.name for field in dataclasses.fields(ImageRequest) if field.name not in INPUTS)
"""Fields of `ImageRequest` whose values are words and numbers."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters; docs/sampling.md explains each of them."""

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
    rescale_cfg: float = 0.0
    cfg_norm: float = 0.0
    apg: bool = False
    apg_eta: float = 1.0
    apg_norm_threshold: float = 5.0
    apg_momentum: float = 0.0
    base_strength: float = 1.0
    sigmas: tuple[float, ...] = ()
    start_at_step: int = 0
    end_at_step: int | None = None
    add_noise: bool = True
    return_with_leftover_noise: bool = False
    paste: int | None = None
    tile: int | None = None
    cache: str | None = None
    cache_interval: tuple[float, float] | None = None
    sampler_options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
        if self.cache == OFF:
            object.__setattr__(self, "cache", None)

    @classmethod
    def named(cls, settings: Mapping[str, Any]) -> "SamplingParams":
        """Return the parameters with these names; options of samplers may stand beside them.

        Raises UnknownNameError, with the nearest name, for one that does not exist.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        check_names("AnimaPipeline", settings, [*fields, *OPTIONS, *_OF_REQUESTS])
        own = {name: value for name, value in settings.items() if name not in OPTIONS}
        if options := {name: value for name, value in settings.items() if name in OPTIONS}:
            own["sampler_options"] = own.get("sampler_options", {}) | options
        return cls(**own)

    def check(self) -> None:
        """Raise UserError for a value of another type or out of range, or an unknown name."""
        _check_types(self)
        for what, table in (("sampler", SAMPLERS), ("schedule", SCHEDULES)):
            name = getattr(self, what)
            if name not in table:
                raise UserError(f"{what} '{name}', expected one of {', '.join(table)}{did_you_mean(name, table)}")
        if not 1 <= self.steps <= TABLE_SIZE:
            raise UserError(f"steps {self.steps}, expected 1 to {TABLE_SIZE}")
        if not abs(self.guidance_scale) <= LARGEST:
            raise UserError(f"guidance_scale {self.guidance_scale}, expected a finite number, at most {LARGEST:g}")
        if not 1 / LARGEST <= self.shift <= LARGEST:
            found = f"shift {self.shift}, expected a number above 0"
            raise UserError(found if self.shift <= 0 else f"{found}, from {1 / LARGEST:g} to {LARGEST:g}")
        if self.denoise != 0 and not MIN_DENOISE <= self.denoise <= 1:
            raise UserError(f"denoise {self.denoise}, expected 0, or {MIN_DENOISE} to 1")
        _check_interval("guidance_interval", self.guidance_interval)
        if self.cache_interval is not None:
            _check_interval("cache_interval", self.cache_interval)
        if self.step_cache is None and self.cache_interval is not None:
            raise UserError("cache_interval without cache: expected cache, too")
        if self.paste is not None and not 0 <= self.paste <= MAX_SIZE:
            raise UserError(f"paste {self.paste}, expected a number of pixels from 0 to {MAX_SIZE}")
        if self.tile and not (MIN_TILE <= self.tile <= MAX_SIZE and self.tile % PIXELS_PER_LATENT == 0):
            expected = f"0, or a multiple of {PIXELS_PER_LATENT} from {MIN_TILE} to {MAX_SIZE}"
            raise UserError(f"tile {self.tile}, expected {expected}")
        NoiseKind.parse(self.noise)
        check_options(self.sampler, self.sampler_options)
        self._check_guidance()
        self._check_levels()

    def _check_guidance(self) -> None:
        """Raise UserError if a parameter of a variant of guidance is out of range or has no effect."""
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} {value}, expected {low:g} to {high:g}")
        if self.apg and self.guidance_scale == 0:
            raise UserError("guidance_scale 0 with apg, which divides by it: expected another scale")
        if not self.apg and (changed := [name for name in APG if getattr(self, name) != getattr(SamplingParams, name)]):
            raise UserError(f"{changed[0]} {getattr(self, changed[0])} without apg: expected apg, too")

    def _check_levels(self) -> None:
        """Raise UserError if the levels or the first and last step are out of range."""
        if self.start_at_step < 0 or (self.end_at_step is not None and self.end_at_step < 0):
            raise UserError(f"start_at_step {self.start_at_step}, end_at_step {self.end_at_step}, expected at least 0")
        if not self.sigmas:
            return
        shown = " ".join(map(str, self.sigmas[:8])) + (" …" if len(self.sigmas) > 8 else "")
        if len(self.sigmas) > TABLE_SIZE + 1:
            raise UserError(f"{len(self.sigmas)} sigmas, expected at most {TABLE_SIZE + 1}")
        if len(self.sigmas) < 2 or not all(0 <= level <= MAX_LEVEL for level in self.sigmas):
            raise UserError(f"sigmas {shown}, expected two or more noise levels from 1 (noise) to 0 (image)")
        if 0 in self.sigmas[:-1] or self.sigmas[-1] >= 1:
            raise UserError(f"sigmas {shown}, expected levels above 0 up to the last one, which is below 1")
        if self.denoise != 1:
            raise UserError(f"denoise {self.denoise} with sigmas: the first level says how much is redrawn")

    @property
    def variants(self) -> Variants:
        """The variants of guidance."""
        apg = self.apg, float(self.apg_eta), float(self.apg_norm_threshold), float(self.apg_momentum)
        return Variants(self.cfg_zero_star, float(self.rescale_cfg), float(self.cfg_norm), *apg)

    @property
    def step_cache(self) -> StepCache | None:
        """The step cache, or None. Raises UserError for an unknown method or an invalid threshold."""
        return StepCache.parse(self.cache, self.cache_interval)

    def levels(self) -> np.ndarray:
        """Return the noise levels to sample at, float32; none if no step is left between first and last step."""
        without_penultimate = SAMPLERS[self.sampler].without_penultimate
        options: dict[str, Any] = {"denoise": self.denoise or 1.0, "without_penultimate": without_penultimate}
        levels = np.array(self.sigmas, np.float32)
        if not self.sigmas:
            levels = sigmas(self.schedule, self.steps, self.shift, **options)
        return part(levels, self.start_at_step, self.end_at_step, leftover_noise=self.return_with_leftover_noise)


_OF_REQUESTS = ("prompt", "width", "height", "seed", "batch_size", "image", "mask", "progress", *INPUTS)
"""Arguments of `AnimaPipeline.__call__` beside the parameters."""

_TYPES: Mapping[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    int | None: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
    str | None: (str, "text"),
}
"""Type of a field → what its values are instances of, and how a message calls them."""


def _check_types(settings: Any) -> None:
    """Raise UserError for a field of a dataclass whose value has another type; arrays of one number are numbers."""
    for field in dataclasses.fields(settings):
        value, (expected, described) = getattr(settings, field.name), _TYPES.get(field.type, (object, ""))
        if getattr(value, "shape", None) == ():
            value = value.item()
        number = isinstance(value, bool) and expected is not bool
        if (number or not isinstance(value, expected)) and (value is not None or field.default is not None):
            raise UserError(f"{field.name} {show_value(repr(value))}, expected {described}")


def _check_interval(name: str, interval: Any) -> None:
    """Raise UserError unless this part of the sampling is two ascending fractions."""
    try:
        first, last = interval
        valid = 0 <= first <= last <= 1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        found = " ".join(map(str, interval)) if isinstance(interval, Sequence) else str(interval)
        raise UserError(f"{name} {show_value(found)}, expected two ascending numbers from 0 to 1")


def _check_batch(size: int) -> None:
    if not 1 <= size <= MAX_BATCH:
        raise UserError(f"batch_size {size}, expected 1 to {MAX_BATCH}")


def check_requests(
    requests: Sequence[ImageRequest], params: SamplingParams, image: Image.Image | None, mask: Image.Image | None
) -> None:
    """Raise UserError unless requests and parameters are valid and match the starting image and the mask."""
    params.check()
    for request in requests:
        request.check()
    if params.base_strength != 1 and requests and not any(request.regions for request in requests):
        raise UserError(f"base_strength {params.base_strength} without regions: expected a region, too")
    if image is None:
        if mask is not None:
            raise UserError("a mask without an image: there is nothing to keep where the mask is black")
        if params.denoise < 1:
            raise UserError(f"denoise {params.denoise} needs an image to start from; without one it is 1")
        if params.paste is not None:
            raise UserError(f"paste {params.paste} needs an image and a mask: there is nothing to put back")
        return
    for request in requests:
        if image.size != (request.width, request.height):
            raise UserError(f"the image is {image.width}×{image.height}, expected {request.width}×{request.height}")
    if mask is None and params.paste is not None:
        raise UserError(f"paste {params.paste} needs a mask: it puts pixels of the image back where that is black")
    if mask is not None and mask.size != image.size:
        raise UserError(f"the mask is {mask.width}×{mask.height}, expected the image's {image.width}×{image.height}")


def batch_of_requests(
    prompt: str | Sequence[str],
    width: int | Sequence[int],
    height: int | Sequence[int],
    seed: int | Sequence[int],
    batch_size: int,
    **inputs: Sequence[Any],
) -> list[ImageRequest]:
    """Return the requests of one batch; a single value is repeated for all images.

    `inputs` are the fields of `INPUTS`: a sequence for all images, or a sequence of sequences, one for each. With a
    single seed, images of one size form a ComfyUI batch, whose noise is drawn together. Raises UserError if the numbers
    of values differ.
    """
    _check_batch(batch_size)
    columns: dict[str, list[Any]] = {
        name: [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)  # type: ignore[arg-type]
        for name, values in {"prompt": prompt, "width": width, "height": height, "seed": seed}.items()
    }
    columns |= {name: _of_images(values) for name, values in inputs.items()}
    count = max(batch_size, *map(len, columns.values()))
    for name, values in columns.items():
        if len(values) not in (1, count):
            raise UserError(f"{len(values)} {name.removesuffix('s')}s for {count} images, expected 1 or {count}")
    rows = zip(*(values if len(values) == count else values * count for values in columns.values()), strict=True)
    requests = [ImageRequest(**dict(zip(columns, row, strict=True))) for row in rows]
    if len(columns["seed"]) > 1:
        return requests
    sizes = [request.latent_size for request in requests]
    return [
        dataclasses.replace(request, batch_size=sizes.count(size), batch_index=sizes[:index].count(size))
        for index, (request, size) in enumerate(zip(requests, sizes, strict=True))
    ]


def _of_images(values: Any) -> list[tuple[Any, ...]]:
    """Return the tuple of each image, or a single one for all images; a single value is one of a tuple."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        return [(values,)]
    values = list(values)
    if any(isinstance(value, list | tuple) for value in values):
        return [
            () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,) for value in values
        ]
    return [tuple(values)]


def expand_request(
    base: ImageRequest,
    prompts: Sequence[str] | None = None,
    widths: Sequence[int] | None = None,
    heights: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[ImageRequest]:
    """Return `base` with every prompt, size and seed, `batch_size` images of each; None keeps the value of `base`.

    Raises UserError unless the numbers of widths and heights are equal or one of them is 1.
    """
    _check_batch(batch_size or 1)
    widths, heights = widths or [base.width], heights or [base.height]
    count = max(len(widths), len(heights))
    if not {len(widths), len(heights)} <= {1, count}:
        raise UserError(f"{len(widths)} values of --width, {len(heights)} of --height, expected one or equally many")
    sizes = [(widths[index % len(widths)], heights[index % len(heights)]) for index in range(count)]
    positions = [(batch_size or 1, index) for index in range(batch_size or 1)]
    if batch_size is None and not seeds:
        positions = [(base.batch_size, base.batch_index)]
    combinations = itertools.product(prompts or [base.prompt], sizes, seeds or [base.seed], positions)
    names = ("prompt", "width", "height", "seed", "batch_size", "batch_index")
    return [
        dataclasses.replace(base, **dict(zip(names, (prompt, *size, seed, *position), strict=True)))
        for prompt, size, seed, position in combinations
    ]


def read_prompts(path: str) -> list[str]:
    """Return the non-blank lines of a text file. Raises UserError if there are none or the file cannot be read."""
    prompts = [line.strip() for line in read_utf8(path).split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path}: contains no prompt, expected one per line")
    return prompts


def read_utf8(path: str) -> str:
    """Return the text of a file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        data = error.object
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x})") from None


def _nearest(size: int) -> str:
    below = max(SIZE_STEP, size // SIZE_STEP * SIZE_STEP)
    return f" (nearest: {below} and {below + SIZE_STEP})" if size > SIZE_STEP else ""


def batches(keys: Sequence[Any], at_once: int) -> Iterator[slice]:
    """Yield slices of at most `at_once` images; those of a slice have equal `keys`, of which each image has one."""
    first = 0
    for _, group in itertools.groupby(keys):
        end = first + sum(1 for _ in group)
        for start in range(first, end, at_once):
            yield slice(start, min(start + at_once, end))
        first = end
