"""Batches of a run: planned examples, their cached latents and masks, and the text that each shows in this epoch.

`Batches.load` runs in the loader's threads and touches the host alone; text that is not cached leaves it as token ids,
from which `OnlineText` makes states on the device just before the step.
Axes: b batch, l image tokens, p the 4 latent pixels of a token, n source and m target text tokens, d features.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.config.main import MainConfig
from anima_jax.data.examples import Example
from anima_jax.data.plan import Plan
from anima_jax.diffusion.objective import PIXELS
from anima_jax.diffusion.randomness import split_ids
from anima_jax.encode import encode_tokens, padded, rounded_up, text_rows
from anima_jax.models.llm_adapter import Text
from anima_jax.models.qwen3 import Qwen3
from anima_jax.text.tokenizers import Tokenizers
from anima_jax.training.cache import Cache
from anima_jax.training.step import Batch

LENGTH_STEP = 16
"""Captions are padded to the longest of the run, rounded up to a multiple of this."""


def caption_lengths(examples: Sequence[Example], tokenizers: Tokenizers) -> np.ndarray:
    """Tokens (Qwen's, T5's) of each different caption of the examples and of the empty one, uncut, int64 (n, 2)."""
    captions = {caption for example in examples for caption in example.captions}
    return tokenizers.lengths(["", *sorted(captions)])


class Batches:
    """What each step of a plan is given. All batches of a tier have one shape."""

    def __init__(
        self,
        config: MainConfig,
        examples: Sequence[Example],
        plan: Plan,
        cache: Cache,
        tokenizers: Tokenizers,
        lengths_n2: np.ndarray,
    ):
        self._config, self._examples, self._plan, self._cache = config, examples, plan, cache
        self._tokenizers = tokenizers
        self._masked = any(example.entry.mask is not None for example in examples)
        self._ids_n2 = split_ids(np.array([example.id for example in examples], np.uint64))
        longest = np.minimum(lengths_n2.max(0), config.model.max_caption_tokens)
        self._source_length, self._target_length = (rounded_up(int(n), LENGTH_STEP) for n in longest)

    def load(self, step: int) -> Batch:
        """The batch of step number `step` (from 0), in host memory."""
        planned = self._plan.batch(step).of_process(jax.process_index(), jax.process_count())
        examples = [self._examples[index] for index in planned.indices]
        length = self._plan.tiers[planned.tier].tokens
        captions = [
            example.caption(self._config.seed, int(epoch))
            for example, epoch in zip(examples, planned.epochs, strict=True)
        ]
        return Batch(
            latents_blc=padded([self._cache.latents(example) for example in examples], length)[0],
            grid_b3=np.array([example.bucket.size.grid for example in examples], np.int32),
            ids_b2=self._ids_n2[planned.indices],
            epochs_b=planned.epochs.astype(np.int32),
            text=self._text(captions),
            mask_blp=self._masks(examples, length) if self._masked else None,
        )

    def unconditional(self) -> Text | None:
        """The empty caption, with a batch axis of 1, if the run drops captions."""
        return self._text([""]) if self._config.uncond_fraction else None

    def _masks(self, examples: Sequence[Example], length: int) -> np.ndarray:
        weights_blp = np.ones((len(examples), length, PIXELS), np.float32)
        for row, example in enumerate(examples):
            mask_lp = self._cache.mask(example)
            if mask_lp is not None:
                weights_blp[row, : len(mask_lp)] = mask_lp
        return weights_blp

    def _text(self, captions: Sequence[str]) -> Text:
        """States of the captions, or in their place the text encoder's ids (b, n) if text is not cached."""
        if self._config.model.cache_text_embeddings:
            rows = [self._cache.text(caption) for caption in captions]
            return text_rows(rows, self._source_length, self._target_length)
        ids = self._tokenizers.training_ids(captions, self._config.model.max_caption_tokens)
        # Shuffled tags can take a few tokens more than the caption as it is written.
        source = rounded_up(max(self._source_length, int(ids.qwen_mask.sum(1).max())), LENGTH_STEP)
        target = rounded_up(max(self._target_length, int(ids.t5_mask.sum(1).max())), LENGTH_STEP)
        return Text(_resized(ids.qwen_ids, source), _resized(ids.qwen_mask, source), *(
            _resized(array, target) for array in (ids.t5_ids, ids.t5_mask)
        ))


def _resized(rows_bn: np.ndarray, length: int) -> np.ndarray:
    """Cut, or padded with zeros, to `length` columns; what is cut off is padding."""
    return np.pad(rows_bn[:, :length], ((0, 0), (0, max(0, length - rows_bn.shape[1]))))


class OnlineText:
    """Encodes the text of each batch just before its step, with the program that sampling uses too."""

    def __init__(self, qwen: Qwen3, dtype: str):
        self._encode = encode_tokens(qwen, jnp.dtype(dtype))

    def __call__(self, text: Text) -> Text:
        """`text` with states in place of the ids."""
        return text._replace(source_bnd=self._encode(text.source_bnd, text.source_mask_bn))

    def seconds(self, text: Text) -> float:
        """How long a batch takes once the program is compiled."""
        jax.block_until_ready(self(text).source_bnd)
        started = time.monotonic()
        jax.block_until_ready(self(text).source_bnd)
        return time.monotonic() - started
