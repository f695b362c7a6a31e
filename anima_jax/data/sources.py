"""Sources of a data set: a folder with its tars (`folder_source`), or a tensorflow-datasets split (`tfds_source`).

A source lists candidates: images and videos with their captions and masks, none of which is read yet. `read_entries`
inspects them through the file index. Files that cannot be used are counted or reported through `Problems`.
"""

import abc
import collections
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from anima_jax.config.dataset import Source
from anima_jax.config.sizes import Size
from anima_jax.data.captions import Captions
from anima_jax.data.file_index import Entry, FileIndex, FileInfo, Partner, Summary
from anima_jax.data.loader import map_ahead
from anima_jax.data.media import Media
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError, one_line, plural

log = logging.getLogger(__name__)

MAX_NAMES = 3
"""Number of skipped files that a message names; the summary counts all of them."""

MAX_QUEUED = 1024
"""Number of files queued for inspection; each takes about a kilobyte."""

LEFT_OUT = "left out {} (skip_empty_caption)"
LEFT_OUT_WITH_PREFIX = (
    "left out {} although caption_prefix is set (skip_empty_caption = false trains the prefix as their caption)"
)
OTHER_SHAPE = "with a control picture of other proportions, which is cropped around its own centre"
SAME_RATIO = 0.02
"""Largest difference of the logarithms of two ratios that may come from rounding sides to pixels."""

BLACK_MASK = "with a mask that is black everywhere, so that nothing of them is trained"

Counts = collections.Counter[str]
SourceT = TypeVar("SourceT", bound=Source)


class Partners(NamedTuple):
    """The files that belong to an image, none of which is read yet. `missing` is the message if one is required."""

    mask: Media | None = None
    controls: tuple[Media, ...] = ()
    inpaint_mask: Media | None = None
    missing: str = ""


class CaptionPlace(NamedTuple):
    """Where a caption is, or where a new one belongs: a file, or the value of `key` in a JSON file of many."""

    path: str
    key: str | None = None
    exists: bool = True
    in_tar: bool = False
    nl: bool = False
    """Whether the whole file is natural language."""

    @property
    def name(self) -> str:
        """Its file name, for messages."""
        return os.path.basename(self.path)


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """An image or video listed by a source, not read yet."""

    media: Media
    captions: Callable[[], Captions | None]
    """Reads the captions; returns None if there are none. Raises UserError if they cannot be read."""
    partners: Partners = Partners()
    places: Callable[[], Sequence[CaptionPlace]] = tuple
    """Finds the files that the captions come from, the one that counts first; none if they are not in files."""


Observer = Callable[[Candidate, Entry | UserError | None, Sequence[str]], None]


class SourceReader(abc.ABC, Generic[SourceT]):
    """Base class of the readers in `folder_source` and `tfds_source`."""

    source: SourceT
    media_types: tuple[type[Media], ...]
    """The dataclasses of its media and masks."""
    name: str
    """Name in messages."""
    location: str
    """Text whose hash names the file index. It must not change, because existing caches use it."""
    about: dict[str, str | bool | list[str] | None]
    """Key of the source in the file index: everything that determines its entries, except the files."""
    cache_dir: str
    """Cache folder of the source if the configuration sets none."""

    @abc.abstractmethod
    def candidates(self, problems: Problems, counts: Counts) -> list[Candidate]:
        """List the source. Raises UserError if it does not exist or cannot be read."""

    def fingerprint(self) -> str:
        """Return a hash of the source's state, "" if it has none. If it is unchanged, nothing is read again."""
        return ""

    def count_entries(self, entries: Sequence[Entry], counts: Counts) -> None:
        """Add counts that are known only after the candidates are inspected."""

    def update_captions(self, entries: list[Entry], problems: Problems) -> list[Entry]:
        """Return trusted entries, after rereading the captions that every run must reread."""
        return entries


def read_entries(
    reader: SourceReader[Any],
    index: FileIndex,
    problems: Problems,
    *,
    threads: int = 8,
    observe: Observer = lambda candidate, result, reasons: None,
) -> tuple[list[Entry], str]:
    """Return the usable images and videos of a source, in its order, and a line for the log.

    `observe` is called with each file that is inspected and the result of `inspect`, in the source's order. Files
    that cannot be used go to `problems`. Each thread may have a whole video in memory. Raises UserError if the
    source does not exist or cannot be read.
    """
    saved = index.load(reader.about, reader.media_types)
    if saved and problems.strict and saved[1].skipped:
        saved = None  # read the files again, to raise the error of the first skipped one
    if saved and index.trust:
        entries, summary = saved
        entries = reader.update_captions(entries, problems)
        problems.skip(*summary.skipped)
        return entries, f"{summary.summary} (from the file index, whose files are trusted to be unchanged)"
    fingerprint = reader.fingerprint()
    if saved and fingerprint and saved[1].fingerprint == fingerprint:
        problems.skip(*saved[1].skipped)
        return saved[0], saved[1].summary
    before, counts = len(problems.lines), Counts()
    candidates = reader.candidates(problems, counts)
    entries = _inspect_all(candidates, reader.source, index, problems, counts, threads, observe)
    reader.count_entries(entries, counts)
    counts["paired with control pictures"] = sum(bool(entry.controls) for entry in entries)
    skipped = tuple(problems.lines[before:])
    counts["could not be used"] = len(skipped)
    line = _summary_line(reader.name, entries, counts)
    index.save(reader.about, entries, Summary(line, skipped, fingerprint))
    return entries, line


