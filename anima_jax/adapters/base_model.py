"""Which model a file contains: the SHA-256 of its bytes, and the name of the release that has it.

An adapter's metadata have both of the model that it was trained on, so that its use on another one is noticed.
"""

import functools
import os
from collections.abc import Mapping
from typing import NamedTuple

from anima_jax.checkpoints import locations
from anima_jax.checkpoints.locations import PathLike

RELEASES = (
    ("bd43b7cf", "006e", "Anima base v1.0"),
    ("3c186838", "a082", "Anima aesthetic v1.1"),
    ("fba11953", "f7eb", "Anima turbo v1.1"),
)
"""(how the SHA-256 of a release's file begins, how it ends, the release)."""

METADATA_KEYS = (
    ("base_model_sha256", "base_model"),
    ("ss_new_sd_model_hash", "ss_sd_model_name"),
)
"""Keys of an adapter's metadata for the model that it was trained on, (hash, name): ours, and sd-scripts'."""


class BaseModel(NamedTuple):
    """A model's file: its SHA-256 and what it is called."""

    sha256: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} (SHA-256 {self.sha256[:8]}…)"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of an adapter that is trained on it."""
        return dict(zip(METADATA_KEYS[0], self, strict=True))


def identify(path: PathLike) -> BaseModel:
    """Return which model a file contains. It is read from end to end, once in a process."""
    local = locations.resolve(path)
    changed = None if locations.is_remote(local) else os.stat(local).st_mtime_ns
    sha256 = _sha256(local, changed)
    known = (name for begin, end, name in RELEASES if sha256.startswith(begin) and sha256.endswith(end))
    return BaseModel(sha256, next(known, os.path.basename(os.fspath(path))))


@functools.lru_cache(maxsize=8)
def _sha256(path: str, changed: int | None) -> str:
    del changed
    return locations.file_sha256(path).hex()


def base_mismatch(adapter_path: str, metadata: Mapping[str, str], base: PathLike) -> str | None:
    """Return a warning with both names if an adapter was trained on another model than the file `base`."""
    for hash_key, name_key in METADATA_KEYS:
        if trained_hash := metadata.get(hash_key, "").lower():
            found = identify(base)
            if trained_hash == found.sha256:
                return None
            trained = BaseModel(trained_hash, metadata.get(name_key, "another model"))
            return f"warning: {adapter_path}: was trained on {trained}, and this is {found}"
    return None
