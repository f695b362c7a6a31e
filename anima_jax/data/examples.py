"""What training draws batches from: a picture or video at one size, with a caption.

An example knows no row number. Its id says what it is: the same media, at the same size, with the same caption index
and repeat, has the same id in any order, any directory and any run, and with it the same noise.

Whatever is random here comes from raw Philox words: NumPy promises that a bit generator's raw stream stays as it is,
but not what `Generator.permutation` and the like make of it.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from anima_jax.data.buckets import Bucket, Bucketing
from anima_jax.data.manifest import Entry, FileMedia, Media, Memo, content_digest
from anima_jax.data.problems import Problems
from anima_jax.data.scan import Directory, read_directory
from anima_jax.data.tfds_source import TfdsSplit, read_split
from anima_jax.errors import UserError

__all__ = [
    "Entry",
    "Example",
    "FileMedia",
    "Media",
    "Source",
    "SourceOptions",
    "content_digest",
    "example_id",
    "examples_of",
    "read_examples",
]

log = logging.getLogger(__name__)

CHOICE, SHUFFLE, DROPOUT, CACHED_SHUFFLE = range(4)
"""What random words are for."""


CONTENTS = ("captions", "masks")
"""What can change of an example while its id stays the same."""


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How one `[[directory]]` or `[[tfds]]` becomes examples."""

    bucketing: Bucketing
    num_repeats: float = 1.0
    """> 0; may be a fraction."""
    caption_prefix: str = ""
    skip_empty_caption: bool = True
    shuffle_copies: int = 0
    """Copies of each caption with shuffled tags, instead of the caption itself (`cache_shuffle_num`)."""
    delimiter: str = ", "
    """What stands between tags (`cache_shuffle_delimiter`)."""
    caption_choice: str = "each"
    """"each": every caption is an example; "random": one example, whose caption is drawn anew each epoch."""
    subsample_ratio: float = 1.0
    """In (0, 1]: the share of the media to use."""
    mask_path: str | None = None
    default_mask_file: str | None = None
    online_captions: bool = False
    shuffle_anew: bool = False
    """Tags are shuffled anew each epoch instead of once: text is encoded at batch time."""
    tag_dropout: float = 0.0
    """In [0, 1): probability that a tag is left out, anew each epoch; only with text encoded at batch time."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One table of a dataset TOML."""

    place: str | TfdsSplit
    """A folder, or a split of a tensorflow-datasets data set."""
    options: SourceOptions
    memo: Memo = dataclasses.field(default_factory=Memo)


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One picture or video at one size, with the captions that it can show."""

    id: int
    """63 bits, from `example_id`. Copies of one file share it."""
    entry: Entry
    bucket: Bucket
    captions: tuple[str, ...]
    """One, or those to choose from; prefix in front, and shuffled unless `options.shuffle_anew`."""
    options: SourceOptions

    def caption(self, seed: int, epoch: int) -> str:
        """The caption of this epoch: the one drawn, its tags shuffled and some of them left out as the options say.

        A pure function of the seed, the epoch and the example's id. The prefix stays, and so does at least one tag.
        """
        options, chosen = self.options, 0
        if len(self.captions) > 1:
            (word,) = _words(CHOICE, seed, epoch, self.id, count=1)
            chosen = int(word) * len(self.captions) >> 64
        caption = self.captions[chosen]
        shuffled = options.shuffle_anew and options.shuffle_copies > 0
        if not (shuffled or options.tag_dropout):
            return caption
        tags = _tags(caption[len(options.caption_prefix) :], options.delimiter)
        if options.tag_dropout:
            words = _words(DROPOUT, seed, epoch, self.id, count=len(tags))
            # The last tag to go is the one whose word is the largest.
            least = min(int(options.tag_dropout * 2.0**64), int(words.max()))
            tags = [tag for tag, word in zip(tags, words, strict=True) if int(word) >= least]
        if shuffled:
            tags = _shuffled(tags, _words(SHUFFLE, seed, epoch, self.id, count=len(tags)))
        return options.caption_prefix + options.delimiter.join(tags)


def example_id(
    digest: bytes, size_wh: tuple[int, int], *, frames: int = 1, caption_index: int = 0, repeat_index: int = 0
) -> int:
    """63-bit hash of the media content (`content_digest`), its size bucket, the caption's index and the repeat's."""
    packed = digest + struct.pack("<5Q", *size_wh, frames, caption_index, repeat_index)
    return int.from_bytes(hashlib.sha256(packed).digest()[:8], "little") >> 1


def read_examples(
    sources: Sequence[Source], problems: Problems, *, threads: int = 8, prepare: bool = True
) -> list[list[Example]]:
    """The examples of each source, in order. Logs one line a source; what cannot be used goes to `problems`.

    Files are looked at in `threads` threads. Without `prepare` no data set is drawn that is not there yet. Raises
    UserError for a source that is not there, and if there is not one example in all of them.
    """
    examples, lines = [], []
    for source in sources:
        options = source.options
        if isinstance(source.place, TfdsSplit):
            entries, line = read_split(
                source.place,
                options.skip_empty_caption,
                options.default_mask_file,
                source.memo,
                problems,
                threads=threads,
                prepare=prepare,
            )
        else:
            directory = Directory(
                source.place,
                options.mask_path,
                options.default_mask_file,
                options.skip_empty_caption,
                options.online_captions,
            )
            entries, line = read_directory(directory, source.memo, problems, threads=threads)
        made = examples_of(entries, options, problems)
        repeats = "" if options.num_repeats == 1 else f" (num_repeats = {options.num_repeats:g})"
        lines.append(f"{line}: {len(made)} examples an epoch{repeats}")
        log.info("%s", lines[-1])
        examples.append(made)
    if not any(examples):
        raise UserError(f"nothing to train on: {'; '.join(lines)}")
    return examples


def examples_of(entries: Sequence[Entry], options: SourceOptions, problems: Problems) -> list[Example]:
    """The examples of one source's entries, every repeat of a resolution behind the one before.

    Each caption (or its `shuffle_copies`) at each of the entry's buckets is one; `caption_choice = "random"` makes them
    one together. `num_repeats` is carried out as in diffusion-pipe, `int(n · num_repeats)` of each resolution and
    length, where those of a last, partial repeat are picked by their hash. Clips that are too short for any bucket go
    to `problems`.
    """
    placed = _subsampled(list(_placed(entries, options, problems)), options.subsample_ratio)
    once: dict[tuple[float | None, int], list[tuple[int, Example]]] = collections.defaultdict(list)
    for entry, buckets in placed:
        shown = _captions(entry, options)
        for bucket in buckets:
            for index, captions in shown:
                example = Example(_id(entry, bucket, index, 0), entry, bucket, captions, options)
                once[bucket.resolution, bucket.size.frames].append((index, example))
    return list(itertools.chain.from_iterable(_repeated(group, options.num_repeats) for group in once.values()))


def contents_of(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return `CONTENTS` of each example: name → hashes, uint64 (n,)."""

    def hashes(values: Iterable[bytes]) -> np.ndarray:
        digests = (hashlib.blake2b(value, digest_size=8).digest() for value in values)
        return np.frombuffer(b"".join(digests), "<u8")

    return {
        "captions": hashes("\0".join(example.captions).encode() for example in examples),
        "masks": hashes(example.entry.mask_digest or b"" for example in examples),
    }


