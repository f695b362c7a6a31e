"""Entries from a tensorflow-datasets data set that lies on disk as array_record. No TensorFlow takes part.

tensorflow_datasets is imported on use: only who names such a data set waits for it.
"""

import atexit
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from anima_jax.data.captions import decode_caption
from anima_jax.data.manifest import Entry, FileMedia, Memo, Summary
from anima_jax.data.media import label_of, stamp_of
from anima_jax.data.problems import Problems
from anima_jax.data.scan import Counts, Found, look_at, summary_line
from anima_jax.errors import UserError, did_you_mean, first_line

SHAPES = "anima_shapes"
"""The data set of the quick start, drawn on first use (`shapes_builder`)."""


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """A `[[tfds]]`: records with an Image feature and a Text feature, or a sequence of texts."""

    name: str
    """A registered name, or the directory that holds a prepared version (its dataset_info.json)."""
    split: str = "train"
    """May be sliced as tfds does ("train[:10%]")."""
    image: str = "image"
    caption: str = "caption"
    data_dir: str | None = None
    """Where prepared data sets are kept; None: tensorflow-datasets' own directory."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecordMedia:
    """The encoded picture in one record of a prepared data set."""

    builder_dir: str
    split: str
    index: int
    image_feature: str

    @property
    def name(self) -> str:
        return f"{self.builder_dir} {self.split}[{self.index}] {self.image_feature}"

    @property
    def label(self) -> str:
        return label_of(f"{self.split}-{self.index}")

    def read(self) -> bytes:
        """Raises UserError if the record cannot be read."""
        return _record(self)[self.image_feature]

    def stamp(self) -> None:
        """A record has no time of its own; the whole data set's fingerprint stands for it."""


def read_split(
    source: TfdsSplit,
    skip_empty_caption: bool,
    default_mask_file: str | None,
    memo: Memo,
    problems: Problems,
    *,
    threads: int = 8,
    prepare: bool = True,
) -> tuple[list[Entry], str]:
    """The usable records of a split, in their order, and a line for the log. Unusable ones go to `problems`.

    Nothing is read if the memo knows the data set's files as they are. Raises UserError if the data set is not there,
    not prepared as array_record (only with `prepare` is that of the quick start drawn), or lacks the split or a
    feature.
    """
    about = {**dataclasses.asdict(source), "skip_empty_caption": skip_empty_caption, "mask": default_mask_file}
    recalled = memo.recall(about, (RecordMedia, FileMedia))
    if recalled and problems.strict and recalled[1].skipped:
        recalled = None
    if recalled and memo.trust:
        problems.skip(*recalled[1].skipped)
        return recalled[0], f"{recalled[1].summary} (as remembered: its files are trusted to be unchanged)"
    builder = _builder(source.name, source.data_dir, prepare)
    _check_features(source, builder)
    fingerprint = _fingerprint(builder, default_mask_file)
    if recalled and recalled[1].fingerprint == fingerprint:
        problems.skip(*recalled[1].skipped)
        return recalled[0], recalled[1].summary
    builder_dir, name = os.fspath(builder.data_path), f"tfds data set {source.name!r}: split {source.split}"
    try:
        number = len(_records(builder_dir, source.split, source.image))
    except Exception as error:  # a slice that tfds cannot parse or that holds nothing, shards that are missing
        raise UserError(f"{name}: {first_line(error)}") from None
    mask = FileMedia(*os.path.split(default_mask_file)) if default_mask_file else None
    found = []
    for index in range(number):
        media = RecordMedia(builder_dir, source.split, index, source.image)
        found.append(Found(media, functools.partial(_captions, media, source.caption), mask))
    before, counts = len(problems.lines), Counts()
    entries = look_at(found, skip_empty_caption, memo, problems, counts, threads=threads)
    skipped = tuple(problems.lines[before:])
    counts["could not be used"] = len(skipped)
    line = summary_line(name, entries, counts)
    memo.save(about, entries, Summary(line, skipped, fingerprint))
    return entries, line


def _captions(media: RecordMedia, feature: str) -> tuple[str, ...]:
    """The texts of a record."""
    found, name = _record(media)[feature], f"{media.builder_dir} {media.split}[{media.index}] {feature}"
    texts: Sequence[Any] = [found] if isinstance(found, bytes | str) else list(found)
    return tuple(text.strip() if isinstance(text, str) else decode_caption(text, name) for text in texts)


