"""Videos as the trainer sees them. Every frame's grey tells its number, so that what a clip shows can be worked out by
hand: at 16 a second frame i (shown from t_i on) is to be seen in the sixteenths n with round(16·t_i) <= n."""

import contextlib
import io
import math
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from anima_jax.config.sizes import Size
from anima_jax.data import video
from anima_jax.data.media import VIDEO_SUFFIXES, probe, read_clip
from anima_jax.errors import UserError

KINDS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "mov": ("mov", "mpeg4", "yuv420p"),
    "webm VP8": ("webm", "libvpx", "yuv420p"),
    "webm VP9": ("webm", "libvpx-vp9", "yuv420p"),
    "mkv": ("matroska", "libx264", "yuv420p"),
    "avi": ("avi", "mpeg4", "yuv420p"),
    "avi, frames out of order": ("avi", "libx264", "yuv420p"),
    "10 bits": ("matroska", "ffv1", "yuv420p10le"),
    "gif": ("gif", "gif", "gray"),
    "avi, lossless": ("avi", "ffv1", "yuv420p"),
}
STEP = 8
"""Grey levels from a frame to the next: more than any codec here loses."""


def frame_of(pixels: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pix_fmt)


def numbered(count: int, size_wh=(64, 48)) -> list[np.ndarray]:
    return [np.full((size_wh[1], size_wh[0], 3), STEP * number, np.uint8) for number in range(count)]


def written(
    frames: list[np.ndarray], kind: str = "mp4", *, rate: int = 16, milliseconds=None, options=None, sound=False
) -> bytes:
    """A video file. With `milliseconds` each frame is shown from that time on, else `rate` frames a second."""
    container, codec, pix_fmt = KINDS[kind]
    stream = io.BytesIO()
    with av.open(stream, "w", format=container, options=options or {}) as file:
        pictures = file.add_stream(codec, rate=rate)
        pictures.height, pictures.width = frames[0].shape[:2]
        pictures.pix_fmt, pictures.bit_rate = pix_fmt, 8_000_000
        if milliseconds:
            pictures.codec_context.time_base = Fraction(1, 1000)
        if sound:
            file.add_stream("aac", rate=48000, layout="mono")
        for number, pixels in enumerate(frames):
            frame = frame_of(pixels, pix_fmt)
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
        if sound:
            write_silence(file, seconds=2)
    return stream.getvalue()


def write_silence(file, seconds: int) -> None:
    track = file.streams.audio[0]
    for start in range(0, 48000 * seconds, 1024):
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts, silence.time_base = 48000, start, Fraction(1, 48000)
        file.mux(track.encode(silence))
    file.mux(track.encode(None))


def numbers_in(clip: np.ndarray) -> list[int]:
    """Which of the written frames each frame of a clip is."""
    greys = clip.astype(float).mean((1, 2, 3))
    assert np.abs(greys / STEP - np.round(greys / STEP)).max() < 0.35  # a codec's loss, below half a step
    return np.round(greys / STEP).astype(int).tolist()


def shown_at_16(seconds: list[float], end: float) -> list[int]:
    """For every n/16 from the first frame to the end: the last frame whose time, in whole sixteenths, is not later."""
    sixteenths = [math.floor(16 * time + 0.5) for time in seconds]
    first, last = sixteenths[0], math.floor(16 * end + 0.5)
    return [max(i for i, sixteenth in enumerate(sixteenths) if sixteenth <= n) for n in range(first, last)]


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_frames_a_second_become_sixteen(kind):
    expected = shown_at_16([number / 30 for number in range(30)], 1.0)
    if kind == "gif":  # its times are hundredths of a second
        expected = shown_at_16([int(100 * number / 30 + 0.5) / 100 for number in range(30)], 1.0)
    if kind == "avi, frames out of order":  # it begins when the decoder has its two reference frames
        expected = shown_at_16([number / 30 for number in range(2, 32)], 32 / 30)
    assert expected[:5] == [0, 2, 4, 6, 8] or kind in ("gif", "avi, frames out of order")
    stored = written(numbered(30), kind, rate=30)
    assert probe(stored, "clip") == Size(64, 48, 16)
    assert numbers_in(read_clip(stored, Size(64, 48, 16), name="clip")) == expected


