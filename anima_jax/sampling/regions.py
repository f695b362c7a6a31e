"""Regions: prompts that count in a part of an image, combined as ComfyUI combines them.

The prompt and each region's prompt are evaluated at the same point. The estimate of the image is the mean of their
estimates, weighted at every latent pixel: the prompt's weight is `base_strength`, a region's is its mask or area times
its strength. Source: `get_area_and_mult`, `calc_cond_batch`, `resolve_areas_and_cond_masks_multidim` and
`create_cond_with_same_area_if_none` in ComfyUI's comfy/samplers.py, and `ConditioningSetMask` and `ConditioningSetArea`
in its nodes.py.
Where a region is an area, the network sees only that part of the image. The negative prompt is then evaluated there
too, and combined with the same weights. All of these evaluations are rows of one batch.
Axes: b images, r rows of the batch, l image tokens, k the four latent pixels of all tokens (4·l), c values.
"""

import dataclasses
import functools
import math
import numbers
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.errors import UserError, show_value
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import OUT_CHANNELS, PATCH
from anima_jax.sampling.images import PIXELS_PER_LATENT, latent_mask, mask_values, read_image
from anima_jax.sampling.packing import TokenPacking

MAX_STRENGTH = 10.0
"""Largest strength, as in ComfyUI's nodes."""

SOFT_EDGE = 8
"""Latent pixels over which the weight of an area rises from its edges, or a quarter of its side if that is less."""

SMALLEST_BOUNDS = 8
"""Smallest side in latent pixels of the part that `bounds` evaluates."""

TINY = 1e-37
"""What ComfyUI adds to the sum of weights: where no prompt counts, the estimate is 0."""

NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*"
AREA = re.compile(",".join([rf"({NUMBER}%?)\s*"] * 4))


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
    def parse(cls, text: str) -> "Region":
        """Return the region of `MASK=PROMPT[:strength]`, where MASK is a file or an area.

        The prompt begins after the first '=' before which there is an area or the name of a file that exists, else
        after the first one. A number after the last ':' is the strength. Raises UserError without '=' or MASK.
        """
        ends = [match.start() for match in re.finditer("=", text)]
        where = next((text[:end] for end in ends if Area.parse(text[:end]) or os.path.isfile(text[:end])), None)
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
        return read_image(os.fspath(self.where)) if isinstance(self.where, str | os.PathLike) else self.where

    @property
    def channel(self) -> str:
        """The channel of the mask's file that has its values, as ComfyUI names them."""
        is_alpha = isinstance(self._mask, Image.Image) and self._mask.has_transparency_data
        return "alpha" if is_alpha else "red"

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
    def name(self) -> str:
        """What messages call the region: its file or area, else its prompt."""
        if self.area is not None or isinstance(self.where, str | os.PathLike):
            return f"region {show_value(str(self.area or self.where))}"
        return f"region '{show_value(self.prompt)}'"

    def check(self) -> None:
        """Raise UserError for a prompt, strength or percent of another type or out of range."""
        for name, high in (("strength", MAX_STRENGTH), ("start_percent", 1.0), ("end_percent", 1.0)):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= high:
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
        return PlacedRegion(part, mask_yx[_slices(part)] * strength)


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


def _slices(part: LatentPart) -> tuple[slice, slice]:
    return slice(part.y, part.y + part.rows), slice(part.x, part.x + part.columns)


class EvaluatedRows(NamedTuple):
    """Rows of the network's batch that are combined to one estimate for each image; the first b are whole images.

    `image_r` is the image of each row, `size_r3` its size in latent pixels, `weight_rk` its weight at each latent pixel
    of the image, and `start_r` and `end_r` the noise levels from and down to which it counts. Where a row is a part of
    its image, `source_rk` is for each latent pixel of the row the one of the image, and `place_rk` the inverse; numbers
    that are too large stand for none. Both are None if all rows are whole images.
    """

    image_r: Any
    size_r3: Any
    weight_rk: Any
    start_r: Any
    end_r: Any
    source_rk: Any = None
    place_rk: Any = None


