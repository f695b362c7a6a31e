"""Pictures in requests: bytes of strangers, decoded only after their header has been checked."""

import base64
import binascii
import contextlib
import contextvars
import io
import re
from collections.abc import Callable, Iterator

from PIL import Image, ImageOps

from anima_jax.data.images import AVIF, eight_bit
from anima_jax.errors import UserError, first_line, one_line
from anima_jax.sampling.exif import read_text
from anima_jax.sampling.images import encoded
from anima_jax.serving.http.limits import RequestLimits, TooLargeError, UnavailableError

READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", *["AVIF"] * AVIF, "TIFF")
"""PIL's names of the formats that requests may contain."""

DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=.+-]*)*?;base64,", re.IGNORECASE)

_COUNT = contextvars.ContextVar[Callable[[int], None] | None]("_COUNT", default=None)


def decode_picture(data: bytes | str, what: str, limits: RequestLimits) -> Image.Image:
    """Return the upright, 8-bit picture of a file's bytes, or of base64 text with or without `data:…;base64,`.

    Its `info` keeps the texts of the file. Raises UserError, which begins with `what`, for anything else, and for a
    picture with more than `limits.max_picture` pixels, before it is decoded. In a block of `counted`, its bytes are
    counted before that, too.
    """
    data = _from_base64(data, what) if isinstance(data, str) else data
    try:
        with Image.open(io.BytesIO(data), formats=READ) as image:
            if (pixels := image.width * image.height) > limits.max_picture:
                raise UserError(f"{what}: {pixels} pixels, expected at most {limits.max_picture}")
            if (count := _COUNT.get()) is not None:
                count(4 * pixels)
            image.load()
            texts = dict(image.info)
            upright = eight_bit(ImageOps.exif_transpose(image))
    except (UnavailableError, TooLargeError):
        raise
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(what) else f"{what}: {text}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{what}: is not a picture, expected {', '.join(READ)}") from None
    except Exception as error:  # PIL's decoders raise many types for damaged or hostile bytes
        raise UserError(f"{what}: cannot be read as a picture: {one_line(first_line(error))[:200]}") from None
    upright.info = texts | upright.info
    return upright


@contextlib.contextmanager
def counted(count: Callable[[int], None]) -> Iterator[None]:
    """Call `count` with the bytes of each picture that this thread decodes in the block, before it is decoded."""
    token = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(token)


def converted(png: bytes, kind: str, quality: int | None, *, with_text: bool = True) -> tuple[bytes, dict[str, str]]:
    """Return a PNG of the gallery as a file of another kind (PIL's name), and its texts by name.

    `quality` is that of `save_image`. Raises UserError for an image that is too large for the format.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        image.load()
        texts = read_text(image)
        if kind == "PNG" and with_text:
            return png, texts
        pixels = image.convert("RGB")
    return encoded(pixels, kind, texts if with_text else None, quality)[0], texts


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an image, without its transparency, as the bytes of a small JPEG for the page."""
    data = io.BytesIO()
    image.convert("RGB").save(data, "JPEG", quality=quality, optimize=True)
    return data.getvalue()


def png_text(image: Image.Image) -> str:
    """Return an image as the base64 text of a PNG."""
    return base64.b64encode(encoded(image, "PNG")[0]).decode()


def _from_base64(text: str, what: str) -> bytes:
    if found := DATA_URL.match(text[:200]):
        text = text[found.end() :]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{what}: is not base64 text or a data URL; addresses and paths are not opened") from None
