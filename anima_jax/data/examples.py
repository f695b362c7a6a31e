"""Training examples. An example is an image or video at one size, with a caption.

An example's id is a hash of its content, not a row number: the same media at the same size with the same caption index
and repeat index has the same id, and therefore the same noise, in any order, folder and run.
"""

import collections
import dataclasses
import hashlib
import itertools
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from anima_jax.config.dataset import DirectorySource, Source, TfdsSource
from anima_jax.config.pairs import Pairs
from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucket, Bucketing
from anima_jax.data.file_index import Entry, FileIndex
from anima_jax.data.folder_source import FolderReader
from anima_jax.data.problems import Problems
from anima_jax.data.sources import SourceReader, log_names, read_entries
from anima_jax.data.tfds_source import TfdsReader
from anima_jax.data.variants import (
    CACHED_SENTENCES,
    CACHED_SHUFFLE,
    SENTENCES,
    SHUFFLE,
    Variant,
    drawn,
    shuffled,
    text_of,
    thinned,
    variants_of,
    with_shuffled_sentences,
)
from anima_jax.errors import UserError, plural

log = logging.getLogger(__name__)

CONTENTS = ("captions", "masks", "control pictures")
"""Parts of an example that can change while its id stays the same."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One image or video at one size, with its possible captions."""

    id: int
    """63 bits, from `example_id`. Identical files share it."""
    entry: Entry
    bucket: Bucket
    variants: tuple[Variant, ...]
    """One text, or several to draw from; already shuffled unless `shuffled_each_epoch`."""
    source: Source
    shuffled_each_epoch: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        """The texts of `variants`, with the prefix."""
        return tuple(text_of(variant, self.source) for variant in self.variants)

    @property
    def rules(self) -> tuple[str, ...]:
        """The options that decide which text of an epoch follows from `captions`, as far as they are set."""
        weights = tuple(variant.weight for variant in self.variants if variant.weight != 1)
        return tuple(map(str, (*self.source.caption_rules, *weights)))

    def caption(self, seed: int, epoch: int) -> str:
        """Return the caption for an epoch, a pure function of the seed, the epoch and the example's id.

        It is one of `captions`, with tags shuffled and dropped, and sentences shuffled, as configured. The prefix, what
        `keep_tokens` and `keep_tokens_separator` keep, and at least one tag stay.
        """
        source, key = self.source, (seed, epoch, self.id)
        variant = drawn(self.variants, *key)
        if source.tag_dropout:
            variant = thinned(variant, source, *key)
        if self.shuffled_each_epoch and source.shuffled_copies:
            variant = shuffled(variant, source, SHUFFLE, *key)
        if self.shuffled_each_epoch and source.nl_shuffle_sentences:
            variant = with_shuffled_sentences(variant, source, SENTENCES, *key)
        return text_of(variant, source)


def example_id(
    digest: bytes, size_wh: tuple[int, int], *, frames: int = 1, caption_index: int = 0, repeat_index: int = 0
) -> int:
    """Return a 63-bit hash of the media content (`content_digest`), the size bucket, and caption and repeat index."""
    packed = digest + struct.pack("<5Q", *size_wh, frames, caption_index, repeat_index)
    return int.from_bytes(hashlib.sha256(packed).digest()[:8], "little") >> 1


def reader_of(source: DirectorySource | TfdsSource, *, prepare: bool = True) -> SourceReader[Any]:
    """Return the reader of a source. Without `prepare`, a data set to be generated goes to a temporary folder."""
    return FolderReader(source) if isinstance(source, DirectorySource) else TfdsReader(source, prepare=prepare)


