"""The images of a `[[tfds]]`: a tensorflow-datasets data set stored as array_record. TensorFlow is not used.

tensorflow_datasets is imported only when such a data set is read. It imports the classes that a data set's files
name, so those are checked first (`_check_classes`): reading a data set must not run code that comes with it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from anima_jax.config.dataset import TfdsSource
from anima_jax.data.captions import Captions, decode_caption
from anima_jax.data.folder_source import CACHE
from anima_jax.data.media import label_of, stamp_of
from anima_jax.data.problems import Problems
from anima_jax.data.sources import Candidate, Counts, Partners, SourceReader
from anima_jax.errors import UserError, did_you_mean, first_line, shorten

SHAPES = "anima_shapes"
"""The data set of the quick start, generated at first use (`shapes_builder`)."""


_CLASS_KEYS = ("pythonClassName", "python_class_name")
_TFDS_CLASS = re.compile(r"tensorflow_datasets(\.[A-Za-z_]\w*)+", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class RecordMedia:
    """The encoded image in one record of a prepared data set."""

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
        return _record(self)[self.image_feature]

    def stamp(self) -> None:
        """Return None: a record has no modification time. The fingerprint of the whole data set is used instead."""


class TfdsReader(SourceReader[TfdsSource]):
    """Reader of a `[[tfds]]`. Without `prepare`, the quick start's data set is generated in a temporary folder."""

    media_types = (RecordMedia,)

    def __init__(self, source: TfdsSource, *, prepare: bool = True):
        self.source, self._prepare = source, prepare
        self._data_set = source.name or source.builder_dir or ""
        self.name = f"tfds data set {self._data_set!r}: split {source.split}"
        keys = ("split", "image", "caption", "data_dir")
        split = {"name": self._data_set, **{key: getattr(source, key) for key in keys}}
        self.location = f"TfdsSplit({', '.join(f'{key}={value!r}' for key, value in split.items())})"
        self.about = {**split, "skip_empty_caption": source.skip_empty_caption, "mask": None}
        self.about |= {"nl": source.nl} if source.nl else {}
        self.about |= {"control": list(source.control)} if source.control else {}
        # The rule of tensorflow-datasets, without importing it.
        root = source.data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
        folder = source.builder_dir or os.path.join(os.path.expanduser(root), self._data_set.partition(":")[0])
        self.cache_dir = os.path.join(folder, CACHE)

    def fingerprint(self) -> str:
        """Return a hash of the data set's version and of the stamps of all its files."""
        builder = self._builder
        files = sorted(os.fspath(path) for path in epath.Path(builder.data_path).iterdir() if path.is_file())
        stamps = [(path, stamp_of(path)) for path in files]
        return hashlib.sha256(repr((str(builder.info.version), stamps)).encode("utf-8", "surrogatepass")).hexdigest()

    def candidates(self, problems: Problems, counts: Counts) -> list[Candidate]:
        source, builder_dir = self.source, os.fspath(self._builder.data_path)
        try:
            number = len(_records(builder_dir, source.split))
        except Exception as error:  # an empty slice or one that tfds cannot parse, missing shards
            raise UserError(f"{self.name}: {first_line(error)}") from None
        media = (RecordMedia(builder_dir, source.split, index, source.image) for index in range(number))
        controls = source.control or ()
        return [
            Candidate(
                each,
                functools.partial(_captions, each, source),
                Partners(controls=tuple(dataclasses.replace(each, image_feature=name) for name in controls)),
            )
            for each in media
        ]

    @functools.cached_property
    def _builder(self) -> Any:
        """The builder of the data set. Raises UserError if it is not prepared or lacks the split or a feature."""
        builder = _builder(self._data_set, self.source.data_dir, self._prepare)
        tfds, features, what = _tfds(), builder.info.features, f"tfds data set {self._data_set!r}"
        if not isinstance(features, tfds.features.FeaturesDict):
            raise UserError(f"{what}: its examples are {shorten([repr(features)], 1)}, expected features with names")
        for part in self.source.split.split("+"):
            _check_known(what, "split", part.partition("[")[0].strip(), ["all", *builder.info.splits])
        images = (self.source.image, *(self.source.control or ()))
        for name in filter(None, (*images, self.source.caption, self.source.nl)):
            _check_known(what, "feature", name, features)
        for name in images:
            if not isinstance(image := features[name], tfds.features.Image):
                raise UserError(f"{what}: feature {name} is {image!r}, expected an Image")
        for name in filter(None, (self.source.caption, self.source.nl)):
            if not isinstance(getattr(features[name], "feature", features[name]), tfds.features.Text):
                raise UserError(f"{what}: feature {name} is {features[name]!r}, expected a Text or a Sequence of Text")
        return builder


def _captions(media: RecordMedia, source: TfdsSource) -> Captions:
    return Captions(_texts(media, source.caption), _texts(media, source.nl) if source.nl else ())


def _texts(media: RecordMedia, feature: str) -> tuple[str, ...]:
    found, name = _record(media)[feature], f"{media.builder_dir} {media.split}[{media.index}] {feature}"
    texts: Sequence[Any] = [found] if isinstance(found, bytes | str) else list(found)
    return tuple(text.strip() if isinstance(text, str) else decode_caption(text, name) for text in texts)


