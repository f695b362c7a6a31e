"""Pictures from files or bytes, as the trainer sees them: upright, 8-bit RGB, cropped to one size.

The crop is that of diffusion-pipe (`models/base.py`, PreprocessMediaFile): transparency over white, then
`PIL.ImageOps.fit`, which crops around the centre and resizes with a bicubic filter.
"""

import io
import os

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from anima_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 2**30
"""A larger file is refused before any of it is read. (Of pixels, PIL refuses more than twice its MAX_IMAGE_PIXELS.)"""


def read_picture(source: str | os.PathLike | bytes, size_wh: tuple[int, int], *, name: str | None = None) -> np.ndarray:
    """The picture in a file (or in the bytes of one), uint8 (height, width, 3), at `size_wh` = (width, height) pixels.

    `name` stands for the picture in messages; by default it is the path. Raises UserError if the file cannot be read
    or does not hold a whole picture in one of `FORMATS`.
    """
    if isinstance(source, bytes):
        data, name = source, name or "picture"
    else:
        data, name = read_file(source), name or os.fspath(source)
    if not data:
        raise UserError(f"{name}: the file is empty, expected a picture")
    try:
        return _decode(data, size_wh)
    except Image.UnidentifiedImageError:
        found = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"
        raise UserError(f"{name}: {found} (the file begins with {data[:8]!r})") from None
    except Exception as error:  # hostile bytes reach PIL's decoders, which then fail in any way they like
        raise UserError(f"{name}: the picture cannot be read: {error or type(error).__name__}") from None


def read_file(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file. Raises UserError if it cannot be read or has more than `max_bytes`."""
    file = epath.Path(path)
    try:
        size = file.stat().length
        if size > max_bytes:
            raise UserError(f"{os.fspath(path)}: {size} bytes, expected at most {max_bytes}")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {error.strerror or error}") from None


def _decode(data: bytes, size_wh: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        upright = _upright(image)
        return np.array(ImageOps.fit(_rgb(upright), size_wh, Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera's EXIF tag says. A broken EXIF block beside sound pixels does not cost the picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey. PIL would clip it at 255 instead of scaling it.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((np.minimum(wide, 65535) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
