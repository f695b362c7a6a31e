"""Pictures, videos and masks as the trainer sees them: upright, 8-bit RGB, cropped to one size.

The crop is that of diffusion-pipe (`models/base.py`, PreprocessMediaFile): transparency over white, then
`PIL.ImageOps.fit`, which crops around the centre and resizes with a bicubic filter. Unlike there, a photograph is
turned as its camera says, 16-bit grey is scaled instead of clipped, and grey with alpha is laid over white too.
What a file is, its first bytes tell, not its name.
"""

import contextlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from anima_jax.checkpoints.locations import is_remote
from anima_jax.data.buckets import Size
from anima_jax.errors import UserError, os_reason

AVIF = "AVIF" in Image.registered_extensions().values()
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", *(["AVIF"] if AVIF else []))
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", *([".avif"] if AVIF else []))
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")

ClipMode = Literal["single_beginning", "single_middle"]

Stamp = tuple[int, int]
"""Size in bytes and time of the last change in ns: a file whose stamp is the same is taken to be unchanged."""

MAX_BYTES = 2**30
"""A larger file is refused before any of it is read."""

MAX_PIXELS = 2 * 89_478_485
"""A larger picture or frame is refused before it is decoded: where PIL too sees a decompression bomb."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation → what makes the picture upright."""

STILL_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"hevx", b"heif")
"""Pictures in the container of MP4: AVIF, and HEIC, which is not read."""

# PIL warns of large pictures (which are read), of broken EXIF blocks and of odd palettes; none of it is of use here.
# For the whole process, since `warnings.catch_warnings` around each call is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def probe(data: bytes, name: str) -> Size:
    """Upright width and height in pixels, and the number of frames: 1 for a picture, those at 16 a second for a video.

    Of a picture only the header is read, a video is decoded once. `name` stands for the file in messages. Raises
    UserError for what `read_clip` could not read, except damage behind a picture's header.
    """
    if container := _video_container(data, name):
        from anima_jax.data import video

        return video.probe(data, container, name)
    with _opened(data, name) as image:
        width, height = image.size
        return Size(height, width, 1) if _orientation(image, data) >= 5 else Size(width, height, 1)


def read_clip(data: bytes, size: Size, *, mode: ClipMode = "single_beginning", name: str) -> np.ndarray:
    """`size.frames` frames of a picture or video, uint8 (frames, height, width, 3).

    Of a video the first ones, or with `mode` "single_middle" those around its middle, at 16 a second. Raises UserError
    if the file cannot be read or has fewer frames.
    """
    if container := _video_container(data, name):
        from anima_jax.data import video

        return video.read_clip(data, container, size, mode, name)
    if size.frames != 1:
        raise UserError(f"{name}: a picture is 1 frame, expected {size.frames}")
    return read_picture(data, (size.width, size.height), name=name)[None]


def read_picture(data: bytes, size_wh: tuple[int, int], *, name: str) -> np.ndarray:
    """The picture in the bytes of a file, uint8 (height, width, 3), at `size_wh` = (width, height) pixels.

    Of an animated GIF or PNG its first frame. Raises UserError if there is no whole picture in one of `FORMATS`.
    """
    with _opened(data, name) as image:
        return np.array(ImageOps.fit(over_white(_upright(image, data)), size_wh, Image.Resampling.BICUBIC))


def read_mask(data: bytes, media_wh: tuple[int, int], size_wh: tuple[int, int], *, name: str) -> np.ndarray:
    """The loss weights in a mask, uint8 (height / 8, width / 8), 255 for weight 1: its red channel at latent size.

    `media_wh` is the upright size of the picture or video it belongs to, `size_wh` that of the bucket: it is cropped
    alike, then of each 8×8 pixels one is taken, as torch's "nearest-exact" does. Its alpha counts for nothing. Raises
    UserError if it cannot be read or is not of `media_wh`.
    """
    with _opened(data, name) as image:
        mask = _upright(image, data)
        if mask.size != tuple(media_wh):
            found, expected = ("{}×{}".format(*size) for size in (mask.size, media_wh))
            raise UserError(f"{name}: the mask is {found} pixels, expected {expected} as its picture")
        red = eight_bit(mask).convert("RGB").getchannel("R")
        return np.array(ImageOps.fit(red, size_wh, Image.Resampling.BICUBIC))[4::8, 4::8]


def label_of(name: str) -> str:
    """A name to go into names of new files, from that of a file: without folders, suffix and what file systems refuse.

    At most 150 bytes in UTF-8, so that there is room for an ending.
    """
    stem = os.path.splitext(name.rpartition("/")[2])[0].encode("utf-8", "replace")[:150].decode("utf-8", "ignore")
    return re.sub(r'[\x00-\x1f\x7f<>:"\\|?*]', "_", stem) or "_"


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """The stamp of a file. Raises UserError if there is none."""
    try:
        if is_remote(path):
            remote = epath.Path(path).stat()
            return remote.length, int(remote.mtime * 10**9)
        local = os.stat(path)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {os_reason(error)}") from None
    if not stat.S_ISREG(local.st_mode):
        # Who opens a pipe waits for ever.
        raise UserError(f"{os.fspath(path)}: cannot be read: a folder, pipe or device, expected a file")
    return local.st_size, local.st_mtime_ns


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file. Raises UserError if it cannot be read or has more than `max_bytes`."""
    size, _ = stamp_of(path)
    if size > max_bytes:
        raise UserError(f"{os.fspath(path)}: {size} bytes, expected at most {max_bytes}")
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {os_reason(error)}") from None


def over_white(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB, what is transparent over white."""
    image = eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The picture with its header read and no pixel decoded; whatever fails inside the block becomes a UserError."""
    if not data:
        raise UserError(f"{name}: the file is empty, expected a picture or a video")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.format in ("WEBP", "AVIF") and getattr(image, "is_animated", False):
                raise UserError(f"{name}: an animated {image.format}, expected a still one (or a GIF, MP4 or WebM)")
            yield image
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        found = f"not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, nor MP4, MOV, WebM, MKV or AVI"
        raise UserError(f"{name}: {found} (the file begins with {data[:8]!r})") from None
    except Exception as error:  # hostile bytes reach PIL's decoders, which then fail in any way they like
        raise UserError(f"{name}: the picture cannot be read: {error or type(error).__name__}") from None


def _video_container(data: bytes, name: str) -> str | None:
    """ffmpeg's name of the container, None for what is no video: pictures, GIFs of one frame among them, and all else.

    ffmpeg itself is not asked: among what it recognises are playlists that open other files.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") and data[8:12] not in STILL_BRANDS:
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"GIF8":
        with _opened(data, name) as image:
            return "gif" if getattr(image, "is_animated", False) else None
    return None


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's orientation, 1 (upright) to 8. A broken EXIF block beside sound pixels does not cost the picture."""
    # In search of a PNG's metadata PIL decodes all its pixels, since they may stand behind them.
    if image.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        orientation = image.getexif().get(0x0112)
        return orientation if orientation in TURNS else 1
    except Exception:
        return 1


def _upright(image: Image.Image, data: bytes) -> Image.Image:
    image.load()
    orientation = _orientation(image, data)
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, v/257. PIL would clip it at 255 instead of scaling it."""
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((np.minimum(wide, 65535) + 128) // 257).astype(np.uint8))