def _id(entry: Entry, bucket: Bucket, caption_index: int, repeat_index: int) -> int:
    width, height, frames = bucket.size
    return example_id(
        entry.digest, (width, height), frames=frames, caption_index=caption_index, repeat_index=repeat_index
    )


def _placed(
    entries: Sequence[Entry], options: SourceOptions, problems: Problems
) -> Iterator[tuple[Entry, tuple[Bucket, ...]]]:
    bucketing = options.bucketing
    known: dict[tuple[int, int, int], tuple[Bucket, ...]] = {}  # so that equal buckets are one object
    for entry in entries:
        size = entry.width, entry.height, entry.frames
        if size not in known:
            known[size] = bucketing.place(*size)
        if known[size]:
            yield entry, known[size]
        else:
            lengths = [length.frames for length in bucketing.size_buckets] or bucketing.frame_buckets
            clips = [length for length in lengths if length > 1]
            if entry.frames > 1:
                expected = f"at least {min(clips)}" if clips else "a picture: no frame bucket is above 1"
                fault = f"found a video of {entry.frames} frames (16 a second), expected {expected}"
            else:
                fault = f"found a picture, expected a video of at least {min(clips)} frames: no size bucket has 1"
            problems.skip(f"{entry.media.name}: {fault}")


def _subsampled(placed: list[tuple[Entry, tuple[Bucket, ...]]], ratio: float) -> list[tuple[Entry, tuple[Bucket, ...]]]:
    """`ratio` of the media, at least one, picked by the hash of their content."""
    if ratio >= 1 or not placed:
        return placed
    chosen = sorted(range(len(placed)), key=lambda row: hashlib.sha256(placed[row][0].digest).digest())
    kept = set(chosen[: max(1, int(len(placed) * ratio))])
    return [each for row, each in enumerate(placed) if row in kept]


