"""What a directory of pictures holds: the pictures in order of name, each with its caption."""

import collections
import dataclasses
import os

from etils import epath

from anima_jax.data.captions import read_caption
from anima_jax.data.media import SUFFIXES
from anima_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CaptionedPicture:
    """A picture file and its caption; None if the file has none."""

    path: str
    caption: str | None


@dataclasses.dataclass(frozen=True)
class Scan:
    """The pictures of a directory, and what else lies there."""

    path: str
    pictures: tuple[CaptionedPicture, ...]
    captions_without_picture: int
    ignored: int
    """Files that are neither picture nor caption, and hidden files."""

    @property
    def summary(self) -> str:
        """One line for the log."""
        bare = sum(picture.caption is None for picture in self.pictures)
        empty = sum(picture.caption == "" for picture in self.pictures)
        counts = {
            "without caption file": bare,
            "with an empty caption": empty,
            "captions without a picture": self.captions_without_picture,
            "other files ignored": self.ignored,
        }
        notes = "".join(f", {number} {what}" for what, number in counts.items() if number)
        return f"{self.path}: {len(self.pictures)} pictures{notes}"


def scan_directory(path: str | os.PathLike) -> Scan:
    """The pictures that lie directly in the directory `path`, and their captions.

    Raises UserError if `path` is not a directory or holds no picture, or for a caption that cannot be read.
    """
    directory, name = epath.Path(path), os.fspath(path)
    by_kind = collections.defaultdict(list)
    for file in _sorted_files(directory, name):
        by_kind[_kind(file)].append(file)
    if not by_kind["picture"]:
        raise UserError(f"{name}: no pictures there ({', '.join(SUFFIXES)}) among {_total(by_kind)} files")
    captions = {file.stem: file for file in by_kind["caption"]}
    pictures = tuple(
        CaptionedPicture(os.fspath(file), read_caption(captions[file.stem]) if file.stem in captions else None)
        for file in by_kind["picture"]
    )
    orphans = captions.keys() - {file.stem for file in by_kind["picture"]}
    return Scan(name, pictures, len(orphans), len(by_kind["other"]))


def _sorted_files(directory: epath.Path, name: str) -> list[epath.Path]:
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"{name}: {found}, expected a directory of pictures")
    try:
        return sorted((file for file in directory.iterdir() if file.is_file()), key=lambda file: file.name)
    except OSError as error:
        raise UserError(f"{name}: the directory cannot be read: {error.strerror or error}") from None


def _kind(file: epath.Path) -> str:
    if file.name.startswith("."):
        return "other"
    suffix = file.suffix.lower()
    return "picture" if suffix in SUFFIXES else "caption" if suffix == ".txt" else "other"


def _total(by_kind: dict[str, list]) -> int:
    return sum(map(len, by_kind.values()))
