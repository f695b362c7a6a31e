"""Identification of model files: the SHA-256 of the bytes, and the name of the release with that hash.

An adapter's metadata records both for the model it was trained on, so that its use on another model is detected.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

from anima_jax.checkpoints.folders import TRANSFORMER, model_files
from anima_jax.checkpoints.locations import PathLike

RELEASES = (
    ("bd43b7cf", "006e", "Anima base v1.0"),
    ("3c186838", "a082", "Anima aesthetic v1.1"),
    ("fba11953", "f7eb", "Anima turbo v1.1"),
)
"""(first digits of the SHA-256 of a release's file, last digits, release)."""

METADATA_KEYS = (
    ("base_model_sha256", "base_model"),
    ("ss_new_sd_model_hash", "ss_sd_model_name"),
)
"""Metadata keys (hash, name) for the model that an adapter was trained on: ours, then sd-scripts'."""


class BaseModel(NamedTuple):
    """SHA-256 and name of a model file."""

    sha256: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} (SHA-256 {self.sha256[:8]}…)"

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata entries for an adapter trained on this model."""
        return dict(zip(METADATA_KEYS[0], self, strict=True))


def identify(path: PathLike) -> BaseModel:
    """Return the SHA-256 of a model's file, with the name of its release or else its file name.

    The whole file is read to hash it; the hash is cached by path and modification time. That of several files, as in a
    folder, is the hash of their hashes.
    """
    files = model_files(path, TRANSFORMER)
    sha256 = files.sha256().hex()
    known = (name for begin, end, name in RELEASES if sha256.startswith(begin) and sha256.endswith(end))
    return BaseModel(sha256, next(known, os.path.basename(files.given.rstrip("/"))))


def base_mismatch(adapter_path: str, metadata: Mapping[str, str], base: PathLike) -> str | None:
    """Return a warning that names both models if an adapter was trained on another model than `base`, else None."""
    for hash_key, name_key in METADATA_KEYS:
        if trained_hash := metadata.get(hash_key, "").lower():
            found = identify(base)
            if trained_hash == found.sha256:
                return None
            trained = BaseModel(trained_hash, metadata.get(name_key, "another model"))
            return f"warning: {adapter_path}: was trained on {trained}, and this is {found}"
    return None