def count_and_name(counts: Counts, what: str, names: Sequence[str], level: int = logging.INFO) -> None:
    """Count skipped files and log the names of the first ones."""
    counts[what] = len(names)
    log_names(what, names, level)


def log_names(what: str, names: Sequence[str], level: int = logging.INFO) -> None:
    """Log the first of `names`, if any, and how many more there are."""
    if names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        log.log(level, "%s", one_line(f"{what}: {', '.join(names[:MAX_NAMES])}{more}"))


def _inspect_all(
    candidates: Sequence[Candidate],
    source: Source,
    index: FileIndex,
    problems: Problems,
    counts: Counts,
    threads: int,
    observe: Observer,
) -> list[Entry]:
    """Return the entries of usable candidates; the others go to `problems` or, without a caption, to `counts`."""
    entries, by_reason = [], collections.defaultdict[str, list[str]](list)
    inspected = map_ahead(lambda each: inspect(each, index, source), candidates, threads=threads, ahead=MAX_QUEUED)
    for candidate, (result, reasons) in zip(candidates, inspected, strict=True):
        observe(candidate, result, reasons)
        for reason in reasons:
            by_reason[reason].append(candidate.media.name)
        if isinstance(result, UserError):
            problems.skip(result)
        elif result is not None:
            entries.append(result)
    for reason, names in by_reason.items():
        is_warning = reason in {BLACK_MASK, OTHER_SHAPE} or "caption_prefix" in reason
        count_and_name(counts, reason, names, logging.WARNING if is_warning else logging.INFO)
    return entries


def inspect(candidate: Candidate, index: FileIndex, source: Source) -> tuple[Entry | UserError | None, list[str]]:
    """Return the entry, an error, or None if it is left out without a caption; then reasons to count it."""
    media, partners, reasons = candidate.media, candidate.partners, list[str]()
    try:
        captions = candidate.captions() or Captions()
        if captions.empty:
            reasons.append("with an empty caption" if captions.tags or captions.nl else "without a caption")
            if source.skip_empty_caption:
                template = LEFT_OUT_WITH_PREFIX if source.caption_prefix else LEFT_OUT
                return None, [template.format(reasons[0])]
        info = index.inspect(media)
        entry = Entry(media, info.digest, *info.size, captions.tags or ("",), nl=captions.nl)
        if partners.missing:
            raise UserError(f"{media.name}: {partners.missing}")
        if partners.mask:
            mask_info = _inspect_mask(partners.mask, "mask", entry, index, as_mask=True)
            entry = dataclasses.replace(entry, mask=partners.mask, mask_digest=mask_info.digest)
            reasons += [BLACK_MASK] * bool(mask_info.black)
        controls = [_inspect_control(control, entry, index) for control in partners.controls]
        if any(_is_other_shape(control.size, info.size) for control in controls):
            reasons.append(OTHER_SHAPE)
        pairs = zip(partners.controls, controls, strict=True)
        entry = dataclasses.replace(entry, controls=tuple(Partner(control, each.digest) for control, each in pairs))
        if mask := partners.inpaint_mask:
            digest = _inspect_mask(mask, "inpainting mask", entry, index).digest
            entry = dataclasses.replace(entry, inpaint_mask=Partner(mask, digest))
    except UserError as error:
        return error, []
    return entry, reasons


def _inspect_mask(mask: Media, what: str, entry: Entry, index: FileIndex, *, as_mask: bool = False) -> FileInfo:
    """Return the info of an image's mask. Raises UserError if it cannot be used or is not of the image's size."""
    name = entry.media.name
    try:
        info = index.inspect(mask, as_mask=as_mask)
    except UserError as error:
        raise UserError(f"{name}: its {what} cannot be used: {error}") from None
    if info.size != (size := Size(entry.width, entry.height, 1)):
        found, expected = (f"{size.width}×{size.height}" for size in (info.size, size))
        kind = "an image" if info.size.frames == 1 else "a video"
        raise UserError(f"{name}: its {what} {mask.name} is {kind} of {found} pixels, expected an image of {expected}")
    return info


def _inspect_control(control: Media, entry: Entry, index: FileIndex) -> FileInfo:
    """Return the info of an image's control picture. Raises UserError if it cannot be used or either is a video."""
    name = entry.media.name
    try:
        info = index.inspect(control)
    except UserError as error:
        raise UserError(f"{name}: its control picture cannot be used: {error}") from None
    if entry.frames > 1:
        raise UserError(f"{name}: found a video, expected an image: only images have control pictures")
    if info.size.frames > 1:
        raise UserError(f"{name}: its control picture {control.name} is a video, expected an image")
    return info


def _is_other_shape(control: Size, image: Size) -> bool:
    """Return whether the ratios of the sides differ by more than rounding them explains."""
    return abs(math.log(control.width * image.height / (control.height * image.width))) > SAME_RATIO


def _summary_line(name: str, entries: Sequence[Entry], counts: Counts) -> str:
    videos = sum(entry.frames > 1 for entry in entries)
    line = f"{name}: {plural(len(entries) - videos, 'image')}" + (f", {plural(videos, 'video')}" if videos else "")
    # "2 captions without an image", but "2 without a mask".
    nouns = ("caption", "control picture", "name", "other file", "partner", "subfolder")
    return line + "".join(
        f", {plural(number, what) if what.startswith(nouns) else f'{number} {what}'}"
        for what, number in counts.items()
        if number
    )
