"""Which scene an image of the quick start's language shows, and how exactly: the nearest rendered template."""

import functools
import itertools

import numpy as np

from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw

RADII = (14.0, 16.0, 18.0, 20.0, 22.0)
CENTRES = np.arange(22.0, 43.0, 2.0)


@functools.cache
def templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Return the shape of each template and its coverage of each pixel, (n, 4096) in [0, 1]."""
    shapes, masks = [], []
    for shape in SHAPES:
        for radius in RADII:
            for x in CENTRES:
                for y in CENTRES:
                    image = draw(Scene(shape, "white", "black"), (x, y), radius)[..., 0].astype(np.float32)
                    shapes.append(shape)
                    masks.append((image - image.min()) / (image.max() - image.min()))
    return tuple(shapes), np.stack(masks).reshape(len(masks), -1)


def judge(image: np.ndarray) -> Scene:
    """Return the scene that, at any place and size, has the least squared error from `image` (uint8, 64×64×3)."""
    shapes, masks = templates()
    pixels = image.reshape(-1, 3).astype(np.float32)
    pairs = [(colour, background) for colour in COLOURS for background in BACKGROUNDS]
    fronts = np.array([COLOURS[colour] for colour, _ in pairs], np.float32)
    backs = np.array([BACKGROUNDS[background] for _, background in pairs], np.float32)
    # |p − b − m (c − b)|² for every mask m and every pair of colours c, b at once.
    from_back = pixels[:, None] - backs
    contrast = fronts - backs
    errors = (from_back**2).sum((0, 2)) - 2 * masks @ (from_back * contrast).sum(2)
    errors += (masks**2).sum(1)[:, None] * (contrast**2).sum(1)
    mask, pair = np.unravel_index(errors.argmin(), errors.shape)
    return Scene(shapes[mask], *pairs[pair])


def score(images: list[np.ndarray], wanted: list[Scene]) -> dict[str, float]:
    """Return the fractions of images with the wanted shape, colour and background."""
    judged = [judge(image) for image in images]
    return {
        part: float(np.mean([getattr(j, part) == getattr(w, part) for j, w in zip(judged, wanted, strict=True)]))
        for part in ("shape", "colour", "background")
    }


@functools.cache
def _fine_masks(shape: str) -> np.ndarray:
    """Return the pixels of a shape, (n, 4096) of 0 and 1, at every half pixel of places and radii."""
    masks = []
    for radius, x, y in itertools.product(np.arange(15.0, 23.1, 0.5), (32.0, 32.5), (32.0, 32.5)):
        inside = draw(Scene(shape, "white", "black"), (x, y), radius)[..., 0] > 135
        masks += [np.roll(inside, shift, (0, 1)) for shift in itertools.product(range(-8, 8), repeat=2)]
    return np.stack(masks).reshape(len(masks), -1).astype(np.float32)


def overlap(image: np.ndarray, wanted: Scene) -> float:
    """Return the intersection over union of an image's shape with the wanted one, at the best place and radius.

    A pixel belongs to the image's shape if it is nearer the colour than the background, along the line between them.
    """
    back = np.array(BACKGROUNDS[wanted.background], np.float32)
    contrast = np.array(COLOURS[wanted.colour], np.float32) - back
    inside = ((image.reshape(-1, 3) - back) @ contrast > 0.5 * contrast @ contrast).astype(np.float32)
    masks = _fine_masks(wanted.shape)
    both = masks @ inside
    return float((both / (masks.sum(1) + inside.sum() - both)).max())