def _record(media: RecordMedia) -> dict[str, Any]:
    try:
        return _records(media.builder_dir, media.split, media.image_feature)[media.index]
    except Exception as error:  # damaged shards: array_record, protobuf and tfds each raise types of their own
        raise UserError(f"{media.name}: the record cannot be read: {first_line(error)}") from None


def _check_features(source: TfdsSplit, builder: Any) -> None:
    tfds, features = _tfds(), builder.info.features
    for part in source.split.split("+"):
        _expect(source.name, "split", part.partition("[")[0].strip(), ["all", *builder.info.splits])
    _expect(source.name, "feature", source.image, features)
    _expect(source.name, "feature", source.caption, features)
    image, caption = features[source.image], features[source.caption]
    if not isinstance(image, tfds.features.Image):
        raise UserError(f"tfds data set {source.name!r}: feature {source.image} is {image!r}, expected an Image")
    text = getattr(caption, "feature", caption)
    if not isinstance(text, tfds.features.Text):
        found = f"feature {source.caption} is {caption!r}"
        raise UserError(f"tfds data set {source.name!r}: {found}, expected a Text or a Sequence of Text")


def _fingerprint(builder: Any, mask: str | None) -> str:
    """Hash of the version and of the stamps of all files of a data set, and of the mask's."""
    files = sorted(os.fspath(path) for path in epath.Path(builder.data_path).iterdir() if path.is_file())
    stamps = [(path, stamp_of(path)) for path in [*files, *([mask] if mask else [])]]
    return hashlib.sha256(repr((str(builder.info.version), stamps)).encode("utf-8", "surrogatepass")).hexdigest()


def _tfds() -> Any:
    import tensorflow_datasets as tfds

    return tfds


@functools.cache
def _scratch() -> str:
    """A folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="anima_shapes_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _builder(name: str, data_dir: str | os.PathLike[str] | None, prepare: bool) -> Any:
    """A builder whose data are on disk as array_record."""
    tfds = _tfds()
    if name == SHAPES:
        from anima_jax.data.shapes_builder import AnimaShapes, prepared_builder

        drawn = AnimaShapes(data_dir=data_dir).data_path.exists()
        return prepared_builder(data_dir if prepare or drawn else _scratch())
    if (epath.Path(name) / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(name)
    else:
        builder = _from_files(name, data_dir) or _from_code(name, data_dir)
    if not builder.info.splits:
        raise UserError(f"tfds data set {name!r} is not prepared: expected its records in {builder.data_path}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise UserError(f"tfds data set {name!r}: its records are {found}, expected array_record")
    return builder


def _from_files(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """A builder of what lies prepared under a name, or None. Not by its code, which may need TensorFlow."""
    from tensorflow_datasets.core import naming, read_only_builder

    try:
        parsed, kwargs = naming.parse_builder_name_kwargs(name, data_dir=data_dir)
        return read_only_builder.builder_from_files(str(parsed), **kwargs)
    except Exception:  # tfds raises many types; what is wrong with the name, `_from_code` says
        return None


def _from_code(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    tfds = _tfds()
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # no such name, no such version, a module that it lacks: tfds raises many types
        # Without the community's data sets, whose list lies on the network.
        known = [SHAPES, *tfds.list_builders(with_community_datasets=False)]
        if (base := re.split("[/:]", name)[0]) in known:
            place = data_dir or tfds.core.constants.DATA_DIR
            found = f"nothing of this version and configuration is prepared in {place}"
            raise UserError(f"tfds data set {name!r}: {found}; {first_line(error)}") from None
        expected = f"a directory with dataset_info.json, or a name that tfds knows{did_you_mean(base, known)}"
        raise UserError(f"tfds data set {name!r}: expected {expected}; {first_line(error)}") from None


@functools.lru_cache(maxsize=8)
def _records(builder_dir: str, split: str, image_feature: str) -> Any:
    tfds = _tfds()
    builder = tfds.builder_from_directory(builder_dir)
    return builder.as_data_source(split=split, decoders={image_feature: tfds.decode.SkipDecoding()})


def _expect(name: str, kind: str, found: str, known: Any) -> None:
    if found not in known:
        hint = did_you_mean(found, known) or f" (there are {', '.join(known)})"
        raise UserError(f"tfds data set {name!r} has no {kind} {found!r}{hint}")
