"""Where files are: a local path, an object store (`gs://bucket/file`), or the Hugging Face hub (`hf://owner/repo/file`).

Local files are opened as plain descriptors; object stores go through etils.epath; a file of the hub is downloaded once
into the hub's own cache and is local from then on.
"""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import IO, Any

from anima_jax.errors import UserError, first_line, os_reason

PathLike = str | os.PathLike[str]


def resolve(path: PathLike) -> str:
    """`path` as something to open: a file of the hub is fetched into the local cache, all else stays as it is."""
    path = os.fspath(path)
    return _from_hub(path) if path.startswith("hf://") else path


def is_remote(path: PathLike) -> bool:
    """Whether `path` is an address (`gs://…`) and not a path of this machine."""
    return "://" in os.fspath(path)


def open_for_reading(path: str) -> tuple[IO[bytes], int]:
    """An unbuffered file and its size in bytes. Raises UserError for what is missing, is a folder or cannot be read."""
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


def file_sha256(path: PathLike) -> bytes:
    """SHA-256 of a file's bytes. Raises UserError as `open_for_reading` does."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
    file, _ = open_for_reading(resolve(path))
    with file:
        while size := read_into(file, buffer):
            digest.update(buffer[:size])
    return digest.digest()


def read_into(file: IO[bytes], buffer: memoryview) -> int:
    """Fill the beginning of `buffer` from where `file` stands; how many bytes it was, 0 at the end."""
    if hasattr(file, "readinto"):
        return file.readinto(buffer)  # type: ignore[attr-defined]
    data = file.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
    """A file that becomes `path` when the block ends well; when it does not, an existing `path` stays as it was.

    The bytes go to a temporary name in the same folder. Raises UserError where `path` cannot be written; an error that
    comes out of the block itself passes through unchanged.
    """
    path = os.fspath(path)
    if is_remote(path):
        with _replacing_remote(path) as file:
            yield file
        return
    path = os.path.realpath(path)
    with writing_to(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: exists and is not an ordinary file")
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)[:200]}.{secrets.token_hex(4)}.tmp")
        file = os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0)
    try:
        with file:
            yield file
            with writing_to(path):
                os.fsync(file.fileno())
        with writing_to(path):
            os.replace(temporary, path)
            _sync_folder(os.path.dirname(path))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def writing_to(path: str) -> Iterator[None]:
    """Turn what the system says against writing into a UserError about `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: the folder {os.path.dirname(path)} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {os_reason(error)}") from error


def _sync_folder(folder: str) -> None:
    """Make the rename itself survive a power cut; file systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _candidates(folder: str) -> str:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    return f"; it holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''}" if names else ""


def _remote(path: str) -> Any:
    try:
        from etils import epath

        return epath.Path(path)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: this kind of address cannot be read here: {error}") from error


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
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(Exception):
            temporary.unlink(missing_ok=True)
        raise


def _from_hub(address: str) -> str:
    """The local copy of `hf://owner/repo[@revision]/path/of/file`."""
    parts = address.removeprefix("hf://").split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"{address}: expected hf://owner/repo/file")
    owner, repo, filename = parts
    repo, _, revision = repo.partition("@")
    try:
        from huggingface_hub import hf_hub_download, logging
    except ImportError as error:
        raise UserError(f"{address}: needs the package huggingface_hub (pip install huggingface_hub)") from error
    logging.set_verbosity_error()  # without a network it warns of every retry; the error below says all of it once
    try:
        return hf_hub_download(f"{owner}/{repo}", filename, revision=revision or None)
    except Exception as error:  # the client raises types of its own and of whichever HTTP library it uses
        raise UserError(
            f"{address}: could not be downloaded and is not in the local cache ({first_line(error)}); without a "
            f"network, fetch {filename} from https://huggingface.co/{owner}/{repo} and give its local path instead"
        ) from error
