"""Videos for training: 16 frames per second, upright, 8-bit RGB, cropped to one size. Decoded by PyAV.

ffmpeg's `fps` filter repeats and drops frames according to the file's timestamps, so that a video with a variable frame
rate keeps its speed. Frames are decoded one at a time, and only those of the clip are converted to RGB. The clip is
taken from the beginning or the middle as in diffusion-pipe (`models/base.py`, PreprocessMediaFile), but not frame by
frame: diffusion-pipe picks frames at equal distances from all frames of the file, whatever their timestamps.
"""

import contextlib
import io
import itertools
import os
from collections.abc import Generator, Iterator

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from PIL import Image, ImageOps

from anima_jax.config.sizes import Size
from anima_jax.data import memory
from anima_jax.data.images import over_white
from anima_jax.errors import UserError

FRAME_RATE = 16
"""Frames per second at which the model was trained (diffusion-pipe's models/anima.py)."""

MAX_FRAME_PIXELS = 8192 * 4608
"""Frames larger than 8K are rejected, because a decoder keeps many of them."""

MIN_EXPANSION, EXPANSION = 2**32, 10**5
"""Pixels that any file may decode to, and pixels per byte that a larger file may decode to. A recording of a still
screen has some 10,000 pixels per byte; a decompression bomb has millions."""

KEPT_FRAMES = 16
"""Frames that a decoder keeps besides those of its threads: the most that H.264 and H.265 refer to."""

MAX_FRAMES = FRAME_RATE * 6 * 3600
"""Longer videos are rejected, because broken timestamps could repeat one frame for years."""

TRANSPOSES = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}
"""(Rows and columns swapped, then columns reversed, then rows reversed) → transpose that makes the frame upright."""


def probe(data: bytes, container: str, name: str) -> Size:
    """Return the upright width and height in pixels and the number of frames at 16 per second, counted by decoding."""
    size = Size(0, 0, 0)
    with _named_errors(name):
        for frame in _frames(data, container):
            if not size.frames:
                swapped = _turn(frame)[0]
                size = Size(frame.height, frame.width, 0) if swapped else Size(frame.width, frame.height, 0)
            size = size._replace(frames=size.frames + 1)
    return size


