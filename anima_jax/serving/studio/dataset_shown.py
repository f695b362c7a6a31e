"""What the page shows of a data set: pictures that fit a filter, how they are cropped, buckets, steps, counts."""

import collections
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from anima_jax.config.dataset import DirectorySource
from anima_jax.data.batch_plan import padding
from anima_jax.data.buckets import Bucket
from anima_jax.data.images import crop_box
from anima_jax.errors import one_line
from anima_jax.serving.studio.dataset_edits import CaptionEditor, tags_of
from anima_jax.serving.studio.dataset_pictures import DuplicateSearch
from anima_jax.serving.studio.dataset_view import DatasetView, PictureRecord, TrainingPlan
from anima_jax.serving.studio.made_pictures import MadePictures

FilterName = Literal["", "all", "trained", "left_out", "no_caption", "upscaled", "cropped", "long"]


class Wanted(BaseModel):
    """Which pictures: all that fit every field that is set."""

    search: str = Field("", max_length=1000, description="words in the file's name or its captions")
    filter: FilterName = Field("", description="which of them")
    bucket: str = Field("", max_length=100, description="as in `buckets` of the data set")
    tag: str = Field("", max_length=1000)
    source: int | None = Field(None, ge=0, lt=10_000, description="number of the source")


class CropEntry(BaseModel):
    """A size at which a picture is trained, and the part of it that is kept, as shares of its width and height."""

    bucket: str
    width: int
    height: int
    frames: int
    left: float
    top: float
    kept_width: float
    kept_height: float
    scale: float = Field(description="above 1, the picture is enlarged")


class PictureEntry(BaseModel):
    """A picture. `left_out` says why it is not trained, "" if it is; `tokens` are those of its longest caption."""

    id: str
    name: str
    source: int
    width: int | None
    height: int | None
    frames: int | None
    caption: str
    left_out: str
    notes: list[str]
    buckets: list[CropEntry]
    examples: int
    upscaled: bool
    tokens: int | None
    masked: bool
    controls: int
    thumbnail: str


class BucketEntry(BaseModel):
    """A bucket, how many pictures are in it, and how many examples of an epoch these are."""

    name: str
    width: int
    height: int
    frames: int
    resolution: float | None
    pictures: int
    examples: int


class TierEntry(BaseModel):
    """Examples that share a compiled program: a row of the table that training prints."""

    name: str
    examples: int
    tokens: int
    padding: float
    batch: int
    steps_per_epoch: float


class DatasetSource(BaseModel):
    """A source of the data set, with the line about it in training's log."""

    name: str
    line: str
    editable: bool
    pictures: int
    num_repeats: float


class ShownDataset:
    """A data set with what belongs to showing and editing it. Its methods may be called from any thread."""

    def __init__(self, view: DatasetView):
        self.view, self.editor = view, CaptionEditor(view)
        self.pictures, self.duplicates = MadePictures(), DuplicateSearch()
        self._summary: tuple[Any, dict[str, Any]] = None, {}

    def select(self, wanted: Wanted) -> list[PictureRecord]:
        """Return the pictures that fit, in the data set's order."""
        plan, words = self.view.plan(), wanted.search.casefold().split()
        limit, fits = self.view.token_limit, FILTERS[wanted.filter or "all"]
        tag = wanted.tag.strip().casefold()
        return [
            record
            for record in self.view.reading.records
            if wanted.source in {None, record.source}
            and fits(record, plan, limit)
            and (not wanted.bucket or wanted.bucket in {bucket_name(bucket) for bucket in buckets_of(record)})
            and (not tag or tag in {found.casefold() for found in self._tags(record)})
            and all(word in record.searched for word in words)
        ]

    def _tags(self, record: PictureRecord) -> list[str]:
        return tags_of(record.text, self.view.data.sources[record.source].cache_shuffle_delimiter)

    def _without_folders(self, line: str, *, is_local: bool) -> str:
        for number in range(0 if is_local else len(self.view.data.sources)):
            path = self.view.source_name(number)
            line = line.replace(path, os.path.basename(path))
        return one_line(line)

    def summary(self, *, is_local: bool) -> dict[str, Any]:
        """Return the fields of `DatasetSummary`. Only clients on this machine learn its folders."""
        view = self.view
        view.read_if_changed()
        plan, version = view.plan(), view.version
        if self._summary[0] != (version, id(plan), is_local):
            self._summary = (version, id(plan), is_local), self._counted(plan, is_local=is_local)
        return {
            "state": view.state,
            "read": view.done,
            "error": view.error or plan.error,
            "version": version,
            "undo": self.editor.undoable,
            **self._summary[1],
        }

    def _counted(self, plan: TrainingPlan, *, is_local: bool) -> dict[str, Any]:
        view, records = self.view, self.view.reading.records

        def shown(path: str) -> str:
            return one_line(path if is_local else os.path.basename(path))

        lines = view.reading.lines or ("",) * len(view.data.sources)
        of_source = collections.Counter(record.source for record in records)
        return {
            "path": shown(view.path),
            "kind": view.kind,
            "counts": {
                name: sum(fits(each, plan, view.token_limit) for each in records) for name, fits in FILTERS.items()
            },
            "sources": [
                {
                    "name": shown(view.source_name(number)),
                    "line": self._without_folders(line, is_local=is_local),
                    "editable": isinstance(source, DirectorySource),
                    "pictures": of_source[number],
                    "num_repeats": source.num_repeats,
                }
                for number, (source, line) in enumerate(zip(view.data.sources, lines, strict=True))
            ],
            "messages": list(view.messages),
            "problems": [self._without_folders(line, is_local=is_local) for line in view.reading.problems],
            "buckets": bucket_entries(records),
            "tiers": tier_entries(plan),
            "table": list(plan.table),
            "steps_of_first_epoch": plan.steps_of_first_epoch,
            "steps": plan.steps,
            "token_limit": view.token_limit,
        }

    def duplicates_answer(self, model: Callable[..., Any]) -> Any:
        """Return the pictures that look alike, or how far the search is, which this call starts."""
        plan, reading = self.view.plan(), self.view.reading
        pictures = [(each.id, each.entry.digest, each.candidate.media) for each in reading.records if each.entry]
        done = self.duplicates.start(pictures)
        groups = [[reading.by_id[id] for id in group if id in reading.by_id] for group in self.duplicates.groups]
        return model(
            state="done" if done else "searching",
            compared=self.duplicates.done,
            total=self.duplicates.total,
            groups=[[picture_entry(record, plan) for record in group] for group in groups if len(group) > 1],
        )


