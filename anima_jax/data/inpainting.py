"""Random masks for training to inpaint: boxes, strokes of a brush, and the whole image.

A mask is a pure function of the seed, the epoch and the example, as all random numbers of training
(diffusion/randomness.py); it is drawn on the host, from raw Philox words like those of captions (`variants`). What is
drawn is our own choice: boxes and strokes of many sizes, as users paint them.
"""

from collections.abc import Callable, Mapping

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw

from anima_jax.config.pairs import MASK_SHARES
from anima_jax.config.sizes import PIXEL_MULTIPLE
from anima_jax.data.examples import Example
from anima_jax.data.variants import INPAINT_MASK, random_words

WORDS = 128
"""Random numbers of a mask, more than any of them uses."""

MOST_BOXES, BOX_SIDE = 3, (0.1, 0.6)
"""Number of boxes, and their sides as fractions of the image's."""

MOST_STROKES, MOST_POINTS, STROKE_STEP, BRUSH = 4, 8, (0.05, 0.3), (0.03, 0.15)
"""Number of strokes, corners of a stroke, and the length of its parts and its width as fractions of √(width·height)."""

Draw = Callable[[], float]
"""Returns the next random number in [0, 1)."""


def mask_of(example: Example, own_yx: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    """Return what is drawn anew of an example in an epoch, bool (height, width): its own mask, else a random one."""
    if own_yx is not None:
        return own_yx
    size, shares = example.bucket.size, example.source.inpaint_masks or MASK_SHARES
    return random_mask(shares, (size.width, size.height), seed, epoch, example.id)


def random_mask(shares: Mapping[str, float], size_wh: tuple[int, int], *key: int) -> np.ndarray:
    """Return what is drawn anew, bool (height, width), with at least one pixel.

    `shares` are relative frequencies of "boxes", "strokes" and "whole". `key` is (seed, epoch, example id).
    """
    numbers = iter((random_words(INPAINT_MASK, *key, count=WORDS) * 2.0**-64).tolist())
    draw: Draw = numbers.__next__
    kinds = [kind for kind, share in shares.items() if share > 0]
    bounds = np.cumsum([shares[kind] for kind in kinds])
    kind = kinds[min(int(np.searchsorted(bounds, draw() * bounds[-1], side="right")), len(kinds) - 1)]
    width, height = size_wh
    if kind == "whole":
        return np.ones((height, width), bool)
    return _boxes(width, height, draw) if kind == "boxes" else _strokes(width, height, draw)


def with_mask(control_lp: np.ndarray, mask_yx: np.ndarray) -> np.ndarray:
    """Return the patches of a picture, uint8 (l, 16·16·3), with a mask of 0 and 255 as fourth channel."""
    side = PIXEL_MULTIPLE
    mask_lq = rearrange(mask_yx, "(y m) (x n) -> (y x) (m n)", m=side, n=side)
    patches = np.empty((len(control_lp), side * side, 4), np.uint8)
    patches[..., :3] = control_lp.reshape(-1, side * side, 3)
    patches[..., 3] = mask_lq * np.uint8(255)
    return patches.reshape(len(control_lp), -1)


def _boxes(width: int, height: int, draw: Draw) -> np.ndarray:
    mask_yx = np.zeros((height, width), bool)
    for _ in range(1 + int(draw() * MOST_BOXES)):
        sides = [max(1, round(side * _between(draw, BOX_SIDE))) for side in (width, height)]
        left, top = (int(draw() * (whole - side + 1)) for whole, side in zip((width, height), sides, strict=True))
        mask_yx[top : top + sides[1], left : left + sides[0]] = True
    return mask_yx


def _strokes(width: int, height: int, draw: Draw) -> np.ndarray:
    """Draw bent lines with round corners and ends, each of which begins inside the image."""
    image, side = Image.new("1", (width, height)), (width * height) ** 0.5
    pen = ImageDraw.Draw(image)
    for _ in range(1 + int(draw() * MOST_STROKES)):
        brush = max(1.0, side * _between(draw, BRUSH))
        x, y, direction = draw() * width, draw() * height, 2 * np.pi * draw()
        points = [(x, y)]
        for _ in range(1 + int(draw() * MOST_POINTS)):
            direction += np.pi * (draw() - 0.5)  # a turn of at most 90°
            step = side * _between(draw, STROKE_STEP)
            x, y = (
                float(np.clip(x + step * np.cos(direction), 0, width - 1)),
                float(np.clip(y + step * np.sin(direction), 0, height - 1)),
            )
            points.append((x, y))
        pen.line(points, fill=1, width=round(brush))
        for x, y in points:
            pen.ellipse((x - brush / 2, y - brush / 2, x + brush / 2, y + brush / 2), fill=1)
    return np.asarray(image)


def _between(draw: Draw, bounds: tuple[float, float]) -> float:
    return bounds[0] + draw() * (bounds[1] - bounds[0])
