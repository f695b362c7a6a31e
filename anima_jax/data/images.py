"""Images and masks for training: upright, 8-bit RGB, cropped to one size.

The crop is that of diffusion-pipe (`models/base.py`, PreprocessMediaFile): transparency is composited over white, then
`PIL.ImageOps.fit` crops around the centre and resizes with a bicubic filter. Unlike in diffusion-pipe, the EXIF
orientation is applied, 16-bit grey is scaled instead of clipped, and grey with alpha is composited over white too.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, features

from anima_jax.data import memory
from anima_jax.errors import UserError

AVIF = "AVIF" in Image.registered_extensions().values()
JPEG2000 = bool(features.check("jpg_2000"))
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", *["AVIF"] * AVIF, "TIFF", *["JPEG2000"] * JPEG2000, "TGA")
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".tga"),
    *((".avif",) if AVIF else ()),
    *((".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c") if JPEG2000 else ()),
)

BYTES_PER_PIXEL = {"JPEG2000": 28, "AVIF": 16, "WEBP": 16}
"""Peak memory of decoding and converting a format, in bytes per pixel, if it is more than `_USUAL_BYTES`."""

_USUAL_BYTES = 12
_STRIP_ROWS = 256

EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → transpose that makes the image upright."""


def set_up_pillow() -> None:
    """Silence Pillow's warnings, and let it give memory back, for the whole process.

    It warns about large images (which are read anyway), broken EXIF blocks and odd palettes, none of which needs
    action; `warnings.catch_warnings` is not thread-safe. Its blocks of 16 MiB become 64 MiB: those over 32 MiB go back
    to the system as soon as they are free, but glibc keeps smaller ones for the thread that used them.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with contextlib.suppress(AttributeError):  # documented only as the environment variable PILLOW_BLOCK_SIZE
        Image.core.set_block_size(2**26)


def is_black(data: bytes, name: str) -> bool:
    """Return whether a mask is black everywhere. Raises UserError as `read_mask` does."""
    with opened(data, name) as image:
        return _red(_upright(image, data)).getextrema() == (0, 0)


def read_image(data: bytes, size_wh: tuple[int, int], *, name: str) -> np.ndarray:
    """Return the image in `data`, an encoded file, as uint8 (height, width, 3) at `size_wh` = (width, height) pixels.

    The first frame of an animated GIF or PNG is used. Raises UserError if `data` is not a complete image in one of
    `FORMATS`.
    """
    with opened(data, name) as image:
        return np.array(ImageOps.fit(over_white(_upright(image, data)), size_wh, Image.Resampling.BICUBIC))


def crop_box(size_wh: tuple[int, int], target_wh: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return (left, top, width, height) in pixels of the part of an image of `size_wh` that `read_image` keeps.

    It is the part around the centre with the proportions of `target_wh`, as `PIL.ImageOps.fit` chooses it.
    """
    (width, height), ratio = size_wh, target_wh[0] / target_wh[1]
    kept = (width, width / ratio) if width / height <= ratio else (ratio * height, height)
    return (width - kept[0]) / 2, (height - kept[1]) / 2, float(kept[0]), float(kept[1])


def read_picture(data: bytes, name: str) -> Image.Image:
    """Return the image in `data`, an encoded file, upright and with its transparency, 8 bits per channel.

    The first frame of an animated PNG is used. Raises UserError if `data` is not a complete image in one of `FORMATS`,
    and for an animated GIF.
    """
    with opened(data, name) as image:
        if image.format == "GIF" and getattr(image, "is_animated", False):
            raise UserError("is a video, expected a picture")
        return eight_bit(_upright(image, data)).copy()


def read_mask(data: bytes, media_wh: tuple[int, int], size_wh: tuple[int, int], *, name: str) -> np.ndarray:
    """Return the red channel of a mask as loss weights, uint8 (height / 8, width / 8), where 255 is weight 1.

    `media_wh` is the upright size of the image or video that the mask belongs to, `size_wh` that of the bucket. The
    mask is cropped like the image, then every 8th pixel is taken as in torch's "nearest-exact". Alpha is ignored.
    Raises UserError if the mask cannot be read or its size is not `media_wh`.
    """
    with _opened_mask(data, media_wh, name) as mask:
        return np.array(ImageOps.fit(mask, size_wh, Image.Resampling.BICUBIC))[4::8, 4::8]


