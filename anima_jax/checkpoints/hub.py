"""Files on the Hugging Face hub, downloaded once into the hub's own cache.

The cache is laid out as `huggingface_hub` does it, so other programs share its files. The download is our own:
`huggingface_hub` starts from nothing after an interruption, and does not compare the file with its hash.
"""

import contextlib
import contextvars
import functools
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

from anima_jax.checkpoints import safetensors_header
from anima_jax.errors import UserError, did_you_mean, first_line, os_reason, size_text

ATTEMPTS = 5
"""Attempts in a row without a new byte, after which a download ends."""

SECONDS_BETWEEN_LINES = 20.0


_HEADERS = contextvars.ContextVar[str | None]("_HEADERS", default=None)
"""The folder of `headers_only`, while it is in effect."""


@contextlib.contextmanager
def headers_only() -> Iterator[None]:
    """Within the block, take only the header of a .safetensors file that is not in the local cache.

    Such a file has its size and its tensors' names and shapes, as an estimate of memory needs them; its values are 0.
    It is in a temporary folder that exists as long as the block lasts.
    """
    with tempfile.TemporaryDirectory(prefix="anima_jax_headers_", ignore_cleanup_errors=True) as folder:
        token = _HEADERS.set(folder)
        try:
            yield
        finally:
            _HEADERS.reset(token)


class DamagedDownloadError(UserError):
    """A file that arrived with another hash than the hub's. It is not kept."""


class HubFile(NamedTuple):
    """The parts of `hf://owner/repo[@revision]/path/of/file`; the revision is a branch, a tag or a commit.

    A slash in a revision is written as `%2F`.
    """

    repo: str
    name: str
    revision: str

    @property
    def address(self) -> str:
        """The `hf://` address."""
        return f"hf://{self.repo}{'' if self.revision == 'main' else f'@{self.revision}'}/{self.name}"


def parse(address: str) -> HubFile:
    """Return the parts of an address. Raises UserError if it does not name a file in a repository."""
    parts = address.removeprefix("hf://").split("/")
    if len(parts) < 3 or not all(parts) or not {".", ".."}.isdisjoint(parts):
        raise UserError(f"{address}: expected hf://owner/repo/file")
    repo, at, revision = parts[1].partition("@")
    if not repo or (at and not revision):
        raise UserError(f"{address}: expected hf://owner/repo@revision/file")
    return HubFile(f"{parts[0]}/{repo}", "/".join(parts[2:]), urllib.parse.unquote(revision) or "main")


def files_in(address: str) -> list[str] | None:
    """Return the files below the repository or folder `hf://owner/repo[@revision][/folder]`, relative to it.

    Returns None if the hub has no such folder. If the hub cannot be asked, the files in the local cache count. Raises
    UserError, in one line, if there are none and the hub does not list the repository.
    """
    from huggingface_hub import constants

    owner, _, rest = address.removeprefix("hf://").rstrip("/").partition("/")
    name, _, folder = rest.partition("/")
    if not name.partition("@")[0]:
        raise UserError(f"{address}: expected hf://owner/repo, with a file or folder in it")
    prefix = f"{folder}/" if folder else ""
    file = parse(f"hf://{owner}/{name}/{prefix}the files")
    names = _names(file, constants.ENDPOINT)
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)] or None


