"""The gallery: images that were drawn, as PNG files with the text that says how.

They are kept in memory, the oldest leaving first, or in a folder under names that the server chooses. A request names
an image by its id, which is looked up among these and never becomes part of a path.
"""

import collections
import dataclasses
import datetime
import io
import pathlib
import re
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping

from PIL import Image

from anima_jax.checkpoints.locations import replacing
from anima_jax.errors import UserError, one_line
from anima_jax.sampling.exif import text_chunks
from anima_jax.sampling.image_text import from_text
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.pictures import as_jpeg

THUMBNAIL = 256
"""Largest side of a thumbnail in pixels."""

ID = re.compile(r"\d{20}-[0-9a-f]{16}")
"""The time in microseconds, and what nobody can guess."""

KEPT_THUMBNAILS = 500


@dataclasses.dataclass(eq=False)
class GalleryImage:
    """An image of the gallery; `created` is in seconds since 1970, and one of `png` and `path` is given.

    Both are None when it has left the gallery: jobs that still name it must not keep its bytes.
    """

    id: str
    width: int
    height: int
    seed: int
    prompt: str
    created: float
    png: bytes | None = None
    path: pathlib.Path | None = None


class Gallery:
    """The images, newest first. Its methods may be called from any thread."""

    def __init__(self, limits: RequestLimits, folder: pathlib.Path | None = None):
        self._limits, self._folder = limits, folder
        self._lock = threading.Lock()
        self._images: dict[str, GalleryImage] = {}
        self._thumbnails: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._bytes = 0
        if folder is not None:
            self._images = {image.id: image for image in _images_in(folder)}

    def add(self, image: Image.Image, text: Mapping[str, str], *, seed: int, prompt: str) -> GalleryImage:
        """Keep an image with these texts, and write it if there is a folder; prints a line if that fails."""
        data, now = io.BytesIO(), datetime.datetime.now(datetime.UTC)
        image.save(data, format="PNG", pnginfo=text_chunks(text))
        png, path = data.getvalue(), None
        id = f"{now:%Y%m%d%H%M%S%f}-{secrets.token_hex(8)}"
        if self._folder is not None:
            path = self._folder / f"{id}.png"
            try:
                with replacing(path) as file:
                    file.write(png)
            except UserError as error:  # It was drawn, and is there as long as the server.
                print(one_line(error), file=sys.stderr)
                path = None
        kept = GalleryImage(id, *image.size, seed, prompt, now.timestamp(), None if path else png, path)
        with self._lock:
            self._images[id] = kept
            self._bytes += len(kept.png or b"")
            self._drop_oldest()
        self._remember(id, _thumbnail(image))
        return kept

    def _drop_oldest(self) -> None:
        in_memory = [image for image in self._images.values() if image.png is not None]
        count = len(in_memory)
        for image in in_memory:
            if count <= self._limits.kept_images and (self._bytes <= self._limits.kept_bytes or count == 1):
                return
            self._forget(image.id)
            count -= 1

    def _forget(self, id: str) -> GalleryImage | None:
        image = self._images.pop(id, None)
        if image is not None:
            self._bytes -= len(image.png or b"")
            image.png = image.path = None
        self._thumbnails.pop(id, None)
        return image

    def get(self, id: str) -> GalleryImage | None:
        """Return an image, or None if there is none of this id."""
        with self._lock:
            return self._images.get(id)

    def page(self, limit: int, before: str | None = None) -> list[GalleryImage]:
        """Return up to `limit` images, newest first, that are older than the image `before`."""
        with self._lock:
            found = list(self._images.values())
        found.sort(key=lambda image: image.id, reverse=True)  # threads may have added them in another order
        return [image for image in found if before is None or image.id < before][:limit]

    def png(self, image: GalleryImage) -> bytes | None:
        """Return the file of an image, or None if somebody has deleted it."""
        png, path = image.png, image.path
        if png is not None or path is None:
            return png
        try:
            return path.read_bytes()
        except OSError:
            with self._lock:
                self._forget(image.id)
            return None

    def thumbnail(self, image: GalleryImage) -> bytes | None:
        """Return a JPEG of at most `THUMBNAIL` pixels a side, or None if the file is gone or damaged."""
        with self._lock:
            if (found := self._thumbnails.get(image.id)) is not None:
                return found
        try:
            with Image.open(io.BytesIO(self.png(image) or b""), formats=["PNG"]) as opened:
                return self._remember(image.id, _thumbnail(opened))
        except Exception:  # PIL's decoders raise many types for damaged bytes
            return None

    def _remember(self, id: str, thumbnail: bytes) -> bytes:
        with self._lock:
            if id in self._images:
                self._thumbnails[id] = thumbnail
            while len(self._thumbnails) > KEPT_THUMBNAILS:
                self._thumbnails.popitem(last=False)
        return thumbnail

    def remove(self, id: str) -> bool:
        """Delete an image and its file. Return whether it was there. Raises UserError if the file cannot be deleted."""
        with self._lock:
            image = self._images.get(id)
            if image is not None and image.path is not None:
                try:
                    image.path.unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"the image cannot be deleted: {error.strerror}") from None
            return self._forget(id) is not None


def _thumbnail(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return as_jpeg(small, 85)


def _images_in(folder: pathlib.Path) -> Iterator[GalleryImage]:
    """Yield the images that a server has written to a folder, oldest first. Raises UserError if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = sorted(path for path in folder.glob("*.png") if ID.fullmatch(path.stem))
    except OSError as error:
        raise UserError(f"--gallery {folder}: {error.strerror}, expected a folder to write to") from None
    for path in paths:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                size, text = image.size, {str(name): str(value) for name, value in image.info.items()}
            values = from_text(path.name, text).values
            digits = datetime.datetime.strptime(path.stem[:20], "%Y%m%d%H%M%S%f").replace(tzinfo=datetime.UTC)
        except Exception:  # a damaged file, or a stranger's
            continue
        seed, prompt = values.get("seed", 0), values.get("prompt", "")
        yield GalleryImage(path.stem, *size, seed, prompt, digits.timestamp(), path=path)
