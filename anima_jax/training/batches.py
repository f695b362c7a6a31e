"""Batches of a run: cached latents and masks of the planned examples, and the text of each in its epoch.

`Batches.load` runs on the host, in the loader's threads. If text is not cached, it returns token ids, which
`OnlineText` encodes on the device just before the step.
Axes: b batch, l image tokens, p the 4 latent pixels of a token, n source and m target text tokens, d features.
"""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import PIXEL_MULTIPLE
from anima_jax.data.dataset import TEXT_ROW_STEP, TrainingData
from anima_jax.data.examples import Example
from anima_jax.data.inpainting import mask_of, with_mask
from anima_jax.diffusion.objective import PIXELS
from anima_jax.diffusion.randomness import split_ids
from anima_jax.models.llm_adapter import Text
from anima_jax.models.qwen3 import Qwen3
from anima_jax.parallel.mesh import current_mesh, replicate, rows_of_process, shard_local_rows
from anima_jax.text.states import encode_tokens, padded, rounded_up, text_rows
from anima_jax.text.tokenizers import Tokenizers
from anima_jax.training.evaluate import NOISE_SEED, padded_batches
from anima_jax.training.run import Run
from anima_jax.training.step import TrainBatch


class Loaded(NamedTuple):
    """The batch of a step, its number of micro-batches, and the index of its tier."""

    batch: TrainBatch
    accumulation: int
    tier: int


