"""Image and video files: where they are, their type and size, and the pixels of a clip.

The type is detected from the first bytes, not from the file name. PyAV is imported only when a video is read.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
from etils import epath

from anima_jax.checkpoints.locations import is_remote
from anima_jax.config.sizes import Size
from anima_jax.data import memory
from anima_jax.data.images import opened, read_image, upright_size
from anima_jax.errors import UserError, os_reason

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif")

ClipMode = Literal["single_beginning", "single_middle"]

Stamp = tuple[int, int]
"""Size in bytes and modification time in ns. A file with the same stamp counts as unchanged."""

MAX_BYTES = 2**30
"""Larger files are rejected before they are read."""

STILL_BRANDS = (b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"hevc", b"hevx", b"heif")
"""Still images in MP4's container: AVIF, and HEIC, which is not supported."""


class Media(Protocol):
    """An encoded image or video that can be read."""

    @property
    def name(self) -> str:
        """Name in messages and in the file index."""
        ...

    @property
    def label(self) -> str:
        """File name stem for files derived from this media. Several media may have the same label."""
        ...

    def read(self) -> bytes:
        """Return the encoded bytes. Raises UserError if they cannot be read."""
        ...

    def stamp(self) -> Stamp | None:
        """Return the stamp, or None if only reading can show whether the content changed."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FileMedia:
    """A file in a folder."""

    folder: str
    file: str

    @property
    def name(self) -> str:
        return os.path.join(self.folder, self.file)

    @property
    def label(self) -> str:
        return label_of(self.file)

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        return read_file(self.name, max_bytes)

    def stamp(self) -> Stamp:
        return stamp_of(self.name)


@contextlib.contextmanager
def reading(media: Media, stamp: Stamp | None) -> Iterator[bytes]:
    """Read a file, with memory reserved for it (its size is in `stamp`). Raises UserError if it cannot be read."""
    with memory.FILES.reserve(stamp[0] if stamp else 0):
        yield media.read()


def probe(data: bytes, name: str) -> Size:
    """Return the upright width and height in pixels and the number of frames.

    An image is 1 frame; frames of a video are counted at 16 per second. Only the header of an image is read; a video is
    decoded once. `name` is the file name in messages. Raises UserError if `read_clip` could not read the file, except
    for damage after the header of an image.
    """
    if container := _video_container(data, name):
        from anima_jax.data import video

        return video.probe(data, container, name)
    with opened(data, name) as image:
        return Size(*upright_size(image, data), 1)


def read_clip(data: bytes, size: Size, *, mode: ClipMode = "single_beginning", name: str) -> np.ndarray:
    """Return `size.frames` frames of an image or video, uint8 (frames, height, width, 3).

    For a video they are the first frames at 16 per second, or the middle ones with `mode` "single_middle". Raises
    UserError if the file cannot be read or has fewer frames.
    """
    if container := _video_container(data, name):
        from anima_jax.data import video

        return video.read_clip(data, container, size, name, from_middle=mode == "single_middle")
    if size.frames != 1:
        raise UserError(f"{name}: an image is 1 frame, expected {size.frames}")
    return read_image(data, (size.width, size.height), name=name)[None]


def content_digest(data: bytes) -> bytes:
    """Return the SHA-256 of a media file's bytes."""
    return hashlib.sha256(data).digest()


def label_of(name: str) -> str:
    """Return a file name without folders and suffix; "_" replaces characters that file systems reject.

    The label has at most 150 bytes in UTF-8, which leaves room for a suffix.
    """
    stem = os.path.splitext(name.rpartition("/")[2])[0].encode("utf-8", "replace")[:150].decode("utf-8", "ignore")
    return re.sub(r'[\x00-\x1f\x7f<>:"\\|?*]', "_", stem) or "_"


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """Return the stamp of a file. Raises UserError if there is no such file."""
    try:
        if is_remote(path):
            remote = epath.Path(path).stat()
            return remote.length, int(remote.mtime * 10**9)
        local = os.stat(path)
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {os_reason(error)}") from None
    if not stat.S_ISREG(local.st_mode):  # opening a pipe would wait forever
        raise UserError(f"{os.fspath(path)}: cannot be read: a folder, pipe or device, expected a file")
    return local.st_size, local.st_mtime_ns


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a file. Raises UserError if it cannot be read or has more than `max_bytes`."""
    size, _ = stamp_of(path)
    if size > max_bytes:
        raise UserError(f"{os.fspath(path)}: {size} bytes, expected at most {max_bytes}")
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read: {os_reason(error)}") from None


def is_video(data: bytes, name: str) -> bool:
    """Return whether this is a video or an animated GIF, as far as its first bytes say."""
    return _video_container(data, name) is not None


def _video_container(data: bytes, name: str) -> str | None:
    """Return ffmpeg's name of the video container; None for images (including GIFs of one frame) and anything else.

    ffmpeg's own detection is not used, because the formats that it recognises include playlists that open other files.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") and data[8:12] not in STILL_BRANDS:
        return "mov"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"GIF8":
        with opened(data, name) as image:
            return "gif" if getattr(image, "is_animated", False) else None
    return None
