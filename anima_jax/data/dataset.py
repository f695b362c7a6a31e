"""A run's data: examples read as the dataset TOML says, their cache, and the plan of which step sees which of them."""

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence

import numpy as np

from anima_jax.checkpoints.locations import is_remote
from anima_jax.config.dataset import DatasetConfig, DirectorySource, TfdsSource
from anima_jax.config.main import MainConfig
from anima_jax.data.batch_plan import BatchPlan, data_fingerprint, describe, make_tiers
from anima_jax.data.buckets import Size
from anima_jax.data.cache import Cache, Encoders
from anima_jax.data.encode import rounded_up
from anima_jax.data.examples import Example, Source, contents_of, read_examples
from anima_jax.data.manifest import Memo
from anima_jax.data.problems import Problems
from anima_jax.data.store import Store
from anima_jax.data.tfds_source import TfdsSplit
from anima_jax.errors import UserError
from anima_jax.text.tokenizers import Tokenizers

log = logging.getLogger(__name__)

TEXT_ROW_STEP = 16

CACHE = os.path.join("cache", "anima_jax")
"""Where a source's cache lies in the source's own folder."""


def read_data(
    config: MainConfig,
    problems: Problems,
    *,
    batch_size_of: Callable[[Size], int],
    evaluated: DatasetConfig | None = None,
    keep: bool = True,
) -> "TrainingData":
    """The examples of every source of the dataset TOML, in its order; none of them encoded yet.

    With `evaluated` they are those of that data set. `batch_size_of` returns how many examples of a size a step has,
    over all processes. What is learned of the files is kept
    beside the cache for the next run; without `keep` nothing is written. Raises UserError if there is nothing to train
    on.
    """
    folders, sources, memos = [], [], dict[str, Memo]()
    for source, options in config.options_of(evaluated or config.data):
        place = source.path if isinstance(source, DirectorySource) else _split(source)
        folders.append(config.cache_dir or _beside(source))
        memo = os.path.join(folders[-1], f"files-{hashlib.sha256(repr(place).encode()).hexdigest()[:16]}.jsonl")
        if memo not in memos:
            memos[memo] = Memo(memo, keep=keep, trust=config.trust_cache)
        sources.append(Source(place, options, memos[memo]))
    groups = read_examples(sources, problems, threads=config.map_num_proc, prepare=keep)
    return TrainingData(config, folders, groups, batch_size_of)


def _split(source: TfdsSource) -> TfdsSplit:
    name = source.name or source.builder_dir or ""
    return TfdsSplit(name, source.split, source.image, source.caption, source.data_dir)


def _beside(source: DirectorySource | TfdsSource) -> str:
    """The folder for a source's cache where the configuration names none."""
    if isinstance(source, DirectorySource):
        return os.path.join(source.path, CACHE)
    if source.builder_dir:
        return os.path.join(source.builder_dir, CACHE)
    # tensorflow-datasets' own rule, without importing it.
    root = source.data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return os.path.join(os.path.expanduser(root), (source.name or "").partition(":")[0], CACHE)


