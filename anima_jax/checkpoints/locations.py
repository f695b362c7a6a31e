"""Access to files: local, in an object store (`gs://bucket/file`) or on the hub (`hf://owner/repo/file`).

Local files are opened unbuffered. Object stores are read through etils.epath. A file on the Hugging Face hub is
downloaded once into the hub's own cache and is local from then on.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from typing import IO, Any

from anima_jax.checkpoints import hub
from anima_jax.checkpoints.locks import lock
from anima_jax.errors import UserError, first_line, os_reason, shorten

PathLike = str | os.PathLike[str]

MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf")
"""Endings of files with weights."""

_LISTED = ("*", "*/*")
"""Patterns for the files of a folder that `files_in` lists."""


_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)([^/]+)/([^/]+)/(?:resolve|blob)/([^/]+)/([^?#]+)"
)
"""The web address of a file on the hub: owner, repository, revision, file."""


def resolve(path: PathLike) -> str:
    """Return the path to open: for a file on the hub, its copy in the local cache, downloaded if needed.

    The web address of a file on the hub is taken for its `hf://` address. Raises UserError for other web addresses.
    """
    path = os.fspath(path)
    check_address(path)
    if match := _HUB_PAGE.match(path):
        owner, repo, revision, file = match.groups()
        path = f"hf://{owner}/{repo}{'' if revision == 'main' else f'@{revision}'}/{file}"
    return hub.local_copy(path) if path.startswith("hf://") else path


def check_address(path: str, *, is_file: bool = True, is_output: bool = False) -> None:
    """Raise UserError for a web address, except of a file on the hub, and for an output on the hub.

    `is_file` is False for a folder, and `is_output` True for what is to be written.
    """
    on_web = re.match(r"(?i)(https?|ftp)://", path)
    if is_output and (on_web or path.startswith("hf://")):
        raise UserError(f"found {path}, expected a local path or gs://, which can be written to")
    if on_web and not (is_file and _HUB_PAGE.match(path)):
        hub = ", or hf://owner/repo/file for a file on the hub" if is_file else ""
        raise UserError(f"{path}: is a web address; download it and give its local path{hub}")


def check_local(what: str, path: str) -> None:
    """Raise UserError if `path`, the value of `what`, is an address."""
    if is_remote(path):
        raise UserError(f"{what} {path}: is an address, expected a path on this machine")


def is_remote(path: PathLike) -> bool:
    """Return whether `path` is an address (`gs://…`) rather than a local path."""
    return "://" in os.fspath(path)


def open_for_reading(path: str) -> tuple[IO[bytes], int]:
    """Open a file unbuffered and return it with its size in bytes.

    Raises UserError if it is missing, a folder or unreadable.
    """
    if is_remote(path):
        return _open_remote(path)
    try:
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder, expected a .safetensors file{_candidates(path)}")
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: is not an ordinary file, expected a .safetensors file")
        file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        return file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened: {os_reason(error)}") from error


def files_in(path: PathLike) -> list[str] | None:
    """Return the files in a folder and in its subfolders, relative to it and sorted; None if `path` is no folder.

    Folders may be local, `gs://…` or `hf://owner/repo[/folder]`. Hidden files are left out. An address whose last part
    has the suffix of a model's file is taken for a file. Raises UserError for a folder that cannot be read.
    """
    path = os.fspath(path)
    if is_remote(path):
        if path.endswith(MODEL_SUFFIXES):
            return None
        found = hub.files_in(path) if path.startswith("hf://") else _remote_files(path)
    elif os.path.isdir(path):
        with reading_folders(path):
            os.listdir(path)
        found = [name.replace(os.sep, "/") for pattern in _LISTED for name in glob.glob(pattern, root_dir=path)]
    else:
        found = None
    return None if found is None else sorted(name for name in found if not name.rpartition("/")[2].startswith("."))


def _remote_files(folder: str) -> list[str] | None:
    remote = _remote(folder)
    try:
        found = [os.fspath(each) for pattern in _LISTED for each in remote.glob(pattern)]
    except Exception as error:  # every object store's client raises its own types
        raise UserError(f"{folder}: cannot be read: {first_line(error)}") from error
    return [path.removeprefix(folder.rstrip("/") + "/") for path in found] or None


def file_sha256(path: PathLike) -> bytes:
    """Return the SHA-256 of a file's bytes. Raises UserError as `open_for_reading` does."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
    file, _ = open_for_reading(resolve(path))
    with file:
        while size := read_into(file, buffer):
            digest.update(buffer[:size])
    return digest.digest()