def read_examples(
    sources: Sequence[tuple[SourceReader[Any], FileIndex]],
    problems: Problems,
    *,
    threads: int = 8,
    shuffle_each_epoch: bool = False,
    pairs: Pairs = "",
    empty_error: str = "nothing to train on",
) -> list[list[Example]]:
    """Return the examples of each source, in order. Log one line per source; unusable files go to `problems`.

    `shuffle_each_epoch` and `pairs` are as in `examples_of`. Raises UserError if a source does not exist, or, beginning
    with `empty_error`, if there are no examples at all.
    """
    groups, lines = [], []
    for reader, index in sources:
        entries, line = read_entries(reader, index, problems, threads=threads)
        examples = examples_of(entries, reader.source, problems, shuffle_each_epoch=shuffle_each_epoch, pairs=pairs)
        num_repeats = reader.source.num_repeats
        repeats = "" if num_repeats == 1 else f" (num_repeats = {num_repeats:g})"
        lines.append(f"{line}: {plural(len(examples), 'example')} per epoch{repeats}")
        log.info("%s", lines[-1])
        groups.append(examples)
    if not any(groups):
        raise UserError(f"{empty_error}: {'; '.join(lines)}")
    return groups


def examples_of(
    entries: Sequence[Entry],
    source: Source,
    problems: Problems,
    *,
    shuffle_each_epoch: bool = False,
    pairs: Pairs = "",
) -> list[Example]:
    """Return the examples of one source, grouped by resolution and frame count; repeats of a group follow each other.

    Each caption (or each of its shuffled copies) in each bucket of an entry is one example, with several texts if
    `caption_mode` mixes them; all captions together are one if `caption_choice` is "random". `shuffle_each_epoch`
    shuffles tags and sentences in every epoch instead of once, for runs that encode text at batch time. A
    resolution and frame count has `int(n · num_repeats)` examples (in diffusion-pipe, each of its ratios has); those of
    a partial repeat are picked by hash. Images and clips that fit no bucket go to `problems`, as do clips if the run
    trains on `pairs`, of which "edit" makes the control pictures frames of the example.
    """
    each_epoch = shuffle_each_epoch and (source.shuffled_copies > 0 or source.nl_shuffle_sentences)
    usable = _images(entries, problems) if pairs else entries
    placed = list(_placed(usable, Bucketing.of(source), problems, with_references=pairs == "edit"))
    placed = _subsampled(placed, source.subsample_ratio)
    log_names("cropped by more than half of their area", _much_cropped(placed), logging.WARNING)
    once: dict[tuple[float | None, int], list[tuple[int, Example]]] = collections.defaultdict(list)
    for entry, buckets in placed:
        indexed_variants = _variants(entry, source, each_epoch)
        for bucket in buckets:
            for index, variants in indexed_variants:
                example = Example(_id(entry, bucket, index, 0), entry, bucket, variants, source, each_epoch)
                once[bucket.resolution, bucket.size.frames].append((index, example))
    return list(itertools.chain.from_iterable(_repeated(group, source.num_repeats) for group in once.values()))


