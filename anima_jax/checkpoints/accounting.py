"""Every tensor of a file and every parameter of the model is accounted for, or the error lists both sides."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anima_jax.adapters.kinds import TITLES, adapter_kind
from anima_jax.checkpoints.names import FileTensor
from anima_jax.checkpoints.names.networks import (
    ADAPTER,
    DIT,
    NETWORKS,
    QUANTISED,
    QWEN3,
    TEXT_ENCODER,
    Network,
    NetworkKeys,
    locate,
)
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.checkpoints.safetensors_header import TensorInfo
from anima_jax.errors import UserError, did_you_mean, shorten


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where the values of a tensor are."""

    file: SafetensorsFile
    key: str

    @property
    def tensor(self) -> TensorInfo:
        return self.file.tensors[self.key]

    def read(self, rows: slice | None = None):
        """The stored array, or these rows of its first axis."""
        return self.file.read(self.key, rows)


def find(network: Network, file: SafetensorsFile) -> NetworkKeys:
    """Where `network` is in `file`. UserError if it is not there or its weights are no plain floating-point numbers."""
    location = None if adapter_kind(file.tensors) else locate(network, file.tensors)
    if location is None:
        raise UserError(f"{file.path}: has no {network.title}; {looks_like(file.tensors)}")
    mine = [*location.keys.values(), *location.unknown]
    quantised = [key for key in mine if QUANTISED.search(key)]
    if quantised:
        raise UserError(
            f"{file.path}: its weights are quantised, with scales beside them ({shorten(quantised)}), which is not "
            "read here; use the bf16, fp16 or plain fp8 file of the model"
        )
    integers = [key for key in location.keys.values() if file.tensors[key].dtype.kind in "iub"]
    if integers:
        raise UserError(f"{file.path}: {shorten(integers)}: integers, expected floating-point weights")
    return location


def original_names(file: SafetensorsFile) -> dict[str, str]:
    """Original name → key of each tensor of the transformer, or of its text adapter alone, and of the text encoder.

    The text encoder's names have `text_encoder.` before. UserError for weights that are no plain numbers.
    """
    found: dict[str, str] = {}
    whole = DIT if locate(DIT, file.tensors) else ADAPTER
    for network, before in ((whole, ""), (QWEN3, TEXT_ENCODER)):
        if locate(network, file.tensors):
            found |= {before + name: key for name, key in find(network, file).keys.items()}
    return found


def looks_like(keys: Iterable[str]) -> str:
    """What a file with these keys seems to be, for a message."""
    keys = list(keys)
    if kind := adapter_kind(keys):
        return f"it looks like: {TITLES[kind]}"
    titles = [network.title for network in NETWORKS if locate(network, keys)]
    return f"it looks like: {' and '.join(titles)}" if titles else f"it holds {len(keys)} tensors: {shorten(keys)}"


def sizes(network: Network, path: str, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The config of a `network` with tensors of these shapes (names without prefix). UserError if there is none."""
    _require_whole_stacks(path, network.stacks, shapes)
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
    path: str, title: str, expected: Sequence[FileTensor], sources: Mapping[str, StoredTensor], unknown: Iterable[str]
) -> None:
    """UserError unless `sources` (by name) are the `expected` tensors, shapes included, and nothing is `unknown`."""
    names = {tensor.name for tensor in expected}
    unknown = [*unknown, *(source.key for name, source in sources.items() if name not in names)]
    missing = [tensor.name for tensor in expected if tensor.name not in sources]
    misshapen = [
        f"{sources[tensor.name].key} is {sources[tensor.name].tensor.shape}, expected {tensor.shape}"
        for tensor in expected
        if tensor.name in sources and sources[tensor.name].tensor.shape != tensor.shape
    ]
    faults = {"unknown in the file": unknown, "missing for the model": missing, "of another shape": misshapen}
    listed = [f"{len(items)} {what}: {shorten(items)}" for what, items in faults.items() if items]
    if listed:
        raise UserError(f"{path}: does not fit the {title}; {'; '.join(listed)}")


def _require_whole_stacks(path: str, stacks: Iterable[tuple[str, str]], names: Iterable[str]) -> None:
    """UserError unless the blocks of each stack are numbered 0, 1, 2, …; only a part that is not there has none."""
    names = list(names)
    for owner, blocks in stacks:
        stack = owner + blocks
        pattern = re.compile(re.escape(stack) + r"(\d{1,9})\.")
        numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
        if not numbers and any(name.startswith(owner) for name in names):
            raise UserError(f"{path}: has 0 blocks: no name begins {stack}0.")
        gaps = [str(number) for number in range(len(numbers)) if number not in numbers]
        if gaps:
            raise UserError(
                f"{path}: has {len(numbers)} different {stack}N. with numbers up to {max(numbers)}, but no {stack}"
                f"{shorten(gaps)}"
            )
