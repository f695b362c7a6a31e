"""Files inside an uncompressed `.tar`, read in place; nothing is extracted.

A tar is untrusted input: names are only labels, and every size is checked against the file before anything is read.
"""

import dataclasses
import tarfile
from collections.abc import Iterator
from typing import IO

from etils import epath

from anima_jax.data.media import MAX_BYTES, label_of, stamp_of
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError, os_reason

MAX_HEADER_BYTES = 2**16
"""Maximum size in bytes of a long name or pax header. A larger one is treated as an attack."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside a tar."""

    tar: str
    member: str
    offset: int
    """Position of the member's bytes in the tar."""
    size: int
    """In bytes."""
    mtime_ns: int
    """Modification time of the tar, in ns."""

    @property
    def name(self) -> str:
        return f"{self.tar}/{self.member}"

    @property
    def label(self) -> str:
        return label_of(self.member)

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the member's bytes. Raises UserError if they cannot be read or there are more than `max_bytes`."""
        if self.size > max_bytes:
            raise UserError(f"{self.name}: {self.size} bytes, expected at most {max_bytes}")
        try:
            with epath.Path(self.tar).open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {os_reason(error)}") from None
        if len(data) != self.size:
            raise UserError(f"{self.name}: the tar ends inside it, after {len(data)} of {self.size} bytes")
        return data

    def stamp(self) -> tuple[int, int]:
        return self.size, self.mtime_ns


def read_members(tar: str, problems: Problems) -> list[TarMember]:
    """Return the files in a tar, in its order. If members have the same name, the last one counts, as for `tar` itself.

    Links, unsafe names and a damaged end go to `problems`; the files before the damage are kept.
    """
    members: dict[str, TarMember] = {}
    errors: list[str] = []
    try:
        tar_size, mtime_ns = stamp_of(tar)
    except UserError as error:
        problems.skip(error)
        return []
    try:
        with epath.Path(tar).open("rb") as file:
            for info in _headers(file, tar_size):
                name = info.name.removeprefix("./")
                if reason := _why_refused(info):
                    errors.append(f"{tar}/{info.name}: {reason}")
                elif not info.isdir():
                    members[name] = TarMember(tar, name, info.offset_data, info.size, mtime_ns)
    except UserError as error:
        errors.append(f"{tar}: {error}")
    except OSError as error:
        errors.append(f"{tar}: cannot be read: {os_reason(error)}")
    except Exception as error:  # tarfile raises many types for hostile bytes
        errors.append(f"{tar}: not a whole, uncompressed tar: {error or type(error).__name__}")
    problems.skip(*errors)
    return list(members.values())


def _headers(file: IO[bytes], tar_size: int) -> Iterator[tarfile.TarInfo]:
    with tarfile.TarFile(fileobj=_LimitedReads(file)) as tar:  # type: ignore[arg-type]
        before = -1
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every header
            if info.size < 0 or info.offset <= before:
                raise UserError(f"the header of {info.name!r} points backwards")
            if info.isreg() and not info.issparse() and info.offset_data + info.size > tar_size:
                missing = info.offset_data + info.size - tar_size
                raise UserError(f"ends {missing} bytes early, inside {info.name!r}")
            before = info.offset
            yield info
        # tarfile treats a damaged header as the end of the tar.
        file.seek(tar.offset)
        if not (block := file.read(tarfile.BLOCKSIZE)) or any(block):
            found = "a damaged header" if block else "no end mark, it may be cut off"
            raise UserError(f"{found} at byte {tar.offset}, after the files that were read")


def _why_refused(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return f"is a link to {info.linkname!r}, expected a file"
    if not (info.isreg() or info.isdir()) or info.issparse():
        return "is a sparse file or a device, expected a plain file"
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its name leads out of the tar, expected a relative one"
    return ""


class _LimitedReads:
    """The file as tarfile sees it. Without this limit, tarfile would allocate as many bytes as a header claims."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise UserError(f"a header claims {size} bytes, expected at most {MAX_HEADER_BYTES}")
        return self._file.read(size)