def read_clip(data: bytes, container: str, size: Size, name: str, *, from_middle: bool = False) -> np.ndarray:
    """Return the first or the middle `size.frames` frames at 16 per second, uint8 (frames, height, width, 3).

    Raises UserError if the video cannot be read or has fewer frames.
    """
    start = 0
    if from_middle:
        start = max(0, (probe(data, container, name).frames - size.frames) // 2)
    clip = np.empty((size.frames, size.height, size.width, 3), np.uint8)
    found = 0
    # Closing gives the reserved memory back, even after an error.
    with _named_errors(name), contextlib.closing(_frames(data, container)) as frames:
        for frame in itertools.islice(frames, start, start + size.frames):
            fitted = ImageOps.fit(_upright_rgb(frame), (size.width, size.height), Image.Resampling.BICUBIC)
            clip[found] = np.asarray(fitted)
            found += 1
    if found < size.frames:
        raise UserError(f"{name}: {found} frames at {FRAME_RATE} per second, expected at least {size.frames}")
    return clip


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # ffmpeg's decoders raise many types for damaged or hostile bytes
        reason = error.strerror if isinstance(error, av.error.FFmpegError) else error
        raise UserError(f"{name}: the video cannot be read: {reason or type(error).__name__}") from None


def _frames(data: bytes, container: str) -> Generator[av.VideoFrame, None, None]:
    """Yield the frames of the video at 16 per second."""
    declared = _declared_bytes(data, container)
    if declared > len(data):
        raise ValueError(f"the file is truncated ({len(data)} of {declared} bytes)")
    with av.open(io.BytesIO(data), "r", format=container, metadata_errors="replace") as file:
        stream = _stream(file)
        pixels = stream.width * stream.height
        threads = max(1, min(os.cpu_count() or 1, 2**28 // max(1, pixels)))
        stream.codec_context.thread_count = threads
        # 1.5 bytes per pixel of a frame as most files store it, and five times RGBA for the one that is converted.
        with memory.PIXELS.reserve(pixels * (3 * (threads + KEPT_FRAMES) // 2 + 20)):
            yield from _at_frame_rate(_decoded(file, stream, max(MIN_EXPANSION, EXPANSION * len(data))))


def _stream(file: InputContainer) -> av.VideoStream:
    """Return the video stream of a file. Raises ValueError if there is none that can be decoded."""
    stream = file.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise ValueError("it has no video stream")
    if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison] - PyAV's types leave it out
        raise ValueError("its codec is unknown")
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise ValueError(f"frames of {stream.width}×{stream.height} pixels, expected at most {MAX_FRAME_PIXELS} pixels")
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    stream.thread_type = "AUTO"
    return stream


def _decoded(file: InputContainer, stream: av.VideoStream, max_pixels: int) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream. Raises ValueError once they have more than `max_pixels` pixels altogether."""
    last, pixels = -1, 0
    for packet in file.demux(stream):
        if packet.is_corrupt:
            raise ValueError("its data are damaged or cut short")
        for frame in packet.decode():
            pixels += frame.width * frame.height
            if pixels > max_pixels:
                raise ValueError(f"a decompression bomb: it has over {max_pixels:,} pixels, too many for its size")
            if frame.pts is None or file.format.name == "avi":
                # AVI stores only the decoding order, so its presentation times belong to other frames.
                frame.pts = last + 1 if frame.dts is None else frame.dts
            last = frame.pts
            yield frame


def _at_frame_rate(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    first = next(frames, None)
    if first is None:
        raise ValueError("it has no frames")
    graph = Graph()
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=first.time_base)
    graph.link_nodes(source, graph.add("fps", str(FRAME_RATE)), graph.add("buffersink")).configure()
    count = 0
    for frame in itertools.chain([first], frames, [None]):
        graph.push(frame)
        while (resampled := _pulled(graph)) is not None:
            count += 1
            if count > MAX_FRAMES:
                raise ValueError(f"longer than {MAX_FRAMES // FRAME_RATE // 3600} hours, or its timestamps are broken")
            yield resampled
    if not count:  # shorter than half of 1/16 s
        yield first


def _pulled(graph: Graph) -> av.VideoFrame | None:
    """Return the next frame that the filter graph has ready, or None if it needs more input or is finished."""
    try:
        return graph.vpull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return None


def _upright_rgb(frame: av.VideoFrame) -> Image.Image:
    if any(component.is_alpha for component in frame.format.components):
        image = over_white(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        image = frame.to_image()
    transpose = TRANSPOSES.get(_turn(frame))
    return image if transpose is None else image.transpose(transpose)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return the display matrix, x' = ax + cy and y' = bx + dy, as a key of `TRANSPOSES`; all False means upright."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(side_data, np.int32)[:5]
    swapped = abs(b) > abs(a)
    return bool(swapped), bool((c if swapped else a) < 0), bool((b if swapped else d) < 0)


def _declared_bytes(data: bytes, container: str) -> int:
    """Return the file length declared in its headers, 0 if there is none. ffmpeg itself does not report truncation."""
    if container == "avi":
        declared = int.from_bytes(data[4:8], "little")
        return 0 if declared == 2**32 - 1 else 8 + declared
    if container == "matroska":
        _, header = _ebml_number(data, 4)
        segment = header + _ebml_number(data, 4)[0]
        if data[segment : segment + 4] != b"\x18\x53\x80\x67":
            return 0
        size, begin = _ebml_number(data, segment + 4)
        unknown = size == 2 ** (7 * (begin - segment - 4)) - 1
        return 0 if unknown else begin + size
    if container == "mov":
        at = 0
        while at + 16 <= len(data):
            size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            size = int.from_bytes(data[at + 8 : at + 16], "big") if size == 1 else size
            if size < 8:  # 0 means up to the end of the file
                break
            if at + size > len(data) and kind in (b"moov", b"mdat", b"moof"):
                return at + size
            at += size
    return 0


def _ebml_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a Matroska number and the position after it; the first byte's leading zeros count the further bytes."""
    length = 9 - int.from_bytes(data[at : at + 1], "big").bit_length()
    value = int.from_bytes(data[at : at + length], "big") & (2 ** (7 * length) - 1)
    return value, at + length
