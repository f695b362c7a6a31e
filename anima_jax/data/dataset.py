"""A run's data: examples read as the dataset TOML says, their cache, and the plan of which step uses which of them."""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anima_jax.checkpoints.locations import is_remote
from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import Size
from anima_jax.data.batch_plan import BatchPlan, data_fingerprint, describe, make_tiers
from anima_jax.data.cache import Cache
from anima_jax.data.encoders import Encoders
from anima_jax.data.examples import Example, contents_of, read_examples, reader_of
from anima_jax.data.file_index import FileIndex
from anima_jax.data.images import ignore_pil_warnings
from anima_jax.data.problems import Problems
from anima_jax.data.store import Store
from anima_jax.errors import UserError
from anima_jax.text.states import rounded_up
from anima_jax.text.tokenizers import Tokenizers

TEXT_ROW_STEP = 16


def read_data(
    config: MainConfig,
    problems: Problems,
    *,
    batch_size_of: Callable[[Size], int],
    evaluated: DatasetConfig | None = None,
    keep: bool = True,
) -> "TrainingData":
    """Return the examples of every source of the dataset TOML, or of `evaluated`; none of them is encoded yet.

    `batch_size_of` returns how many examples of a size a step has, over all processes. What was learned about the files
    is saved in the cache for the next run; without `keep` nothing is written. Raises UserError if there is nothing to
    train on.
    """
    ignore_pil_warnings()
    folders, sources, indexes = [], [], dict[str, FileIndex]()
    for source in (evaluated or config.data).sources:
        reader = reader_of(source, prepare=keep)
        folders.append(config.cache_dir or reader.cache_dir)
        path = os.path.join(folders[-1], f"files-{_short_hash(reader.location)}.jsonl")
        if path not in indexes:
            indexes[path] = FileIndex(path, keep=keep, trust=config.trust_cache)
        sources.append((reader, indexes[path]))
    shuffle_each_epoch = not config.model.cache_text_embeddings
    groups = read_examples(sources, problems, threads=config.map_num_proc, shuffle_each_epoch=shuffle_each_epoch)
    return TrainingData(config, folders, groups, batch_size_of)


class TrainingData:
    """The examples of a run. `encode` leaves out those that cannot be encoded and puts the others into `cache`."""

    cache: Cache
    """Set by `open_cache`."""
    examples: list[Example]
    """All of them; a plan's indices count in this list."""
    plan: BatchPlan
    """Which step uses which examples."""
    captions: list[str]
    """The distinct captions, the empty one first."""

    def __init__(
        self,
        config: MainConfig,
        folders: Sequence[str],
        groups: Sequence[list[Example]],
        batch_size_of: Callable[[Size], int],
    ):
        self._config, self._folders, self._batch_size_of = config, folders, batch_size_of
        self._use(groups)

    def _use(self, groups: Sequence[list[Example]]) -> None:
        """Set everything that follows from the examples of each source."""
        self._groups = groups
        self.examples = [example for group in groups for example in group]
        tiers = make_tiers([example.bucket for example in self.examples], self._batch_size_of)
        self.plan = BatchPlan(tiers, self._config.seed)
        self.captions = ["", *sorted({caption for example in self.examples for caption in example.captions} - {""})]
        self._lengths: np.ndarray | None = None

    @property
    def ids(self) -> np.ndarray:
        """The examples' ids, uint64 (n,)."""
        return np.array([example.id for example in self.examples], np.uint64)

    @property
    def largest_sizes(self) -> list[Size]:
        """The size with the most tokens that occurs in each tier."""
        return [
            max((self.examples[index].bucket.size for index in tier.indices), key=lambda size: size.tokens)
            for tier in self.plan.tiers
        ]

    @property
    def masked(self) -> bool:
        """Whether any example has a mask."""
        return any(example.entry.mask is not None for example in self.examples)

    def fingerprint(self) -> dict[str, Any]:
        """Return `data_fingerprint` of these examples."""
        return data_fingerprint(self.plan, self.ids, contents_of(self.examples))

    def described_fingerprint(self) -> dict[str, int | str]:
        """Return the tiers' fingerprints, keyed by a description of each value for messages."""
        words = {"examples": "how many examples", "batch": "the examples in a step", "set": "which examples"}
        return {
            f"{words.get(name, name)} of tier {tier}": value
            for tier, values in self.fingerprint()["tiers"].items()
            for name, value in values.items()
        }

    def open_cache(self, encoders: Encoders) -> None:
        """Open the cache, and empty it if everything is to be encoded again.

        Data sets of a run may share a cache: open it for all of them before encoding any.
        """
        stores = {folder: Store(folder, local_dir=self._local(folder)) for folder in dict.fromkeys(self._folders)}
        self.cache = Cache(self._config, [stores[folder] for folder in self._folders], encoders)
        if self._config.regenerate_cache:
            self.cache.clear()

    def encode(self, encoders: Encoders, problems: Problems) -> None:
        """Encode what the open cache does not have yet. Raises UserError if nothing is left to train on."""
        self.cache.fill(self._groups, encoders, problems)
        before = len(self.examples)
        encoded = [[each for each in group if self.cache.has_latents(each)] for group in self._groups]
        if problems.count:
            print(problems.summary())
        if missing := before - sum(map(len, encoded)):
            print(f"{missing} of {before} examples cannot be encoded and are left out")
        if not any(encoded):
            raise UserError(f"nothing to train on: none of {before} examples could be encoded")
        if missing:
            self._use(encoded)

    def _local(self, folder: str) -> str | None:
        """Return this machine's folder for copies of a remote cache, or of any if the configuration names one."""
        root = self._config.cache_local_dir
        if root is None:
            if is_remote(folder):
                raise UserError(f"{folder}: a cache next to remote data needs cache_local_dir or cache_dir")
            return None
        return os.path.join(root, _short_hash(folder))

    def describe(self, tokenizers: Tokenizers) -> str:
        """Return the plan as text: tiers, buckets, padding, steps an epoch, programs and how many captions are cut."""
        lines = describe(self.plan.tiers, [example.bucket for example in self.examples])
        longest = self._config.model.max_caption_tokens
        cut = int(np.sum(self.caption_lengths(tokenizers).max(1) > longest))
        if cut:
            lines.append(f"different captions over {longest} tokens, which are cut (max_caption_tokens): {cut:,}")
        return "\n".join(lines)

    def text_rows(self, tokenizers: Tokenizers) -> tuple[int, int]:
        """Return the source and target rows that captions are padded to: those of the longest, rounded up."""
        longest = np.minimum(self.caption_lengths(tokenizers).max(0), self._config.model.max_caption_tokens)
        if any(example.shuffled_each_epoch for example in self.examples):
            # In another order tags can have a few tokens more.
            longest = np.minimum(longest + longest // 4 + TEXT_ROW_STEP, self._config.model.max_caption_tokens)
        source, target = (rounded_up(int(n), TEXT_ROW_STEP) for n in longest)
        return source, target

    def caption_lengths(self, tokenizers: Tokenizers) -> np.ndarray:
        """Return the tokens (Qwen's, T5's) of each of `captions` before any is cut, int64 (n, 2)."""
        if self._lengths is None:
            self._lengths = tokenizers.lengths(self.captions)
        return self._lengths


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
