"""Control pictures made from ordinary pictures, without a model: canny, grey, scribble, tile, and mask for inpainting.

Kinds and defaults are those of the annotators that control networks are trained with (lllyasviel/ControlNet
`annotator`, Fannovel16/comfyui_controlnet_aux). Edges are those of OpenCV's `Canny`, pixel for pixel.
Axes: y rows, x columns, c channels red, green, blue, and for `mask` a fourth one. All pixels are uint8.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from anima_jax.checkpoints.locations import PathLike
from anima_jax.data.images import is_transparent, over_white, read_picture
from anima_jax.data.media import read_file
from anima_jax.errors import UserError, did_you_mean


def canny(pixels_yxc: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Return edges in white on black, (y, x, 3): `cv2.Canny(pixels, low, high)`.

    A pixel is an edge if its gradient |∂x| + |∂y| (Sobel, of the channel where it is largest) is above `low` and above
    both neighbours across the edge, and a chain of such pixels leads to one above `high`.
    """
    low, high = sorted((low, high))
    padded = np.pad(pixels_yxc.astype(np.int16), ((1, 1), (1, 1), (0, 0)), "edge")
    rows, columns = padded[:-2] + 2 * padded[1:-1] + padded[2:], padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx_yxc, dy_yxc = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    sizes_yxc = np.abs(dx_yxc) + np.abs(dy_yxc)
    near = np.pad(sizes_yxc.max(axis=2), 1)
    # From here on only the few pixels n that may be edges.
    y, x = np.nonzero(near[1:-1, 1:-1] > low)
    at = (y, x, sizes_yxc[y, x].argmax(axis=1))
    dx, dy, size = (each[at].astype(np.int32) for each in (dx_yxc, dy_yxc, sizes_yxc))
    # tan 22.5° in units of 2⁻¹⁵, rounded as in OpenCV.
    flat, steep = np.abs(dx) * 13573, np.abs(dy) << 15
    across = np.where(steep < flat, 0, np.where(steep > flat + (np.abs(dx) << 16), 1, np.where((dx ^ dy) < 0, 2, 3)))
    to_y, to_x = np.array([(0, 1), (1, 0), (1, -1), (1, 1)])[across].T
    before, after = near[1 + y - to_y, 1 + x - to_x], near[1 + y + to_y, 1 + x + to_x]
    is_ridge = (size > before) & np.where(across < 2, size >= after, size > after)
    ridge = np.zeros(pixels_yxc.shape[:2], bool)
    ridge[y, x] = is_ridge
    labelled: Any = ndimage.label(ridge, structure=np.ones((3, 3)))
    chains, count = labelled
    strong = np.zeros(count + 1, bool)
    strong[chains[y, x][is_ridge & (size > high)]] = True
    return _grey(strong[chains])


def grey(pixels_yxc: np.ndarray) -> np.ndarray:
    """Return the brightness of each pixel (0.299 red + 0.587 green + 0.114 blue) in all channels, (y, x, 3)."""
    return np.array(Image.fromarray(pixels_yxc).convert("L").convert("RGB"))


def scribble(pixels_yxc: np.ndarray, threshold: int = 32) -> np.ndarray:
    """Return dark lines and borders in white on black, (y, x, 3): Scribble XDoG.

    White is where each channel is darker than its surroundings, by more than half the `threshold`: the difference of
    Gaussians of 0.5 and 5 pixels. Drawings in black on white become white on black.
    """
    pixels = pixels_yxc.astype(np.float32)
    fine, coarse = (ndimage.gaussian_filter(pixels, (width, width, 0), mode="mirror") for width in (0.5, 5.0))
    return _grey(2.0 * (coarse - fine).min(axis=2) > threshold)