@functools.lru_cache(maxsize=64)
def _names(file: HubFile, endpoint: str) -> list[str]:
    """Return all files of a repository and revision, asked for once."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        return hub.HfApi(endpoint=endpoint).list_repo_files(file.repo, revision=file.revision)
    except Exception as error:  # the client raises its own types and those of its HTTP library
        folder = os.path.join(constants.HF_HUB_CACHE, f"models--{file.repo.replace('/', '--')}")
        commit = file.revision
        with contextlib.suppress(OSError), open(os.path.join(folder, "refs", commit), encoding="utf-8") as text:
            commit = text.read().strip()
        snapshot = os.path.join(folder, "snapshots", commit)
        found = [os.path.join(parent, name) for parent, _, names in os.walk(snapshot) for name in names]
        if found:
            return [os.path.relpath(path, snapshot).replace(os.sep, "/") for path in found]
        raise UserError(f"{file.address.rpartition('/')[0]}: {_reason(file, error)}") from error


def local_copy(address: str) -> str:
    """Return the path of an `hf://` file in the local cache, downloaded if the hub has it or another version of it.

    If the hub cannot be asked, the cached version counts. Raises UserError, in one line, if there is none and the hub
    does not give the file, or if it does not arrive whole.
    """
    return fetch(parse(address))


def cached_copy(address: str) -> str | None:
    """Return the path of an `hf://` file in the local cache, None if it is not there; the hub is not asked."""
    return _cached(parse(address))


def _cached(file: HubFile) -> str | None:
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(file.repo, file.name, revision=file.revision)
    return cached if isinstance(cached, str) else None


def cache_folder() -> str:
    """Return the folder of the local cache."""
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def availability(address: str) -> tuple[int, int]:
    """Return the bytes of an `hf://` file, and how many of them an earlier download has left in the local cache.

    Raises UserError as `local_copy` does, and if the hub does not tell the size.
    """
    file = parse(address)
    asked = _ask(file)
    if isinstance(asked, str):
        return os.path.getsize(asked), os.path.getsize(asked)
    if asked.size is None:
        raise UserError(f"{file.address}: the hub does not tell its size")
    folder = os.path.join(cache_folder(), f"models--{file.repo.replace('/', '--')}", "blobs", asked.etag)
    here = next((os.path.getsize(path) for path in (folder, f"{folder}.incomplete") if os.path.exists(path)), 0)
    return asked.size, min(here, asked.size)


class _Remote(NamedTuple):
    """What the hub says of a file."""

    url: str
    etag: str
    commit: str
    size: int | None


def _ask(file: HubFile) -> _Remote | str:
    """Return what the hub says of a file, or the path of its copy in the cache if that counts; see `local_copy`."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    hub.logging.set_verbosity_error()  # without a network it warns about every retry; our errors are enough
    cached = _cached(file)
    if cached and re.fullmatch("[0-9a-f]{40}", file.revision):
        return cached
    revision, name = (urllib.parse.quote(text, safe=safe) for text, safe in ((file.revision, ""), (file.name, "/")))
    url = f"{constants.ENDPOINT}/{file.repo}/resolve/{revision}/{name}"
    try:
        found = hub.get_hf_file_metadata(url, timeout=10.0, endpoint=constants.ENDPOINT)
    except Exception as error:  # the client raises its own types and those of its HTTP library
        if cached and not isinstance(error, hub.errors.EntryNotFoundError):
            return cached
        raise UserError(f"{file.address}: {_reason(file, error)}") from error
    etag, commit = found.etag or "", found.commit_hash or ""
    if not re.fullmatch(r"[\w.-]+", etag) or not re.fullmatch(r"[\w.-]+", commit):
        raise UserError(f"{file.address}: {constants.ENDPOINT} does not tell the file's commit and hash, as a hub does")
    return cached if cached and _HEADERS.get() else _Remote(url, etag, commit, found.size)


def fetch(file: HubFile) -> str:
    """Return the path of a file in the local cache; see `local_copy`."""
    found = _ask(file)
    if isinstance(found, str):
        return found
    url, etag, commit, size = found
    headers, cache = _HEADERS.get(), cache_folder()
    if headers and size is not None and file.name.endswith(".safetensors"):
        return _only_header(file, url, os.path.join(headers, f"{etag}.safetensors"), size)
    folder = os.path.join(cache, f"models--{file.repo.replace('/', '--')}")
    blob, pointer = (os.path.join(folder, *rest) for rest in (("blobs", etag), ("snapshots", commit, file.name)))
    with _writing(file, folder):
        for path in (blob, pointer, ref := os.path.join(folder, "refs", file.revision)):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with _locked(os.path.join(cache, ".locks", os.path.basename(folder), f"{etag}.lock")):
            if not os.path.exists(blob) and not os.path.exists(pointer):
                _download(file, url, blob, size, etag)
            if not os.path.exists(pointer):
                _link(blob, pointer)
            if commit != file.revision:
                with open(ref, "w", encoding="utf-8") as text:
                    text.write(commit)
    return pointer


