"""Hashes by which A1111, Forge and Civitai know a file: the first digits of a SHA-256."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Sequence

from anima_jax.parallel.hosts import is_process_0

MODEL_DIGITS = 10
"""Digits of the hash of a whole file (`modules/sd_models.py`, CheckpointInfo.shorthash)."""

LORA_DIGITS = 12
"""Digits of the hash of a LoRA's values, without its header (`extensions-builtin/Lora/network.py`)."""

_CHUNK_BYTES = 2**22


class FileHashes(threading.Thread):
    """Computes hashes while images are drawn. Files that are not local are left out."""

    def __init__(self, transformer: str, loras: Sequence[str], controls: Sequence[str] = ()):
        super().__init__(daemon=True)
        self._whole, self._loras = [transformer, *controls], loras
        self._hashes: dict[str, str] = {}
        self.start()

    def run(self) -> None:
        if not is_process_0():  # which writes the images
            return
        for path in (*self._whole, *self._loras):
            if path not in self._hashes and (found := file_hash(path, is_lora=path in self._loras)):
                self._hashes[path] = found

    def wait(self) -> dict[str, str]:
        """Return path → hash, once all are computed."""
        self.join()
        return self._hashes


def file_hash(path: str, *, is_lora: bool = False) -> str | None:
    """Return the hash of a local file, a LoRA's after its header; None if it is not local or cannot be read."""
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            return _sha256(path, after_header=is_lora)[: LORA_DIGITS if is_lora else MODEL_DIGITS]
    return None


def _sha256(path: str, *, after_header: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if after_header:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
