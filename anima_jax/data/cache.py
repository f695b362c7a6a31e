"""What the encoders made of a data set, on disk: every clip, mask and caption once, found again by what it is.

A record's key is the hash of all that decides its value: of latents the media's content, the size bucket, how a clip is
cut from a video, the VAE's file and the dtypes; of a caption's states the caption, the text encoder's file, the
tokenizers, the length at which captions are cut, and the dtype. So nothing is stale, and what changed is encoded anew.
Axes: l image tokens, p the 4 latent pixels and c the 64 values of a token, t frames, y rows, x columns.
"""

import collections
import concurrent.futures
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from tqdm import tqdm

from anima_jax.checkpoints.locations import file_sha256
from anima_jax.checkpoints.models import load_text_encoder, load_vae
from anima_jax.config.main import MainConfig
from anima_jax.data import encode
from anima_jax.data.buckets import Size
from anima_jax.data.encode import EncodedText
from anima_jax.data.examples import Example, Media, content_digest
from anima_jax.data.media import read_clip, read_mask
from anima_jax.data.problems import Problems
from anima_jax.data.store import Store, pack, unpack
from anima_jax.errors import UserError
from anima_jax.models.dit import PATCH
from anima_jax.models.quantised import quantise_text_encoder
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel.hosts import barrier, is_process_0
from anima_jax.parallel.mesh import local_mesh
from anima_jax.text.tokenizers import Tokenizers

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CLIPS_A_PART, CAPTIONS_A_PART = 64, 256
"""Records that are written at once: the most that a killed process loses."""

RESIDENT_BYTES = 2**30
"""Records stay in host memory once they are read, up to this size in all."""

FRAMES_A_LATENT = 4


def encoded_frames(size: Size) -> int:
    """Frames of a clip that the VAE takes: 1 + 4n, what is over is left out."""
    return 1 + (size.frames - 1) // FRAMES_A_LATENT * FRAMES_A_LATENT


