"""Control pictures: what a control network is given for an image, and when in the sampling it acts.

Scaling is ComfyUI's (`AnimaLLLitePatch` in comfy/ldm/anima/lllite.py, `AnimaLLLiteApply` in
comfy_extras/nodes_model_patch.py). Axes: y rows, x columns, c channels.
"""

import dataclasses
import functools
import hashlib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from anima_jax.checkpoints.locations import MODEL_SUFFIXES, PathLike
from anima_jax.data.images import eight_bit, is_transparent, over_white
from anima_jax.data.preprocessors import Preprocessor, control_picture
from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.errors import UserError, plural, show_value
from anima_jax.models.control import ControlNetwork
from anima_jax.sampling.images import mask_values, name_in_text, read_picture, to_pixels
from anima_jax.sampling.scaling import is_number, scaled_bicubic, scaled_nearest

MASK = "mask"
"""The kind of control picture that is an ordinary picture with a mask."""

NO_KIND = "none"
"""What stands on the command line for a picture that is a control picture already."""

NUMBERS = ("strength", "start_percent", "end_percent")

LARGEST = 1e6
"""Largest strength: float32 holds what it multiplies."""

WITH_MASK = 4
"""Channels of the control pictures of an inpainting network: colours and the mask."""


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """A control network for one image: its file, or the loaded network, and the control picture.

    `strength` multiplies what the network adds; it acts in the sampling from `start_percent` to `end_percent`, 0 (first
    step) to 1. `mask`, for inpainting networks, is white where the picture is drawn anew; without one, it is what is
    transparent in the picture. Pictures are files or images.
    With a `kind`, such as "canny" or "canny:50:150" (`data.preprocessors`), `image` is an ordinary picture from which
    the control picture is made; "mask" is for inpainting networks, with `mask` or what is transparent. `title` is what
    messages call the network instead of its file.
    """

    path: PathLike | ControlNetwork
    image: PathLike | Image.Image
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: PathLike | Image.Image | None = None
    kind: str | None = None
    title: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Control":
        """Return the control of FILE=PICTURE[:STRENGTH[:START[:END]]]. Names may have "=" and ":" in them.

        FILE ends with .safetensors where that is possible. Raises UserError if there is no picture of that name, or for
        a number that cannot be read.
        """
        ends = [match.start() for match in re.finditer("=", text)]
        for is_end in (_is_network, os.path.exists, bool):
            if end := next((end for end in ends if is_end(text[:end])), None):
                path, rest = text[:end], text[end + 1 :]
                break
        else:
            raise UserError(f"--control {text}: expected FILE.safetensors=PICTURE[:STRENGTH[:START[:END]]]")
        parts = rest.split(":")
        splits = ((":".join(parts[:count]), parts[count:]) for count in range(len(parts), 0, -1))
        image, values = next((split for split in splits if os.path.isfile(split[0])), (None, parts))
        if image is None:
            raise UserError(f"--control {text}: there is no picture {re.sub(r'(:[-+.0-9e]+){1,3}$', '', rest)}")
        try:
            found = list(map(float, values))
            return cls(path, image, **dict(zip(NUMBERS[: len(found)], found, strict=True)))
        except ValueError:
            expected = "expected :STRENGTH:START:END, at most three numbers"
            raise UserError(f"--control {text}: found :{':'.join(values)}, {expected}") from None

    @property
    def name(self) -> str:
        """The network's file, or "control"."""
        return "control" if isinstance(self.path, ControlNetwork) else os.fspath(self.path)

    @property
    def shown(self) -> str:
        """What messages call the network."""
        return self.title or self.name

    @functools.cached_property
    def opened(self) -> tuple[Image.Image, Image.Image | None]:
        """The picture and the mask. Raises UserError if one cannot be read, or if their sizes differ."""
        image = _opened("control picture", self.image)
        mask = None if self.mask is None else _opened("control mask", self.mask)
        if mask is not None and mask.size != image.size:
            expected = f"expected the control picture's {image.width}×{image.height}"
            raise UserError(f"{_named(self.mask)}: the control mask is {mask.width}×{mask.height}, {expected}")
        return image, mask

    @property
    def has_transparency(self) -> bool:
        """Whether the picture can say what is drawn anew."""
        return is_transparent(self.opened[0])

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the pixels of picture and mask, in hexadecimal digits."""
        shown = [part.convert("RGBA") for part in self.opened if part is not None]
        parts = [f"{part.size}".encode() + part.tobytes() for part in shown]
        return hashlib.sha256(b" ".join(parts)).hexdigest()

    @property
    def is_named(self) -> bool:
        """Whether the network is a file, which the text of an image can name."""
        return not isinstance(self.path, ControlNetwork)

    @property
    def picture_names(self) -> tuple[str, str | None]:
        """What the text of an image calls picture and mask."""
        mask = None if self.mask is None else name_in_text(self.mask, "mask", self.digest)
        return name_in_text(self.image, "picture", self.digest), mask

    def stored(self, file_hash: str | None) -> "StoredControl":
        """Return what the text of an image says of it. `file_hash` is the network file's."""
        (image, mask), path = self.picture_names, self.name
        numbers = float(self.strength), float(self.start_percent), float(self.end_percent)
        return StoredControl(path, image, *numbers, mask, self.kind, file_hash, self.digest)

    def check(self) -> None:
        """Raise UserError for a value of another type or out of range, or a picture that cannot be used."""
        path: Any = self.path
        if not isinstance(path, ControlNetwork | str | os.PathLike):
            raise UserError(f"control {show_value(repr(path))}, expected a file or a ControlNetwork")
        for field in NUMBERS:
            value: Any = getattr(self, field)
            if not is_number(value) or not abs(value) <= LARGEST:
                found = f"{self.shown}: {field} {show_value(str(value))}"
                raise UserError(f"{found}, expected a number of at most {LARGEST:g}")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            found = f"start {self.start_percent:g}, end {self.end_percent:g}"
            raise UserError(f"{self.shown}: {found}, expected two ascending numbers from 0 to 1")
        if self.kind is not None:
            Preprocessor.parse(self.kind)
        _ = self.opened

    def levels(self, shift: float) -> tuple[np.float32, np.float32]:
        """Return the noise levels σ at and below which, and above which the network acts: end < σ ≤ start.

        Levels in float32 compare with them as in ComfyUI with its numbers in float64.
        """
        start = math.inf if self.start_percent <= 0 else percent_to_sigma(self.start_percent, shift)
        return _rounded_down(start), _rounded_down(percent_to_sigma(self.end_percent, shift))

    def picture(self, size_wh: tuple[int, int]) -> Image.Image:
        """Return the control picture for an image of this size in pixels, which need not be its own size.

        Raises UserError if it cannot be read or made.
        """
        image, mask = self.opened
        if self.kind is None or (mask is not None and self.kind == MASK):
            return image
        try:
            return control_picture(image, Preprocessor.parse(self.kind), size_wh)
        except UserError as error:
            raise UserError(f"{_named(self.image)}: {error}") from None

    def pixels(self, size_wh: tuple[int, int], channels: int) -> np.ndarray:
        """Return the control picture (y, x, c) in [−1, 1], float32, scaled to cover this size in pixels and cropped.

        A fourth channel is the mask, ±1: 1 where the picture is drawn anew. Raises UserError if the network takes a
        mask and there is none, or the other way round.
        """
        image, mask = self.opened
        if channels != WITH_MASK and (mask is not None or self.kind == MASK):
            raise UserError(f"{self.shown}: takes no mask, because it is no inpainting network; found a control mask")
        picture = self.picture(size_wh)
        colours = picture if channels == WITH_MASK else over_white(picture)  # as training reads it
        colours_yxc = (to_pixels(colours)[0] + np.float32(1.0)) / np.float32(2.0)
        pixels_yxc = np.clip(scaled_bicubic(colours_yxc, size_wh), 0.0, 1.0) * np.float32(2.0) - np.float32(1.0)
        if channels != WITH_MASK:
            return pixels_yxc
        if mask is None and not self.has_transparency:
            found = f"{_named(self.image)} has no transparent pixels and there is no mask"
            raise UserError(f"{self.shown}: is an inpainting network, which takes a mask; {found}")
        values_yx1 = scaled_nearest(mask_values(image if mask is None else mask)[0], size_wh)
        return np.concatenate([pixels_yxc, np.where(values_yx1 >= 0.5, np.float32(1.0), np.float32(-1.0))], axis=2)


