"""The data of a run: the examples of the dataset TOML, their cache, and the plan of which step uses which examples."""

import collections
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from anima_jax.checkpoints.locations import is_remote
from anima_jax.config.dataset import DirectorySource, TfdsSource
from anima_jax.config.eval_dataset import EvalDataset
from anima_jax.config.main import MainConfig
from anima_jax.config.sizes import Size
from anima_jax.data.batch_plan import BatchPlan, data_fingerprint, describe, make_tiers
from anima_jax.data.buckets import Bucket
from anima_jax.data.cache import Cache
from anima_jax.data.encoders import Encoders
from anima_jax.data.examples import Example, contents_of, read_examples, reader_of
from anima_jax.data.file_index import FileIndex
from anima_jax.data.images import set_up_pillow
from anima_jax.data.problems import Problems
from anima_jax.data.sources import SourceReader
from anima_jax.data.store import Store
from anima_jax.errors import UserError
from anima_jax.text.states import rounded_up
from anima_jax.text.tokenizers import Tokenizers

TEXT_ROW_STEP = 16

TAGS_COUNTED, TAG_LENGTH = 10_000, 200
"""Maximum number of tags that `TrainingData.tag_counts` returns, at most a tenth of it per source, and of characters of
a tag: they are for the header of a file."""


def read_data(
    config: MainConfig,
    problems: Problems,
    *,
    batch_size_of: Callable[[Size], int],
    eval_dataset: EvalDataset | None = None,
    keep: bool = True,
) -> "TrainingData":
    """Return the examples of every source of the dataset TOML, or of `eval_dataset` if given; none is encoded yet.

    `batch_size_of` maps a size to the number of examples per step, over all processes. The file index is saved in the
    cache for the next run; without `keep` nothing is written. Raises UserError if there are no examples.
    """
    set_up_pillow()
    folders, sources, indexes = [], [], dict[str, FileIndex]()
    for source in (eval_dataset or config).data.sources:
        reader = reader_of(source, prepare=keep)
        folders.append(config.cache_dir or reader.cache_dir)
        path = index_path(folders[-1], reader)
        if path not in indexes:
            indexes[path] = FileIndex(path, keep=keep, trust=config.trust_cache)
        sources.append((reader, indexes[path]))
    shuffle_each_epoch = not config.model.cache_text_embeddings
    empty = f"{eval_dataset.config}: nothing to evaluate" if eval_dataset else f"{config.dataset}: nothing to train on"
    groups = read_examples(
        sources,
        problems,
        threads=config.map_num_proc,
        shuffle_each_epoch=shuffle_each_epoch,
        pairs=config.pairs,
        empty_error=empty,
    )
    return TrainingData(config, folders, groups, batch_size_of, empty_error=empty)


