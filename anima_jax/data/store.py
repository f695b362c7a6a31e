"""A key → record store on disk, in ArrayRecord files that are written once and then read in random order.

Records that are written together form a part: two files, named by the hash of the part's keys. `NAME.array_record`
contains the records; `NAME.keys` contains the size of that file, a checksum of its ends, and the keys in the order of
the records. Both are written under temporary names, and the list of keys is renamed last. A part is therefore complete
or absent, no matter when a process is killed and which other processes and hosts write to the folder. Equal records
give equal files.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import secrets
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from anima_jax.checkpoints import safetensors_header
from anima_jax.checkpoints.locations import is_remote
from anima_jax.checkpoints.locks import lock
from anima_jax.checkpoints.safetensors_header import HeaderError, TensorInfo
from anima_jax.errors import UserError, os_reason

log = logging.getLogger(__name__)

KEY_BYTES = 32
FORMAT = 1
"""Format version, stored in every list of keys."""

OPEN_READERS = 256
"""Maximum number of open record files over all stores; many systems allow 1024 open files per process."""

ABANDONED_S = 24 * 3600.0
"""Age in seconds after which an unfinished file of another host is assumed to be left by a killed process."""

# Latents do not compress. The parallelism is stored in the file, which must be the same on every machine, so it is
# fixed at 1; for uncompressed records this is as fast.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 2**15  # bytes; larger buffers slow random reads

_REMOTE_THREADS = 32  # for small requests to an object store, about 50 ms each
_COPY_CHUNK = 2**24  # bytes
_END_BYTES = 4096
_KEYS, _RECORDS = ".keys", ".array_record"
_PART_FILE = re.compile(rf"([0-9a-f]{{32}})({_KEYS}|{_RECORDS})".replace(".", r"\."))
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:64]
_REGENERATE = "start once with --regenerate_cache to make a new cache"


def pack(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a safetensors file with `header` as its metadata. Arrays may have any strides.

    Text in the header that is not valid Unicode (a file name in another encoding) gets backslash escapes.
    """
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)  # aligns every array
    tensors = [TensorInfo(name, array.dtype, array.shape) for name, array in ordered]
    metadata = {name: text.encode(errors="backslashreplace").decode() for name, text in header.items()}
    data = (np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in ordered)
    return b"".join([safetensors_header.build(tensors, metadata), *data])


