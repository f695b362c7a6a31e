"""The dataset TOML: where pictures and captions come from.

A key at the top holds for every source; the same key inside a `[[directory]]` or a `[[tfds]]` wins there.
"""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_jax.config.schema import (
    PIXEL_MULTIPLE,
    InputFolder,
    Listed,
    NotEmpty,
    OutputFolder,
    Positive,
    Section,
    fault,
    multiple_of_16,
    not_yet,
)

SHARED_KEYS = ("resolutions", "num_repeats", "caption_prefix", "skip_empty_caption")
"""Keys that may stand at the top of the file."""

SOURCES = ("directory", "tfds")
"""Tables of the file: one or more of each."""


def side_of(resolution: int | tuple[int, int]) -> int:
    """Side in pixels of the square that a resolution stands for.

    As in diffusion-pipe a resolution is an *area*, given as a side or as (width, height), and without aspect-ratio
    buckets pictures are square. The side is rounded to a multiple of 16.
    """
    side = resolution if isinstance(resolution, int) else math.sqrt(resolution[0] * resolution[1])
    return max(1, round(side / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE


def _resolution(found: Any) -> int | tuple[int, int]:
    """A side, or [width, height]. Both kinds are checked by hand: the faults of a union would name both."""
    sides = found if isinstance(found, list | tuple) else [found]
    if len(sides) not in {1, 2} or not all(type(side) is int and side >= 1 for side in sides):
        raise fault(f"found {found!r}, expected a side in pixels or [width, height]")
    if not isinstance(found, list | tuple):
        return found
    if len(sides) == 1:
        raise fault(f"found {found!r}, expected [width, height], or the side alone, without brackets")
    return multiple_of_16(sides[0]), multiple_of_16(sides[1])


def _one_for_now(resolutions: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(resolutions) > 1:
        raise fault(not_yet(f"more than one resolution (found {len(resolutions)})"))
    return resolutions


Resolutions = Annotated[
    tuple[Annotated[Any, AfterValidator(_resolution)], ...],
    Listed,
    NotEmpty,
    AfterValidator(_one_for_now),
]


class Source(Section):
    """What every source of examples has."""

    resolutions: Resolutions = Field(
        description="one resolution: the side of a square in pixels, or [width, height] for the same area; "
        "pictures are resized and cropped at the centre"
    )
    num_repeats: Positive = Field(1.0, description="how often an epoch passes over the examples; may be a fraction")
    caption_prefix: str = Field("", description="put before every caption")
    skip_empty_caption: bool = Field(
        True, description="leave out pictures without a caption (false: train them with an empty one)"
    )

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of the training pictures, in pixels."""
        side = side_of(self.resolutions[0])
        return side, side


class DirectorySource(Source):
    """A folder of pictures, each with its caption in a `.txt` file of the same name."""

    path: InputFolder = Field(description="the folder")


class TfdsSource(Source):
    """Ours: a dataset of tensorflow-datasets."""

    name: str | None = Field(None, min_length=1, description="a registered name, as 'anima_shapes' or 'coco_captions'")
    builder_dir: InputFolder | None = Field(
        None, validate_default=True, description="the folder of a prepared dataset version, instead of name"
    )
    split: str = Field("train", min_length=1, description="split, in tensorflow-datasets' notation: 'train[:90%]'")
    image: str = Field("image", min_length=1, description="feature that holds the picture")
    caption: str = Field("caption", min_length=1, description="feature that holds the caption")
    data_dir: OutputFolder | None = Field(
        None, description="where prepared datasets are kept; unset: tensorflow-datasets' own place"
    )

    @field_validator("num_repeats", "caption_prefix", "skip_empty_caption")
    @classmethod
    def _as_it_is(cls, value: Any, info: ValidationInfo) -> Any:
        if value != Source.model_fields[info.field_name or ""].default:
            raise fault(not_yet(f"{info.field_name} for a [[tfds]]"))
        return value

    @field_validator("builder_dir")
    @classmethod
    def _one_of_two(cls, builder_dir: str | None, info: ValidationInfo) -> str | None:
        if "name" in info.data and (info.data["name"] is None) == (builder_dir is None):
            found = "neither" if builder_dir is None else "both"
            raise fault(f"expected exactly one of name and builder_dir, found {found}")
        return builder_dir


class DatasetConfig(Section):
    """A whole dataset TOML, shared keys already handed to the sources."""

    directory: Annotated[tuple[DirectorySource, ...], Listed] = Field((), description="folders of captioned pictures")
    tfds: Annotated[tuple[TfdsSource, ...], Listed] = Field((), validate_default=True, description="ours: datasets")

    @field_validator("tfds")
    @classmethod
    def _one_size_of_source(cls, tfds: tuple[TfdsSource, ...], info: ValidationInfo) -> tuple[TfdsSource, ...]:
        if not tfds and info.data.get("directory") == ():
            raise fault("expected at least one [[directory]] or [[tfds]], found none")
        sizes = {source.size_wh for source in (*info.data.get("directory", ()), *tfds)}
        if len(sizes) > 1:
            raise fault(not_yet(f"more than one resolution (found {sorted(side for side, _ in sizes)})"))
        return tfds

    @property
    def sources(self) -> tuple[DirectorySource | TfdsSource, ...]:
        """Every source, folders first."""
        return self.directory + self.tfds

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of every training picture, in pixels."""
        return self.sources[0].size_wh


def hand_down(table: dict[str, Any]) -> dict[str, Any]:
    """A dataset TOML's table with the shared keys moved from its top into each source that does not set them itself."""
    shared = {key: table[key] for key in SHARED_KEYS if key in table}
    rest = {key: value for key, value in table.items() if key not in SHARED_KEYS}
    for kind in SOURCES:
        if isinstance(entries := rest.get(kind), list):
            rest[kind] = [shared | entry if isinstance(entry, dict) else entry for entry in entries]
    return rest