class Encoders:
    """The VAE and the text encoder of a run, loaded when something needs them; `release` gives them up.

    They lie on `mesh`: a process's own devices, where each process encodes for itself, or those of all.
    """

    def __init__(self, config: MainConfig, tokenizers: Tokenizers, mesh: Mesh | None = None):
        self._config, self.tokenizers, self._mesh = config, tokenizers, mesh or local_mesh()

    def on(self, mesh: Mesh) -> "Encoders":
        """The same on another mesh."""
        return self if mesh == self._mesh else Encoders(self._config, self.tokenizers, mesh)

    @functools.cached_property
    def vae(self) -> WanVAE:
        with jax.set_mesh(self._mesh):
            return load_vae(self._config.model.vae_path, self._config.compute_dtype)

    @functools.cached_property
    def text_encoder(self) -> Qwen3:
        model = self._config.model
        with jax.set_mesh(self._mesh):
            loaded = load_text_encoder(model.llm_path, self._config.compute_dtype)
        return quantise_text_encoder(loaded, model.text_encoder_storage) if model.text_encoder_storage else loaded

    @functools.cached_property
    def encode_clips(self) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
        config = self._config
        return encode.clip_encoder(self.vae, batch_size=config.caching_batch_size, dtype=config.compute_dtype)

    @functools.cached_property
    def encode_captions(self) -> Callable[[Iterable[str]], Iterator[EncodedText]]:
        return encode.caption_encoder(
            self.text_encoder,
            self.tokenizers,
            max_tokens=self._config.model.max_caption_tokens,
            dtype=self._config.compute_dtype,
        )

    @functools.cached_property
    def vae_fingerprint(self) -> bytes:
        """What decides the latents of a clip besides the clip."""
        config = self._config
        return _hash(file_sha256(config.model.vae_path), config.compute_dtype, config.cached_dtype)

    @functools.cached_property
    def text_fingerprint(self) -> bytes:
        """What decides the states of a caption besides the caption."""
        config, model = self._config, self._config.model
        return _hash(
            file_sha256(model.llm_path),
            self.tokenizers.fingerprint,
            model.max_caption_tokens,
            config.compute_dtype,
            config.cached_dtype,
            model.text_encoder_storage,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Both, in hexadecimal, by what they decide."""
        return {
            "what the VAE makes of pictures": self.vae_fingerprint.hex(),
            "what the text encoder makes of captions": self.text_fingerprint.hex(),
        }

    def release(self) -> None:
        """Forget all of it; whoever still uses a network keeps it."""
        for name in ("vae", "text_encoder", "encode_clips", "encode_captions"):
            self.__dict__.pop(name, None)


class Cache:
    """Latents, masks and captions of one run's examples. `fill` encodes what is not there; then all of it can be read.

    Reading is safe from several threads.
    """

    def __init__(self, config: MainConfig, stores: Sequence[Store], encoders: Encoders):
        self._config, self._stores = config, stores
        self._vae, self._text = encoders.vae_fingerprint, encoders.text_fingerprint
        self._resident: dict[bytes, dict[str, np.ndarray]] = {}
        self._room, self._lock = RESIDENT_BYTES, threading.Lock()

    # ---- reading --------------------------------------------------------------------------------------------------

    def has_latents(self, example: Example) -> bool:
        """Whether the example can be trained on: its latents and, if it has a mask, that are there."""
        return self._find(self._latents_key(example)) is not None and (
            example.entry.mask is None or self._find(self._mask_key(example)) is not None
        )

    def latents(self, example: Example) -> np.ndarray:
        """Latent tokens (l, c) in the cache's dtype."""
        return self._read(self._latents_key(example))["latents"]

    def mask(self, example: Example) -> np.ndarray | None:
        """Weight of each latent pixel, float32 (l, p) in [0, 1]; None if the example has no mask."""
        if example.entry.mask is None:
            return None
        pixels_yx = self._read(self._mask_key(example))["mask"]
        frame_lp = rearrange(pixels_yx, "(y m) (x n) -> (y x) (m n)", m=PATCH, n=PATCH).astype(np.float32) / 255.0
        return np.tile(frame_lp, (example.bucket.size.grid[0], 1))

    def text(self, caption: str) -> EncodedText:
        """States and T5 ids of a caption."""
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

    def _latents_key(self, example: Example) -> bytes:
        size = example.bucket.size
        cut = self._config.video_clip_mode if size.frames > 1 else ""
        return _hash("latents", example.entry.digest, *size, cut, self._vae)

    def _mask_key(self, example: Example) -> bytes:
        entry, size = example.entry, example.bucket.size
        return _hash("mask", entry.mask_digest, entry.width, entry.height, size.width, size.height)

    def _text_key(self, caption: str) -> bytes:
        return _hash("text", caption, self._text)

    # ---- filling --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Remove every record, of other runs too."""
        if jax.process_index() == 0:
            for store in self._stores:
                store.clear()
        barrier("the cache is cleared")
        for store in self._stores:
            store.refresh()

    def fill(self, examples: Sequence[Sequence[Example]], encoders: Encoders, problems: Problems) -> None:
        """Encode what is missing, of each store's examples in its store, in turn with the run's other processes.

        Media that cannot be decoded go to `problems`.
        """
        work, claimed = [], set[bytes]()  # what two sources share is encoded for the first

        def missing(wanted: dict[bytes, Item]) -> list[tuple[bytes, Item]]:
            new = [(key, item) for key, item in wanted.items() if key not in claimed and self._find(key) is None]
            claimed.update(key for key, _ in new)
            return new

        for store, group in zip(self._stores, examples, strict=True):
            masks = {self._mask_key(example): example for example in group if example.entry.mask}
            latents = {self._latents_key(example): example for example in group}
            work.append((store, missing(masks), missing(latents), missing(self._text_keys(group))))
        for store, *lists in work:
            if any(lists):
                store.prepare()
        barrier("the missing parts are counted")
        for store, masks, latents, captions in work:
            self._fill_masks(store, masks, problems)
            self._fill_latents(store, latents, encoders, problems)
            self._fill_text(store, captions, encoders)
        barrier("the cache is filled")
        for store in self._stores:
            store.refresh()

    def _text_keys(self, examples: Sequence[Example]) -> dict[bytes, str]:
        """The captions to encode; the empty one, which stands for all that are dropped, is among them."""
        if not self._config.model.cache_text_embeddings:
            return {}
        captions = {caption for example in examples for caption in example.captions}
        return {self._text_key(caption): caption for caption in ["", *sorted(captions)]}

    def _fill_masks(self, store: Store, missing: Sequence[tuple[bytes, Example]], problems: Problems) -> None:
        def read(item: tuple[bytes, Example]) -> tuple[bytes, bytes] | None:
            (key, example), size = item, item[1].bucket.size
            entry = example.entry
            assert entry.mask is not None
            try:
                mask_yx = read_mask(
                    _unchanged(entry.mask, entry.mask_digest),
                    (entry.width, entry.height),
                    (size.width, size.height),
                    name=entry.mask.name,
                )
            except UserError as error:
                problems.skip(f"{entry.media.name}: its mask is of no use: {error}")
                return None
            return key, pack({"name": entry.mask.name}, {"mask": mask_yx})

        for part in _own_parts(missing, CAPTIONS_A_PART):
            if records := [record for record in _read_ahead(read, part, self._config.map_num_proc) if record]:
                store.write_part(records)

    def _fill_latents(
        self, store: Store, missing: Sequence[tuple[bytes, Example]], encoders: Encoders, problems: Problems
    ) -> None:
        by_size: dict[Size, list[tuple[bytes, Example]]] = collections.defaultdict(list)
        for key, example in missing:
            by_size[example.bucket.size].append((key, example))
        with progress_bar(len(missing), "clip") as bar:
            for size, items in sorted(by_size.items()):
                own = [item for part in _own_parts(items, CLIPS_A_PART) for item in part]
                _write_parts(store, self._encoded(own, size, encoders, problems), CLIPS_A_PART, bar)

    def _encoded(
        self, items: Sequence[tuple[bytes, Example]], size: Size, encoders: Encoders, problems: Problems
    ) -> Iterator[tuple[bytes, bytes]]:
        """The records of clips that become `size`."""
        kept: collections.deque[tuple[bytes, Example]] = collections.deque()

        def read(item: tuple[bytes, Example]) -> np.ndarray | None:
            entry, mode = item[1].entry, self._config.video_clip_mode
            try:
                data = _unchanged(entry.media, entry.digest)
                return read_clip(data, size, mode=mode, name=entry.media.name)[: encoded_frames(size)]
            except UserError as error:
                problems.skip(error)
                return None

        def clips() -> Iterator[np.ndarray]:
            read_clips = _read_ahead(read, items, self._config.map_num_proc)
            for item, clip_tyxc in zip(items, read_clips, strict=True):
                if clip_tyxc is not None:
                    kept.append(item)
                    yield clip_tyxc

        for latents_lc in encoders.encode_clips(clips()) if items else ():
            key, example = kept.popleft()
            header = {"name": example.entry.media.name, "size": "×".join(map(str, size))}
            yield key, pack(header, {"latents": latents_lc.astype(np.dtype(self._config.cached_dtype))})

    def _fill_text(self, store: Store, missing: Sequence[tuple[bytes, str]], encoders: Encoders) -> None:
        own = [item for part in _own_parts(missing, CAPTIONS_A_PART) for item in part]

        def records() -> Iterator[tuple[bytes, bytes]]:
            encoded = encoders.encode_captions(caption for _, caption in own) if own else ()
            for (key, caption), text in zip(own, encoded, strict=True):
                states_nd = text.states_nd.astype(np.dtype(self._config.cached_dtype))
                yield key, pack({"caption": caption}, {"states": states_nd, "t5_ids": text.target_ids_m})

        with progress_bar(len(own), "caption") as bar:
            _write_parts(store, records(), CAPTIONS_A_PART, bar)


def _unchanged(media: Media, digest: bytes | None) -> bytes:
    """The bytes of a file, which are to be cached under their hash. Raises UserError if they have another by now."""
    data = media.read()
    if content_digest(data) != digest:
        raise UserError(f"{media.name}: changed since it was looked at; start again, without --trust_cache")
    return data


def progress_bar(total: int, unit: str) -> tqdm:
    """Return a progress bar over `total` items, which process 0 shows if there are any."""
    return tqdm(total=total, unit=unit, dynamic_ncols=True, disable=not total or not is_process_0())


def _write_parts(store: Store, records: Iterable[tuple[bytes, bytes]], size: int, bar: tqdm) -> None:
    """Write the records, `size` of them at a time."""
    part: list[tuple[bytes, bytes]] = []
    for record in records:
        bar.update()
        part.append(record)
        if len(part) == size:
            store.write_part(part)
            part = []
    if part:
        store.write_part(part)


def _hash(*parts: str | bytes | int | None) -> bytes:
    """SHA-256 of the parts, each with its length, so that none runs into the next."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _own_parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Runs of `size` items that fall to this process: its turn comes every `jax.process_count()` of them."""
    starts = range(0, len(items), size)
    for start in starts[jax.process_index() :: jax.process_count()]:
        yield items[start : start + size]


def _read_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`function` of each item, in order, a few items ahead in `threads` threads."""
    pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