def _reason(file: HubFile, error: Exception) -> str:
    """Return why the hub did not describe a file, and what helps."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{file.repo}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks for your consent: accept the conditions on {page}, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {file.repo}, or it is private and needs `hf auth login` or HF_TOKEN of an account "
            f"that may read it ({page})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision '{file.revision}'; branches, tags and commits are listed on {page}"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        names: list[str] = []
        with contextlib.suppress(Exception):  # this only helps
            names = hub.HfApi(endpoint=constants.ENDPOINT).list_repo_files(file.repo, revision=file.revision)
        same = [name for name in names if name.rpartition("/")[2] == file.name.rpartition("/")[2]]
        near = f" (did you mean '{same[0]}'?)" if same else did_you_mean(file.name, names)
        return f"the repository has no file {file.name}{near}; its files are listed on {page}/tree/{file.revision}"
    if (status := _status(error)) in (401, 403):
        return f"access refused ({status}): log in with `hf auth login` or set HF_TOKEN to a token that may read {page}"
    return (
        f"could not be downloaded and is not in the local cache ({first_line(error)}); without a network, fetch "
        f"{file.name} from {page} and give its local path instead"
    )


def _status(error: Exception) -> int:
    """Return the HTTP status of a refused request, or 0 if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", 0)


@contextlib.contextmanager
def _writing(file: HubFile, folder: str) -> Iterator[None]:
    """Convert the operating system's errors about the cache to UserError."""
    try:
        yield
    except OSError as error:
        reason = os_reason(error)
        raise UserError(
            f"{file.address}: cannot be written to {folder}: {reason}; HF_HOME=FOLDER uses another folder"
        ) from error


def _locked(path: str) -> contextlib.AbstractContextManager[Any]:
    """Return the lock that every user of the cache takes while it writes this file."""
    from huggingface_hub.utils import WeakFileLock

    os.makedirs(os.path.dirname(path), exist_ok=True)
    return WeakFileLock(path)


def _link(blob: str, pointer: str) -> None:
    """Make `pointer` a name of `blob`, by the first way that the file system has: symbolic link, hard link, copy."""
    relative = os.path.relpath(blob, os.path.dirname(pointer))
    with contextlib.suppress(FileExistsError):
        try:
            os.symlink(relative, pointer)
        except (OSError, NotImplementedError):
            try:
                os.link(blob, pointer)
            except OSError:
                shutil.copyfile(blob, pointer)


def _only_header(file: HubFile, url: str, path: str, size: int) -> str:
    """Write a file of `size` bytes with the header of `url` and return `path`; see `headers_only`."""
    if os.path.exists(path):
        return path
    print(f"reading the header of {file.address} ({size_text(size)}), which a run downloads", file=sys.stderr)
    start, wanted = bytearray(), 8
    try:
        with _requested(url) as response:
            for chunk in response.iter_bytes(2**16):
                start += chunk
                if len(start) >= 8:
                    wanted = 8 + min(int.from_bytes(start[:8], "little"), safetensors_header.LIMIT)
                if len(start) >= wanted:
                    break
    except Exception as error:  # those of the client's HTTP library
        raise UserError(f"{file.address}: {_reason(file, error)}") from error
    with _writing(file, os.path.dirname(path)), open(path, "xb") as output:
        output.write(start[:wanted])
        output.truncate(size)
    return path