def test_a_slow_video_repeats_its_frames():
    stored = written(numbered(5), rate=4)
    assert numbers_in(read_clip(stored, Size(64, 48, 20), name="c")) == [
        number for number in range(5) for _ in range(4)
    ]


def test_a_video_shorter_than_a_sixteenth_of_a_second_is_one_frame():
    stored = written(numbered(2)[1:], rate=60)
    assert probe(stored, "c") == Size(64, 48, 1)
    assert numbers_in(read_clip(stored, Size(64, 48, 1), mode="single_middle", name="c")) == [1]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm VP9"])
def test_a_variable_frame_rate_keeps_its_speed(kind):
    times = [0, 40, 500, 530, 560, 1200, 1210, 2000]
    stored = written(numbered(8), kind, milliseconds=times)
    expected = shown_at_16([time / 1000 for time in times], 2.0)
    assert expected[-1] == 6
    clip = read_clip(stored, Size(64, 48, 32), name="c")
    assert numbers_in(clip) == expected
    assert (
        32 <= probe(stored, "c").frames <= 46
    )  # the last frame lasts as long as the container says: not at all to 0.8 s


def test_a_clip_is_the_first_frames_or_those_around_the_middle():
    stored = written(numbered(30), "mkv")
    assert probe(stored, "c").frames == 30
    assert numbers_in(read_clip(stored, Size(64, 48, 9), name="c")) == list(range(9))
    middle = read_clip(stored, Size(64, 48, 9), mode="single_middle", name="c")
    assert numbers_in(middle) == list(range(10, 19))  # int((30 − 9) / 2) = 10
    for mode in ("single_beginning", "single_middle"):
        assert numbers_in(read_clip(stored, Size(64, 48, 30), mode=mode, name="c")) == list(range(30))


@pytest.mark.parametrize("mode", ["single_beginning", "single_middle"])
def test_a_video_shorter_than_its_bucket_is_refused_with_both_numbers(mode):
    with pytest.raises(UserError, match=r"clip\.mp4: 20 frames at 16 per second, expected at least 33"):
        read_clip(written(numbered(20)), Size(64, 48, 33), mode=mode, name="clip.mp4")


def test_a_frame_is_cropped_around_its_centre():
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, 24:72] = 200  # the middle square, which is what is left at 48×48
    clip = read_clip(written([pixels] * 4), Size(48, 48, 2), name="c")
    assert np.abs(clip.astype(int) - 200).max() <= 8  # x264's loss at an edge


def test_odd_sizes():
    stored = written(numbered(4, (33, 21)), "webm VP8")
    assert probe(stored, "c") == Size(33, 21, 4)
    assert numbers_in(read_clip(stored, Size(32, 16, 4), name="c")) == [0, 1, 2, 3]


def test_a_file_without_a_duration_is_counted():
    stored = written(numbered(20), "webm VP8", options={"live": "1"})
    with av.open(io.BytesIO(stored)) as file:
        assert file.duration is None
    assert probe(stored, "c").frames == 20


def test_a_sound_track_changes_nothing():
    frames = numbered(8)
    with_sound = written(frames, sound=True)
    assert probe(with_sound, "c") == Size(64, 48, 8)
    np.testing.assert_array_equal(
        read_clip(with_sound, Size(64, 48, 8), name="c"), read_clip(written(frames), Size(64, 48, 8), name="c")
    )


