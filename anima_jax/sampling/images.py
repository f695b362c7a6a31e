"""Images and masks: reading and writing files, and conversion to and from the networks' arrays."""

import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.data.images import FORMATS, eight_bit, is_transparent
from anima_jax.data.media import is_video, read_file
from anima_jax.errors import UserError, first_line
from anima_jax.sampling.exif import exif_of_text, text_chunks

PIXELS_PER_LATENT = 8
"""Pixels along each side of one latent pixel: the VAE's downsampling factor."""


WRITTEN = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending of an image file to write → PIL's name of its format."""


def save_image(
    image: Image.Image, path: pathlib.Path, text: Mapping[str, str] | None = None, quality: int | None = None
) -> list[str]:
    """Write a PNG, JPEG or WebP file, as the ending of `path` says, with these texts (`sampling.image_text`).

    `quality` is that of JPEG and WebP, 1 to 100; without it a JPEG has 95 and a WebP is lossless. The file appears
    under its name only once it is complete. Returns the names of texts for which the file has no room. Raises UserError
    for another ending, for an image that is too large for the format, and if the file cannot be written.
    """
    kind = image_format(path)
    try:
        data, dropped = encoded(image, kind, text, quality)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    with writing_to(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(data)
    return dropped


def encoded(
    image: Image.Image, kind: str, text: Mapping[str, str] | None = None, quality: int | None = None
) -> tuple[bytes, list[str]]:
    """Return the bytes of an image file, and the names of texts for which it has no room.

    `kind` is PIL's name of a format in `WRITTEN`; the rest is as for `save_image`. Raises UserError for an image that
    is too large for the format.
    """
    data, dropped = io.BytesIO(), list[str]()
    options: dict[str, Any] = {"pnginfo": text_chunks(text or {})} if kind == "PNG" else {}
    if kind != "PNG":
        exif, dropped = exif_of_text(text or {})
        options = {"exif": exif, "quality": quality or 95}
        options |= {"subsampling": 0} if kind == "JPEG" else {"lossless": quality is None}
    try:
        image.save(data, format=kind, **options)
    except (OSError, ValueError) as error:
        size = f"{image.width}×{image.height} pixels"
        raise UserError(f"{size} cannot be written as {kind}: {first_line(error)}") from None
    return data.getvalue(), dropped


def check_room(paths: Sequence[pathlib.Path], sizes_wh: Iterable[tuple[int, int]]) -> None:
    """Raise UserError unless `paths`, all in one existing folder, can be written: better before the images are drawn.

    A lossless image takes at most about three bytes a pixel.
    """
    folder, needed = paths[0].absolute().parent, sum(3 * width * height + 2**12 for width, height in sizes_wh)
    with writing_to(str(paths[0])):
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"0")
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{paths[0]}: may need {needed / 1000:,.0f} kB, but only {free / 1000:,.0f} kB are free on the disk of "
            f"{folder}"
        )


def image_format(path: pathlib.Path) -> str:
    """Return the format of an image to write. Raises UserError for an ending that is not in `WRITTEN`."""
    if path.suffix.lower() not in WRITTEN:
        raise UserError(f"{path}: images are written as {', '.join(WRITTEN)}, found '{path.suffix}'")
    return WRITTEN[path.suffix.lower()]


def read_image(path: str) -> Image.Image:
    """Read an 8-bit image, rotated according to its EXIF orientation. Raises UserError if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return eight_bit(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # PIL's decoders raise many types for damaged or hostile bytes
        raise UserError(f"{path}: cannot be read as an image: {error or type(error).__name__}") from None


def name_in_text(given: Any, kind: str, digest: str) -> str:
    """Return what the text of an image calls a picture or mask: its path, or a name by `digest` if it has none.

    No file has that name, so a reader is told that there was one, and a digest tells whether another picture is it.
    """
    return os.fspath(given) if isinstance(given, str | os.PathLike) else f"{kind}-{digest[:12]}.png"


def digest_of(picture: Image.Image) -> str:
    """Return the SHA-256 of a picture's size and pixels, in hexadecimal digits."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def read_picture(path: str) -> Image.Image:
    """Read an image as `read_image` does. Raises UserError for a video or an animation, too."""
    if os.path.isfile(path) and is_video(read_file(path), path):
        raise UserError(f"{path}: is a video, expected a picture")
    return read_image(path)


def to_images(pixels: Iterable[np.ndarray]) -> list[Image.Image]:
    """Return the first frame of each (t, y, x, 3) array, clipped to [−1, 1] and rounded down as in ComfyUI."""
    return [Image.fromarray(np.clip((x[0] + 1.0) * 127.5, 0.0, 255.0).astype(np.uint8)) for x in pixels]


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return the image as (1, y, x, 3) in [−1, 1], float32. Transparency is dropped."""
    return np.asarray(image.convert("RGB"), np.float32)[None] / 127.5 - 1.0


def mask_values(mask: Image.Image) -> np.ndarray:
    """Return how strongly each pixel is redrawn, (1, y, x, 1) in [0, 1], float32.

    White pixels are redrawn, black ones kept. If the mask has transparency, the transparent part is redrawn, as with
    ComfyUI's Load Image node. An opaque alpha channel, which browsers write, says nothing.
    """
    if is_transparent(mask):
        values = 255.0 - np.asarray(mask.convert("RGBA").getchannel("A"), np.float32)
    else:
        values = np.asarray(mask.convert("L"), np.float32)
    return values[None, ..., None] / np.float32(255.0)


def paste_original(drawn: Image.Image, original: Image.Image, values_1yx1: np.ndarray, feather: int) -> Image.Image:
    """Return `drawn` with the original's own pixels where `mask_values` are 0.

    Elsewhere the two are mixed: grey of the mask is the share of `drawn`, which also rises with the distance from the
    nearest black pixel, over `feather` pixels. Transparency of the original is dropped.
    """
    share_yx = values_1yx1[0, :, :, 0]
    kept_yx = share_yx == 0.0
    if feather and kept_yx.any():
        distance_yx = np.asarray(ndimage.distance_transform_edt(~kept_yx), np.float32)
        share_yx = share_yx * np.minimum(distance_yx / np.float32(feather + 1), np.float32(1.0))
    own, new = (np.asarray(image.convert("RGB"), np.float32) for image in (original, drawn))
    mixed = share_yx[..., None] * new + (1.0 - share_yx[..., None]) * own
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def latent_mask(values_1yx1: np.ndarray) -> np.ndarray:
    """Return `mask_values` downsampled to latents, as in ComfyUI's SetLatentNoiseMask.

    Each value is the bilinear one at the latent pixel's centre: the mean of the four pixels around it.
    """
    step, middle = PIXELS_PER_LATENT, PIXELS_PER_LATENT // 2
    corners = [values_1yx1[:, y::step, x::step] for y in (middle - 1, middle) for x in (middle - 1, middle)]
    return np.stack(corners).mean(axis=0)
