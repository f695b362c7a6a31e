"""Compare two models or two adapters: which tensors differ, and how much each block differs."""

import argparse
import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.kinds import adapter_kind
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.folders import TRANSFORMER
from anima_jax.checkpoints.joined import open_model
from anima_jax.convert import outputs
from anima_jax.convert.extract import opened_both
from anima_jax.convert.inspect import block_of
from anima_jax.errors import UserError, shorten

SUMMARY = "compare two models or two adapters"


class Pair(NamedTuple):
    """A tensor, or an adapter's update of a module, from both files; None for a file that does not have it."""

    name: str
    first: np.ndarray | None
    second: np.ndarray | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("first", metavar="A", help="a model's or an adapter's file or folder")
    parser.add_argument("second", metavar="B", help="another one of the same kind")
    outputs.add_variant(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print what only one file has, how many tensors are equal, and ‖B − A‖ / ‖A‖ of each block that differs."""
    kinds = []
    for path in (arguments.first, arguments.second):
        with open_model(path, TRANSFORMER, arguments.variant) as file:
            kinds.append(adapter_kind(file.tensors) is not None)
    if kinds[0] != kinds[1]:
        raise UserError(f"{arguments.second}: one of the two is an adapter, the other is a model")
    paths = arguments.first, arguments.second
    pairs = adapters(*paths) if kinds[0] else models(*paths, arguments.variant)
    for line in report(pairs, "modules" if kinds[0] else "tensors"):
        print(line)


def models(first: str, second: str, variant: str | None) -> Iterator[Pair]:
    """Yield every tensor of two models."""
    with opened_both(first, second, variant=variant) as files:
        for name in dict.fromkeys([*files[0], *files[1]]):
            arrays = (file[name].read().astype(np.float32) if name in file else None for file in files)
            yield Pair(name, *arrays)


def adapters(first: str, second: str) -> Iterator[Pair]:
    """Yield the updates of every module of two adapters, which may differ in kind and dialect.

    The factors instead, where the update depends on the model (GLoRA, OFT).
    """
    with open_adapter(first) as one, open_adapter(second) as other:
        for name in dict.fromkeys([*one.patches, *other.patches]):
            yield Pair(name, _update(one.patches.get(name)), _update(other.patches.get(name)))


def _update(patch: Patch | None) -> np.ndarray | None:
    if patch is None:
        return None
    if patch.kind.on_weight:  # ΔW is not known without the model
        parts = [part.float32() for _, part in sorted(patch.parts.items())]
    else:
        parts = [patch.update()] if patch.update_shape is not None else []
        parts += [patch.parts[name].float32() for name in ("diff_b", "set_b", "dora_scale") if name in patch.parts]
    return np.concatenate([part.ravel() for part in parts])


def report(pairs: Iterable[Pair], what: str) -> Iterator[str]:
    """Yield the lines to print; `what` is "tensors" or "modules", the word for the pairs."""
    only: dict[str, list[str]] = {"A": [], "B": []}
    misshapen: list[str] = []
    equal = 0
    ratios: dict[str, float] = {}
    squares: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for name, first, second in pairs:
        if first is None or second is None:
            only["B" if first is None else "A"].append(name)
        elif first.shape != second.shape:
            misshapen.append(f"{name} {first.shape} and {second.shape}")
        elif np.array_equal(first, second):
            equal += 1
        else:
            change_and_size = np.array([np.sum(np.square(x), dtype=np.float64) for x in (second - first, first)])
            squares[block_of(name)] += change_and_size
            ratios[name] = _ratio(change_and_size)
    for file, names in only.items():
        if names:
            yield f"only in {file}: {len(names)} {what}: {shorten(names)}"
    if misshapen:
        yield f"of another shape: {len(misshapen)} {what}: {shorten(misshapen)}"
    yield f"equal: {equal} {what}; different: {len(ratios)}"
    if ratios:
        yield f"{'':<24} ‖B − A‖ / ‖A‖"
        yield from (f"{block:<24} {_ratio(of_block):.3e}" for block, of_block in squares.items())
        largest = max(ratios, key=ratios.__getitem__)
        yield f"most: {largest} {ratios[largest]:.3e}"


def _ratio(change_and_size: np.ndarray) -> float:
    """Return ‖B − A‖ / ‖A‖ from the sums of squares (of B − A, of A)."""
    change, size = change_and_size.tolist()
    return (change / size) ** 0.5 if size else float("inf")