def check_controls(controls: Sequence[Any]) -> None:
    """Raise UserError unless all of these are controls that can be used."""
    for control in controls:
        if not isinstance(control, Control):
            raise UserError(f"controls {show_value(repr(control))}, expected Control(network's file, picture)")
        control.check()


def with_kinds(controls: Sequence[Control], kinds: Sequence[str]) -> tuple[Control, ...]:
    """Return controls whose control pictures are made as `kinds` say: one kind for all controls, or one for each.

    Raises UserError for an unknown kind, and for another number of kinds. One of them may be `NO_KIND`.
    """
    if not kinds:
        return tuple(controls)
    if not controls:
        raise UserError(f"--control_from {kinds[0]}: there is no control network; give one with --control")
    if len(kinds) not in (1, len(controls)):
        raise UserError(f"{len(kinds)} values of --control_from for {plural(len(controls), 'control network')}")
    of_control = list(kinds) if len(kinds) == len(controls) else [kinds[0]] * len(controls)
    return tuple(
        dataclasses.replace(control, kind=None if kind == NO_KIND else str(Preprocessor.parse(kind, [NO_KIND])))
        for control, kind in zip(controls, of_control, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class StoredControl:
    """A control as the text of an image has it: names of files, hash of the network's file and digest of the pictures.

    A hash or digest is None if it is not known.
    """

    path: str
    image: str
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: str | None = None
    kind: str | None = None
    file_hash: str | None = None
    digest: str | None = None

    def control(self, path: str, image: str, mask: str | None) -> Control:
        """Return the control with the files that the names were found to be."""
        return Control(path, image, self.strength, self.start_percent, self.end_percent, mask, self.kind)


def _is_network(name: str) -> bool:
    return name.casefold().endswith(MODEL_SUFFIXES)


def _opened(what: str, given: Any) -> Image.Image:
    """Return a PIL image, or that of a file. Raises UserError for anything else."""
    if isinstance(given, Image.Image):
        try:
            return eight_bit(given)
        except UserError as error:
            raise UserError(f"{what}: {error}") from None
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{what} {show_value(repr(given))}, expected a PIL image or the path of an image")
    return read_picture(os.fspath(given))


def _named(given: Any) -> str:
    return "the image" if isinstance(given, Image.Image) else os.fspath(given)


def _rounded_down(level: float) -> np.float32:
    nearest = np.float32(level)
    # As Python's numbers: NumPy would compare in float32, in which both are equal.
    return nearest if float(nearest) <= level else np.nextafter(nearest, np.float32(-np.inf))
