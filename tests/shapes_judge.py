"""Which scene an image of the quick start's language shows: the nearest rendered template."""

import functools

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
