"""The encoders that fill the cache: pixels → latents, captions → text states.

Axes: b batch, t frames, y rows, x columns, l image tokens, n source (Qwen3) tokens, m target (T5) tokens, d features,
c the 64 values of a token.
"""

import functools
import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from anima_jax.checkpoints.models import load_text_encoder, load_vae
from anima_jax.checkpoints.values import first_problem
from anima_jax.config.main import MainConfig
from anima_jax.errors import NotFiniteError
from anima_jax.models.dit import patchify
from anima_jax.models.parameters import Params, merge, split
from anima_jax.models.quantised import quantise_text_encoder
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel.mesh import batch_sharding, local_mesh, replicated, shard_batch
from anima_jax.text.states import EncodedText, encode_tokens, rounded_up, text_dtype
from anima_jax.text.tokenizers import TRAINING_LENGTH, TextIds, Tokenizers

Item = TypeVar("Item")


class Encoders:
    """The VAE and the text encoder of a run, loaded at first use; `release` drops them.

    They are placed on `mesh`: the devices of this process (default), so that each process encodes on its own, or those
    of all processes.
    """

    def __init__(self, config: MainConfig, tokenizers: Tokenizers, mesh: Mesh | None = None):
        self._config, self.tokenizers, self._mesh = config, tokenizers, mesh or local_mesh()

    def on(self, mesh: Mesh) -> "Encoders":
        """Return the same encoders on `mesh`. Those on another mesh are released."""
        if mesh == self._mesh:
            return self
        self.release()
        return Encoders(self._config, self.tokenizers, mesh)

    @functools.cached_property
    def vae(self) -> WanVAE:
        with jax.set_mesh(self._mesh):
            return load_vae(
                self._config.model.vae_files, self._config.compute_dtype, allow_unused=self._config.allow_unused
            )

    @functools.cached_property
    def text_encoder(self) -> Qwen3:
        model = self._config.model
        with jax.set_mesh(self._mesh):
            loaded = load_text_encoder(
                model.llm_files, self._config.compute_dtype, allow_unused=self._config.allow_unused
            )
        return quantise_text_encoder(loaded, model.text_encoder_storage) if model.text_encoder_storage else loaded

    @functools.cached_property
    def encode_clips(self) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
        """The `clip_encoder` of this run."""
        config = self._config
        return clip_encoder(self.vae, batch_size=config.caching_batch_size, dtype=config.compute_dtype)

    @functools.cached_property
    def encode_captions(self) -> Callable[[Iterable[str]], Iterator[EncodedText]]:
        """The `caption_encoder` of this run."""
        max_tokens, dtype = self._config.model.max_caption_tokens, self._config.compute_dtype
        return caption_encoder(self.text_encoder, self.tokenizers, max_tokens=max_tokens, dtype=dtype)

    @functools.cached_property
    def vae_fingerprint(self) -> bytes:
        """Hash of everything that determines a clip's latents, except the clip."""
        config = self._config
        return hash_parts(config.model.vae_files.sha256(), config.compute_dtype, config.cached_dtype)

    @functools.cached_property
    def text_fingerprint(self) -> bytes:
        """Hash of everything that determines a caption's states, except the caption."""
        config, model = self._config, self._config.model
        return hash_parts(
            model.llm_files.sha256(),
            self.tokenizers.fingerprint,
            model.max_caption_tokens,
            text_dtype(config.compute_dtype).name,
            config.cached_dtype,
            model.text_encoder_storage,
        )

    @property
    def fingerprints(self) -> dict[str, str]:
        """Both fingerprints in hexadecimal, under the keys used in checkpoints."""
        return {
            "what the VAE makes of pictures": self.vae_fingerprint.hex(),
            "what the text encoder makes of captions": self.text_fingerprint.hex(),
        }

    def release(self) -> None:
        """Drop the references to the networks, which frees their memory now; other users keep theirs."""
        for name in ("vae", "text_encoder", "encode_clips", "encode_captions"):
            self.__dict__.pop(name, None)
        gc.collect()  # a module's references are circular


