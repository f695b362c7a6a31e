"""Images with regions as rows of the network's batch, and the combination of the rows' estimates.

The prompt and each region's prompt are evaluated at the same point. The estimate of the image is the mean of their
estimates, weighted at every latent pixel: the prompt's weight is `base_strength`, a region's is its mask or area times
its strength. Where a region is an area, the network sees only that part of the image. The negative prompt is then
evaluated there too, and combined with the same weights. Source: `calc_cond_batch` and
`create_cond_with_same_area_if_none` in ComfyUI's comfy/samplers.py.
Axes: b images, r rows of the batch, l image tokens, k the four latent pixels of all tokens (4·l), c values.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import OUT_CHANNELS, PATCH
from anima_jax.sampling.packing import TokenPacking
from anima_jax.sampling.regions import LatentPart, PlacedRegion, Region

TINY = 1e-37
"""What ComfyUI adds to the sum of weights: where no prompt counts, the estimate is 0."""


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
        own, inside = cell_numbers((sizes[image][0], *part[2:])), cell_numbers(sizes[image])[:, *part.slices]
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