def coloured(colourspace: int, colour_range: int, yuv: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as file:
        pictures = file.add_stream("ffv1", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 16, "yuv444p"
        pictures.codec_context.colorspace, pictures.codec_context.color_range = colourspace, colour_range
        frame = av.VideoFrame.from_ndarray(np.stack([np.full((16, 32), v, np.uint8) for v in yuv]), "yuv444p")
        frame.colorspace, frame.color_range = colourspace, colour_range
        file.mux(pictures.encode(frame))
        file.mux(pictures.encode(None))
    return stream.getvalue()


@pytest.mark.parametrize(("colourspace", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (2, 0.299, 0.114)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_the_matrix_and_range_that_the_file_names(colourspace, red, blue, full_range):
    """ITU-R BT.709 (1), BT.601 (6), and 601 where nothing is named (2), by the recommendations' own formulas."""
    y, u, v = 120, 90, 170
    luma = y / 255 if full_range else (y - 16) / 219
    cb, cr = ((u - 128) / 255, (v - 128) / 255) if full_range else ((u - 128) / 224, (v - 128) / 224)
    r, b = luma + 2 * (1 - red) * cr, luma + 2 * (1 - blue) * cb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    clip = read_clip(coloured(colourspace, 2 if full_range else 1, (y, u, v)), Size(32, 16, 1), name="c")
    assert np.abs(clip.astype(float) - 255 * np.array([r, g, b])).max() <= 2  # ffmpeg's integer arithmetic


def test_transparency_is_composited_over_white():
    stream = io.BytesIO()
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[:, :16] = [0, 0, 0, 51]
    pixels[:, 16:] = [255, 0, 0, 255]
    with av.open(stream, "w", format="matroska") as file:
        pictures = file.add_stream("ffv1", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 16, "bgra"
        file.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, "rgba").reformat(format="bgra")))
        file.mux(pictures.encode(None))
    clip = read_clip(stream.getvalue(), Size(32, 16, 1), name="c")
    np.testing.assert_array_equal(clip[0, 0, [0, -1]], [[204, 204, 204], [255, 0, 0]])


def test_a_gif_of_several_frames_is_a_video():
    frames = [Image.new("L", (16, 16), STEP * number) for number in range(4)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0)
    assert probe(stream.getvalue(), "c") == Size(16, 16, 16)  # played once, whatever its loop says
    clip = read_clip(stream.getvalue(), Size(16, 16, 16), name="c")
    assert numbers_in(clip) == [number for number in range(4) for _ in range(4)]


CORNERS = np.zeros((32, 64, 3), np.uint8)
CORNERS[:16, :32], CORNERS[:16, 32:], CORNERS[16:, :32] = 240, 160, 80


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [
        pytest.param((0, 1, -1, 0), np.rot90(CORNERS, -1), id="a quarter clockwise"),
        pytest.param((-1, 0, 0, -1), np.rot90(CORNERS, 2), id="upside down"),
        pytest.param((0, -1, 1, 0), np.rot90(CORNERS, 1), id="a quarter anticlockwise"),
        pytest.param((-1, 0, 0, 1), np.fliplr(CORNERS), id="mirrored"),
        pytest.param((1, 0, 0, -1), np.flipud(CORNERS), id="flipped"),
        pytest.param((0, 1, 1, 0), CORNERS.swapaxes(0, 1), id="transposed"),
        pytest.param((0, -1, -1, 0), np.rot90(CORNERS, 2).swapaxes(0, 1), id="transposed upside down"),
        pytest.param((1, 0, 0, 1), CORNERS, id="as it is"),
    ],
)
def test_a_video_is_rotated_by_its_display_matrix(matrix, seen):
    """The track header's matrix (ISO 14496-12, 16.16 numbers): a point (x, y) is shown at (ax + cy, bx + dy)."""
    stored = bytearray(written([CORNERS] * 4))
    at = stored.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and numbers, layer and volume
    assert struct.unpack(">4i", stored[at : at + 8] + stored[at + 12 : at + 20]) == (65536, 0, 0, 65536)
    a, b, c, d = (65536 * number for number in matrix)
    stored[at : at + 20] = struct.pack(">5i", a, b, 0, c, d)
    height, width = seen.shape[:2]
    assert probe(bytes(stored), "c") == Size(width, height, 4)
    clip = read_clip(bytes(stored), Size(width, height, 1), name="c")
    for y, x in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        assert np.abs(clip[0, y, x].astype(int) - seen[y, x]).max() <= 5  # x264's loss


def only_sound() -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        file.add_stream("aac", rate=48000, layout="mono")
        write_silence(file, seconds=1)
    return stream.getvalue()


def test_a_file_without_a_video_stream_is_refused():
    with pytest.raises(UserError, match=r"song\.mp4: the video cannot be read: it has no video stream"):
        probe(only_sound(), "song.mp4")


def test_frames_of_absurd_size_are_refused_by_the_header():
    stored = bytearray(written(numbered(2), "avi, lossless"))  # a codec that trusts the container for it
    at = stored.index(b"strf") + 8 + 4
    assert struct.unpack("<2i", stored[at : at + 8]) == (64, 48)
    stored[at : at + 8] = struct.pack("<2i", 14000, 14000)
    with pytest.raises(UserError, match=r"big\.avi: .*14000×14000 pixels, expected at most 37748736 pixels"):
        probe(bytes(stored), "big.avi")


def hostile_gif(side: int, frames: int) -> bytes:
    """A GIF of `frames` frames of side² pixels, of which each is stored in 23 bytes, as a change of one pixel."""
    change = b"\x21\xf9\x04\x00\x05\x00\x00\x00" + b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0)
    change += b"\x02\x02\x44\x01\x00"
    head = b"GIF89a" + struct.pack("<2H", side, side) + b"\xf0\x00\x00" + bytes(3) + b"\xff" * 3
    return head + change * frames + b";"


