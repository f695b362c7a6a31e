"""What training draws batches from: a caption, and where its pixels come from.

An example knows no row number. Its id says what it is: the same picture, at the same size, with the same caption index
and repeat, has the same id in any order, any directory and any run, and with it the same noise.
"""

import dataclasses
import hashlib
import logging
import os
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from anima_jax.data.media import read_file, read_picture
from anima_jax.data.scan import scan_directory
from anima_jax.errors import UserError

if TYPE_CHECKING:
    from anima_jax.data.buckets import Bucketing

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How one `[[directory]]` or `[[tfds]]` becomes examples."""

    bucketing: "Bucketing"
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


class Media(Protocol):
    """Something that holds an encoded picture."""

    @property
    def name(self) -> str:
        """What a message calls it."""
        ...

    def read(self) -> bytes:
        """The encoded picture."""
        ...


@dataclasses.dataclass(frozen=True)
class FileMedia:
    """A picture file."""

    path: str

    @property
    def name(self) -> str:
        return self.path

    def read(self) -> bytes:
        return read_file(self.path)


@dataclasses.dataclass(frozen=True)
class Example:
    """One captioned picture at one size."""

    id: int
    """63 bits, from `example_id`. Copies of one file share it."""
    caption: str
    media: Media
    size_wh: tuple[int, int]
    """Width and height in pixels."""

    def pixels(self) -> np.ndarray:
        """uint8 (height, width, 3). Raises UserError if the picture cannot be read."""
        return read_picture(self.media.read(), self.size_wh, name=self.media.name)


def content_digest(data: bytes) -> bytes:
    """SHA-256 of a media file's bytes."""
    return hashlib.sha256(data).digest()


def example_id(
    digest: bytes, size_wh: tuple[int, int], *, frames: int = 1, caption_index: int = 0, repeat_index: int = 0
) -> int:
    """63-bit hash of the media content (`content_digest`), its size bucket, the caption's index and the repeat's."""
    packed = digest + struct.pack("<5Q", *size_wh, frames, caption_index, repeat_index)
    return int.from_bytes(hashlib.sha256(packed).digest()[:8], "little") >> 1


def directory_examples(
    path: str | os.PathLike,
    size_wh: tuple[int, int],
    *,
    caption_prefix: str = "",
    num_repeats: float = 1,
    skip_empty_caption: bool = True,
) -> list[Example]:
    """The captioned pictures of a directory, in order of file name, each repeat after the whole list.

    `num_repeats` > 0 may be a fraction: `int(n · num_repeats)` examples in all, as in diffusion-pipe, the extra ones
    picked by their hash. A caption counts as empty before the prefix is put in front. Logs one line of what was found.
    Raises UserError if nothing usable is there.
    """
    scan = scan_directory(path)
    log.info("%s", scan.summary)
    kept = [picture for picture in scan.pictures if picture.caption or not skip_empty_caption]
    if not kept:
        raise UserError(
            f"{scan.path}: none of {len(scan.pictures)} pictures has a caption, and skip_empty_caption is on"
        )
    captioned = [(caption_prefix + (picture.caption or ""), FileMedia(picture.path)) for picture in kept]
    return _repeated(captioned, size_wh, num_repeats, scan.path)


def _repeated(
    captioned: Sequence[tuple[str, Media]], size_wh: tuple[int, int], num_repeats: float, name: str
) -> list[Example]:
    total = int(len(captioned) * num_repeats) if num_repeats > 0 else 0
    if total == 0:
        raise UserError(f"{name}: num_repeats = {num_repeats} of {len(captioned)} pictures leaves none to train on")
    digests = [content_digest(media.read()) for _, media in captioned]
    examples = []
    for repeat in range(-(-total // len(captioned))):
        one_pass = [
            Example(example_id(digest, size_wh, repeat_index=repeat), caption, media, size_wh)
            for digest, (caption, media) in zip(digests, captioned, strict=True)
        ]
        missing = total - len(examples)
        if missing < len(one_pass):
            chosen = set(sorted(range(len(one_pass)), key=lambda row: one_pass[row].id)[:missing])
            one_pass = [example for row, example in enumerate(one_pass) if row in chosen]
        examples += one_pass
    return examples