def check_finite(values: np.ndarray, what: str, file: str, dtype: str) -> None:
    """Raise NotFiniteError unless all `values`, which an encoder computed in `dtype` from `what`, are finite.

    It names the encoder's `file` if that has such values.
    """
    if not np.isfinite(values).all():
        where = f"{what}: NaN or infinite values after {file}, but none in that file: {dtype} overflowed"
        raise NotFiniteError(first_problem([file]) or where)


def hash_parts(*parts: str | bytes | int | None) -> bytes:
    """Return the SHA-256 of the parts, each prefixed with its length, so that different parts do not collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def clip_encoder(
    vae: WanVAE, *, batch_size: int = 1, dtype: DTypeLike = jnp.float32
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """Return a function that maps uint8 clips (t, y, x, 3) of one size to their float32 latents (l, c), in order.

    An image is a clip of one frame. Each local device encodes `batch_size` clips at a time while the next batch is
    read. One program is compiled per size.
    """
    graphdef, params = split(vae)
    mesh = local_mesh()
    params = jax.device_put(params, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh, mesh.size))
    def encode(params: Params, pixels_btyxc: jax.Array) -> jax.Array:
        pixels = pixels_btyxc.astype(jnp.float32) / 127.5 - 1.0
        return patchify(merge(graphdef, params).encode(pixels.astype(dtype)).astype(jnp.float32))

    def encode_all(clips: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        pending: tuple[jax.Array, int] | None = None
        for batch, real in _batches(clips, batch_size * mesh.size):
            with jax.set_mesh(mesh):
                latents = encode(params, shard_batch(np.stack(batch), len(batch)))
            if pending:
                yield from np.asarray(pending[0])[: pending[1]]
            pending = latents, real
        if pending:
            yield from np.asarray(pending[0])[: pending[1]]

    return encode_all


def caption_encoder(
    qwen: Qwen3, tokenizers: Tokenizers, *, batch_size: int = 8, max_tokens: int = TRAINING_LENGTH, dtype: DTypeLike
) -> Callable[[Iterable[str]], Iterator[EncodedText]]:
    """Return a function that encodes captions as in training: no prompt weights, at most `max_tokens` per tokenizer.

    Each local device encodes `batch_size` captions at a time.
    """
    mesh = local_mesh()
    graphdef, params = split(qwen)
    run = encode_tokens(merge(graphdef, jax.device_put(params, replicated(mesh))), dtype)

    def encode_all(captions: Iterable[str]) -> Iterator[EncodedText]:
        for batch, real in _batches(captions, batch_size * mesh.size):
            ids = _trimmed(tokenizers.training_ids(batch, max_tokens))
            with jax.set_mesh(mesh):
                states_bnd = np.asarray(run(*shard_batch((ids.qwen_ids, ids.qwen_mask), len(batch))))
            for row in range(real):
                states_nd = states_bnd[row, : ids.qwen_mask[row].sum()]
                yield EncodedText(states_nd.copy(), ids.t5_ids[row, : ids.t5_mask[row].sum()].copy())

    return encode_all


def _trimmed(ids: TextIds) -> TextIds:
    """Return the ids with less padding: the length of the batch's longest caption, `rounded_up`."""
    qwen = min(rounded_up(int(ids.qwen_mask.sum(1).max())), ids.qwen_mask.shape[1])
    t5 = min(rounded_up(int(ids.t5_mask.sum(1).max())), ids.t5_mask.shape[1])
    return TextIds(ids.qwen_ids[:, :qwen], ids.qwen_mask[:, :qwen], ids.t5_ids[:, :t5], ids.t5_mask[:, :t5])


def _batches(items: Iterable[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Yield (list of `size` items, number of real items); the last list is filled up with copies of its last item."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch, size
            batch = []
    if batch:
        yield batch + batch[-1:] * (size - len(batch)), len(batch)