def buckets_of(record: PictureRecord) -> list[Bucket]:
    """Return the buckets in which a picture is trained, each once."""
    return list(dict.fromkeys(example.bucket for example in record.examples))


def bucket_name(bucket: Bucket) -> str:
    """Return the name of a bucket, such as "640×400", or "640×400×17" of clips."""
    return str(bucket) + (f"×{bucket.size.frames}" if bucket.size.frames > 1 else "")


def crop_of(record: PictureRecord, bucket: Bucket) -> CropEntry:
    """Return how a picture is cropped for a bucket."""
    entry, size = record.entry, bucket.size
    assert entry is not None
    left, top, width, height = crop_box((entry.width, entry.height), (size.width, size.height))
    return CropEntry(
        bucket=bucket_name(bucket),
        **{name: getattr(size, name) for name in ("width", "height", "frames")},
        left=left / entry.width,
        top=top / entry.height,
        kept_width=width / entry.width,
        kept_height=height / entry.height,
        scale=size.width / width,
    )


def picture_entry(record: PictureRecord, plan: TrainingPlan) -> PictureEntry:
    """Return what a client is told of a picture."""
    entry, crops = record.entry, [crop_of(record, bucket) for bucket in buckets_of(record)]
    return PictureEntry(
        id=record.id,
        name=record.name,
        source=record.source,
        width=entry and entry.width,
        height=entry and entry.height,
        frames=entry and entry.frames,
        caption=record.text,
        left_out=record.left_out,
        notes=list(record.notes),
        buckets=crops,
        examples=len(record.examples),
        upscaled=any(crop.scale > 1.001 for crop in crops),
        tokens=tokens_of(record, plan),
        masked=bool(entry and entry.mask),
        controls=len(entry.controls) if entry else 0,
        thumbnail=f"/api/dataset/pictures/{record.id}/thumbnail.jpg?version={record.version}",
    )


def tokens_of(record: PictureRecord, plan: TrainingPlan) -> int | None:
    """Return the tokens of the longest text that is trained with a picture; None if none is."""
    texts = [text for example in record.examples for text in example.captions]
    return max((plan.lengths.get(text, 0) for text in texts), default=None)


def bucket_entries(records: tuple[PictureRecord, ...]) -> list[BucketEntry]:
    """Return the buckets with their counts, small resolutions first."""
    pictures, examples = collections.Counter[Bucket](), collections.Counter[Bucket]()
    for record in records:
        pictures.update(buckets_of(record))
        examples.update(example.bucket for example in record.examples)
    return [
        BucketEntry(
            name=bucket_name(bucket),
            **{name: getattr(bucket.size, name) for name in ("width", "height", "frames")},
            resolution=bucket.resolution,
            pictures=pictures[bucket],
            examples=examples[bucket],
        )
        for bucket in sorted(pictures, key=lambda each: (each.resolution or 0, each.size, each.references))
    ]


def tier_entries(plan: TrainingPlan) -> list[TierEntry]:
    """Return the rows of the table that training prints."""
    tokens = np.array([example.bucket.tokens for example in plan.examples])
    return [
        TierEntry(
            name=tier.name,
            examples=len(tier.indices),
            tokens=tier.tokens,
            padding=padding([tier], tokens),
            batch=tier.batch_size,
            steps_per_epoch=len(tier.indices) / tier.batch_size,
        )
        for tier in plan.tiers
    ]


Filter = Callable[[PictureRecord, TrainingPlan, int], bool]


def _cropped(record: PictureRecord, plan: TrainingPlan, limit: int) -> bool:
    crops = [crop_of(record, bucket) for bucket in buckets_of(record)]
    return any(crop.kept_width * crop.kept_height < 0.5 for crop in crops)


def _upscaled(record: PictureRecord, plan: TrainingPlan, limit: int) -> bool:
    return any(crop_of(record, bucket).scale > 1.001 for bucket in buckets_of(record))


FILTERS: Mapping[str, Filter] = {
    "all": lambda record, plan, limit: True,
    "trained": lambda record, plan, limit: bool(record.examples),
    "left_out": lambda record, plan, limit: bool(record.left_out),
    "no_caption": lambda record, plan, limit: record.captions.empty,
    "upscaled": _upscaled,
    "cropped": _cropped,
    "long": lambda record, plan, limit: (tokens_of(record, plan) or 0) > limit,
}
"""Name → whether a picture fits: `cropped` by more than half of its area, `long` captions of more tokens than used."""
