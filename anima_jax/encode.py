"""Pixels → latents, captions → text states: the one place where data, models and devices meet.

Axes: b batch, l image tokens, n source (Qwen3) tokens, m target (T5) tokens, d features, c the 64 values of a token.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from anima_jax.models.dit import patchify
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import merge, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.text.tokenizers import TextIds, Tokenizers

LENGTH_STEP = 64
"""Token lists are padded to a multiple of this, so that captions of many lengths share a few programs."""


def rounded_up(length: int, step: int = LENGTH_STEP) -> int:
    """`length`, at least 1, rounded up to a multiple of `step`."""
    return max(1, -(-length // step)) * step


def encode_pictures(
    vae: WanVAE, pictures: Iterable[np.ndarray], *, batch_size: int = 1, dtype: DTypeLike = jnp.float32
) -> Iterator[np.ndarray]:
    """Latent tokens (l, c), float32, of each uint8 picture (y, x, 3); all pictures have one size."""
    graphdef, params = split(vae)

    @jax.jit
    def encode(params, pixels_byxc):
        pixels = pixels_byxc[:, None].astype(jnp.float32) / 127.5 - 1.0
        return patchify(merge(graphdef, params).encode(pixels.astype(dtype)).astype(jnp.float32))

    for batch, real in _batches(pictures, batch_size):
        yield from np.asarray(encode(params, np.stack(batch)))[:real]


def encode_tokens(qwen: Qwen3, dtype: DTypeLike) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """A jitted (ids_bn, mask_bn) → Qwen3's states (b, n, d) in `dtype`, computed in it; padded rows are 0."""
    graphdef, params = split(qwen)
    run = jax.jit(lambda params, ids_bn, mask_bn: merge(graphdef, params)(ids_bn, mask_bn, dtype=dtype))
    return lambda ids_bn, mask_bn: run(params, ids_bn, mask_bn)


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """The different captions of a data set, encoded, without padding; `rows` gives any of them as a batch."""

    index: dict[str, int]
    states_nd: list[np.ndarray]
    target_ids_m: list[np.ndarray]

    def rows(self, captions: Sequence[str]) -> Text:
        """The captions as a batch, padded to the lengths that the whole table needs."""
        picked = [self.index[caption] for caption in captions]
        source_length, target_length = self._lengths
        source_bnd, source_mask_bn = padded([self.states_nd[i] for i in picked], source_length)
        target_bm, target_mask_bm = padded([self.target_ids_m[i] for i in picked], target_length)
        return Text(source_bnd, source_mask_bn, target_bm, target_mask_bm)

    @functools.cached_property
    def _lengths(self) -> tuple[int, int]:
        """Rows that the longest caption needs, of source and of target."""
        source, target = (max(map(len, arrays)) for arrays in (self.states_nd, self.target_ids_m))
        return rounded_up(source, step=16), rounded_up(target, step=16)


def encode_captions(
    qwen: Qwen3, tokenizers: Tokenizers, captions: Iterable[str], *, batch_size: int = 8, dtype: DTypeLike
) -> CaptionTable:
    """Every different caption once, as in training: the text as it is, cut off at 512 tokens."""
    different = list(dict.fromkeys(captions))
    run = encode_tokens(qwen, dtype)
    states: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for batch, real in _batches(different, batch_size):
        ids = _trimmed(tokenizers.training_ids(batch))
        states_bnd = np.asarray(run(ids.qwen_ids, ids.qwen_mask))
        for row in range(real):
            states.append(states_bnd[row, : ids.qwen_mask[row].sum()])
            targets.append(ids.t5_ids[row, : ids.t5_mask[row].sum()])
    return CaptionTable({caption: i for i, caption in enumerate(different)}, states, targets)


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