def read_inpaint_mask(data: bytes, media_wh: tuple[int, int], size_wh: tuple[int, int], *, name: str) -> np.ndarray:
    """Return where a mask's red channel is at least 128, bool (height, width), at `size_wh`.

    It is cropped like the image, and each pixel is that of the mask at its centre. Raises UserError as `read_mask`.
    """
    with _opened_mask(data, media_wh, name) as mask:
        return np.array(ImageOps.fit(mask, size_wh, Image.Resampling.NEAREST)) >= 128


@contextlib.contextmanager
def _opened_mask(data: bytes, media_wh: tuple[int, int], name: str) -> Iterator[Image.Image]:
    """Open a mask as its red channel. Raises UserError if it cannot be read or its size is not `media_wh`."""
    with opened(data, name) as image:
        mask = _upright(image, data)
        if mask.size != tuple(media_wh):
            found, expected = ("{}×{}".format(*size) for size in (mask.size, media_wh))
            raise UserError(f"{name}: the mask is {found} pixels, expected {expected} as its image")
        yield _red(mask)


def _red(mask: Image.Image) -> Image.Image:
    return eight_bit(mask).convert("RGB").getchannel("R")


def upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """Return the width and height in pixels after rotation, from the header only."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow versions differ in whether `size` is upright
        width, height = image.tag_v2[256], image.tag_v2[257]
    return (height, width) if _orientation(image, data) >= 5 else (width, height)


def over_white(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, with transparency composited over white."""
    image = eight_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    result = Image.new("RGB", image.size)
    # In strips, which take a third of the memory.
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is transparent; programs also save opaque images with an alpha channel."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8-bit grey (v / 257; PIL would clip at 255); return other images unchanged.

    Raises UserError for floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        raise UserError("the pixels are floating-point numbers, expected 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image)
    narrow, pixels = np.empty(wide.shape, np.uint8), wide.reshape(-1)
    for begin in range(0, pixels.size, _PIXELS):  # what fits a cache takes half the time
        part = np.clip(pixels[begin : begin + _PIXELS], 0, 65535).astype(np.uint32)
        narrow.reshape(-1)[begin : begin + _PIXELS] = (part + 128) // 257
    return Image.fromarray(narrow)


_PIXELS = 2**16


@contextlib.contextmanager
def opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Open an image and read its header without decoding pixels, whose memory is reserved during the block.

    PIL rejects images of more than 178,956,970 pixels as decompression bombs, before it decodes them.
    Raises UserError for any error inside the block.
    """
    if not data:
        raise UserError(f"{name}: the file is empty, expected an image or a video")
    # TGA has no mark at its beginning, so that other files may look like it.
    is_tga = name.lower().endswith(".tga") or data[-18:-2] == b"TRUEVISION-XFILE"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS if is_tga else FORMATS[:-1]) as image:
            if image.format in ("WEBP", "AVIF") and getattr(image, "is_animated", False):
                raise UserError(f"an animated {image.format}, expected a still one (or a GIF, MP4 or WebM)")
            size = image.width * image.height * BYTES_PER_PIXEL.get(image.format or "", _USUAL_BYTES)
            with memory.PIXELS.reserve(size):
                try:
                    yield image
                finally:
                    image.close()  # frees the pixels, which `Image.open` alone does not
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(name) else f"{name}: {message}") from None
    except Image.UnidentifiedImageError:
        found = f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image, nor MP4, MOV, WebM, MKV or AVI"
        raise UserError(f"{name}: {found} (the file begins with {data[:8]!r})") from None
    except Exception as error:  # PIL's decoders raise many types for damaged or hostile bytes
        raise UserError(f"{name}: the image cannot be read: {error or type(error).__name__}") from None


def _orientation(image: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 1 if the EXIF block is broken, so that the image is still used."""
    # To find a PNG's metadata, PIL decodes all pixels, because metadata may come after them.
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        orientation = image.getexif().get(0x0112)
        return orientation if orientation in EXIF_TRANSPOSES else 1
    except Exception:
        return 1


def _upright(image: Image.Image, data: bytes) -> Image.Image:
    image.load()
    orientation = _orientation(image, data)  # PIL makes a TIFF upright itself, and then deletes its orientation
    return image.transpose(EXIF_TRANSPOSES[orientation]) if orientation in EXIF_TRANSPOSES else image