class TrainingData:
    """The examples of a run. `encode` drops those that cannot be encoded and writes the others to `cache`.

    `empty_error` begins the error of a data set without any example that can be encoded.
    """

    cache: Cache
    """Set by `open_cache`."""
    examples: list[Example]
    """All examples; the indices in `plan` refer to this list."""
    plan: BatchPlan
    """The batch of each step."""
    captions: list[str]
    """The distinct captions, the empty one first."""

    def __init__(
        self,
        config: MainConfig,
        folders: Sequence[str],
        groups: Sequence[list[Example]],
        batch_size_of: Callable[[Size], int],
        *,
        empty_error: str = "nothing to train on",
    ):
        self._config, self._folders, self._batch_size_of = config, folders, batch_size_of
        self._empty_error = empty_error
        self._use(groups)

    def use_config(self, config: MainConfig) -> None:
        """Use another configuration, with the same sources and the same examples in a step, before `open_cache`."""
        self._config = config

    def _use(self, groups: Sequence[list[Example]]) -> None:
        """Set all attributes that are derived from the examples of each source."""
        self._groups = groups
        self.examples = [example for group in groups for example in group]
        tiers = make_tiers([example.bucket for example in self.examples], self._batch_size_of)
        self.plan = BatchPlan(tiers, self._config.seed)
        self.captions = ["", *sorted({caption for example in self.examples for caption in example.captions} - {""})]
        self._lengths: np.ndarray | None = None
        self._tag_counts: dict[str, dict[str, int]] | None = None

    @property
    def ids(self) -> np.ndarray:
        """Ids of the examples, uint64 (n,)."""
        return np.array([example.id for example in self.examples], np.uint64)

    @property
    def largest_buckets(self) -> list[Bucket]:
        """The bucket with the most tokens in each tier."""
        return [
            max((self.examples[index].bucket for index in tier.indices), key=lambda bucket: bucket.tokens)
            for tier in self.plan.tiers
        ]

    @property
    def largest_sizes(self) -> list[Size]:
        """The size of each of `largest_buckets`."""
        return [bucket.size for bucket in self.largest_buckets]

    @property
    def masked(self) -> bool:
        """Whether any example has a mask."""
        return any(example.entry.mask is not None for example in self.examples)

    def tag_counts(self) -> dict[str, dict[str, int]]:
        """Return source → tag → number of its occurrences, one caption per image, for the most frequent tags.

        As in sd-scripts' `ss_tag_frequency`, tags are what commas separate, in lower case.
        """
        if self._tag_counts is None:
            limit = max(1, TAGS_COUNTED // max(10, len(self._groups)))
            self._tag_counts = {name: most_frequent_tags(group, limit) for name, group in self._named_groups()}
        return self._tag_counts

    def image_counts(self) -> dict[str, dict[str, float]]:
        """Return source → {"n_repeats": …, "img_count": …}, as in sd-scripts' `ss_dataset_dirs`."""
        return {
            name: {"n_repeats": group[0].source.num_repeats, "img_count": len({id(each.entry) for each in group})}
            for name, group in self._named_groups()
        }

    def _named_groups(self) -> Iterator[tuple[str, list[Example]]]:
        """Yield the name of each source, which is that of its folder and made unique, with its examples."""
        names = collections.Counter[str]()
        for group in filter(None, self._groups):
            source = group[0].source
            place = source.path if isinstance(source, DirectorySource) else ""
            if isinstance(source, TfdsSource):
                place = source.name or source.builder_dir or ""
            name = os.path.basename(os.path.normpath(place))
            names[name] += 1
            yield f"{name} ({names[name]})" if names[name] > 1 else name, group

    def fingerprint(self) -> dict[str, Any]:
        """Return `data_fingerprint` of these examples."""
        return data_fingerprint(self.plan, self.ids, contents_of(self.examples))

    def described_fingerprint(self) -> dict[str, int | str]:
        """Return the fingerprints of the tiers, keyed by a description of each value for messages."""
        words = {"examples": "how many examples", "batch": "the examples in a step", "set": "which examples"}
        return {
            f"{words.get(name, name)} of tier {tier}": value
            for tier, values in self.fingerprint()["tiers"].items()
            for name, value in values.items()
        }

    def open_cache(self, encoders: Encoders) -> None:
        """Open the cache, and clear it if `regenerate_cache` is set.

        The data sets of a run may share a cache, so open it for all of them before encoding any.
        """
        stores = {folder: Store(folder, local_dir=self._local(folder)) for folder in dict.fromkeys(self._folders)}
        self.cache = Cache(self._config, [stores[folder] for folder in self._folders], encoders)
        if self._config.regenerate_cache:
            self.cache.clear()

    def encode(self, encoders: Encoders, problems: Problems) -> None:
        """Encode the examples that are missing from the open cache. Raises UserError if no example can be encoded."""
        self.cache.fill(self._groups, encoders, problems)
        before = len(self.examples)
        encoded = [[each for each in group if self.cache.is_complete(each)] for group in self._groups]
        if problems.count:
            print(problems.summary())
        if missing := before - sum(map(len, encoded)):
            print(f"{missing} of {before} examples cannot be encoded and are left out")
        if not any(encoded):
            raise UserError(f"{self._empty_error}: none of {before} examples could be encoded")
        if missing:
            self._use(encoded)

    def _local(self, folder: str) -> str | None:
        """Return the local folder for copies of the cache in `folder`, or None if the cache is read in place.

        Raises UserError if a remote cache has no local folder.
        """
        root = self._config.cache_local_dir
        if root is None:
            if is_remote(folder):
                raise UserError(f"{folder}: a cache next to remote data needs cache_local_dir or cache_dir")
            return None
        return os.path.join(root, _short_hash(folder))

    def describe(self, tokenizers: Tokenizers) -> str:
        """Describe the plan: tiers, buckets, padding, steps per epoch, programs and number of truncated captions."""
        lines = describe(self.plan.tiers, [example.bucket for example in self.examples])
        longest = self._config.model.max_caption_tokens
        cut = int(np.sum(self.caption_lengths(tokenizers).max(1) > longest))
        if cut:
            lines.append(f"different captions over {longest} tokens, which are cut (max_caption_tokens): {cut:,}")
        return "\n".join(lines)

    def text_rows(self, tokenizers: Tokenizers) -> tuple[int, int]:
        """Return the (source, target) token counts that captions are padded to: the longest caption's, rounded up."""
        longest = np.minimum(self.caption_lengths(tokenizers).max(0), self._config.model.max_caption_tokens)
        if any(example.shuffled_each_epoch for example in self.examples):
            # Tags in another order may need a few more tokens.
            longest = np.minimum(longest + longest // 4 + TEXT_ROW_STEP, self._config.model.max_caption_tokens)
        source, target = (rounded_up(int(n), TEXT_ROW_STEP) for n in longest)
        return source, target

    def caption_lengths(self, tokenizers: Tokenizers) -> np.ndarray:
        """Return the number of (Qwen3, T5) tokens of each of `captions` before truncation, int64 (n, 2)."""
        if self._lengths is None:
            self._lengths = tokenizers.lengths(self.captions)
        return self._lengths


def index_path(cache_dir: str, reader: SourceReader[Any]) -> str:
    """Return the path of the file index of a source in a cache."""
    return os.path.join(cache_dir, f"files-{_short_hash(reader.location)}.jsonl")


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def most_frequent_tags(examples: Sequence[Example], limit: int) -> dict[str, int]:
    """Return tag → number of occurrences in the first caption of each image, for the `limit` most frequent tags."""
    captions = {id(example.entry): example.captions[0] for example in reversed(examples)}
    counts = collections.Counter[str]()
    for caption in captions.values():
        tags = (tag.strip().lower() for tag in caption.split(","))
        counts.update(tag for tag in tags if 0 < len(tag) <= TAG_LENGTH)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:limit])