def contents_of(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return hashes of the `CONTENTS` of each example: name → uint64 (n,). Control pictures only if there are any."""

    def hashes(values: Iterable[bytes]) -> np.ndarray:
        digests = (hashlib.blake2b(value, digest_size=8).digest() for value in values)
        return np.frombuffer(b"".join(digests), "<u8")

    found = {
        "captions": hashes("\0".join((*example.captions, *example.rules)).encode() for example in examples),
        "masks": hashes(example.entry.mask_digest or b"" for example in examples),
    }
    controls = [b"".join(partner.digest for partner in example.entry.partners) for example in examples]
    return found | ({"control pictures": hashes(controls)} if any(controls) else {})


def _id(entry: Entry, bucket: Bucket, caption_index: int, repeat_index: int) -> int:
    width, height, frames = bucket.size
    return example_id(
        entry.digest, (width, height), frames=frames, caption_index=caption_index, repeat_index=repeat_index
    )


def _images(entries: Sequence[Entry], problems: Problems) -> list[Entry]:
    """Return the images; videos go to `problems`."""
    for entry in entries:
        if entry.frames > 1:
            problems.skip(f"{entry.media.name}: found a video, expected an image: this run trains on pairs of images")
    return [entry for entry in entries if entry.frames == 1]


def _placed(
    entries: Sequence[Entry], bucketing: Bucketing, problems: Problems, *, with_references: bool = False
) -> Iterator[tuple[Entry, tuple[Bucket, ...]]]:
    known: dict[tuple[int, ...], tuple[Bucket, ...]] = {}  # so that entries of equal size share their buckets
    for entry in entries:
        references = len(entry.controls) if with_references else 0
        size = entry.width, entry.height, entry.frames, references
        if size not in known:
            found = bucketing.place(entry.width, entry.height, entry.frames)
            known[size] = tuple(bucket._replace(references=references) for bucket in found)
        if known[size]:
            yield entry, known[size]
        else:
            lengths = [length.frames for length in bucketing.size_buckets] or bucketing.frame_buckets
            clips = [length for length in lengths if length > 1]
            if entry.frames > 1:
                expected = f"at least {min(clips)}" if clips else "an image: no frame bucket is above 1"
                message = f"found a video of {entry.frames} frames (16 per second), expected {expected}"
            else:
                message = f"found an image, expected a video of at least {min(clips)} frames: no size bucket has 1"
            problems.skip(f"{entry.media.name}: {message}")


def _much_cropped(placed: Sequence[tuple[Entry, tuple[Bucket, ...]]]) -> list[str]:
    """Return a description of each image or clip of which some bucket shows less than half of the area."""
    found = []
    for entry, buckets in placed:
        ratio = entry.width / entry.height
        kept, size = min((min(ratio / each, each / ratio), size) for each, size in _ratios(buckets))
        if kept < 0.5:
            sizes = f"{entry.width}×{entry.height} to {size.width}×{size.height}"
            found.append(f"{entry.media.name} ({sizes}, {1 - kept:.0%} lost)")
    return found


def _ratios(buckets: Sequence[Bucket]) -> Iterator[tuple[float, Size]]:
    return ((bucket.size.width / bucket.size.height, bucket.size) for bucket in buckets)


def _subsampled(placed: list[tuple[Entry, tuple[Bucket, ...]]], ratio: float) -> list[tuple[Entry, tuple[Bucket, ...]]]:
    """Return the fraction `ratio` of the media, at least one, picked by the hash of their content."""
    if ratio >= 1 or not placed:
        return placed
    chosen = sorted(range(len(placed)), key=lambda row: hashlib.sha256(placed[row][0].digest).digest())
    kept = set(chosen[: max(1, int(len(placed) * ratio))])
    return [each for row, each in enumerate(placed) if row in kept]


def _variants(entry: Entry, source: Source, each_epoch: bool) -> list[tuple[int, tuple[Variant, ...]]]:
    """Return (caption index, variants) of each example that an entry has at one size.

    The index counts all captions of the entry, so that skipping an empty caption does not change the others.
    """
    indexed, copies = [], max(1, source.shuffled_copies)
    content = struct.unpack("<4Q", entry.digest)
    for index, variants in variants_of(entry.captions, entry.nl, source):
        for copy in range(copies if any(variant.tags for variant in variants) else 1):
            copied = variants
            if source.shuffled_copies and not each_epoch:
                key = (CACHED_SHUFFLE, *content, index, copy)
                copied = tuple(shuffled(variant, source, *key) for variant in copied)
            if source.nl_shuffle_sentences and not each_epoch:
                key = (CACHED_SENTENCES, *content, index, copy)
                copied = tuple(with_shuffled_sentences(variant, source, *key) for variant in copied)
            indexed.append((index * copies + copy, copied))
    if source.caption_choice == "random":
        return [(0, tuple(variant for _, variants in indexed for variant in variants))] if indexed else []
    return indexed


def _repeated(group: Sequence[tuple[int, Example]], num_repeats: float) -> Iterator[Example]:
    """Yield `int(len(group) · num_repeats)` examples by repeating the group of (caption index, example)."""
    total = int(len(group) * num_repeats)
    if total < 1:
        bucket = group[0][1].bucket
        where = f"{bucket.size.frames} frames" if bucket.resolution is None else f"resolution {bucket.resolution:g}"
        log.warning("num_repeats = %s leaves none of %d examples at %s", num_repeats, len(group), where)
    for repeat in range(-(-total // len(group))):
        repeated = [
            example
            if repeat == 0
            else dataclasses.replace(example, id=_id(example.entry, example.bucket, index, repeat))
            for index, example in group
        ]
        missing = total - repeat * len(group)
        if missing < len(group):
            kept = set(sorted(range(len(repeated)), key=lambda row: repeated[row].id)[:missing])
            repeated = [example for row, example in enumerate(repeated) if row in kept]
        yield from repeated