class TrainingData:
    """The examples of a run. After `encode`, those that cannot be encoded are gone and the rest are in `cache`."""

    cache: Cache
    """There after `open_cache`."""

    def __init__(
        self,
        config: MainConfig,
        folders: Sequence[str],
        groups: Sequence[list[Example]],
        batch_size_of: Callable[[Size], int],
    ):
        self._config, self._folders, self._groups, self._batch_size_of = config, folders, groups, batch_size_of
        self._lengths: np.ndarray | None = None

    @functools.cached_property
    def examples(self) -> list[Example]:
        """All of them; a plan's indices count in this list."""
        return [example for group in self._groups for example in group]

    @property
    def ids(self) -> np.ndarray:
        """(n,) uint64: each example's."""
        return np.array([example.id for example in self.examples], np.uint64)

    @functools.cached_property
    def plan(self) -> BatchPlan:
        """Which step sees which examples."""
        tiers = make_tiers([example.bucket for example in self.examples], self._batch_size_of)
        return BatchPlan(tiers, self._config.seed)

    @property
    def largest_sizes(self) -> list[Size]:
        """The size with the most tokens that occurs in each tier."""
        return [
            max((self.examples[index].bucket.size for index in tier.indices), key=lambda size: size.tokens)
            for tier in self.plan.tiers
        ]

    @functools.cached_property
    def captions(self) -> list[str]:
        """The different captions, and the empty one first."""
        return ["", *sorted({caption for example in self.examples for caption in example.captions} - {""})]

    @functools.cached_property
    def masked(self) -> bool:
        """Whether any example has a mask."""
        return any(example.entry.mask is not None for example in self.examples)

    def facts(self) -> dict[str, int | str]:
        """Hashes of which examples each tier has, in which order, and of what they are, by a person's words."""
        tiers = data_fingerprint(self.plan, self.ids, contents_of(self.examples))["tiers"]
        words = {"examples": "how many examples", "batch": "the examples in a step", "set": "which examples"}
        return {
            f"{words.get(name, name)} of tier {tier}": value
            for tier, each in tiers.items()
            for name, value in each.items()
        }

    def open_cache(self, encoders: Encoders) -> None:
        """Look into the cache, or empty it if all is to be encoded anew.

        Data sets of a run may share one: open them all before any is encoded.
        """
        stores = {folder: Store(folder, local_dir=self._local(folder)) for folder in dict.fromkeys(self._folders)}
        self.cache = Cache(self._config, [stores[folder] for folder in self._folders], encoders)
        if self._config.regenerate_cache:
            self.cache.clear()

    def encode(self, encoders: Encoders, problems: Problems) -> None:
        """Put into the cache, which is open, what is not there yet. Raises UserError if nothing is left to train on."""
        self.cache.fill(self._groups, encoders, problems)
        before = len(self.examples)
        self._groups = [[each for each in group if self.cache.has_latents(each)] for group in self._groups]
        self._lengths = None
        for name in ("examples", "plan", "captions", "masked"):
            self.__dict__.pop(name, None)
        if problems.count:
            print(problems.summary())
        if lost := before - len(self.examples):
            print(f"{lost} of {before} examples cannot be encoded and are left out")
        if not self.examples:
            raise UserError(f"nothing to train on: none of {before} examples could be encoded")

    def _local(self, folder: str) -> str | None:
        """Where a cache at an address, or any if the configuration says so, has its copy on this machine."""
        root = self._config.cache_local_dir
        if root is None:
            if is_remote(folder):
                raise UserError(f"{folder}: a cache beside data at an address needs cache_local_dir or cache_dir")
            return None
        return os.path.join(root, hashlib.sha256(folder.encode()).hexdigest()[:16])

    def describe(self, tokenizers: Tokenizers) -> str:
        """The plan for a person: tiers, buckets, padding, steps an epoch, programs, and captions that are too long."""
        lines = describe(self.plan.tiers, [example.bucket for example in self.examples])
        longest = self._config.model.max_caption_tokens
        cut = int(np.sum(self.caption_lengths(tokenizers).max(1) > longest))
        if cut:
            lines.append(f"different captions over {longest} tokens, which are cut (max_caption_tokens): {cut:,}")
        return "\n".join(lines)

    def text_rows(self, tokenizers: Tokenizers) -> tuple[int, int]:
        """Rows that captions are padded to, the source's and the target's: those of the longest, rounded up."""
        longest = np.minimum(self.caption_lengths(tokenizers).max(0), self._config.model.max_caption_tokens)
        if any(example.options.shuffle_anew for example in self.examples):
            # In another order tags can take some tokens more.
            longest = np.minimum(longest + longest // 4 + TEXT_ROW_STEP, self._config.model.max_caption_tokens)
        source, target = (rounded_up(int(n), TEXT_ROW_STEP) for n in longest)
        return source, target

    def caption_lengths(self, tokenizers: Tokenizers) -> np.ndarray:
        """Tokens (Qwen's, T5's) of each of `captions` before any is cut, int64 (n, 2)."""
        if self._lengths is None:
            self._lengths = tokenizers.lengths(self.captions)
        return self._lengths
