"""The encoded data set on disk. Every clip, mask and caption is stored once, under a key derived from its content.

A record's key is a hash of everything that determines its value. For latents: the media content, the size bucket, how a
clip is cut from a video, the VAE file and the dtypes. For control pictures, whose pixels are stored: the content and
the size bucket. For text states: the caption, the text encoder file and how its weights are stored, the tokenizers, the
maximum caption length and the dtypes. Records therefore never become stale: changed inputs have a new key.
Axes: l image tokens, p the 4 latent pixels and c the 64 values of a token, t frames, y rows, x columns.
"""

import collections
import contextlib
import math
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from einops import rearrange
from tqdm import tqdm

from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import PIXEL_MULTIPLE, Size
from anima_jax.data.encoders import Encoders, check_finite, hash_parts
from anima_jax.data.examples import Example
from anima_jax.data.file_index import Partner
from anima_jax.data.images import read_inpaint_mask, read_mask
from anima_jax.data.loader import map_ahead
from anima_jax.data.media import Media, content_digest, read_clip, reading
from anima_jax.data.problems import Problems
from anima_jax.data.store import Store, pack, unpack
from anima_jax.errors import UserError
from anima_jax.models.dit import PATCH
from anima_jax.parallel.hosts import barrier, is_process_0, progress_bar
from anima_jax.text.states import EncodedText

Item = TypeVar("Item")
Record = tuple[bytes, bytes]

CLIPS_PER_PART, SMALL_RECORDS_PER_PART = 64, 256
"""Records per write: the most that a killed process loses."""

READ_AHEAD_BYTES = 2**30
"""Pixels of clips that wait for the VAE, at most; a clip that has more waits alone."""

WORTH_INFLATING = 0.5
"""Control pictures are stored deflated if that leaves at most this fraction of their bytes. Of 3 MiB (1024²), edges
leave 1 %, which inflate in a millisecond, and depth a sixth; a photograph leaves 70 %, which take longer than reading
all of it."""

RESIDENT_BYTES = 2**30
"""Records stay in host memory after the first read, up to this total size."""


class _SizedMedia(NamedTuple):
    """An image or clip to be stored at a size. `owner` is the image whose control picture it is, "" otherwise."""

    media: Media
    digest: bytes
    size: Size
    owner: str = ""

    def error(self, error: UserError) -> str:
        """Return the message if it cannot be decoded."""
        return f"{self.owner}: its control picture cannot be used: {error}" if self.owner else str(error)