def _record(media: RecordMedia) -> dict[str, Any]:
    try:
        return _records(media.builder_dir, media.split)[media.index]
    except Exception as error:  # damaged shards: array_record, protobuf and tfds each raise their own types
        raise UserError(f"{media.name}: the record cannot be read: {first_line(error)}") from None


@functools.lru_cache(maxsize=8)
def _records(builder_dir: str, split: str) -> Any:
    tfds = _tfds()
    builder = _from_directory(builder_dir)
    images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    return builder.as_data_source(split=split, decoders=dict.fromkeys(images, tfds.decode.SkipDecoding()))


def _tfds() -> Any:
    import tensorflow_datasets as tfds

    return tfds


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="anima_shapes_", ignore_cleanup_errors=True)


def _from_directory(builder_dir: str) -> Any:
    """Return the builder of a prepared data set. Raises UserError if its files are damaged or name foreign code."""
    _check_classes(epath.Path(builder_dir).expanduser())
    try:
        return _tfds().builder_from_directory(builder_dir)
    except Exception as error:  # tfds, protobuf and json raise many types
        raise UserError(f"tfds data set {builder_dir!r}: cannot be read: {first_line(error)}") from None


def _check_classes(folder: epath.Path) -> None:
    """Raise UserError if the files of a prepared data set name a class that is not part of tensorflow_datasets."""
    for path in (folder / "features.json", folder / "dataset_info.json"):
        if not path.exists():
            continue
        try:
            foreign = next(
                filter(lambda name: not _TFDS_CLASS.fullmatch(name), _classes(json.loads(path.read_text()))), ""
            )
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
        if foreign:
            raise UserError(
                f"{path}: names the class {shorten([foreign])}, expected only classes of tensorflow_datasets: to read "
                "this data set would run code that comes with it"
            )


def _classes(value: Any) -> Iterator[str]:
    """Yield the names of classes in a description of features: that of a protobuf, or an older one in plain JSON.

    An older one may be in the text of a newer one.
    """
    if isinstance(value, list):
        for item in value:
            yield from _classes(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, str) and (key in _CLASS_KEYS or (key == "type" and "." in item)):
                yield item
            yield from _classes(item)
    elif isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        with contextlib.suppress(ValueError):
            yield from _classes(json.loads(value))


def _builder(name: str, data_dir: str | os.PathLike[str] | None, prepare: bool) -> Any:
    """Return a builder whose data is on disk as array_record. Raises UserError if there is none."""
    tfds = _tfds()
    if name == SHAPES:
        from anima_jax.data.shapes_builder import AnimaShapes, prepared_builder

        drawn = AnimaShapes(data_dir=data_dir).data_path.exists()
        return prepared_builder(data_dir if prepare or drawn else _temporary_folder().name)
    if (epath.Path(name) / "dataset_info.json").exists():
        builder = _from_directory(name)
    else:
        builder = _from_files(name, data_dir) or _from_code(name, data_dir)
    if not builder.info.splits:
        raise UserError(f"tfds data set {name!r} is not prepared: expected its records in {builder.data_path}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise UserError(f"tfds data set {name!r}: its records are {found}, expected array_record")
    return builder


def _from_files(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    """Return a builder of the prepared files, or None, without running the data set's code, which may need TF."""
    from tensorflow_datasets.core import naming, read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    try:
        parsed, kwargs = naming.parse_builder_name_kwargs(name, data_dir=data_dir)
    except Exception:  # `_from_code` reports what is wrong with the name
        return None
    if parsed.namespace:
        raise UserError(
            f"tfds data set {name!r}: community data sets run code from the network, which is not supported; prepare "
            "it with tensorflow_datasets as array_record and give its builder_dir"
        )
    for root in file_utils.list_data_dirs(given_data_dir=data_dir):
        for pattern in ("*", "*/*"):  # version, or configuration and version
            for path in (epath.Path(root) / parsed.name).glob(f"{pattern}/dataset_info.json"):
                _check_classes(path.parent)
    try:
        return read_only_builder.builder_from_files(str(parsed), **kwargs)
    except Exception:  # of many types, as above
        return None


def _from_code(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    tfds = _tfds()
    try:
        return tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # no such name or version, a missing module: tfds raises many types
        # Without the community data sets, because their list is on the network.
        known = [SHAPES, *tfds.list_builders(with_community_datasets=False)]
        if (base := re.split("[/:]", name)[0]) in known:
            folder = data_dir or tfds.core.constants.DATA_DIR
            found = f"nothing of this version and configuration is prepared in {folder}"
            raise UserError(f"tfds data set {name!r}: {found}; {first_line(error)}") from None
        expected = f"a directory with dataset_info.json, or a name that tfds knows{did_you_mean(base, known)}"
        raise UserError(f"tfds data set {name!r}: expected {expected}; {first_line(error)}") from None


def _check_known(what: str, kind: str, found: str, known: Any) -> None:
    if found not in known:
        hint = did_you_mean(found, known) or f" (there are {', '.join(known)})"
        raise UserError(f"{what} has no {kind} {found!r}{hint}")