class RegionRows(NamedTuple):
    """The rows of a batch with regions: those of the negative prompt, then those of the prompts."""

    negative: EvaluatedRows
    positive: EvaluatedRows

    def evaluated(self, with_negative: bool) -> EvaluatedRows:
        """Return all rows that are evaluated."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *self) if with_negative else self.positive

    def combined(self, velocities_rlc: Array, x_blc: Array, sigma: Array) -> Array:
        """Return the velocities (b, l, c) of the prompts at `x_blc`, or those (2 · b, l, c) of both kinds of prompt.

        `velocities_rlc` are those of `evaluated`.
        """
        negatives = len(velocities_rlc) - len(self.positive.image_r)
        parts = [(self.negative, velocities_rlc[:negatives]), (self.positive, velocities_rlc[negatives:])]
        return jnp.concatenate([combined(*part, x_blc, sigma) for part in parts if len(part[1])])


def rows_of(x_blc: Array, rows: EvaluatedRows) -> Array:
    """Return the tokens (r, l, c) of the rows: those of their images, or of parts of them."""
    x_rlc = x_blc[rows.image_r]
    return x_rlc if rows.source_rk is None else _moved(x_rlc, rows.source_rk)


def combined(rows: EvaluatedRows, velocities_rlc: Array, x_blc: Array, sigma: Array) -> Array:
    """Return each image's mean velocity (b, l, c), weighted with the rows that count at this noise level.

    The estimate x − σ·v is then the mean of the rows' estimates; it is 0 where no row counts.
    """
    velocities_rlc = constrain(velocities_rlc, "nnn")
    if rows.place_rk is not None:
        velocities_rlc = _moved(velocities_rlc, rows.place_rk)
    counts_r1 = ((sigma <= rows.start_r) & (sigma >= rows.end_r))[:, None]
    weight_rlc = _of_values(jnp.where(counts_r1, rows.weight_rk, 0.0), velocities_rlc.shape)

    def add(row: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        image, weight_lc = rows.image_r[row], weight_rlc[row]
        return sums[0].at[image].add(weight_lc * velocities_rlc[row]), sums[1].at[image].add(weight_lc)

    # In the order of the rows, so that the sum does not depend on the hardware.
    zeros = jnp.zeros_like(x_blc)
    total_blc, weights_blc = jax.lax.fori_loop(0, len(velocities_rlc), add, (zeros, zeros))
    return jnp.where(weights_blc > 0.0, total_blc / (weights_blc + TINY), x_blc / sigma)


def _moved(x_rlc: Array, index_rk: Array) -> Array:
    """Return tokens whose latent pixels are those with these numbers, or 0."""
    x_rkc = x_rlc.reshape(*index_rk.shape, -1)
    moved = jnp.take_along_axis(x_rkc, index_rk[..., None], axis=1, mode="fill", fill_value=0.0)
    return moved.reshape(x_rlc.shape)


def _of_values(weight_rk: Array, shape: tuple[int, ...]) -> Array:
    return jnp.repeat(weight_rk, OUT_CHANNELS, axis=1).reshape(shape)


class PlacedRow(NamedTuple):
    """A row before it is an array: its image, what is evaluated with which weight, and the region if it is of one."""

    image: int
    placed: PlacedRegion
    region: Region | None = None


def region_rows(
    regions: Sequence[Sequence[Region]],
    packing: TokenPacking,
    seen: tuple[np.ndarray, int],
    base_strength: float = 1.0,
    shift: float = 3.0,
) -> RegionRows:
    """Return the rows of images with these regions, on the host.

    `seen` are the images' sizes (t, y, x) in latent pixels with their references as further frames, and the token
    budget for them. `base_strength` is the weight of the prompt of an image that has regions. The positive rows are the
    images, then the regions in the images' order; the negative ones are the images, then each part of an image once.
    Raises UserError as `Region.placed` does.
    """
    sizes: list[tuple[int, int, int]] = [(t, y, x) for t, y, x in seen[0].tolist()]
    positive = [
        PlacedRow(image, PlacedRegion(part := LatentPart(0, 0, *size[1:]), np.full(part[2:], weight, np.float32)))
        for image, (size, own) in enumerate(zip(sizes, regions, strict=True))
        for weight in [base_strength if own else 1.0]
    ]
    negative = [
        row._replace(placed=row.placed._replace(weight_yx=np.ones_like(row.placed.weight_yx))) for row in positive
    ]
    for image, (size, own) in enumerate(zip(sizes, regions, strict=True)):
        rows = [PlacedRow(image, region.placed(size[1:]), region) for region in own]
        parts = {row.placed.part: row for row in rows[::-1]}  # the first of each part
        positive += rows
        negative += [row for row in rows if _is_crop(row, size) and parts[row.placed.part] is row]
    crops = any(_is_crop(row, sizes[row.image]) for row in positive)
    budgets = packing.length, seen[1]
    return RegionRows(*(_as_arrays(rows, sizes, budgets, shift, crops) for rows in (negative, positive)))


def _is_crop(row: PlacedRow, size: tuple[int, int, int]) -> bool:
    return row.placed.part[2:] != size[1:]


def _as_arrays(
    rows: Sequence[PlacedRow],
    sizes: Sequence[tuple[int, int, int]],
    budgets: tuple[int, int],
    shift: float,
    crops: bool,
) -> EvaluatedRows:
    """Return the rows' arrays on the host, with `source_rk` and `place_rk` if there are `crops`."""
    cells, seen_cells = (tokens * PATCH * PATCH for tokens in budgets)
    weight_rk, levels_r2 = np.zeros((len(rows), cells), np.float32), np.zeros((len(rows), 2), np.float32)
    source_rk, place_rk = (np.full((len(rows), each), seen_cells, np.int32) for each in (seen_cells, cells))
    for index, (image, (part, weight_yx), region) in enumerate(rows):
        own, inside = cell_numbers((sizes[image][0], *part[2:])), cell_numbers(sizes[image])[:, *_slices(part)]
        weight_rk[index, inside[0]] = weight_yx
        source_rk[index, own], place_rk[index, inside[0]] = inside, own[0]
        start, end = (region.start_percent, region.end_percent) if region else (0.0, 1.0)
        # As without ConditioningSetTimestepRange: a first level above 1, which some shifts have, is not left out.
        levels_r2[index] = percent_to_sigma(start, shift) if start > 0 else np.inf, percent_to_sigma(end, shift)
    size_r3 = np.array([(sizes[row.image][0], *row.placed.part[2:]) for row in rows], np.int32)
    image_r = np.array([row.image for row in rows], np.int32)
    moved = (source_rk, place_rk) if crops else (None, None)
    return EvaluatedRows(image_r, size_r3, weight_rk, levels_r2[:, 0], levels_r2[:, 1], *moved)


def cell_numbers(size: Sequence[int]) -> np.ndarray:
    """Return the number of each latent pixel (t, y, x) in packed latents of this size: token, then place there."""
    (t, y, x), (_, rows, columns) = np.indices(size), -(-np.array(size) // PATCH)
    token = (t * rows + y // PATCH) * columns + x // PATCH
    return (token * PATCH + y % PATCH) * PATCH + x % PATCH
