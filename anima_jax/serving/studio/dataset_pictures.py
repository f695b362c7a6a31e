"""Small copies of a data set's pictures, and which of them look alike."""

import collections
import io
import itertools
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from anima_jax.config.sizes import Size
from anima_jax.data.images import over_white, read_picture
from anima_jax.data.media import Media, is_video, probe, read_clip
from anima_jax.errors import UserError

THUMBNAIL_SIDES = (128, 256, 512, 1024)
"""Longest sides in pixels; others are rounded up to these."""

MAX_BITS = 5
"""Of the 64 bits of their hashes, in how many two near-duplicates may differ."""

MAX_COLOUR = 14
"""Of 255: by how much the mean colour of a sixteenth of near-duplicates may differ."""

_BANDS = 6


class ImageCache:
    """Encoded images, the last used ones within a number of bytes. Thread-safe."""

    def __init__(self, max_bytes: int = 2**26):
        self._max_bytes, self._bytes, self._lock = max_bytes, 0, threading.Lock()
        self._kept: collections.OrderedDict[Hashable, bytes] = collections.OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """Return what was put under this key, None if it was dropped or never there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, data: bytes) -> bytes:
        """Keep the bytes of an image, and drop those that were not used for longest. Returns `data`."""
        with self._lock:
            self._bytes += len(data) - len(self._kept.pop(key, b""))
            self._kept[key] = data
            while self._bytes > self._max_bytes:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return data


def thumbnail_side(wanted: int) -> int:
    """Return the side of the thumbnail to make for one of `wanted` pixels."""
    return next((side for side in THUMBNAIL_SIDES if side >= wanted), THUMBNAIL_SIDES[-1])


def small_picture(media: Media, side: int) -> Image.Image:
    """Return an image, or a video's first frame, upright over white, at most `side` pixels wide and high.

    Raises UserError if it cannot be read.
    """
    data = media.read()
    if is_video(data, media.name):
        found = probe(data, media.name)
        width, height = (max(16, side_ - side_ % 16) for side_ in (found.width, found.height))
        picture = Image.fromarray(read_clip(data, Size(width, height, 1), name=media.name)[0])
    else:
        picture = over_white(read_picture(data, media.name))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return picture


def as_png(pixels: np.ndarray) -> bytes:
    """Return pixels, uint8 (height, width, 3), as the bytes of a PNG."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


class Look(NamedTuple):
    """How a picture looks: a hash of 64 bits, and the mean colours of 4 × 4 parts, uint8 (48,)."""

    bits: int
    colours: np.ndarray


def look_of(picture: Image.Image) -> Look:
    """Return how an RGB image looks.

    A bit of the hash says whether one of 8 × 8 parts is darker than the next on the right (a difference hash): scaling,
    compression and small changes of brightness leave most of them.
    """
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes()
    colours = np.asarray(picture.resize((4, 4), Image.Resampling.BOX), np.uint8).reshape(-1)
    return Look(int.from_bytes(bits, "big"), colours)


def near_duplicates(looks: Mapping[str, Look]) -> list[list[str]]:
    """Return the groups of ids, each at least two, whose pictures look alike; a group's first comes first in `looks`.

    The bits are cut into bands, one of which is equal in any two hashes that differ in fewer bits than there are bands,
    so that only pictures with an equal band are compared.
    """
    ids = list(looks)
    groups_n = np.arange(len(ids))  # of each picture: that of its group's first
    bits = np.array([look.bits for look in looks.values()], np.uint64)
    colours = np.array([look.colours for look in looks.values()], np.int16).reshape(len(ids), -1)
    width = -(-64 // _BANDS)
    for band in range(_BANDS):
        key = (bits >> np.uint64(band * width)) & np.uint64(2**width - 1)
        order = np.argsort(key, kind="stable")
        for _, members in itertools.groupby(order.tolist(), key=lambda at: int(key[at])):
            group = np.array(list(members))
            for number, at in enumerate(group[:-1].tolist()):
                rest = group[number + 1 :]
                rest = rest[groups_n[rest] != groups_n[at]]
                close = np.bitwise_count(bits[rest] ^ bits[at]) <= MAX_BITS
                close &= np.abs(colours[rest] - colours[at]).max(1) <= MAX_COLOUR
                if close.any():
                    joined = np.unique(groups_n[[at, *rest[close]]])
                    groups_n[np.isin(groups_n, joined)] = joined[0]
    groups = collections.defaultdict[int, list[str]](list)
    for group, name in zip(groups_n.tolist(), ids, strict=True):
        groups[group].append(name)
    return [group for group in groups.values() if len(group) > 1]


class DuplicateSearch:
    """Looks for near-duplicates in the background. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: dict[tuple[str, bytes], Look | None] = {}
        self._thread: threading.Thread | None = None
        self._searched: list[tuple[str, bytes]] | None = None
        self.done, self.total = 0, 0
        self.groups: list[list[str]] = []
        self.damaged: dict[str, str] = {}
        """Id → why the picture cannot be decoded."""

    def start(self, pictures: Sequence[tuple[str, bytes, Media]]) -> bool:
        """Search these (id, content hash, media) unless that is done or under way. Return whether it is done."""
        wanted = [(name, digest) for name, digest, _ in pictures]
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return False
            if self._searched == wanted:
                return True
            self.done, self.total = 0, len(pictures)
            self._thread = threading.Thread(target=self._search, args=(pictures, wanted), daemon=True)
            self._thread.start()
        return False

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the search that is under way."""
        if (thread := self._thread) is not None:
            thread.join(timeout)

    def _search(self, pictures: Sequence[tuple[str, bytes, Media]], wanted: list[tuple[str, bytes]]) -> None:
        damaged, looks = dict[str, str](), dict[tuple[str, bytes], Look | None]()
        for name, digest, media in pictures:
            key = name, digest
            looks[key] = self._looks.get(key)
            try:
                if looks[key] is None:
                    looks[key] = look_of(small_picture(media, 128))
            except UserError as error:
                damaged[name] = str(error)
            self.done += 1
        groups = near_duplicates({name: look for (name, _), look in looks.items() if look is not None})
        with self._lock:
            self._looks, self.groups, self.damaged, self._searched = looks, groups, damaged, wanted
