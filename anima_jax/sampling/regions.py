"""Regions: prompts that count in a part of an image, named by a mask or an area, as in ComfyUI.

Source: `ConditioningSetMask` and `ConditioningSetArea` in ComfyUI's nodes.py, `get_area_and_mult` and
`resolve_areas_and_cond_masks_multidim` in its comfy/samplers.py. How regions are sampled is in `sampling.region_rows`.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from anima_jax.data.images import eight_bit, is_transparent
from anima_jax.errors import UserError, show_value
from anima_jax.sampling.images import PIXELS_PER_LATENT, latent_mask, mask_values, name_in_text, read_picture
from anima_jax.sampling.scaling import is_number

MAX_STRENGTH = 10.0
"""Largest strength, as in ComfyUI's nodes."""

SOFT_EDGE = 8
"""Latent pixels over which the weight of an area rises from its edges, or a quarter of its side if that is less."""

SMALLEST_BOUNDS = 8
"""Smallest side in latent pixels of the part that `bounds` evaluates."""

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
AREA = re.compile(",".join([rf"\s*({NUMBER}(?:\s*%)?)\s*"] * 4))

LONGEST_NAME = 4096
"""Longest name of a mask's file in characters."""


class Area(NamedTuple):
    """A rectangle in pixels, or in fractions of the image's sides."""

    x: float
    y: float
    width: float
    height: float
    fractions: bool = False

    @classmethod
    def parse(cls, text: str) -> "Area | None":
        """Return the area that "x,y,width,height" names, in pixels or with %; None for another text.

        Zeros need no %. Raises UserError if only some of the other numbers have it.
        """
        if not (match := AREA.fullmatch(text)):
            return None
        parts = [part.strip() for part in match.groups()]
        values = [float(part.rstrip("% ")) for part in parts]
        with_percent = {part.endswith("%") for part, value in zip(parts, values, strict=True) if value}
        if len(with_percent) > 1:
            raise UserError(f"region {text}: expected four numbers of pixels or four with %, such as 0%,0%,50%,100%")
        if with_percent == {True}:
            values = [value / 100 for value in values]
        x, y, width, height = values
        return cls(x, y, width, height, with_percent == {True})

    def __str__(self) -> str:
        if self.fractions:
            return ",".join(f"{round(100 * value, 6):g}%" for value in self[:4])
        return ",".join(f"{value:g}" for value in self[:4])

    def latent(self, size_yx: tuple[int, int]) -> "LatentPart":
        """Return the part of latents of this size. Raises UserError if it is empty or outside of the image."""
        rows, columns = size_yx
        name = f"region {self}"
        if not all(map(math.isfinite, self[:4])) or min(self.x, self.y) < 0 or min(self.width, self.height) <= 0:
            raise UserError(f"{name}: expected x, y ≥ 0 and a width and a height above 0")
        if self.fractions:
            y, x = round(self.y * rows), round(self.x * columns)
            height, width = max(1, round(self.height * rows)), max(1, round(self.width * columns))
        else:
            y, x, height, width = (int(side // PIXELS_PER_LATENT) for side in (self.y, self.x, self.height, self.width))
        if not (height and width):
            raise UserError(f"{name}: expected at least {PIXELS_PER_LATENT} pixels in width and height")
        if y >= rows or x >= columns:
            size = f"{columns * PIXELS_PER_LATENT}×{rows * PIXELS_PER_LATENT}"
            raise UserError(f"{name}: is outside of the image of {size} pixels")
        return LatentPart(y, x, min(height, rows - y), min(width, columns - x))


class LatentPart(NamedTuple):
    """A rectangle of latents: its first row and column, and its numbers of rows and columns."""

    y: int
    x: int
    rows: int
    columns: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Its rows and columns."""
        return slice(self.y, self.y + self.rows), slice(self.x, self.x + self.columns)


class PlacedRegion(NamedTuple):
    """A region in latents of one size: the part that is evaluated and the weight of each of its pixels, float32."""

    part: LatentPart
    weight_yx: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A prompt that counts in a part of an image.

    `where` is a mask or an area. A mask is a local file, a PIL image, or an array (y, x) of numbers from 0 to 1: white
    or transparent pixels belong to the region, grey ones count less. It has the image's size in pixels. An area is
    `(x, y, width, height)` in pixels, an `Area`, or text such as "0%,0%,50%,100%". The network sees only that part of
    the image; its weight rises over the first 64 pixels from edges inside of the image. With `bounds` the network sees
    only the rectangle around a mask ("mask bounds" in ComfyUI). `strength` multiplies the weights. The prompt counts
    from `start_percent` to `end_percent` of the sampling, which are fractions from 0 to 1.
    """

    where: Any
    prompt: str
    strength: float = 1.0
    bounds: bool = False
    start_percent: float = 0.0
    end_percent: float = 1.0

    @classmethod
    def parse(cls, text: str, is_mask: Callable[[str], bool] = os.path.isfile) -> "Region":
        """Return the region of `MASK=PROMPT[:strength]`, where MASK is a file or an area.

        The prompt begins after the first '=' before which there is an area or what `is_mask` calls one, else after the
        first one. A number after the last ':' is the strength. Raises UserError without MASK, '=' or PROMPT.
        """
        ends = [match.start() for match in re.finditer("=", text[:LONGEST_NAME])]
        where = next((text[:end] for end in ends if Area.parse(text[:end]) or is_mask(text[:end])), None)
        where = text.partition("=")[0] if where is None else where
        if not ends or not where.strip():
            raise UserError(f"--region {text}: expected MASK=PROMPT[:strength], MASK a file or x,y,width,height")
        prompt, colon, number = text[len(where) + 1 :].rpartition(":")
        try:
            strength = float(number) if colon else 1.0
        except ValueError:
            colon = ""
            strength = 1.0
        region = cls(where, prompt if colon else text[len(where) + 1 :], strength)
        region.check()
        if not region.prompt.strip():
            raise UserError(f"--region {text}: has no prompt, expected MASK=PROMPT[:strength]")
        return region

    @functools.cached_property
    def area(self) -> Area | None:
        """The area, or None for a mask."""
        if isinstance(self.where, Area) or self.where is None:
            return self.where
        if isinstance(self.where, str):
            return Area.parse(self.where)
        if not isinstance(self.where, tuple | list):
            return None
        try:
            x, y, width, height = map(float, self.where)
        except (TypeError, ValueError):
            raise UserError(f"region {show_value(str(self.where))}: expected (x, y, width, height)") from None
        return Area(x, y, width, height)

    @functools.cached_property
    def _mask(self) -> Any:
        """The mask as an image or an array."""
        if isinstance(self.where, str | os.PathLike):
            if not os.path.lexists(self.where):
                raise UserError(f"{self.name}: no such file; expected a mask's picture, or an area x,y,width,height")
            return read_picture(os.fspath(self.where))
        try:
            return eight_bit(self.where) if isinstance(self.where, Image.Image) else self.where
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    @functools.cached_property
    def channel(self) -> str:
        """The channel of the mask's file that has its values: alpha if a pixel is transparent, else red."""
        return "alpha" if isinstance(self._mask, Image.Image) and is_transparent(self._mask) else "red"

    @functools.cached_property
    def mask_yx(self) -> np.ndarray:
        """The mask's values in [0, 1], float32. Raises UserError if it cannot be read or is not a mask."""
        if isinstance(self._mask, Image.Image):
            return mask_values(self._mask)[0, :, :, 0]
        values = np.asarray(self._mask)
        if values.dtype == np.uint8:
            values = values / np.float32(255.0)
        if values.ndim != 2 or not (values.dtype == bool or np.issubdtype(values.dtype, np.number)):
            found = f"{values.dtype} {values.shape}"
            raise UserError(f"{self.name}: found {found}, expected a mask (y, x), or x, y, width, height")
        if not np.all((values >= 0) & (values <= 1)):
            raise UserError(f"{self.name}: a mask of values {values.min():g} to {values.max():g}, expected 0 to 1")
        return values.astype(np.float32)

    @property
    def is_simple(self) -> bool:
        """Whether the network sees the whole image and the prompt counts all the time."""
        return self.area is None and not self.bounds and (self.start_percent, self.end_percent) == (0.0, 1.0)

    @property
    def is_named(self) -> bool:
        """Whether an area or a file's name says where it is."""
        return self.area is not None or isinstance(self.where, str | os.PathLike)

    @property
    def where_name(self) -> str:
        """What the text of an image calls the area or the mask."""
        return str(self.area or self.where) if self.is_named else name_in_text(self.where, "mask", self.digest)

    def named(self) -> "StoredRegion":
        """Return what a text says of it, without the mask's digest."""
        return StoredRegion(self.where_name, *_rest(self))

    def stored(self) -> "StoredRegion":
        """Return what an image's own text says of it."""
        return dataclasses.replace(self.named(), digest=self.digest if self.area is None else None)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the mask's size and values, in hexadecimal digits."""
        return hashlib.sha256(f"{self.mask_yx.shape}".encode() + self.mask_yx.tobytes()).hexdigest()

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{self.where_name}={self.prompt}:{self.strength!r}"

    @property
    def name(self) -> str:
        """What messages call the region: its file or area, else its prompt."""
        if self.is_named:
            return f"region {show_value(str(self.area or self.where))}"
        return f"region '{show_value(self.prompt)}'"

    def check(self) -> None:
        """Raise UserError for a prompt, strength or percent of another type or out of range."""
        prompt: Any = self.prompt
        if not isinstance(prompt, str) or self.where is None or (isinstance(self.where, str) and not self.where):
            raise UserError(f"regions {show_value(repr(self))}, expected Region(mask or area, prompt, strength)")
        for name, high in (("strength", MAX_STRENGTH), ("start_percent", 1.0), ("end_percent", 1.0)):
            value: Any = getattr(self, name)
            if not is_number(value) or not 0 <= value <= high:
                raise UserError(f"{self.name}: {name} {show_value(repr(value))}, expected a number from 0 to {high:g}")
        if self.start_percent > self.end_percent:
            raise UserError(f"{self.name}: start_percent {self.start_percent} is above end_percent {self.end_percent}")
        if self.bounds and self.area is not None:
            raise UserError(f"{self.name}: bounds are those of a mask, found an area")

    def placed(self, size_yx: tuple[int, int]) -> PlacedRegion:
        """Return the region in latents of this size.

        Raises UserError if the mask cannot be read, has another size or is black everywhere, and for an area outside of
        the image.
        """
        self.check()
        strength = np.float32(self.strength)
        if self.area is not None:
            part = self.area.latent(size_yx)
            return PlacedRegion(part, area_weight(part, size_yx, strength))
        own, expected = (f"{x}×{y}" for y, x in (self.mask_yx.shape, [side * PIXELS_PER_LATENT for side in size_yx]))
        if own != expected:
            raise UserError(f"{self.name}: the mask is {own} pixels, expected the image's {expected}")
        mask_yx = latent_mask(self.mask_yx[None, :, :, None])[0, :, :, 0]
        if not mask_yx.any():
            raise UserError(f"{self.name}: the mask is black everywhere, so the prompt would count nowhere")
        part = bounds_of(mask_yx) if self.bounds else LatentPart(0, 0, *size_yx)
        return PlacedRegion(part, mask_yx[part.slices] * strength)


@dataclasses.dataclass(frozen=True)
class StoredRegion:
    """A region in an image's text: its fields, with the name of the mask's file, and the mask's digest."""

    where: str
    prompt: str
    strength: float = 1.0
    bounds: bool = False
    start_percent: float = 0.0
    end_percent: float = 1.0
    digest: str | None = None

    @property
    def is_area(self) -> bool:
        """Whether it is an area, not a mask."""
        return AREA.fullmatch(self.where) is not None

    def region(self, where: str | None = None) -> Region:
        """Return the region, with a mask that is the file `where`."""
        return Region(where or self.where, *_rest(self))


def _rest(region: "Region | StoredRegion") -> list[Any]:
    """Return the fields of `Region` after `where`."""
    return [getattr(region, field.name) for field in dataclasses.fields(Region)[1:]]


def check_regions(regions: Sequence[Any], size_yx: tuple[int, int]) -> None:
    """Raise UserError unless all of these are regions that count in latents of this size."""
    for region in regions:
        if not isinstance(region, Region):
            raise UserError(f"regions {show_value(repr(region))}, expected Region(mask or area, prompt, strength)")
        region.placed(size_yx)


def area_weight(part: LatentPart, size_yx: tuple[int, int], strength: np.float32) -> np.ndarray:
    """Return the weight of each pixel of an area, (rows, columns), float32: lower near edges inside of the image."""
    weight_yx = np.full(part[2:], strength, np.float32)
    for axis, whole in enumerate(size_yx):
        first, length = part[axis], part[2 + axis]
        soft = min(SOFT_EDGE, length // 4)
        rising, side = (1.0 / max(1, soft)) * np.arange(1, soft + 1), np.ones(length, np.float32)
        if first != 0:
            side[:soft] = rising
        if first + length < whole:
            side[length - soft :] *= rising.astype(np.float32)[::-1]
        weight_yx *= np.expand_dims(side, 1 - axis)
    return weight_yx


def bounds_of(mask_yx: np.ndarray) -> LatentPart:
    """Return the smallest rectangle with all pixels of a mask that are not 0, of at least 8 × 8 where there is room."""
    (y, x), (last_y, last_x) = (function(np.argwhere(mask_yx), axis=0) for function in (np.min, np.max))
    height, width = (max(SMALLEST_BOUNDS, int(last - first) + 1) for first, last in ((y, last_y), (x, last_x)))
    return LatentPart(int(y), int(x), min(height, mask_yx.shape[0] - int(y)), min(width, mask_yx.shape[1] - int(x)))
