"""The texts that an example may be trained with: its tags, its natural language, or both, shuffled and thinned out.

All randomness here comes from raw Philox words, because NumPy guarantees the raw stream of a bit generator, but not the
results of methods such as `Generator.permutation`.
"""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from anima_jax.config.dataset import Source

CHOICE, SHUFFLE, DROPOUT, CACHED_SHUFFLE, SENTENCES, CACHED_SENTENCES, INPAINT_MASK = range(7)
"""Purposes of random words: the first part of the key in `random_words`."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*(?=\S)")


class Variant(NamedTuple):
    """One of the texts of an example; tags and natural language may be empty."""

    tags: str = ""
    nl: str = ""
    nl_first: bool = False
    weight: float = 1.0
    """How often it is drawn, relative to the example's other variants."""


def variants_of(tags: Sequence[str], nl: Sequence[str], source: Source) -> list[tuple[int, tuple[Variant, ...]]]:
    """Return the variants of each caption of an image under `caption_mode`, with the number of the caption.

    Empty captions are left out with `skip_empty_caption`; the numbers count them, so that the others keep theirs.
    """
    nl = [text for text in nl if text.strip()]
    written = [(number, text) for number, text in enumerate(tags) if text.strip()]
    if nl and (source.caption_mode == "nl" or not written):
        return [(number, (Variant(nl=text),)) for number, text in enumerate(nl)]
    if not nl or source.caption_mode == "tags":
        kept = written if source.skip_empty_caption else enumerate(tags)
        return [(number, (Variant(tags=text),)) for number, text in kept]
    if source.caption_mode != "mixed":
        nl_first = source.caption_mode == "nl_tags"
        pairs = ((number * len(nl) + at, (text, other)) for number, text in written for at, other in enumerate(nl))
        return [(number, (Variant(*pair, nl_first),)) for number, pair in pairs]
    return [(number, _mixed(text, nl, source.mixed_weights)) for number, text in written]


def _mixed(tags: str, nl: Sequence[str], weights: dict[str, float]) -> tuple[Variant, ...]:
    """Return the variants of a list of tags and several texts, which share the weight of each way."""
    found = [Variant(tags, weight=weights["tags"])]
    for text in nl:
        found.append(Variant("", text, weight=weights["nl"] / len(nl)))
        found.append(Variant(tags, text, weight=weights["tags_nl"] / len(nl)))
        found.append(Variant(tags, text, nl_first=True, weight=weights["nl_tags"] / len(nl)))
    return tuple(each for each in found if each.weight)


def drawn(variants: Sequence[Variant], seed: int, epoch: int, example: int) -> Variant:
    """Return the variant of an epoch, drawn by weight."""
    if len(variants) == 1:
        return variants[0]
    (word,) = random_words(CHOICE, seed, epoch, example, count=1)
    bounds = np.cumsum([each.weight for each in variants])
    at = np.searchsorted(bounds, int(word) * 2.0**-64 * bounds[-1], side="right")
    return variants[min(int(at), len(variants) - 1)]


def text_of(variant: Variant, source: Source) -> str:
    """Return a variant's text with the prefix and without `keep_tokens_separator`."""
    tags, separator = variant.tags, source.keep_tokens_separator
    if separator and separator in tags:
        tags = source.cache_shuffle_delimiter.join(itertools.chain(*_split(tags, source)))
    both = (variant.nl, tags) if variant.nl_first else (tags, variant.nl)
    first, second = (text for text in both) if all(both) else ("".join(both), "")
    return source.caption_prefix + (f"{first.rstrip().removesuffix('.')}. {second}" if second else first)


def thinned(variant: Variant, source: Source, *key: int) -> Variant:
    """Return the variant without the tags that `tag_dropout` leaves out; `key` is that of the random words.

    Tags at the front and end, protected tags and, of a caption that would be empty, one tag are kept.
    """
    front, middle, back = _split(variant.tags, source)
    if not middle:
        return variant
    words = random_words(DROPOUT, *key, count=len(middle))
    least = int(source.tag_dropout * 2.0**64)
    protected = source.all_protected_tags
    kept = [tag.strip().casefold() in protected or int(word) >= least for tag, word in zip(middle, words, strict=True)]
    if not (any(kept) or front or back or variant.nl):
        kept[int(np.argmax(words))] = True
    middle = [tag for tag, keep in zip(middle, kept, strict=True) if keep]
    return variant._replace(tags=_joined(front, middle, back, variant.tags, source))


def shuffled(variant: Variant, source: Source, *key: int) -> Variant:
    """Return the variant with its tags in random order, except those at the front and end."""
    front, middle, back = _split(variant.tags, source)
    middle = _permuted(middle, random_words(*key, count=len(middle)))
    return variant._replace(tags=_joined(front, middle, back, variant.tags, source))


def with_shuffled_sentences(variant: Variant, source: Source, *key: int) -> Variant:
    """Return the variant with the sentences of its natural language in random order."""
    sentences = _SENTENCE_END.split(variant.nl.strip())
    if len(sentences) < 2:
        return variant
    if not re.search(r"[.!?。！？]$", sentences[-1]):
        sentences[-1] += "."
    kept = int(source.nl_keep_first_sentence)
    rest = _permuted(sentences[kept:], random_words(*key, count=len(sentences) - kept))
    return variant._replace(nl=" ".join([*sentences[:kept], *rest]))


def random_words(*key: int, count: int) -> np.ndarray:
    """Return `count` random uint64 words, a pure function of the parts of `key`, each taken modulo 2**64."""
    # 64 bits each, because SeedSequence joins integers of varying length without a separator.
    parts = np.array([part % 2**64 for part in key], "<u8").view("<u4")
    return np.random.Philox(np.random.SeedSequence(parts.tolist())).random_raw(count)


def _permuted(items: list[str], words: np.ndarray) -> list[str]:
    return [items[row] for row in np.argsort(words, kind="stable")]


def _split(text: str, source: Source) -> tuple[list[str], list[str], list[str]]:
    """Return the tags that stay at the front, those that may be shuffled and dropped, and those that stay at the end.

    As in sd-scripts, `keep_tokens_separator` separates these in a caption that has it; in others `keep_tokens` counts.
    """
    delimiter, separator = source.cache_shuffle_delimiter, source.keep_tokens_separator
    if not separator or separator not in text:
        tags = text.split(delimiter)
        return tags[: source.keep_tokens], tags[source.keep_tokens :], []
    edge = delimiter.strip()
    parts = [[tag.strip().strip(edge) for tag in part.split(delimiter)] for part in text.split(separator)]
    front, *middle = [[tag.strip() for tag in part if tag.strip()] for part in parts]
    back = middle.pop() if len(middle) > 1 else []
    return front, list(itertools.chain(*middle)), back


def _joined(front: Sequence[str], middle: Sequence[str], back: Sequence[str], before: str, source: Source) -> str:
    """Return the tags as one text, with separators if the text `before` had them, so that it can be split again."""
    delimiter, separator = source.cache_shuffle_delimiter, source.keep_tokens_separator
    if not separator or separator not in before:
        return delimiter.join([*front, *middle])
    parts = map(delimiter.join, [front, middle, *([back] if back else [])])
    return separator.join(parts)
