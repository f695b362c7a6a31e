"""Matching of a file's tensors with a model's parameters: all must match, or an error lists what is left over."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from anima_jax.adapters.kinds import adapter_kind, unsupported
from anima_jax.checkpoints import copying, families
from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.names.networks import (
    ADAPTER,
    DIT,
    NETWORKS,
    QWEN3,
    TEXT_ENCODER,
    WAN_VAE,
    Network,
    NetworkKeys,
    locate,
)
from anima_jax.checkpoints.safetensors import DTYPES, TensorInfo
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.errors import UserError, did_you_mean, plural, shorten

BFLOAT16 = DTYPES["BF16"]

_VALUES = 2**24  # of a quantised tensor that are in float32 at a time

MOST_UNUSED = 0.1
"""Share of unused tensors up to which it is safe to advise going on without them: a few odd ones, not a part."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file."""

    file: TensorFile
    key: str

    @property
    def info(self) -> TensorInfo:
        """The tensor's dtype, in which it is read, and shape."""
        return self.file.tensors[self.key]

    @property
    def storage(self) -> str | None:
        """The format of a quantised tensor; None for a plain one."""
        return self.file.storage(self.key)

    @property
    def written_dtype(self) -> np.dtype[Any]:
        """The dtype in which its values are written if no other is asked for: bfloat16 for a quantised tensor."""
        return BFLOAT16 if self.storage else self.info.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in its file, with the scales of a quantised tensor."""
        parts = self.file.parts(self.key).values()
        return sum(part.nbytes for part in parts) if parts else self.info.nbytes

    def read(self, rows: slice | None = None) -> np.ndarray:
        """Read the array, or these rows of its first axis, in the dtype of `info`."""
        return self.file.read(self.key, rows)

    def read_as(self, dtype: np.dtype[Any], rows: slice | None = None) -> np.ndarray:
        """Read the array, or these rows of its first axis, rounded to `dtype`.

        Of a quantised tensor only some rows are in float32 at a time. Raises UserError if a value overflows.
        """
        shape = self.info.shape
        if not self.storage or dtype == self.info.dtype or not shape:
            return copying.cast(self.read(rows), dtype, self.key)
        first, last, _ = (rows or slice(None)).indices(shape[0])
        out = np.empty((max(0, last - first), *shape[1:]), dtype)
        step = max(1, _VALUES // max(1, math.prod(shape[1:])))
        for begin in range(first, last, step):
            part = slice(begin, min(begin + step, last))
            out[part.start - first : part.stop - first] = copying.cast(self.read(part), dtype, self.key)
        return out


def find(network: Network, file: TensorFile) -> NetworkKeys:
    """Locate `network` in `file`. Raises UserError if it is missing or its weights are integers."""
    located = None if adapter_kind(file.tensors) else locate(network, file.tensors)
    if located is None:
        raise UserError(f"{file.path}: has no {network.title}; {looks_like(file.tensors, file.metadata)}")
    integers = [key for key in located.keys.values() if file.tensors[key].dtype.kind in "iub"]
    if integers:
        raise UserError(f"{file.path}: {shorten(integers)}: integers without scales, expected floating-point weights")
    return located


def sources(located: NetworkKeys, file: TensorFile) -> dict[str, StoredTensor]:
    """Return original name → tensor in the file, for the located network."""
    return {name: StoredTensor(file, key) for name, key in located.keys.items()}


def original_names(file: TensorFile) -> dict[str, str]:
    """Return original name → key for the tensors of the transformer (or a text adapter alone) and the text encoder.

    The text encoder's names begin with `text_encoder.`. Raises UserError for integer weights.
    """
    found: dict[str, str] = {}
    transformer = DIT if locate(DIT, file.tensors) else ADAPTER
    for network, prefix in ((transformer, ""), (QWEN3, TEXT_ENCODER)):
        if locate(network, file.tensors):
            found |= {prefix + name: key for name, key in find(network, file).keys.items()}
    return found


def networks_in(keys: Iterable[str]) -> list[Network]:
    """Return the networks in a file with these keys; a transformer counts together with its LLM adapter."""
    keys = list(keys)
    found = [network for network in NETWORKS if locate(network, keys)]
    return [network for network in found if network is not ADAPTER or DIT not in found]


def looks_like(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> str:
    """Return a short description of what a file with these tensors (name → anything with `.shape`) contains."""
    kind = adapter_kind(tensors)
    titles = [kind.title] if kind else [network.title for network in networks_in(tensors)]
    foreign = families.family({name: tensor.shape for name, tensor in tensors.items()})
    if foreign and (kind or not titles or titles == [WAN_VAE.title]):
        return f"it looks like: {foreign}"
    if titles:
        named = families.from_metadata(metadata or {}) if kind else None
        return f"it looks like: {' and '.join(titles)}" + (f" for {named!a}" if named else "")
    if other := unsupported(tensors):
        return f"it looks like: {other}"
    return f"it contains {plural(len(tensors), 'tensor')}: {shorten(list(tensors))}"


def foreign_hint(tensors: Mapping[str, TensorInfo], title: str = "") -> str:
    """Return `"; it looks like: …"` for tensors of another model than Anima and of another network than `title`."""
    found = families.family({name: tensor.shape for name, tensor in tensors.items()})
    return f"; it looks like: {found}" if found and not (title and title in found) else ""


def sizes(network: Network, path: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Return the config of a `network` whose tensors have these `shapes` (original name → shape).

    Raises UserError if no config fits.
    """
    _require_complete_stacks(path, network.stacks, shapes)
    try:
        return network.config_from_shapes(shapes)
    except KeyError as error:
        name = str(error.args[0])
        raise UserError(f"{path}: missing for the {network.title}: {name}{did_you_mean(name, shapes)}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, IndexError, ArithmeticError) as error:
        raise UserError(f"{path}: the shapes are not those of a {network.title}: {error}") from error


def require_match(
    path: str,
    title: str,
    expected: Sequence[FileTensor],
    found: Mapping[str, StoredTensor],
    unknown: Iterable[str],
    *,
    allow_unused: bool | None = False,
) -> list[str]:
    """Return the keys of `found` (name → tensor) and `unknown` that are not among the `expected` tensors.

    Raises UserError unless every expected tensor is there in its shape, and, unless `allow_unused`, if there are
    others. None is False where nobody can ask for it: the message does not name it.
    """
    names = {tensor.name for tensor in expected}
    unused = [*unknown, *(source.key for name, source in found.items() if name not in names)]
    missing = [tensor.name for tensor in expected if tensor.name not in found]
    misshapen = [
        f"{found[tensor.name].key} is {found[tensor.name].info.shape}, expected {tensor.shape}"
        for tensor in expected
        if tensor.name in found and found[tensor.name].info.shape != tensor.shape
    ]
    problems = {"unknown in the file": unused, "missing for the model": missing, "of another shape": misshapen}
    listed = [f"{len(items)} {what}: {shorten(items)}" for what, items in problems.items() if items]
    only_unused = not (missing or misshapen)
    if listed and not (only_unused and allow_unused):
        advice = "; --allow_unused (allow_unused=True) goes on without them"
        few = allow_unused is not None and only_unused and len(unused) <= MOST_UNUSED * len(expected)
        raise UserError(f"{path}: does not fit the {title}; {'; '.join(listed)}{advice if few else ''}")
    return unused


def _require_complete_stacks(path: str, stacks: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
    """Raise UserError unless the blocks of each part in the file are numbered 0, 1, 2, … without gaps."""
    names = list(names)
    for owner, blocks in stacks:
        stack = owner + blocks
        pattern = re.compile(re.escape(stack) + r"(\d{1,9})\.")
        numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
        if not numbers and any(name.startswith(owner) for name in names):
            raise UserError(f"{path}: has 0 blocks: no name begins with {stack}0.")
        gaps = [str(number) for number in range(len(numbers)) if number not in numbers]
        if gaps:
            raise UserError(
                f"{path}: has {len(numbers)} different {stack}N. with numbers up to {max(numbers)}, but no {stack}"
                f"{shorten(gaps)}"
            )
