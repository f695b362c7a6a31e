"""Folders of files that survive a power failure, and that notice when a byte of them changes.

`seal` writes the size and CRC-32 of every file to `checksums.json` in the folder and flushes everything to the disk;
`damage` compares. CRC-32 finds every change of a few bits and misses one in 2³² others; at about 4 GB/s per core
(zlib with hardware support) it is faster than the disks that it reads. It is no protection against intent.
"""

import concurrent.futures
import errno
import io
import json
import os
import pathlib
import zlib

from anima_jax.checkpoints.locations import replacing, sync_folder
from anima_jax.errors import UserError, os_reason

FILE = "checksums.json"

_CHUNK = 2**22
_DAMAGED_DISK = {getattr(errno, name) for name in ("EIO", "EUCLEAN", "EBADMSG") if hasattr(errno, name)}
"""Errors of a read that tell of damage on the disk; others, such as missing rights, do not."""


def seal(folder: pathlib.Path) -> None:
    """Write the checksums of all files in `folder`, and flush files and folders to the disk.

    Raises OSError or UserError, as for a full disk.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(_flushed_checksum, paths)
        files = {path.relative_to(folder).as_posix(): each for path, each in zip(paths, found, strict=True)}
    with replacing(folder / FILE) as file:
        file.write(json.dumps({"format": "size, crc32", "files": files}, indent=0).encode())
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def is_sealed(folder: pathlib.Path) -> bool:
    """Return whether `folder` has checksums."""
    return (folder / FILE).exists()


def damage(folder: pathlib.Path, share: int = 0, shares: int = 1) -> str | None:
    """Return how the first damaged file of a sealed folder differs from what was written; None if none does.

    Of `shares` equal parts of the files, only part `share` is read, so that several processes can divide the work.
    Raises UserError if a file cannot be read for another reason, such as missing rights.
    """
    try:
        files = json.loads((folder / FILE).read_bytes())["files"]
        ordered = sorted((int(size), str(name), str(crc)) for name, (size, crc) in files.items())
    except OSError as error:
        return _not_read(folder / FILE, error)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{FILE} is not what was written"
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        # Largest first, so that no thread begins with it when the others are done.
        found = pool.map(lambda each: _difference(folder, *each), ordered[::-1][share::shares])
        return next(filter(None, found), None)


def _difference(folder: pathlib.Path, size: int, name: str, crc: str) -> str | None:
    path = folder / name
    try:
        found = os.stat(path).st_size
        if found != size:
            return f"{name} has {found} bytes, {size} were written"
        with open(path, "rb", buffering=0) as file:
            return None if _crc(file) == crc else f"{name} has other bytes than were written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return _not_read(path, error)


def _not_read(path: pathlib.Path, error: OSError) -> str:
    if error.errno not in _DAMAGED_DISK:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from error
    return f"{path.name} cannot be read: {os_reason(error)}"


def _flushed_checksum(path: pathlib.Path) -> tuple[int, str]:
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, _crc(file)


def _crc(file: io.FileIO) -> str:
    """Return the CRC-32 of the rest of an open file, in hexadecimal digits. Other threads run meanwhile."""
    value, buffer = 0, memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        value = zlib.crc32(buffer[:count], value)
    return f"{value:08x}"


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