class Cache:
    """Latents, masks, control pictures and text states of one run's examples.

    After `fill` has encoded the missing ones, all can be read. Reading is thread-safe.
    """

    def __init__(self, config: MainConfig, stores: Sequence[Store], encoders: Encoders):
        self._config, self._stores = config, stores
        self._vae, self._text = encoders.vae_fingerprint, encoders.text_fingerprint
        self._resident: dict[bytes, dict[str, np.ndarray]] = {}
        self._room, self._lock = RESIDENT_BYTES, threading.Lock()

    # ---- reading --------------------------------------------------------------------------------------------------

    def is_complete(self, example: Example) -> bool:
        """Return whether the example can be trained: everything that it needs, except text, is in the cache."""
        keys = {**self._latents_of(example), **self._controls_of(example)}.keys() | self._masks_of(example).keys()
        return all(self._find(key) is not None for key in keys)

    def latents(self, example: Example) -> np.ndarray:
        """Return the latent tokens (l, c) in the dtype of the cache, without those of reference pictures."""
        return self._read(self._latents_key(example.entry.digest, example.bucket.size))["latents"]

    def references(self, example: Example) -> np.ndarray:
        """Return the latent tokens (n·l, c) of the example's n reference pictures, at the size of its image.

        Raises ValueError if it has none.
        """
        keys = [self._latents_key(control.digest, example.bucket.size) for control in example.entry.controls]
        return np.concatenate([self._read(key)["latents"] for key in keys])

    def control(self, example: Example) -> np.ndarray:
        """Return the control picture, uint8 (l, 16·16·3): patches row by row, each with axes (y, x, channel).

        Without one, it is the image itself, which is the control picture of inpainting.
        """
        (key,) = self._controls_of(example)
        record = self._read(key)
        if "control" in record:
            return record["control"]
        pixels = np.frombuffer(zlib.decompress(record["deflated"].data), np.uint8)
        return pixels.reshape(example.bucket.size.tokens, -1)

    def inpaint_mask(self, example: Example) -> np.ndarray | None:
        """Return what is drawn anew, bool (height, width); None if the example has no mask for it."""
        mask, size = example.entry.inpaint_mask, example.bucket.size
        if mask is None:
            return None
        bits = self._read(self._mask_key(example, mask, "inpaint mask"))["inpaint"]
        return np.unpackbits(bits, count=size.width * size.height).reshape(size.height, size.width).astype(bool)

    def mask(self, example: Example) -> np.ndarray | None:
        """Return the loss weight of each latent pixel, float32 (l, p) in [0, 1]; None if the example has no mask."""
        mask = example.entry.loss_mask
        if mask is None:
            return None
        pixels_yx = self._read(self._mask_key(example, mask, "mask"))["mask"]
        frame_lp = rearrange(pixels_yx, "(y m) (x n) -> (y x) (m n)", m=PATCH, n=PATCH).astype(np.float32) / 255.0
        return np.tile(frame_lp, (example.bucket.size.grid[0], 1))

    def text(self, caption: str) -> EncodedText:
        """Return the text encoder states and T5 ids of a caption."""
        record = self._read(self._text_key(caption))
        return EncodedText(record["states"], record["t5_ids"])

    def _find(self, key: bytes) -> Store | None:
        return next((store for store in self._stores if key in store), None)

    def _read(self, key: bytes) -> dict[str, np.ndarray]:
        if key in self._resident:
            return self._resident[key]
        store = self._find(key)
        if store is None:
            raise KeyError(f"no record {key.hex()} in the cache")
        arrays = unpack(store.read(key))[1]
        size = sum(array.nbytes for array in arrays.values())
        with self._lock:
            if size <= self._room:
                self._resident[key] = arrays
                self._room -= size
        return arrays

    # ---- keys -----------------------------------------------------------------------------------------------------

    def _latents_key(self, digest: bytes, size: Size) -> bytes:
        cut = self._config.video_clip_mode if size.frames > 1 else ""
        return hash_parts("latents", digest, *size, cut, self._vae)

    def _mask_key(self, example: Example, mask: Partner, kind: str) -> bytes:
        entry, size = example.entry, example.bucket.size
        return hash_parts(kind, mask.digest, entry.width, entry.height, size.width, size.height)

    def _text_key(self, caption: str) -> bytes:
        return hash_parts("text", caption, self._text)

    # ---- the records of an example --------------------------------------------------------------------------------

    def _latents_of(self, example: Example) -> dict[bytes, _SizedMedia]:
        """Return key → picture of each of the example's latents: its own and those of its reference pictures."""
        entry, size = example.entry, example.bucket.size
        pictures = [_SizedMedia(entry.media, entry.digest, size)]
        if example.bucket.references:
            pictures += [_SizedMedia(*control, size, entry.media.name) for control in entry.controls]
        return {self._latents_key(picture.digest, size): picture for picture in pictures}

    def _controls_of(self, example: Example) -> dict[bytes, _SizedMedia]:
        """Return key → picture of the example's control picture, empty if the run needs none."""
        entry, size = example.entry, example.bucket.size
        if not self._config.control_channels:
            return {}
        own = _SizedMedia(entry.media, entry.digest, size)
        picture = _SizedMedia(*entry.controls[0], size, entry.media.name) if entry.controls else own
        return {hash_parts("control", picture.digest, size.width, size.height): picture}

    def _masks_of(self, example: Example) -> dict[bytes, tuple[Example, Partner, str]]:
        """Return key → (example, mask, kind) of the example's masks."""
        masks = {"mask": example.entry.loss_mask, "inpaint mask": example.entry.inpaint_mask}
        return {self._mask_key(example, mask, kind): (example, mask, kind) for kind, mask in masks.items() if mask}

    # ---- filling --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove all records, including those of other runs."""
        if is_process_0():
            for store in self._stores:
                store.clear()
        barrier("the cache is cleared")
        for store in self._stores:
            store.refresh()

    def fill(self, groups: Sequence[Sequence[Example]], encoders: Encoders, problems: Problems) -> None:
        """Encode the missing records, those of `groups[i]` into store i. The run's processes divide the work.

        Media that cannot be decoded go to `problems`.
        """
        work, claimed = [], set[bytes]()  # records that two sources share are encoded once, for the first

        def missing(wanted: dict[bytes, Item]) -> list[tuple[bytes, Item]]:
            new = [(key, item) for key, item in wanted.items() if key not in claimed and self._find(key) is None]
            claimed.update(key for key, _ in new)
            return new

        for store, group in zip(self._stores, groups, strict=True):
            masks = _joined(map(self._masks_of, group))
            controls = _joined(map(self._controls_of, group))
            latents = _joined(map(self._latents_of, group))
            captions = self._captions_by_key(group)
            work.append((store, missing(masks), missing(controls), missing(latents), missing(captions)))
        for store, *lists in work:
            if any(lists):
                store.prepare()
            elif is_process_0():  # A process may have been killed after it had encoded everything.
                store.sweep()
        barrier("the missing parts are counted")
        for store, masks, controls, latents, captions in work:
            own = _own_items(masks, SMALL_RECORDS_PER_PART)
            _write_parts(store, self._mask_records(own, problems), SMALL_RECORDS_PER_PART)
            with progress_bar(len(controls), "control picture") as bar:
                own = _own_items(controls, CLIPS_PER_PART)
                _write_parts(store, self._control_records(own, problems), CLIPS_PER_PART, bar)
            with progress_bar(len(latents), "clip") as bar:
                for size, items in _by_size(latents):
                    own = _own_items(items, CLIPS_PER_PART)
                    _write_parts(store, self._latent_records(own, size, encoders, problems), CLIPS_PER_PART, bar)
            own = _own_items(captions, SMALL_RECORDS_PER_PART)
            with progress_bar(len(own), "caption") as bar:
                _write_parts(store, self._text_records(own, encoders), SMALL_RECORDS_PER_PART, bar)
        barrier("the cache is filled")
        for store in self._stores:
            store.refresh()

    def _captions_by_key(self, examples: Sequence[Example]) -> dict[bytes, str]:
        """Return key → caption to encode, including the empty caption, which replaces dropped captions."""
        if not self._config.model.cache_text_embeddings:
            return {}
        captions = {caption for example in examples for caption in example.captions}
        return {self._text_key(caption): caption for caption in ["", *sorted(captions)]}

    def _mask_records(
        self, items: Sequence[tuple[bytes, tuple[Example, Partner, str]]], problems: Problems
    ) -> Iterator[Record]:
        def read(item: tuple[bytes, tuple[Example, Partner, str]]) -> Record | None:
            key, (example, (media, digest), kind) = item
            entry, size = example.entry, example.bucket.size
            media_wh, size_wh = (entry.width, entry.height), (size.width, size.height)
            try:
                with _reading_unchanged(media, digest) as data:
                    if kind == "mask":
                        arrays = {"mask": read_mask(data, media_wh, size_wh, name=media.name)}
                    else:
                        mask_yx = read_inpaint_mask(data, media_wh, size_wh, name=media.name)
                        arrays = {"inpaint": np.packbits(mask_yx)}
            except UserError as error:
                problems.skip(f"{entry.media.name}: its {kind} cannot be used: {error}")
                return None
            return key, pack({"name": media.name}, arrays)

        yield from filter(None, map_ahead(read, items, threads=self._config.map_num_proc))

    def _control_records(self, items: Sequence[tuple[bytes, _SizedMedia]], problems: Problems) -> Iterator[Record]:
        def read(item: tuple[bytes, _SizedMedia]) -> Record | None:
            key, picture = item
            pixels_tyxc = self._pixels(picture, problems)
            if pixels_tyxc is None:
                return None
            patches_lp = rearrange(pixels_tyxc[0], "(y m) (x n) c -> (y x) (m n c)", m=PIXEL_MULTIPLE, n=PIXEL_MULTIPLE)
            deflated = zlib.compress(np.ascontiguousarray(patches_lp).data, level=1)
            is_smaller = len(deflated) <= WORTH_INFLATING * patches_lp.nbytes
            arrays = {"deflated": np.frombuffer(deflated, np.uint8)} if is_smaller else {"control": patches_lp}
            return key, pack({"name": picture.media.name}, arrays)

        yield from filter(None, map_ahead(read, items, threads=self._config.map_num_proc))

    def _pixels(self, picture: _SizedMedia, problems: Problems) -> np.ndarray | None:
        """Return the pixels (t, y, x, 3), uint8, None if they cannot be decoded, which goes to `problems`."""
        mode, size = self._config.video_clip_mode, picture.size
        try:
            with _reading_unchanged(picture.media, picture.digest) as data:
                return read_clip(data, size, mode=mode, name=picture.media.name)[: size.encoded_frames]
        except UserError as error:
            problems.skip(picture.error(error))
            return None

    def _latent_records(
        self, items: Sequence[tuple[bytes, _SizedMedia]], size: Size, encoders: Encoders, problems: Problems
    ) -> Iterator[Record]:
        """Yield the latents of clips that are resized to `size`."""
        decoded: collections.deque[tuple[bytes, _SizedMedia]] = collections.deque()

        def read(item: tuple[bytes, _SizedMedia]) -> np.ndarray | None:
            return self._pixels(item[1], problems)

        def clips() -> Iterator[np.ndarray]:
            most = max(1, READ_AHEAD_BYTES // (3 * math.prod(size)))
            read_clips = map_ahead(read, items, threads=min(self._config.map_num_proc, most))
            for item, clip_tyxc in zip(items, read_clips, strict=True):
                if clip_tyxc is not None:
                    decoded.append(item)
                    yield clip_tyxc

        for latents_lc in encoders.encode_clips(clips()) if items else ():
            key, picture = decoded.popleft()
            name = picture.media.name
            stored_lc = self._stored(latents_lc, name, self._config.model.vae_path)
            yield key, pack({"name": name, "size": "×".join(map(str, size))}, {"latents": stored_lc})

    def _text_records(self, items: Sequence[tuple[bytes, str]], encoders: Encoders) -> Iterator[Record]:
        encoded = encoders.encode_captions(caption for _, caption in items) if items else ()
        for (key, caption), text in zip(items, encoded, strict=True):
            states_nd = self._stored(text.states_nd, f"caption '{caption}'", self._config.model.llm_path)
            yield key, pack({"caption": caption}, {"states": states_nd, "t5_ids": text.target_ids_m})

    def _stored(self, values: np.ndarray, what: str, file: str) -> np.ndarray:
        """Return values in `cached_dtype`. Raises NotFiniteError, naming `what` and the network's file."""
        dtype = self._config.cached_dtype
        with np.errstate(over="ignore"):  # reported by the check
            stored = values.astype(np.dtype(dtype))
        check_finite(stored, what, file, dtype)
        return stored


@contextlib.contextmanager
def _reading_unchanged(media: Media, digest: bytes | None) -> Iterator[bytes]:
    """Read a file (`reading`). Raises UserError if its hash is no longer `digest`, which is in the cache key."""
    with reading(media, media.stamp()) as data:
        if content_digest(data) != digest:
            raise UserError(f"{media.name}: changed since it was inspected; start again, without --trust_cache")
        yield data


def _joined(records: Iterable[dict[bytes, Item]]) -> dict[bytes, Item]:
    return {key: item for each in records for key, item in each.items()}


def _by_size(items: Iterable[tuple[bytes, _SizedMedia]]) -> list[tuple[Size, list[tuple[bytes, _SizedMedia]]]]:
    by_size: dict[Size, list[tuple[bytes, _SizedMedia]]] = collections.defaultdict(list)
    for key, picture in items:
        by_size[picture.size].append((key, picture))
    return sorted(by_size.items())


def _own_items(items: Sequence[Item], part: int) -> list[Item]:
    """Return the items of this process: every `jax.process_count()`-th chunk of `part` items."""
    starts = range(0, len(items), part)[jax.process_index() :: jax.process_count()]
    return [item for start in starts for item in items[start : start + part]]


def _write_parts(store: Store, records: Iterable[Record], size: int, bar: "tqdm[Any] | None" = None) -> None:
    """Write the records in parts of `size` records."""
    part: list[Record] = []
    for record in records:
        part.append(record)
        if bar is not None:
            bar.update()
        if len(part) == size:
            store.write_part(part)
            part = []
    if part:
        store.write_part(part)
