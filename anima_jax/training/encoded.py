"""A run's examples: read as the dataset TOML says, encoded once, then handed out in batches.

Axes: n examples, l image tokens, c the 64 values of a token.
"""

from collections.abc import Sequence

import numpy as np

from anima_jax import encode
from anima_jax.config.dataset import DirectorySource
from anima_jax.config.main import MainConfig
from anima_jax.data.examples import Example, directory_examples
from anima_jax.data.tfds_source import tfds_examples
from anima_jax.diffusion.randomness import split_ids
from anima_jax.models.dit import PATCH
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.pipeline import PIXELS_PER_LATENT
from anima_jax.text.tokenizers import Tokenizers
from anima_jax.training import report
from anima_jax.training.step import Batch


def read_data(config: MainConfig) -> list[Example]:
    """The examples of every source of the dataset TOML, in its order."""
    examples: list[Example] = []
    for source in config.data.sources:
        common = {
            "caption_prefix": source.caption_prefix,
            "num_repeats": source.num_repeats,
            "skip_empty_caption": source.skip_empty_caption,
        }
        if isinstance(source, DirectorySource):
            examples += directory_examples(source.path, source.size_wh, **common)
        else:
            examples += tfds_examples(
                source.name or source.builder_dir or "",
                source.split,
                source.image,
                source.caption,
                source.size_wh,
                data_dir=source.data_dir,
            )
    return examples


class EncodedData:
    """The examples as latent tokens and text states, in host memory; `batch` gives those of one step."""

    def __init__(
        self, config: MainConfig, examples: Sequence[Example], vae: WanVAE, qwen: Qwen3, tokenizers: Tokenizers
    ):
        width, height = config.data.size_wh
        pictures = (example.pixels() for example in examples)
        size = config.caching_batch_size
        encoded = encode.encode_pictures(vae, pictures, batch_size=size, dtype=config.compute_dtype)
        self._latents_nlc = np.stack(list(report.bar(encoded, len(examples), "picture")))
        self._grid_3 = (1, *(side // PIXELS_PER_LATENT // PATCH for side in (height, width)))
        self._ids_n2 = split_ids(np.array([example.id for example in examples], np.uint64))
        self._captions = [example.caption for example in examples]
        self._texts = encode.encode_captions(qwen, tokenizers, ["", *self._captions], dtype=config.compute_dtype)
        self.unconditional = self._texts.rows([""]) if config.uncond_fraction else None

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> Batch:
        """The examples of these indices, in these epochs."""
        return Batch(
            latents_blc=self._latents_nlc[indices],
            grid_b3=np.tile(np.array(self._grid_3, np.int32), (len(indices), 1)),
            ids_b2=self._ids_n2[indices],
            epochs_b=epochs.astype(np.int32),
            text=self._texts.rows([self._captions[index] for index in indices]),
        )