def unpack(record: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return a packed record's header and arrays (read-only views of the record). Raises UserError if it is damaged."""
    try:
        size = int.from_bytes(record[:8], "little")
        if len(record) < 8 + size:
            raise HeaderError("is cut off")
        header, tensors = safetensors_header.parse(record[8 : 8 + size], len(record))
        return header, {name: np.ndarray(t.shape, t.dtype, record, t.start) for name, t in tensors.items()}
    except (HeaderError, ValueError) as error:
        raise UserError("damaged record") from error


@dataclasses.dataclass(eq=False)
class _Part:
    """A complete part. `path` is its record file on this machine, or None until it is known to exist there."""

    name: str
    size: int  # of the record file, bytes
    keys: np.ndarray  # (rows,) S32
    ends: int | None  # `_ends` of the record file; None in a part that is older than this checksum
    path: str | None = None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class _Index:
    """The location of each key, in 72 bytes per key. `recent` has those added since the parts were read."""

    def __init__(self, parts: Sequence[_Part]):
        self.parts = {part.name: part for part in parts}
        self._in_order = list(parts)
        keys = np.concatenate([np.empty(0, f"S{KEY_BYTES}"), *(part.keys for part in parts)])
        self.keys, self._positions = np.unique(keys, return_index=True)
        self._starts = np.cumsum([0, *(len(part.keys) for part in parts)]).tolist()
        self.recent: dict[bytes, tuple[_Part, int]] = {}

    def add(self, part: _Part) -> None:
        self.parts[part.name] = part
        for row, key in enumerate(_each(part.keys)):
            if self.find(key) is None:
                self.recent[key] = part, row

    def find(self, key: bytes) -> tuple[_Part, int] | None:
        """Return the part that contains `key` and the row in that part, or None."""
        at = int(self.keys.searchsorted(key))  # type: ignore[call-overload]
        if self.keys[at : at + 1].tobytes() != key:
            return self.recent.get(key)
        position = int(self._positions[at])
        number = bisect.bisect_right(self._starts, position) - 1
        return self._in_order[number], position - self._starts[number]


class Store:
    """Records by 32-byte key, in a folder that several processes share. Thread-safe.

    `folder` is a path, or a remote address (`gs://…`), which needs `local_dir`: a folder on this machine where a part's
    records are written first and to which they are copied before they are read. Folders are created when something is
    written. `folder` is listed at first use, so `clear` also works on a cache of another format. All methods raise a
    one-line UserError if a folder cannot be read or written or if the cache has another format.
    """

    def __init__(self, folder: str | os.PathLike[str], *, local_dir: str | os.PathLike[str] | None = None):
        self.folder = os.fspath(folder)
        if is_remote(self.folder) and local_dir is None:
            raise UserError(f"{self.folder}: a cache at an address needs cache_local_dir, a folder on this machine")
        if local_dir is not None and is_remote(local_dir):
            raise UserError(f"cache_local_dir is {os.fspath(local_dir)}, expected a folder on this machine")
        self._local = pathlib.Path(local_dir) if local_dir is not None else None
        self._lock = threading.RLock()
        self._index: _Index | None = None
        self._swept: set[pathlib.Path] = set()
        self._reported: set[str] = set()

    def __contains__(self, key: bytes) -> bool:
        return self._known().find(key) is not None

    def __len__(self) -> int:
        index = self._known()
        return len(index.keys) + len(index.recent)

    def keys(self) -> Iterator[bytes]:
        """Yield every key once."""
        index = self._known()
        yield from _each(index.keys)
        yield from list(index.recent)

    def read(self, key: bytes) -> bytes:
        """Return the record of `key`. Raises KeyError if there is none, UserError if its file is damaged or missing."""
        found = self._known().find(key)
        if found is None:
            raise KeyError(key.hex())
        part, row = found
        path = self._path_of(part)
        try:
            return _reader(part, path).read([row])[0]
        except (RuntimeError, OSError) as error:
            remedy = "delete this file, and the next start encodes its records again"
            raise UserError(f"{path}: record {row} cannot be read: {os_reason(error)}; {remedy}") from error

    def prepare(self) -> None:
        """Create the output folders. Raises UserError if one cannot be written, before anything is encoded."""
        if self._local is not None:
            self._prepare(self._local, "cache_local_dir")
        if not is_remote(self.folder):
            self._prepare(pathlib.Path(self.folder), "cache_dir")

    def sweep(self) -> None:
        """Remove what killed processes left, as `prepare` does, if the folders are there and can be written."""
        if not is_remote(self.folder) and os.path.isdir(self.folder):
            with contextlib.suppress(UserError):
                self.prepare()

    def write_part(self, records: Sequence[tuple[bytes, bytes]]) -> None:
        """Write (key, record) pairs as one part, unless it exists. From then on all processes can read it."""
        if any(len(key) != KEY_BYTES for key, _ in records):
            raise ValueError(f"a key must have {KEY_BYTES} bytes")
        keys = b"".join(key for key, _ in records)
        name = _name(keys)
        if not records or name in self._known().parts:
            return
        self.prepare()
        first = (self._local or pathlib.Path(self.folder)) / (name + _RECORDS)
        with _named_errors(first.parent, "be written"), _replacing(first) as path:
            _write_array_record(path, [record for _, record in records])
            size, ends = path.stat().st_size, _ends(path)
        with _named_errors(self.folder, "be written"):
            if self._local is not None:
                with _replacing(_path(self.folder) / first.name) as path:
                    _copy(first, path)
            head = json.dumps({"format": FORMAT, "bytes": size, "ends": ends}).encode()
            with _replacing(_path(self.folder) / (name + _KEYS)) as path:
                path.write_bytes(head + b"\n" + keys)
        with self._lock:
            self._known().add(_Part(name, size, np.frombuffer(keys, f"S{KEY_BYTES}"), ends, str(first)))

    def refresh(self) -> None:
        """Read which parts other processes have added or removed. Incomplete parts are logged once and ignored."""
        with self._lock:
            before = self._index.parts if self._index else {}
            with _named_errors(self.folder, "be read"):
                names = [name for name, suffix in _part_files(_path(self.folder)) if suffix == _KEYS]
            with concurrent.futures.ThreadPoolExecutor(_REMOTE_THREADS) as pool:
                # Threads would slow down local reads.
                each = pool.map if is_remote(self.folder) else map
                parts = list(each(lambda name: self._open(name, before.get(name)), sorted(names)))
            self._index = _Index([part for part in parts if part])

    def clear(self) -> None:
        """Remove all parts and their copies in `local_dir`. Other files in the folders are not touched."""
        with self._lock:
            with _named_errors(self.folder, "be cleared"):
                folder = _path(self.folder)
                # Keys first: without them a part is absent, even if this is interrupted.
                for name, suffix in sorted(_part_files(folder), key=lambda file: file[1] != _KEYS):
                    (folder / (name + suffix)).unlink(missing_ok=True)
                    if self._local is not None:
                        (self._local / (name + suffix)).unlink(missing_ok=True)
            _reader.cache_clear()  # an open file still occupies the disk
            self._index = None

    def _known(self) -> _Index:
        index = self._index
        if index is None:
            with self._lock:
                if self._index is None:
                    self.refresh()
                index = self._index
                assert index is not None
        return index

    def _open(self, name: str, before: _Part | None) -> _Part | None:
        """Return the part `name`, or `before` if that is still current, or None if the part is incomplete."""
        records = _path(self.folder) / (name + _RECORDS)
        with _named_errors(self.folder, "be read"):
            size = _size(records)
            if before is not None and before.size == size:
                return before
            listing = _read(records.with_name(name + _KEYS))
        if listing is None:  # removed by another process in the meantime
            return None
        try:
            line, _, keys = listing.partition(b"\n")
            head = json.loads(line)
            number, expected, ends = head["format"], head["bytes"], head.get("ends")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            number, expected, ends, keys = FORMAT, 0, None, b""
        if number != FORMAT:
            raise UserError(
                f"{_path(self.folder) / (name + _KEYS)}: is of cache format {number}, expected {FORMAT}; {_REGENERATE}"
            )
        if _name(keys) != name:
            reason = "its list of keys is damaged"
        elif size is None or size != expected:
            reason = f"its file has {size or 'no'} bytes, expected {expected}"
        elif self._local is None and ends not in (None, _ends(records)):
            reason = "its file is another part's, or damaged"
        else:
            path = None if self._local else str(records)
            return _Part(name, size, np.frombuffer(keys, f"S{KEY_BYTES}"), ends, path)
        if name not in self._reported:
            log.warning("%s: is ignored, and its records are encoded again if they are needed: %s", records, reason)
        self._reported.add(name)
        return None

    def _path_of(self, part: _Part) -> str:
        """Return the part's record file on this machine, copying it first if necessary."""
        with part.lock:
            if part.path is None:
                assert self._local is not None
                local, origin = self._local / (part.name + _RECORDS), _path(self.folder) / (part.name + _RECORDS)
                if not _is_of(part, local):
                    self._prepare(self._local, "cache_local_dir")
                    with _named_errors(origin, f"be copied to {self._local}"), _replacing(local) as path:
                        _copy(origin, path)
                        if not _is_of(part, path):
                            raise UserError(f"{origin}: changed while it was read, or is another part's; {_REGENERATE}")
                part.path = str(local)
            return part.path

    def _prepare(self, folder: pathlib.Path, key: str) -> None:
        """Create a local folder, set by the option `key`. The first time, remove what killed processes left in it."""
        with self._lock, _named_errors(folder, "be written", f"; set {key} to a folder that can"):
            if folder not in self._swept:
                folder.mkdir(parents=True, exist_ok=True)
                _sweep(folder, orphans=folder != self._local)
                self._swept.add(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _array_record() -> Any:
    """Return the module that reads and writes records. Raises UserError where they are not installed."""
    try:
        import array_record.python.array_record_module as array_record
    except ImportError as error:
        raise UserError("the cache needs array-record, which has no package for Windows: train in WSL2") from error
    return array_record


@functools.lru_cache(OPEN_READERS)
def _reader(part: _Part, path: str) -> Any:
    """Return a thread-safe reader of the part's records. It is closed when its last reference is dropped."""
    reader = _array_record().ArrayRecordReader(path, _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
    if not reader.ok():
        reader.close()  # raises the actual error
    if reader.num_records() != len(part.keys):
        raise RuntimeError(f"it has {reader.num_records()} records, expected {len(part.keys)}")
    return reader


def _write_array_record(path: pathlib.Path, records: Sequence[bytes]) -> None:
    writer = _array_record().ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()  # raises any earlier error


def _name(keys: bytes) -> str:
    return hashlib.sha256(keys).hexdigest()[:32]


def _each(keys: np.ndarray) -> Iterator[bytes]:
    data = keys.tobytes()  # numpy strips trailing zeros from elements
    return (data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))


# ---- files ----------------------------------------------------------------------------------------------------------


def _path(folder: str) -> Any:
    """Return a `pathlib.Path`, or for a remote address an etils path, which has the same methods."""
    if not is_remote(folder):
        return pathlib.Path(folder)
    from etils import epath

    return epath.Path(folder)


def _part_files(folder: Any) -> list[tuple[str, str]]:
    """Return the name and suffix of each part file in `folder`, which may not exist."""
    if (filesystem := getattr(getattr(folder, "_backend", None), "fs", None)) is not None:
        filesystem(os.fspath(folder)).invalidate_cache()  # fsspec's cached listings lack the files of other processes
    if not folder.exists():
        return []
    found = (_PART_FILE.fullmatch(path.name) for path in folder.iterdir())
    return [(match[1], match[2]) for match in found if match]


def _size(path: Any) -> int | None:
    """Return the size of a file in bytes, or None if there is no such file."""
    try:
        # etils' stat of a local file fails if its owner has no user name.
        return os.stat(path).st_size if isinstance(path, pathlib.Path) else path.stat().length
    except (FileNotFoundError, NotADirectoryError):
        return None


def _ends(path: pathlib.Path) -> int:
    """Return a checksum of the first and last bytes of a file. The files of two parts differ there."""
    with path.open("rb") as file:
        first = file.read(_END_BYTES)
        file.seek(-min(_END_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return zlib.crc32(first + file.read(_END_BYTES))


def _is_of(part: _Part, path: pathlib.Path) -> bool:
    return _size(path) == part.size and (part.ends is None or _ends(path) == part.ends)


def _read(path: Any) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _copy(source: Any, target: Any) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, _COPY_CHUNK)


@contextlib.contextmanager
def _replacing(target: Any) -> Iterator[Any]:
    """Yield a path to write to, which is renamed to `target` if the block succeeds and removed if it fails.

    The file is locked during the block, so that other processes of this host know that its writer is alive (`_sweep`).
    For a remote address the path is `target` itself, because an object store only shows complete objects.
    """
    if not isinstance(target, pathlib.Path):
        yield target
        return
    while True:
        path = target.with_name(f".{target.name}.{_HOST}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # another process swept it before it was locked
    try:
        yield path
        os.fsync(descriptor)
        os.replace(path, target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _sweep(folder: pathlib.Path, *, orphans: bool) -> None:
    """Remove unfinished parts and memos of killed processes and, with `orphans`, old record files without keys."""
    for path in folder.iterdir():
        unfinished = re.fullmatch(rf"\.{_PART_FILE.pattern}\.(.+)\.[0-9a-f]{{8}}\.tmp", path.name)
        memo = re.fullmatch(r"\.files-.+\.[0-9a-f]{8}\.tmp", path.name)
        orphan = orphans and path.suffix == _RECORDS and _PART_FILE.fullmatch(path.name)
        if not (unfinished or memo) and (not orphan or path.with_suffix(_KEYS).exists()):
            continue
        with contextlib.suppress(OSError), path.open("rb") as file:  # BlockingIOError while its writer is alive
            old = time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_S
            of_this_host = memo or (unfinished and unfinished[3] == _HOST)
            if old or (of_this_host and lock(file.fileno(), wait=False)):
                path.unlink()


@contextlib.contextmanager
def _named_errors(path: object, what: str, remedy: str = "") -> Iterator[None]:
    """Turn any error into a one-line UserError: `path: cannot <what>: reason`, and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, ArrayRecord's RuntimeError, or types of object store clients
        raise UserError(f"{path}: cannot {what}: {os_reason(error)}{remedy}") from error
