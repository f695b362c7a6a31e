"""The dataset TOML: the sources of images, clips and captions, and the sizes at which they are trained.

A top-level key applies to every source; the same key inside a `[[directory]]` or a `[[tfds]]` overrides it there.
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from anima_jax.config.pairs import ControlFeatures, ControlFolders, InpaintFolder, MaskShares, controls_of
from anima_jax.config.schema import (
    Count,
    InputFile,
    InputFolder,
    Listed,
    LocalFile,
    NotEmpty,
    OutputFolder,
    Positive,
    Probability,
    Section,
    Whole,
    documented_as,
    expecting,
    invalid,
    shares,
    whole_number,
)
from anima_jax.config.sizes import SIDE_DECIMALS, Size, nearest_multiple
from anima_jax.errors import UserError, os_reason

SOURCES = ("directory", "tfds")
"""The kinds of source tables. Each may occur several times."""

MANY_RESOLUTIONS = 4
"""This many or more in one source are probably a mistake, because each resolution repeats the whole data set."""

MAX_SIDE = 16384
"""In pixels. A larger side is a typing error and would not fit in memory."""

RATIO_SPAN = ("min_ar", "max_ar", "num_ar_buckets")

_KEEPING = ("keep_tokens", "keep_tokens_separator", "nl_keep_first_sentence")

CAPTION_WAYS = ("tags", "nl", "tags_nl", "nl_tags")
"""What a caption may consist of: tags, natural language, or one followed by the other."""

Side = Annotated[int | float, Field(ge=16, le=MAX_SIDE)]
Pair = tuple[float, float]


def _ratio(found: Any) -> Any:
    is_pair = isinstance(found, list | tuple) and len(found) == 2
    return found[0] / found[1] if is_pair and all(type(n) in {int, float} and n > 0 for n in found) else found


def _some_but_few(resolutions: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
    if info.data.get("size_buckets", True):
        return resolutions
    if not resolutions:
        raise invalid("found none, expected at least one side in pixels, as in [1024], or size_buckets")
    if len(resolutions) >= MANY_RESOLUTIONS and not (info.context or {}).get("i_know_what_i_am_doing"):
        raise invalid(
            f"found {len(resolutions)} of them: every image is trained at every resolution, so an epoch is "
            f"{len(resolutions)} times as long; if that is meant, start with --i_know_what_i_am_doing"
        )
    return resolutions


def _size_bucket(found: Any) -> Size:
    size = [whole_number(x) for x in found] if isinstance(found, list | tuple) else []
    if len(size) != 3 or any(type(x) is not int or x < 1 for x in size):
        raise invalid(f"found {found!r}, expected [width, height, frames]")
    width, height, frames = size
    return Size(nearest_multiple(width), nearest_multiple(height), frames)


def _suffix(found: str) -> str:
    if not re.fullmatch(r"\.?[\w-]{1,20}", found):
        raise invalid(f"found {found!r}, expected the suffix of a file, as in '.txt'")
    return "." + found.removeprefix(".").lower()


def _tags_file(path: str) -> str:
    try:
        read_tags(path)
    except UserError as error:
        raise invalid(str(error)) from None
    return path


Resolution = Annotated[
    Side | Annotated[tuple[Side, Side], Listed],
    expecting(f"a side in pixels or [width, height], 16 to {MAX_SIDE} each"),
    documented_as("number or [width, height]"),
]
RatioBound = Annotated[float, Field(ge=0.001, le=1000)]
Ratio = Annotated[
    RatioBound,
    BeforeValidator(_ratio),
    expecting("width / height or [width, height], 0.001 to 1000"),
    documented_as("number or [width, height]"),
]
SizeBucket = Annotated[Any, AfterValidator(_size_bucket), documented_as("[width, height, frames]")]
Share = Annotated[float, Field(gt=0, le=1)]
Weights = Annotated[
    Any,
    shares(CAPTION_WAYS, "{tags = 50, nl = 10, tags_nl = 20, nl_tags = 20}"),
    documented_as("{tags = …, nl = …, tags_nl = …, nl_tags = …}"),
]
Suffix = Annotated[str, AfterValidator(_suffix), documented_as("suffix")]


class Source(Section):
    """A source of examples: the keys shared by all kinds of sources."""

    size_buckets: Annotated[tuple[SizeBucket, ...], Listed, NotEmpty] = Field(
        (),
        description="[width, height, frames] each, sides in pixels, rounded to multiples of 16: exactly these sizes, "
        "instead of resolutions and frame_buckets; each example goes to the one of the nearest ratio that it is long "
        "enough for",
    )
    resolutions: Annotated[tuple[Resolution, ...], Listed, AfterValidator(_some_but_few)] = Field(
        (),
        validate_default=True,
        description="sides of squares in pixels, or [width, height]: either means an area; "
        "every example is trained at each of them, resized and cropped around the centre",
    )
    min_ar: RatioBound | None = Field(None, description="enable_ar_bucket: the smallest ratio, width / height")
    max_ar: RatioBound | None = Field(None, description="enable_ar_bucket: the largest ratio, width / height")
    num_ar_buckets: Count | None = Field(
        None, description="enable_ar_bucket: number of ratios from min_ar to max_ar, evenly spaced in their logarithm"
    )
    ar_buckets: Annotated[tuple[Ratio, ...], Listed, NotEmpty] = Field(
        (),
        description="enable_ar_bucket: ratios, width / height or [width, height] each, instead of min_ar to max_ar",
    )
    enable_ar_bucket: bool = Field(
        False,
        description="true: an example keeps about its own shape, at the nearest ratio of ar_buckets or of min_ar to "
        "max_ar; false: all are cropped to squares",
    )
    frame_buckets: Annotated[tuple[Count, ...], Listed, NotEmpty] = Field(
        (1,),
        description="lengths of clips in frames, 16 per second, best 1 + 4n; a clip is cut to the longest that it "
        "fills, and left out if it fills none above 1; 1, for images, is always among them",
    )
    num_repeats: Positive = Field(1.0, description="how often an epoch repeats the examples; may be a fraction")
    subsample_ratio: Share = Field(
        1.0, description="share of the images and clips to use, more than 0 and at most 1; the same ones in every run"
    )
    caption_prefix: str = Field("", description="prepended to every caption")
    skip_empty_caption: bool = Field(
        True,
        description="leave out images and clips without a caption, or with an empty one, which diffusion-pipe would "
        "train (false: train them all, with an empty one)",
    )
    caption_choice: Literal["each", "random"] = Field(
        "each",
        description="ours; of several captions of one image: 'each' is an example of its own, or one is drawn at "
        "'random' in every epoch",
    )
    caption_mode: Literal["tags", "nl", "tags_nl", "nl_tags", "mixed"] = Field(
        "tags",
        description="ours; which of an image's captions are used. 'tags': its caption file or tags, else its natural "
        "language; 'nl': its natural language, else its tags; 'tags_nl' and 'nl_tags': one followed by the other; "
        "'mixed': one of these ways, drawn in every epoch by mixed_weights. Natural language is in NAME_nl.txt, in "
        "NAME.caption next to NAME.txt, or in JSON",
    )
    mixed_weights: Weights = Field(
        {"tags": 50.0, "nl": 10.0, "tags_nl": 20.0, "nl_tags": 20.0},
        description="ours; caption_mode 'mixed': how often each way is drawn, relative to the others; one that is not "
        "named never, and of an image without natural language only tags",
    )
    shuffle_tags: bool = Field(
        False,
        description="shuffle each caption's tags: once, or in every epoch if [model] cache_text_embeddings = false",
    )
    cache_shuffle_num: Whole = Field(
        0,
        description="number of shuffled copies that replace each caption, each an example; 0: see shuffle_tags",
    )
    cache_shuffle_delimiter: str = Field(", ", min_length=1, description="separator of a caption's tags")
    keep_tokens: Whole = Field(
        0, description="ours; number of tags at the start of each caption that are neither shuffled nor dropped"
    )
    keep_tokens_separator: str = Field(
        "",
        description="ours; a text such as '|||' that ends the tags which are neither shuffled nor dropped, in a "
        "caption that has it, instead of keep_tokens; a second one begins such tags at the end; it is removed",
    )
    nl_shuffle_sentences: bool = Field(
        False, description="ours; shuffle the sentences of natural language, as often as shuffle_tags shuffles tags"
    )
    nl_keep_first_sentence: bool = Field(
        False, description="ours; nl_shuffle_sentences leaves the first sentence first"
    )
    tag_dropout: Probability = Field(
        0.0,
        description="ours; probability that a tag is left out in an epoch, at least 0 and less than 1; "
        "needs [model] cache_text_embeddings = false",
    )
    protected_tags: Annotated[tuple[str, ...], Listed] = Field(
        (), description="ours; tags that tag_dropout always keeps, without regard to capital letters"
    )
    protected_tags_file: Annotated[LocalFile, AfterValidator(_tags_file)] | None = Field(
        None,
        description="ours; a text file of more protected_tags, one in a line; lines that begin with # are comments",
    )

    inpaint_masks: MaskShares = Field(
        None,
        description="ours; with [adapter] cond_in_channels = 4: how often each kind of random mask is drawn, relative "
        "to the others; a kind that is not named never; unset: {boxes = 45, strokes = 45, whole = 10}",
    )

    @field_validator("enable_ar_bucket")
    @classmethod
    def _ratios_are_given(cls, enabled: bool, info: ValidationInfo) -> bool:
        missing = [key for key in RATIO_SPAN if key in info.data and info.data[key] is None]
        if enabled and missing and not info.data.get("ar_buckets", True) and not info.data.get("size_buckets"):
            raise invalid(f"expected ar_buckets, or min_ar, max_ar and num_ar_buckets; missing: {', '.join(missing)}")
        return enabled

    @field_validator("tag_dropout")
    @classmethod
    def _cached_text_has_no_dropout(cls, dropout: float, info: ValidationInfo) -> float:
        if dropout and (info.context or {}).get("cached_text"):
            raise invalid(
                f"found {dropout}, but cached text is the same in every epoch; set cache_text_embeddings = false in "
                "the main TOML's [model], or leave it at 0"
            )
        return dropout

    @functools.cached_property
    def all_protected_tags(self) -> frozenset[str]:
        """The tags of `protected_tags` and `protected_tags_file`, case-folded. Raises UserError."""
        more = read_tags(self.protected_tags_file) if self.protected_tags_file else ()
        return frozenset(tag.strip().casefold() for tag in (*self.protected_tags, *more))

    @functools.cached_property
    def caption_rules(self) -> tuple[str, ...]:
        """The options, as far as they are set, that decide which tags and sentences of a caption stay in place.

        The protected tags, of which there may be thousands, are one hash.
        """
        kept = [f"{key} {value}" for key in _KEEPING if (value := getattr(self, key))]
        tags = "\0".join(sorted(self.all_protected_tags)).encode()
        protected = [hashlib.sha256(tags).hexdigest()] if tags else []
        return (*kept, *protected) if self.tag_dropout or kept else ()

    @property
    def shuffled_copies(self) -> int:
        """Number of shuffled copies that replace each caption; 0 leaves captions unchanged."""
        return self.cache_shuffle_num or int(self.shuffle_tags)

    @property
    def sides(self) -> tuple[float, ...]:
        """Sides in pixels of the squares that `resolutions` describe."""
        return tuple(map(_side, self.resolutions))

    @property
    def messages(self) -> dict[str, str]:
        """Key → message about a value with an effect that the user may not expect."""
        return dict([*self._caption_messages(), *self._size_messages()])

    def _caption_messages(self) -> Iterator[tuple[str, str]]:
        if self.caption_mode != "mixed":
            yield "mixed_weights", "does nothing here: caption_mode is not 'mixed'"
        if not self.nl_shuffle_sentences and self.nl_keep_first_sentence:
            yield "nl_keep_first_sentence", "does nothing here: nl_shuffle_sentences is not true"
        if not self.tag_dropout:
            for key in ("protected_tags", "protected_tags_file"):
                yield key, "does nothing here: tag_dropout is 0"
            if not self.shuffled_copies:
                yield "keep_tokens", "does nothing here: neither tags are shuffled nor dropped"

    def _size_messages(self) -> Iterator[tuple[str, str]]:
        ratio_keys = (*RATIO_SPAN, "ar_buckets")
        if self.size_buckets:
            for key in ("resolutions", "frame_buckets", *ratio_keys, *["enable_ar_bucket"] * self.enable_ar_bucket):
                yield key, "does nothing here: size_buckets is set"
        elif not self.enable_ar_bucket:
            for key in ratio_keys:
                yield key, "does nothing here: enable_ar_bucket is not true"
            squares = {area: nearest_multiple(_side(area)) for area in self.resolutions}
            rounded = [
                f"{area} is an area: images are {side} × {side}"
                for area, side in squares.items()
                if area not in {side, (side, side)}
            ]
            if rounded:
                yield "resolutions", "; ".join(rounded)
        elif self.ar_buckets:
            for key in RATIO_SPAN:
                yield key, "does nothing here: ar_buckets is set"
        for key, sizes in (
            ("size_buckets", self.size_buckets),
            ("frame_buckets", [] if self.size_buckets else [Size(16, 16, frames) for frames in self.frame_buckets]),
        ):
            used = [f"of {size.frames} the first {size.encoded_frames}" for size in sizes if size.is_cut]
            if used:
                yield key, f"the VAE takes 1 + 4n frames: {', '.join(used)}"


class DirectorySource(Source):
    """A folder of images and videos, with captions in `.txt`, `.caption` or `.json` files of the same name, or in
    `captions.json`.
    """

    path: InputFolder = Field(description="the folder")
    mask_path: InputFolder | None = Field(
        None,
        description="a folder of masks, with the images' names and sizes: red 255 trains a pixel, 0 does not, "
        "values between are weights; of an image without a mask every pixel is trained",
    )
    default_mask_file: InputFile | None = Field(None, description="the mask of images that have none in mask_path")
    control_path: ControlFolders = Field(
        None,
        validate_default=True,
        description="a folder of control pictures, with the images' names, for [adapter] type = 'lllite'; or for "
        "edit = true a folder of reference pictures, or a list of folders, each with a picture for every image; an "
        "image without one of its pictures is left out",
    )
    inpaint_mask_path: InpaintFolder = Field(
        None,
        description="ours; with [adapter] cond_in_channels = 4 a folder of masks, with the images' names and sizes: "
        "white is drawn anew; for an image without a mask, one is drawn at random in every epoch",
    )
    caption_extension: Suffix | None = Field(
        None, description="ours; suffix of the caption files; unset: .txt, else .caption, else .json"
    )
    captions_file: InputFile | None = Field(
        None,
        description="ours; a JSON file with the captions of all images; unset: captions.json, if the folder has it",
    )
    online_captions: bool = Field(
        False, description="read captions.json, or captions_file, at every start, even with --trust_cache"
    )


class TfdsSource(Source):
    """Ours: a tensorflow-datasets data set."""

    name: str | None = Field(None, min_length=1, description="a registered name, as 'anima_shapes' or 'coco_captions'")
    builder_dir: InputFolder | None = Field(
        None, validate_default=True, description="the folder of a prepared dataset version, instead of name"
    )
    split: str = Field("train", min_length=1, description="split in tensorflow-datasets' notation: 'train[:90%]'")
    image: str = Field("image", min_length=1, description="feature with the image")
    caption: str = Field("caption", min_length=1, description="feature with the caption or captions")
    nl: str | None = Field(None, min_length=1, description="feature with natural language, for caption_mode")
    control: ControlFeatures = Field(
        None,
        validate_default=True,
        description="feature with the control or reference picture, or several, as control_path of a [[directory]]",
    )
    data_dir: OutputFolder | None = Field(
        None, description="folder of prepared datasets; unset: tensorflow-datasets' own"
    )

    @field_validator("builder_dir")
    @classmethod
    def _one_of_two(cls, builder_dir: str | None, info: ValidationInfo) -> str | None:
        if "name" in info.data and (info.data["name"] is None) == (builder_dir is None):
            found = "neither" if builder_dir is None else "both"
            raise invalid(f"expected exactly one of name and builder_dir, found {found}")
        return builder_dir


SHARED_KEYS = tuple(key for key in DirectorySource.model_fields if key != "path")
"""Keys that are also allowed at the top level."""


def read_tags(path: str) -> tuple[str, ...]:
    """Return the tags in a file, one per line; empty lines and comments (#) are left out. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from None
    return tuple(line for line in lines if line and not line.startswith("#"))


def _side(resolution: float | Pair) -> float:
    """Return the side in pixels of a square with the same area: a resolution is an *area*, as in diffusion-pipe."""
    side = math.sqrt(resolution[0] * resolution[1]) if isinstance(resolution, tuple) else float(resolution)
    return round(side, SIDE_DECIMALS)


class DatasetConfig(Section):
    """A dataset TOML, after `apply_shared_keys`."""

    directory: Annotated[tuple[DirectorySource, ...], Listed] = Field((), description="folders of captioned images")
    tfds: Annotated[tuple[TfdsSource, ...], Listed] = Field((), validate_default=True, description="ours: datasets")

    @field_validator("tfds")
    @classmethod
    def _some_source(cls, tfds: tuple[TfdsSource, ...], info: ValidationInfo) -> tuple[TfdsSource, ...]:
        if not tfds and info.data.get("directory") == ():
            raise invalid("expected at least one [[directory]] or [[tfds]], found none")
        controls = [controls_of(source) for source in (*info.data.get("directory", ()), *tfds)]
        if (info.context or {}).get("pairs") == "edit" and "directory" in info.data and not any(controls):
            raise invalid(
                "missing, expected a folder of reference pictures in at least one [[directory]]: edit = true in the "
                "main TOML trains on pairs",
                key="control_path",
            )
        return tfds

    @property
    def sources(self) -> tuple[DirectorySource | TfdsSource, ...]:
        """All sources, folders first."""
        return self.directory + self.tfds

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels of the largest square or size bucket of any source."""
        return max((size for source in self.sources for size in _largest_sizes(source)), key=math.prod)


def _largest_sizes(source: Source) -> list[tuple[int, int]]:
    """Return the width and height of each of a source's size buckets, or of its largest square."""
    if source.size_buckets:
        return [(size.width, size.height) for size in source.size_buckets]
    side = nearest_multiple(max(source.sides))
    return [(side, side)]


def apply_shared_keys(table: dict[str, Any]) -> dict[str, Any]:
    """Return a dataset TOML's table with top-level keys moved into the sources that have them and do not set them."""
    rest = {key: value for key, value in table.items() if key not in SHARED_KEYS}
    for kind, section in zip(SOURCES, (DirectorySource, TfdsSource), strict=True):
        shared = {key: table[key] for key in SHARED_KEYS if key in table and key in section.model_fields}
        if isinstance(entries := rest.get(kind), list):
            rest[kind] = [shared | entry if isinstance(entry, dict) else entry for entry in entries]
    return rest