class Batches:
    """The batch of each step of a plan. All batches of a tier have the same shape.

    Each process loads the rows of its own devices; `put` combines the rows of all processes into global arrays.
    """

    def __init__(self, run: Run, data: TrainingData, tokenizers: Tokenizers):
        self._run, self._config, self._data, self._tokenizers = run, run.config, data, tokenizers
        self._mesh = current_mesh()
        self._rows = [rows_of_process(self._mesh, tier.batch_size) for tier in data.plan.tiers]
        self._ids_n2 = split_ids(data.ids)
        self._source_length, self._target_length = data.text_rows(tokenizers)

    def load(self, step: int) -> Loaded:
        """Return this process's rows of the batch of the plan's step `step` (from 0), in host memory."""
        planned = self._data.plan.batch(step)
        own = planned.take(self._rows[planned.tier])
        return Loaded(
            self._batch(own.tier, own.indices, own.epochs, self._config.seed), self._accumulations[own.tier], own.tier
        )

    def names(self, step: int) -> list[str]:
        """Return the file names of all examples of the plan's step `step` (from 0), in the order of its batch."""
        return [self._data.examples[index].entry.media.name for index in self._data.plan.batch(step).indices]

    @functools.cached_property
    def _accumulations(self) -> list[int]:
        return self._run.accumulations(self._data)

    def put(self, batch: TrainBatch, tier: int) -> TrainBatch:
        """Return this process's rows as a global batch of tier `tier`, sharded over the devices."""
        return shard_local_rows(batch, self._mesh, self._rows[tier], self._data.plan.tiers[tier].batch_size)

    def for_evaluation(self) -> Iterator[tuple[TrainBatch, np.ndarray]]:
        """Yield every example once, in batches on the devices, with the weights of the examples: 0 for padding.

        All batches of a tier have the same size; the last one is padded.
        """
        for number, tier in enumerate(self._data.plan.tiers):
            for rows, weights in padded_batches(len(tier.indices), tier.batch_size):
                indices = tier.indices[rows[self._rows[number]]]
                first = np.zeros(len(indices), np.int64)
                yield self.put(self._batch(number, indices, first, NOISE_SEED), number), weights

    def _batch(self, tier: int, indices: np.ndarray, epochs: np.ndarray, mask_seed: int) -> TrainBatch:
        of_tier = self._data.plan.tiers[tier]
        length = of_tier.tokens
        examples = [self._data.examples[index] for index in indices]
        seed = self._config.seed
        captions = [example.caption(seed, int(epoch)) for example, epoch in zip(examples, epochs, strict=True)]
        return TrainBatch(
            latents_blc=padded([self._latents(example) for example in examples], length)[0],
            grid_b3=np.array([example.bucket.grid for example in examples], np.int32),
            ids_b2=self._ids_n2[indices],
            epochs_b=epochs.astype(np.int32),
            text=self._text(captions),
            mask_blp=self._masks(examples, length) if self._data.masked else None,
            full=() if of_tier.full else None,
            control_blp=self._controls(examples, epochs, mask_seed, length),
        )

    def unconditional(self) -> Text:
        """Return the empty caption, with a batch axis of 1, replicated on all devices."""
        return replicate(self._text([""]))

    def _latents(self, example: Example) -> np.ndarray:
        """Return the latent tokens (l, c) of an example, followed by those of its reference pictures."""
        latents_lc = self._data.cache.latents(example)
        if not example.bucket.references:
            return latents_lc
        return np.concatenate([latents_lc, self._data.cache.references(example)])

    def _controls(
        self, examples: Sequence[Example], epochs: np.ndarray, mask_seed: int, length: int
    ) -> np.ndarray | None:
        """Return the control pictures as `TrainBatch.control_blp`, with random masks of these epochs to inpaint."""
        if not self._config.control_channels:
            return None
        features = PIXEL_MULTIPLE**2 * self._config.control_channels
        patches_blp = np.zeros((len(examples), length, features), np.uint8)
        for row, (example, epoch) in enumerate(zip(examples, epochs, strict=True)):
            control_lp = self._data.cache.control(example)
            if self._config.pairs == "inpaint":
                own_yx = self._data.cache.inpaint_mask(example)
                control_lp = with_mask(control_lp, mask_of(example, own_yx, mask_seed, int(epoch)))
            patches_blp[row, : len(control_lp)] = control_lp
        return patches_blp

    def _masks(self, examples: Sequence[Example], length: int) -> np.ndarray:
        weights_blp = np.ones((len(examples), length, PIXELS), np.float32)
        for row, example in enumerate(examples):
            mask_lp = self._data.cache.mask(example)
            if mask_lp is not None:
                weights_blp[row, : len(mask_lp)] = mask_lp
        return weights_blp

    def _text(self, captions: Sequence[str]) -> Text:
        """Return the text states of the captions, or the text encoder's token ids (b, n) if text is not cached."""
        if self._config.model.cache_text_embeddings:
            rows = [self._data.cache.text(caption) for caption in captions]
            return text_rows(rows, self._source_length, self._target_length)
        ids = self._tokenizers.training_ids(captions, self._config.model.max_caption_tokens)
        # Shuffled tags may need more tokens than reserved; the step is then compiled for this batch's length.
        source = rounded_up(max(self._source_length, int(ids.qwen_mask.sum(1).max())), TEXT_ROW_STEP)
        target = rounded_up(max(self._target_length, int(ids.t5_mask.sum(1).max())), TEXT_ROW_STEP)
        return Text(
            _resized(ids.qwen_ids, source),
            _resized(ids.qwen_mask, source),
            *(_resized(array, target) for array in (ids.t5_ids, ids.t5_mask)),
        )


def _resized(rows_bn: np.ndarray, length: int) -> np.ndarray:
    """Return the rows, cut or padded with zeros to `length` columns. Callers cut off only padding."""
    return np.pad(rows_bn[:, :length], ((0, 0), (0, max(0, length - rows_bn.shape[1]))))


class OnlineText:
    """Encodes the text of each batch just before its step, with the same program as sampling."""

    def __init__(self, qwen: Qwen3, config: MainConfig):
        self._encode = encode_tokens(qwen, jnp.dtype(config.compute_dtype))
        self._last: Text | None = None

    def __call__(self, text: Text) -> Text:
        """Return `text` with text states in place of the token ids."""
        self._last = text
        return text._replace(source_bnd=self._encode(text.source_bnd, text.source_mask_bn))

    def share(self, seconds_a_step: float) -> float:
        """Return the encoder's share of a step's time, 0 to 1, measured by encoding the last batch again."""
        if self._last is None:
            return 0.0
        started = time.monotonic()
        jax.block_until_ready(self(self._last).source_bnd)
        return min(1.0, (time.monotonic() - started) / max(seconds_a_step, 1e-9))