def _download(file: HubFile, url: str, blob: str, size: int | None, etag: str) -> None:
    """Download `url` to `blob`, going on with what an earlier attempt left, and compare it with its hash."""
    partial = f"{blob}.incomplete"
    done = os.path.getsize(partial) if os.path.exists(partial) else 0
    if size is not None and done > size:
        os.unlink(partial)
        done = 0
    free = shutil.disk_usage(os.path.dirname(blob)).free
    if size is not None and free < size - done:
        raise UserError(
            f"{file.address}: needs {size_text(size - done)} in {os.path.dirname(blob)}, where {size_text(free)} are "
            "free; HF_HOME=FOLDER uses another folder"
        )
    so_far = f", {size_text(done)} of them from an earlier attempt" if done else ""
    total = size_text(size) if size is not None else "unknown size"
    print(f"downloading {file.address} ({total}{so_far}) to {blob}", file=sys.stderr)
    with _Progress(file.name.rpartition("/")[2], size, done) as progress:
        _receive(file, url, partial, size, progress)
    digest = _digest(partial, etag)
    if digest not in (None, etag):
        os.unlink(partial)
        raise DamagedDownloadError(
            f"{file.address}: arrived with another hash ({digest}) than the hub's ({etag}): try again"
        )
    os.replace(partial, blob)
    checked = f"{'sha256' if len(etag) == 64 else 'git hash'} {etag} as on the hub" if digest else "no hash to compare"
    print(f"downloaded {file.name}: {size_text(os.path.getsize(blob))}, {checked}", file=sys.stderr)


def _receive(file: HubFile, url: str, partial: str, size: int | None, progress: "_Progress") -> None:
    """Append what is missing to `partial`, in as many requests as it takes. Raises UserError if no more arrives."""
    failed = 0
    with open(partial, "ab") as output:
        while size is None or output.tell() < size:
            before = start = output.tell()
            try:
                with _requested(url, start) as response:
                    if start and response.status_code != 206:  # the server sends the file from its beginning
                        output.truncate(0)
                        before = output.seek(0)
                        progress.restart()
                    for chunk in response.iter_bytes():
                        with _writing(file, os.path.dirname(partial)):
                            output.write(chunk)
                        progress.add(len(chunk))
                if size is None:
                    return
                error: Exception = ConnectionError("the server sent less than it promised")
            except UserError:
                raise
            except Exception as caught:  # those of the client's HTTP library
                status = _status(caught)
                if 400 <= status < 500 and status not in (408, 429):
                    raise UserError(f"{file.address}: {_reason(file, caught)}") from caught
                error = caught
            output.flush()
            failed = 0 if output.tell() > before else failed + 1
            if failed == ATTEMPTS or (size is None and failed):
                raise UserError(
                    f"{file.address}: the download broke off after {size_text(output.tell())} ({first_line(error)}); "
                    "the same command continues it"
                ) from error
            if failed:
                time.sleep(min(2.0**failed, 10.0))


@contextlib.contextmanager
def _requested(url: str, start: int = 0) -> Iterator[Any]:
    """Request the bytes of `url` from `start` on; the response is closed at the end of the block."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30.0) as response:
        hf_raise_for_status(response)
        yield response


def _digest(path: str, etag: str) -> str | None:
    """Return the hash that `etag` is: SHA-256 of a large file, git's hash of a small one; None if it is neither."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        digest = hashlib.sha256()
    elif re.fullmatch("[0-9a-f]{40}", etag):
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path), usedforsecurity=False)
    else:
        return None
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


class _Progress:
    """Shows how far a download is on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, name: str, size: int | None, done: int):
        self._name, self._size, self._first, self._done = name, size, done, done
        self._bar: Any = None
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> "_Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._name[:30],
                total=self._size,
                initial=self._done,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def restart(self) -> None:
        """Count from 0 again."""
        self._first = self._done = 0
        if self._bar is not None:
            self._bar.reset()

    def add(self, count: int) -> None:
        """Count bytes that have arrived."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            of = left = ""
            if self._size:
                of = f" of {size_text(self._size)} ({self._done / self._size:.0%})"
                left = f", {(self._size - self._done) / max(rate, 1.0):,.0f} s left"
            print(f"{self._name}: {size_text(self._done)}{of}, {size_text(int(rate))}/s{left}", file=sys.stderr)
