"""Hostile images, videos, captions, tars, data sets of tensorflow-datasets, and damaged caches."""

import functools
import io
import json
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Callable
from unittest import mock

import numpy as np
from PIL import Image

from anima_jax.config.dataset import DirectorySource, TfdsSource
from anima_jax.config.sizes import Size
from anima_jax.data.examples import reader_of
from anima_jax.data.file_index import FileIndex
from anima_jax.data.images import FORMATS as IMAGE_FORMATS
from anima_jax.data.images import read_mask
from anima_jax.data.media import probe, read_clip, read_file
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.data.store import Store, pack, unpack
from anima_jax.data.tfds_source import TfdsReader
from anima_jax.sampling import images
from tests.data.test_video import KINDS, numbered, written
from tests.fuzz.model_files import choice, files_in
from tests.fuzz.mutations import Files

# ---- images and videos -----------------------------------------------------------------------------------------------

MODES = {"PNG": ("RGB", "RGBA", "P", "I;16", "LA", "1"), "TIFF": ("RGB", "RGBA", "L")}


@functools.cache
def pictures() -> list[Files]:
    """An image of every format, and of every mode that PNG has."""
    found = list[Files]()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (17, 20, 4), np.uint8), "RGBA")
    for kind in IMAGE_FORMATS:
        for mode in MODES.get(kind, ("RGB",)):
            stream = io.BytesIO()
            picture = noise.convert("L").convert(mode) if mode in ("I;16", "1") else noise.convert(mode)
            exif = Image.Exif()
            exif[0x0112], exif[0x010E] = 6, "a picture"
            picture.save(stream, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
            found.append({f"picture.{kind.lower()}": stream.getvalue()})
    return found


def videos() -> list[Files]:
    """A video of every container; a GIF with several frames is one."""
    found = [{f"clip.{kind}": written(numbered(6, (32, 32)), kind)} for kind in KINDS]
    stream = io.BytesIO()
    frames = [Image.new("P", (20, 16), number) for number in range(5)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=60)
    return [*found, {"clip.gif": stream.getvalue()}]


def read_media(folder: pathlib.Path) -> None:
    path = next(folder.iterdir())
    if choice(folder, 4) == 0 and path.stem == "picture":
        images.read_image(str(path))
        return
    data = read_file(path)
    size = probe(data, path.name)
    read_clip(data, Size(16, 16, min(size.frames, 3)), mode="single_middle", name=path.name)
    if size.frames == 1:
        read_mask(data, (size.width, size.height), (16, 16), name=path.name)


# ---- folders of pictures and captions --------------------------------------------------------------------------------


def _png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def captions() -> list[Files]:
    table = {"a.png": "a cat", "b.png": ["a dog", "another"], "c": {"caption": "x", "tags": ["1girl", "solo"]}}
    folder = {"a.png": _png(0), "b.png": _png(1), "c.png": _png(2)}
    texts = {
        "a.txt": "a cat, 1girl, ü".encode(),
        "b.txt": b"\xef\xbb\xbfone\r\ntwo\n",
        "c.caption": b"tag one, tag two",
    }
    return [
        folder | texts,
        folder | {"captions.json": json.dumps(table).encode()},
        folder | texts | {"captions.json": json.dumps({"a.png": ["x"]}).encode()},
        folder | {"a.json": json.dumps({"caption": "a cat", "tags": {"general": ["x"]}}).encode(), "b.txt": b""},
    ]


def tars() -> list[Files]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name, data in {**captions()[0], "x/" + "long" * 40 + ".png": _png(3)}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return [{"all.tar": stream.getvalue()}, {"all.tar": stream.getvalue(), "captions.json": b'{"a.png": "x"}'}]


def _source(folder: pathlib.Path, **keys: object) -> DirectorySource:
    defaults = {name: field.get_default() for name, field in DirectorySource.model_fields.items()}
    return DirectorySource.model_construct(**{**defaults, "path": str(folder), **keys})


def read_folder(folder: pathlib.Path) -> None:
    """Read a folder, twice: the second time its captions, as a run reads them that knows the images."""
    with tempfile.TemporaryDirectory() as place:
        index = FileIndex(os.path.join(place, "files.jsonl"))
        entries, _ = read_entries(reader_of(_source(folder, skip_empty_caption=False)), index, Problems(), threads=1)
        for entry in entries:
            entry.media.read()


@functools.cache
def _prepared() -> Files:
    with tempfile.TemporaryDirectory() as place:
        few = {"train": 1, "held_out": 1}
        with mock.patch.multiple("anima_jax.data.shapes_builder", IMAGES_PER_SCENE=few):
            reader = TfdsReader(TfdsSource.model_construct(name="anima_shapes", data_dir=place, **_TFDS))
            read_entries(reader, FileIndex(), Problems())
        (version,) = pathlib.Path(place, "anima_shapes").iterdir()
        return {f"data/{name}": data for name, data in files_in(version).items()}


_TFDS = {"split": "train[:3]", "image": "image", "caption": "caption", "skip_empty_caption": False}


def read_tfds(folder: pathlib.Path) -> None:
    source = TfdsSource.model_construct(name=None, data_dir=None, builder_dir=str(folder / "data"), **_TFDS)
    entries, _ = read_entries(TfdsReader(source, prepare=False), FileIndex(), Problems())
    for entry in entries:
        entry.media.read()


# ---- caches ----------------------------------------------------------------------------------------------------------

PICTURES = "pictures"
"""A folder in the current one: a file index has the paths of files."""


def indexes() -> list[Files]:
    folder = pathlib.Path(PICTURES)
    folder.mkdir(exist_ok=True)
    for name, data in captions()[0].items():
        (folder / name).write_bytes(data)
        os.utime(folder / name, (10**9, 10**9))
    with tempfile.TemporaryDirectory() as place:
        read_entries(reader_of(_source(folder)), FileIndex(pathlib.Path(place, "i.jsonl")), Problems())
        return [{"i.jsonl": pathlib.Path(place, "i.jsonl").read_bytes()}]


def read_index(folder: pathlib.Path) -> None:
    trust = bool(choice(folder, 2))
    index = FileIndex(folder / "i.jsonl", trust=trust)
    entries, _ = read_entries(reader_of(_source(pathlib.Path(PICTURES))), index, Problems(), threads=1)
    for entry in entries:
        entry.media.read()


def stores() -> list[Files]:
    with tempfile.TemporaryDirectory() as place:
        store = Store(place)
        store.prepare()
        for part in (b"a", b"b"):
            values = {"latents": np.arange(12, dtype=np.float32).reshape(3, 4), "mask": np.ones(5, np.uint8)}
            store.write_part([(part * 32, pack({"made": "by us"}, values)), (part * 31 + b"x", pack({}, {}))])
        return [files_in(pathlib.Path(place))]


def read_store(folder: pathlib.Path) -> None:
    store = Store(folder)
    for key in store.keys():  # noqa: SIM118 - a store is no mapping
        unpack(store.read(key))


FORMATS: dict[str, tuple[Callable[[], list[Files]], Callable[[pathlib.Path], None]]] = {
    "image": (pictures, read_media),
    "video": (videos, read_media),
    "captions": (captions, read_folder),
    "tar": (tars, read_folder),
    "tfds": (lambda: [_prepared()], read_tfds),
    "file_index": (indexes, read_index),
    "store": (stores, read_store),
}