def tile(pixels_yxc: np.ndarray, factor: int = 8) -> np.ndarray:
    """Return the picture as it would be at 1/`factor` of its size, scaled up smoothly, (y, x, 3).

    `factor` is a power of 2. The mean of each square of `factor` pixels is scaled up as by OpenCV's `pyrUp`. A picture
    whose sides are no multiples of `factor` continues its last row and column.
    """
    height, width = pixels_yxc.shape[:2]
    padded = np.pad(pixels_yxc, ((0, -height % factor), (0, -width % factor), (0, 0)), "edge")
    squares = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
    small = np.rint(squares.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
    while small.shape[0] < padded.shape[0]:
        small = (_doubled(_doubled(small.astype(np.int32)).swapaxes(0, 1)).swapaxes(0, 1) + 32 >> 6).astype(np.uint8)
    return small[:height, :width]


def _doubled(values: np.ndarray) -> np.ndarray:
    """Return 8 times the values at twice the length of axis 0, smoothed by the quadratic kernel (1, 4, 6, 4, 1)."""
    before = np.concatenate([values[1:2] if len(values) > 1 else values, values[:-1]])
    after = np.concatenate([values[1:], values[-1:]])
    return np.stack([before + 6 * values + after, 4 * (values + after)], axis=1).reshape(-1, *values.shape[1:])


def mask(pixels_yxc: np.ndarray) -> np.ndarray:
    """Return the picture with an inpainting mask as its fourth channel, (y, x, 4): 255 where it is to be drawn anew.

    `pixels_yxc` is red, green, blue and opacity; what is less than half opaque is drawn anew.
    """
    return np.dstack([pixels_yxc[..., :3], np.where(pixels_yxc[..., 3] < 128, 255, 0).astype(np.uint8)])


def _grey(lines_yx: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(lines_yx, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


@dataclasses.dataclass(frozen=True)
class WholeNumber:
    """A whole number that a kind of control picture depends on, and its range."""

    default: int
    least: int
    most: int
    is_power_of_2: bool = False

    def parse(self, name: str, text: str) -> int:
        """Return the number in a text. Raises UserError, which `name` begins, if it is none or out of range."""
        value = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else -1
        if not self.least <= value <= self.most or (self.is_power_of_2 and value & (value - 1)):
            kind = "a power of 2" if self.is_power_of_2 else "a whole number"
            raise UserError(f"{name}: found '{text}', expected {kind} from {self.least} to {self.most}")
        return value


MOST_GRADIENT = 8 * 255
KINDS: dict[str, tuple[Callable[..., np.ndarray], Mapping[str, WholeNumber]]] = {
    "canny": (canny, {"low": WholeNumber(100, 0, MOST_GRADIENT), "high": WholeNumber(200, 0, MOST_GRADIENT)}),
    "grey": (grey, {}),
    "scribble": (scribble, {"threshold": WholeNumber(32, 1, 2 * 255)}),
    "tile": (tile, {"factor": WholeNumber(8, 2, 64, is_power_of_2=True)}),
    "mask": (mask, {}),
}
"""Kind → what makes it of pixels, and that function's options."""

RESOLUTION = WholeNumber(0, 16, 8192)
"""Option of every kind but `mask`: the shorter side in pixels to which a picture is scaled first."""


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """A kind of control picture with all its options."""

    kind: str
    options: Mapping[str, int]
    resolution: int = 0

    @classmethod
    def parse(cls, text: str, others: Sequence[str] = ()) -> "Preprocessor":
        """Return what a text such as `canny`, `canny:50:150` or `tile:factor=4:resolution=512` says.

        Options follow the kind, by name or in order. Raises UserError for an unknown kind or option, or a bad value;
        `others` are what the caller takes besides kinds.
        """
        kind, *parts = str(text).split(":")
        if kind in others:
            raise UserError(f"{text}: {kind} has no options")
        if kind not in KINDS:
            names = (*KINDS, *others)
            raise UserError(f"'{kind}'{did_you_mean(kind, names)} is no control picture, expected {', '.join(names)}")
        known = {**KINDS[kind][1]} | ({} if kind == "mask" else {"resolution": RESOLUTION})
        values = {name: option.default for name, option in known.items()}
        for place, part in enumerate(parts):
            name, equals, value = part.rpartition("=")
            if not equals and place < len(KINDS[kind][1]):
                name = list(known)[place]
            if name not in known:
                options = f"its options are {', '.join(known)}" if known else "it has no options"
                raise UserError(f"{text}: '{part}'{did_you_mean(name, known)} is no option of {kind}: {options}")
            values[name] = known[name].parse(f"{text}: {name}", value)
        resolution = values.pop("resolution", 0)
        return cls(kind, values, resolution)

    def __str__(self) -> str:
        """Return the shortest text that `parse` reads as this."""
        own = {name: value for name, value in self.options.items() if value != KINDS[self.kind][1][name].default}
        own |= {"resolution": self.resolution} if self.resolution else {}
        return ":".join([self.kind, *(f"{name}={value}" for name, value in own.items())])

    def __call__(self, picture: Image.Image, size_wh: tuple[int, int] | None = None) -> np.ndarray:
        """Return the control picture of `picture`, uint8 (y, x, 3), or (y, x, 4) with the mask of `mask`.

        Transparent pixels are white, except for `mask`, which is about them. With a `resolution` the picture is scaled
        to it first; else with `size_wh`, the size of a drawing in pixels, to cover the drawing, and cropped around the
        centre; else not at all. So edges are one pixel wide in the picture in which they are found. `mask` does not
        scale. Raises UserError for `mask` if nothing of the picture is transparent.
        """
        if self.kind == "mask":
            if not is_transparent(picture):
                raise UserError("has no transparency, which says for `mask` what is to be drawn anew")
            return mask(np.asarray(picture.convert("RGBA")))
        picture = over_white(picture)
        if self.resolution:
            scale = self.resolution / min(picture.size)
            size = [max(1, round(side * scale)) for side in picture.size]
            if size[0] * size[1] > 16 * self.resolution**2:
                raise UserError(f"would be {size[0]}×{size[1]} pixels at resolution={self.resolution}, too long")
            picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        elif size_wh:
            picture = ImageOps.fit(picture, size_wh, Image.Resampling.BICUBIC)
        return KINDS[self.kind][0](np.asarray(picture), **self.options)


def control_picture(
    picture: PathLike | Image.Image | np.ndarray, kind: str | Preprocessor, size_wh: tuple[int, int] | None = None
) -> Image.Image:
    """Return a control picture of `picture`: a file, an image, or uint8 pixels (y, x), (y, x, 3) or (y, x, 4).

    `kind` is canny, grey, scribble, tile or mask, with options as for `--control_from`, as in "canny:50:150". With
    `size_wh`, the size of the drawing, the picture is first scaled and cropped to it. The result is RGB, or for `mask`
    RGBA: transparent where it is to be drawn anew. Raises UserError for a kind, an option or a picture that cannot be
    used.
    """
    kind = kind if isinstance(kind, Preprocessor) else Preprocessor.parse(kind)
    if isinstance(picture, str | os.PathLike):
        image = read_picture(read_file(picture), os.fspath(picture))
    elif isinstance(picture, Image.Image):
        image = picture
    else:
        array = np.asarray(picture)
        shape = array.shape
        if array.dtype != np.uint8 or shape[2:] not in ((), (3,), (4,)) or 0 in shape or len(shape) < 2:
            raise UserError(f"{array.dtype} pixels of shape {shape}, expected uint8 (y, x), (y, x, 3) or (y, x, 4)")
        image = Image.fromarray(array)
    made = kind(image, size_wh)
    if made.shape[2] == 4:
        made = np.dstack([made[..., :3], 255 - made[..., 3]])
    return Image.fromarray(made)