def _captions(entry: Entry, options: SourceOptions) -> list[tuple[int, tuple[str, ...]]]:
    """The index of each example that an entry makes at one size, with the captions that it shows.

    An index counts all captions that are written, so that it does not move when an empty one before it is skipped.
    """
    shown = []
    for index, text in enumerate(entry.captions):
        if options.skip_empty_caption and not text.strip():
            continue
        for copy in range(max(1, options.shuffle_copies)):
            caption = text
            if options.shuffle_copies and not options.shuffle_anew:
                tags = _tags(text, options.delimiter)
                content = struct.unpack("<4Q", entry.digest)
                words = _words(CACHED_SHUFFLE, *content, index, copy, count=len(tags))
                caption = options.delimiter.join(_shuffled(tags, words))
            shown.append((index * max(1, options.shuffle_copies) + copy, options.caption_prefix + caption))
    if options.caption_choice == "random":
        return [(0, tuple(caption for _, caption in shown))] if shown else []
    return [(index, (caption,)) for index, caption in shown]


def _repeated(group: Sequence[tuple[int, Example]], num_repeats: float) -> Iterator[Example]:
    """`int(len(group) · num_repeats)` examples: the group (caption index and example) over and over."""
    total = int(len(group) * num_repeats)
    if total < 1:
        bucket = group[0][1].bucket
        where = f"{bucket.size.frames} frames" if bucket.resolution is None else f"resolution {bucket.resolution:g}"
        log.warning("num_repeats = %s leaves none of %d examples at %s", num_repeats, len(group), where)
    for repeat in range(-(-total // len(group))):
        again = [
            example
            if repeat == 0
            else dataclasses.replace(example, id=_id(example.entry, example.bucket, index, repeat))
            for index, example in group
        ]
        missing = total - repeat * len(group)
        if missing < len(group):
            kept = set(sorted(range(len(again)), key=lambda row: again[row].id)[:missing])
            again = [example for row, example in enumerate(again) if row in kept]
        yield from again


def _tags(caption: str, delimiter: str) -> list[str]:
    return caption.split(delimiter) if delimiter else [caption]


def _shuffled(tags: list[str], words: np.ndarray) -> list[str]:
    return [tags[place] for place in np.argsort(words, kind="stable")]


def _words(*key: int, count: int) -> np.ndarray:
    """`count` random uint64, a pure function of the key, of which each part counts modulo 2**64."""
    # As 64 bits each: SeedSequence joins integers of varying length without a mark between them.
    parts = np.array([part % 2**64 for part in key], "<u8").view("<u4")
    return np.random.Philox(np.random.SeedSequence(parts.tolist())).random_raw(count)
