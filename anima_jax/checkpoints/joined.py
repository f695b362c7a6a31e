"""Files of tensors that are read as one: the shards of a network, and the networks of a folder."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from anima_jax.checkpoints.folders import COMPONENTS, NetworkFiles, model_files
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.quantised import view
from anima_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo
from anima_jax.checkpoints.tensor_files import TensorFile, open_tensors
from anima_jax.errors import UserError, shorten


class JoinedFile(SafetensorsFile):
    """Open files as one file `path` with the tensors of all, each under its file's prefix and its own name.

    The metadata are the first file's. Raises UserError for a tensor that is in two files.
    """

    def __init__(self, path: str, files: Sequence[tuple[str, TensorFile]]):
        self.path, self._files = path, [file for _, file in files]
        self.size, self.metadata = sum(file.size for file in self._files), self._files[0].metadata
        self.tensors = {}
        self._owners: dict[str, tuple[TensorFile, str]] = {}
        for prefix, file in files:
            for key, info in file.tensors.items():
                if prefix + key in self._owners:
                    other = self._owners[prefix + key][0].path
                    raise UserError(f"{path}: {shorten([key])} is in {other} and in {file.path}")
                self.tensors[prefix + key] = dataclasses.replace(info, name=prefix + key)
                self._owners[prefix + key] = file, key

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def storage(self, name: str) -> str | None:
        """Return the format of a quantised tensor, or None."""
        file, key = self._owners[name]
        return file.storage(key)

    def parts(self, name: str) -> Mapping[str, TensorInfo]:
        """Return the parts of a quantised tensor; {} for a plain one."""
        file, key = self._owners[name]
        prefix = name.removesuffix(key)
        return {part: dataclasses.replace(info, name=prefix + info.name) for part, info in file.parts(key).items()}

    def read_part(self, name: str, part: str, rows: slice | None = None) -> np.ndarray:
        """Read a part of a quantised tensor, or these rows of the part's first axis."""
        file, key = self._owners[name]
        return file.read_part(key, part, rows)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Read a tensor, or these rows of its first axis."""
        file, key = self._owners[name]
        return file.read(key, rows)


def open_model(path: PathLike, components: Sequence[str] = COMPONENTS, variant: str | None = None) -> TensorFile:
    """Open a file, or the files that belong to these `components` in a folder, as one file.

    Raises UserError as `folders.model_files` and `open_tensors` do, and for shards that are not what their index says.
    """
    found = model_files(path, components, variant)
    with contextlib.ExitStack() as stack:
        files = [(part.prefix, stack.enter_context(_open_part(part))) for part in found.parts]
        opened = files[0][1] if len(files) == 1 else JoinedFile(str(found), files)
        stack.pop_all()
        return opened


def _open_part(part: NetworkFiles) -> TensorFile:
    if part.index is None:
        return open_tensors(part.files[0])
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(SafetensorsFile(file)) for file in part.files]
        joined = JoinedFile(part.where, [("", shard) for shard in shards])
        _check_index(part.where, part.index, dict(zip(dict.fromkeys(part.index.values()), shards, strict=True)))
        opened = view.recognise(joined)  # a weight and its scale may be in different shards
        stack.pop_all()
        return opened


def _check_index(path: str, index: Mapping[str, str], shards: Mapping[str, SafetensorsFile]) -> None:
    """Raise UserError unless every tensor of an index is in the file that it names."""
    found = {key: name for name, shard in shards.items() for key in shard.tensors}
    for key, name in index.items():
        if found.get(key) != name:
            where = f"is in {found[key]}" if key in found else "is in none of its files"
            raise UserError(f"{path}: says that {shorten([key])} is in {name}, but it {where}")