def test_a_few_bytes_that_are_many_frames_are_refused_in_bounded_time(monkeypatch):
    with pytest.raises(UserError, match=r"x\.gif: .* frames of 13000×13000 pixels, expected at most 37748736"):
        probe(hostile_gif(13000, 2000), "x.gif")
    monkeypatch.setattr(video, "MIN_EXPANSION", 2**20)
    monkeypatch.setattr(video, "EXPANSION", 100)
    with pytest.raises(UserError, match=r"x\.gif: .*a decompression bomb: it has over 1,048,576 pixels"):
        probe(hostile_gif(300, 200), "x.gif")
    assert probe(hostile_gif(100, 50), "x.gif") == Size(100, 100, 40)  # 5/100 s each, so 2.5 s


def test_timestamps_that_jump_by_years_do_not_repeat_a_frame_forever(monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 16 * 3600)
    stored = written(numbered(3), "mkv", milliseconds=[0, 60, 5_000_000])
    with pytest.raises(UserError, match="longer than 1 hours, or its timestamps are broken"):
        probe(stored, "c")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gif"])
@pytest.mark.parametrize("kept", [0.02, 0.4, 0.8, 0.99])
def test_a_video_that_was_cut_off_is_refused(kind, kept):
    stored = written(numbered(8), kind)
    with pytest.raises(UserError, match=r"half: the video cannot be read: "):
        probe(stored[: int(kept * len(stored))], "half")


def test_an_mp4_for_streaming_that_was_cut_off_is_refused():
    """Its index lies in front, so that ffmpeg opens it."""
    stored = written(numbered(8), options={"movflags": "frag_keyframe+empty_moov+skip_trailer"})
    assert stored.index(b"moov") < stored.index(b"mdat")
    with pytest.raises(UserError, match=rf"truncated \({len(stored) - 9} of {len(stored)} bytes\)"):
        probe(stored[:-9], "half.mp4")


def test_a_files_kind_does_not_depend_on_its_name():
    assert probe(written(numbered(4)), "picture.png").frames == 4
    assert ".mp4" in VIDEO_SUFFIXES


FILES = {kind: written(numbered(6, (32, 32)), kind) for kind in KINDS}


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(FILES)),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
    kept=st.floats(0, 1) | st.just(1),
    mode=st.sampled_from(["single_beginning", "single_middle"]),
)
def test_damaged_bytes_give_a_clip_or_a_user_error(kind, damage, kept, mode):
    data = bytearray(FILES[kind])
    for place, value in damage:
        data[int(place * len(data))] = value
    stored = bytes(data[: round(kept * len(data))])
    with contextlib.suppress(UserError):
        size = probe(stored, "c")
        assert min(size) >= 1
        clip = read_clip(stored, Size(16, 32, min(size.frames, 5)), mode=mode, name="c")
        assert clip.shape == (min(size.frames, 5), 32, 16, 3)


def test_ffmpegs_own_messages_do_not_reach_the_user(tmp_path):
    damaged = bytearray(written(numbered(30), "mkv"))
    for place in range(len(damaged) // 2, len(damaged) - 100, 7):
        damaged[place] ^= 0x55
    (tmp_path / "damaged.mkv").write_bytes(damaged)
    program = """
import pathlib, sys
from anima_jax.data.media import probe
from anima_jax.errors import UserError
try:
    probe(pathlib.Path(sys.argv[1]).read_bytes(), "damaged.mkv")
except UserError:
    pass
"""
    path = tmp_path / "damaged.mkv"
    ran = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