def read_into(file: IO[bytes], buffer: memoryview) -> int:
    """Read into the beginning of `buffer` and return the number of bytes read, 0 at the end of the file."""
    if hasattr(file, "readinto"):
        return file.readinto(buffer)  # type: ignore[attr-defined]
    data = file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
    """Open a file that becomes `path` if the block ends without an error; otherwise an existing `path` is unchanged.

    Until then the data is in the same folder under a temporary name. A call of the file's `write` writes all its bytes.
    Raises UserError if `path` cannot be written; any other error in the block passes through unchanged.
    """
    path = os.fspath(path)
    check_address(path, is_output=True)
    if is_remote(path):
        with _replacing_remote(path) as file:
            yield file
        return
    path = os.path.realpath(path)
    with writing_to(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: exists and is not an ordinary file")
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:200]}.{secrets.token_hex(4)}.tmp")
        file = _WholeWrites(temporary, path)
    try:
        with file:
            yield file
            with writing_to(path):
                os.fsync(file.fileno())
        with writing_to(path):
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class _WholeWrites(io.FileIO):
    """A new unbuffered file, in errors called `path`, whose `write` writes all bytes, however few the system takes."""

    def __init__(self, temporary: str, path: str):
        super().__init__(temporary, "xb")
        lock(self.fileno())  # shows that the writer is alive
        self._path = path

    def write(self, data: Any) -> int:
        """Write all of `data`, any object with contiguous memory. Raises UserError, as for a full disk."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with writing_to(self._path):
            while rest:
                rest = rest[super().write(rest[: 2**30]) :]
        return size


@contextlib.contextmanager
def writing_to(path: str) -> Iterator[None]:
    """Convert the operating system's errors about writing `path` to UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: the folder {os.path.dirname(path)} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {os_reason(error)}") from error


@contextlib.contextmanager
def reading_folders(path: PathLike) -> Iterator[None]:
    """Convert the operating system's errors about reading `path`, or what it contains, to UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or os.fspath(path)}: cannot be read: {os_reason(error)}") from error


def folders_below(folder: str, above: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield a local folder and all below it, each with the names of its files, also through links.

    A link to a folder that it is in is not followed; `above` are the real paths of those. Folders that cannot be read
    are left out.
    """
    real = os.path.realpath(folder)
    for _, children, names in itertools.islice(os.walk(folder), 0 if real in above else 1):
        yield folder, sorted(names)
        for child in sorted(children):
            yield from folders_below(os.path.join(folder, child), (*above, real))


def sync_folder(folder: PathLike) -> None:
    """Make a rename in this folder survive a power failure, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _candidates(folder: str) -> str:
    names = sorted(glob.glob("*.safetensors", root_dir=folder) or glob.glob("*/*.safetensors", root_dir=folder))
    return f"; it contains {shorten(names, 3)}" if names else ""


def _remote(path: str) -> Any:
    check_address(path)
    try:
        from etils import epath

        return epath.Path(path)
    except (ImportError, ValueError, NotImplementedError, LookupError) as error:
        raise UserError(f"{path}: this kind of address is not supported: {error}") from error


def _open_remote(path: str) -> tuple[IO[bytes], int]:
    remote = _remote(path)
    try:
        return remote.open("rb"), remote.stat().length
    except ImportError as error:
        raise UserError(f"{path}: reading it needs another package: {error}") from error
    except Exception as error:  # every object store's client raises its own types
        raise UserError(f"{path}: cannot be opened: {error}") from error


@contextlib.contextmanager
def _replacing_remote(path: str) -> Iterator[IO[bytes]]:
    target = _remote(path)
    temporary = _remote(f"{path}.{secrets.token_hex(4)}.tmp")
    try:
        with _named_errors(path):
            opened = temporary.open("wb")
        with opened as file:
            yield file
        with _named_errors(path):
            temporary.replace(target)
    except BaseException:
        with contextlib.suppress(Exception):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _named_errors(path: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(f"{path}: writing it needs another package: {error}") from error
    except Exception as error:  # every object store's client raises its own types
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from error
