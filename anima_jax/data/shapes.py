"""A small data set of captioned drawings: "a red triangle on a blue background", 64×64.

Position and size vary but are not in the caption. One combination in six is held out of training, chosen so that every
pair of shape, colour and background still occurs: a model that draws a held-out caption must combine what it has seen
separately.
"""

import dataclasses
import itertools

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (30, 150, 50),
    "yellow": (245, 215, 40),
    "purple": (140, 30, 160),
    "orange": (245, 135, 25),
    "white": (250, 250, 250),
}
BACKGROUNDS = {"blue": (45, 85, 200), "black": (20, 20, 20), "gray": (150, 150, 150), "pink": (250, 175, 205)}

_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Scene:
    """The shape and colours that a caption describes."""

    shape: str
    colour: str
    background: str

    @property
    def caption(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"


def scenes(*, held_out: bool) -> list[Scene]:
    """Return the scenes used for training, or those held out."""
    return [
        Scene(shape, colour, background)
        for (s, shape), (c, colour), (b, background) in itertools.product(
            enumerate(SHAPES), enumerate(COLOURS), enumerate(BACKGROUNDS)
        )
        if ((s + c + b) % len(COLOURS) == 0) == held_out
    ]


def draw(scene: Scene, centre_xy: tuple[float, float] = (32.0, 32.0), radius: float = 18.0) -> np.ndarray:
    """Return the image, uint8 (64, 64, 3), antialiased. `centre_xy` and `radius` are in pixels."""
    return draw_in_colours(scene.shape, COLOURS[scene.colour], BACKGROUNDS[scene.background], centre_xy, radius)


def draw_in_colours(
    shape: str, fill: tuple[int, ...], background: tuple[int, ...], centre_xy: tuple[float, float], radius: float
) -> np.ndarray:
    """Draw a shape like `draw`, in any two colours (red, green, blue, each 0–255)."""
    scale = _SUPERSAMPLING
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), background)
    x, y, r = centre_xy[0] * scale, centre_xy[1] * scale, radius * scale
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape == "square":
        side = 0.85 * r
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill=fill)
    else:
        arm = 0.32 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def sample_placement(rng: np.random.Generator) -> tuple[tuple[float, float], float]:
    """Return a random centre, up to 6 pixels from the middle, and a radius; the shape stays inside the image."""
    radius = rng.uniform(17.0, 21.0)
    x, y = SIZE / 2 + rng.uniform(-6.0, 6.0, size=2)
    return (x, y), radius
