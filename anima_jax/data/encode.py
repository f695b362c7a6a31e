"""Pixels → latents, captions → text states: the one place where data, models and devices meet.

Axes: b batch, t frames, y rows, x columns, l image tokens, n source (Qwen3) tokens, m target (T5) tokens, d features,
c the 64 values of a token.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.models.dit import patchify
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, merge, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel.mesh import batch_sharding, local_mesh, replicated, shard_batch
from anima_jax.text.tokenizers import TRAINING_LENGTH, TextIds, Tokenizers

LENGTH_STEP = 64
"""Token lists are padded to a multiple of this, so that captions of many lengths share a few programs."""


def rounded_up(length: int, step: int = LENGTH_STEP) -> int:
    """`length`, at least 1, rounded up to a multiple of `step`."""
    return max(1, -(-length // step)) * step


def clip_encoder(
    vae: WanVAE, *, batch_size: int = 1, dtype: DTypeLike = jnp.float32
) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """A function from uint8 clips (t, y, x, 3), all of one size, to their latent tokens (l, c), float32, in order.

    A picture is a clip of one frame. Each local device takes `batch_size` clips at a time. While one batch is on the
    devices the next is read. Each size compiles a program, once.
    """
    graphdef, params = split(vae)
    mesh = local_mesh()
    params = jax.device_put(params, replicated(mesh))

    @functools.partial(jax.jit, out_shardings=batch_sharding(mesh, mesh.size))
    def encode(params, pixels_btyxc):
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


def encode_tokens(qwen: Qwen3, dtype: DTypeLike) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """`text_states` of this encoder: (ids_bn, mask_bn) → (b, n, d), where its parameters lie."""
    graphdef, params = split(qwen)
    return lambda ids_bn, mask_bn: text_states(params, ids_bn, mask_bn, graphdef=graphdef, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def text_states(params: Params, ids_bn, mask_bn, *, graphdef: nnx.GraphDef, dtype: Any) -> jax.Array:
    """Qwen3's states (b, n, d) in `dtype`, computed in it; padded rows are 0."""
    return merge(graphdef, params)(ids_bn, mask_bn, dtype=dtype)


class EncodedText(NamedTuple):
    """One caption without padding: Qwen3's states (n, d) and T5 ids (m,)."""

    states_nd: np.ndarray
    target_ids_m: np.ndarray


def caption_encoder(
    qwen: Qwen3, tokenizers: Tokenizers, *, batch_size: int = 8, max_tokens: int = TRAINING_LENGTH, dtype: DTypeLike
) -> Callable[[Iterable[str]], Iterator[EncodedText]]:
    """A function that encodes captions as in training: the text as it is, cut at `max_tokens` tokens of either kind.

    Each local device takes `batch_size` captions at a time.
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


def text_rows(captions: Sequence[EncodedText], source_length: int, target_length: int) -> Text:
    """Captions as a batch, padded to these lengths."""
    source_bnd, source_mask_bn = padded([caption.states_nd for caption in captions], source_length)
    target_bm, target_mask_bm = padded([caption.target_ids_m for caption in captions], target_length)
    return Text(source_bnd, source_mask_bn, target_bm, target_mask_bm)


def _trimmed(ids: TextIds) -> TextIds:
    """Without the padding that no caption of the batch needs."""
    qwen = min(rounded_up(int(ids.qwen_mask.sum(1).max())), ids.qwen_mask.shape[1])
    t5 = min(rounded_up(int(ids.t5_mask.sum(1).max())), ids.t5_mask.shape[1])
    return TextIds(ids.qwen_ids[:, :qwen], ids.qwen_mask[:, :qwen], ids.t5_ids[:, :t5], ids.t5_mask[:, :t5])


def padded(arrays: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """The arrays (n, …) as one (b, length, …), zeros behind each, and the mask (b, length), int32, of what is real."""
    joined = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    mask = np.zeros((len(arrays), length), np.int32)
    for row, array in enumerate(arrays):
        joined[row, : len(array)] = array
        mask[row, : len(array)] = 1
    return joined, mask


def _batches(items: Iterable, size: int) -> Iterator[tuple[list, int]]:
    """Lists of `size` items and how many of them are real: the last list repeats its last item."""
    batch: list = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch, size
            batch = []
    if batch:
        yield batch + batch[-1:] * (size - len(batch)), len(batch)
