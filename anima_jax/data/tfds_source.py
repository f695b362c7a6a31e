"""Examples from a tensorflow-datasets data set that lies on disk as array_record. No TensorFlow takes part.

tensorflow_datasets is imported on use: only who names such a data set waits for it.
"""

import dataclasses
import functools
import os
from typing import Any

from etils import epath

from anima_jax.data.captions import decode_caption
from anima_jax.data.examples import Example, content_digest, example_id
from anima_jax.errors import UserError, did_you_mean

SHAPES = "anima_shapes"
"""The data set of the quick start, drawn on first use (`shapes_builder`)."""


@dataclasses.dataclass(frozen=True)
class RecordMedia:
    """The encoded picture in one record of a prepared data set."""

    builder_dir: str
    split: str
    index: int
    image_feature: str

    @property
    def name(self) -> str:
        return f"{self.builder_dir} {self.split}[{self.index}] {self.image_feature}"

    def read(self) -> bytes:
        return _records(self.builder_dir, self.split, self.image_feature)[self.index][self.image_feature]


def tfds_examples(
    name_or_builder_dir: str,
    split: str,
    image_feature: str,
    caption_feature: str,
    size_wh: tuple[int, int],
    data_dir: str | os.PathLike | None = None,
) -> list[Example]:
    """The records of a split, in their order: an Image feature and a Text feature.

    The data set is a registered name (under `data_dir`, by default tensorflow-datasets' own directory) or the directory
    that holds its dataset_info.json. `split` may be sliced as tfds does ("train[:10%]"). Raises UserError if the data
    set is not there, not prepared as array_record, empty, or lacks the split or a feature.
    """
    builder = _builder(name_or_builder_dir, data_dir)
    tfds = _tfds()
    name, features = name_or_builder_dir, builder.info.features
    for part in split.split("+"):
        _expect(name, "split", part.partition("[")[0].strip(), ["all", *builder.info.splits])
    _expect(name, "feature", image_feature, features)
    _expect(name, "feature", caption_feature, features)
    if not isinstance(features[image_feature], tfds.features.Image):
        raise UserError(
            f"tfds data set {name!r}: feature {image_feature} is {features[image_feature]!r}, expected an Image"
        )
    if not isinstance(features[caption_feature], tfds.features.Text):
        raise UserError(
            f"tfds data set {name!r}: feature {caption_feature} is {features[caption_feature]!r}, expected a Text"
        )
    builder_dir = os.fspath(builder.data_path)
    try:
        records = _records(builder_dir, split, image_feature)
    except ValueError as error:  # a slice that tfds cannot parse, or that holds nothing
        raise UserError(f"tfds data set {name!r}: split {split}: {_first_line(error)}") from None
    examples = []
    for index in range(len(records)):
        record, media = records[index], RecordMedia(builder_dir, split, index, image_feature)
        caption = decode_caption(record[caption_feature], f"{builder_dir} {split}[{index}] {caption_feature}")
        examples.append(Example(example_id(content_digest(record[image_feature]), size_wh), caption, media, size_wh))
    if not examples:
        raise UserError(f"tfds data set {name!r}: split {split} is empty")
    return examples


def _tfds() -> Any:
    import tensorflow_datasets as tfds

    return tfds


def _builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """A builder whose data are on disk as array_record."""
    tfds = _tfds()
    if name == SHAPES:
        from anima_jax.data.shapes_builder import prepared_builder

        return prepared_builder(data_dir)
    if (epath.Path(name) / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(name)
    else:
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except Exception as error:  # no such name, no such version, a module that it lacks: tfds raises many types
            # Without the community's data sets, whose list lies on the network.
            hint = did_you_mean(name, [SHAPES, *tfds.list_builders(with_community_datasets=False)])
            expected = f"a directory with dataset_info.json, or a name that tfds knows{hint}"
            raise UserError(f"tfds data set {name!r}: expected {expected}; {_first_line(error)}") from None
    if not builder.info.splits:
        raise UserError(f"tfds data set {name!r} is not prepared: expected its records in {builder.data_path}")
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format.value
        raise UserError(f"tfds data set {name!r}: its records are {found}, expected array_record")
    return builder


@functools.lru_cache(maxsize=8)
def _records(builder_dir: str, split: str, image_feature: str) -> Any:
    tfds = _tfds()
    builder = tfds.builder_from_directory(builder_dir)
    return builder.as_data_source(split=split, decoders={image_feature: tfds.decode.SkipDecoding()})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _expect(name: str, kind: str, found: str, known: Any) -> None:
    if found not in known:
        hint = did_you_mean(found, known) or f" (there are {', '.join(known)})"
        raise UserError(f"tfds data set {name!r} has no {kind} {found!r}{hint}")
