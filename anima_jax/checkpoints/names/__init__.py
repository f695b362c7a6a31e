"""The mapping between tensors in files and model parameters: the only place that knows the networks' tensor names.

A network's table is a tuple of `Rule`s: a pattern for parameter paths, the name in the file and the layout of the
values there. Parameters of stacked blocks have a leading layer axis; files have one tensor per layer, whose number
replaces `{layer}` in the rule's name.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """How a file stores one parameter (of one layer): conversions in both directions, which may return views."""

    to_model: Callable[[np.ndarray], np.ndarray]
    to_file: Callable[[np.ndarray], np.ndarray]

    def file_shape(self, model_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file of a parameter of `model_shape`, without allocating it."""
        return self.to_file(np.broadcast_to(np.zeros((), np.uint8), model_shape)).shape


def permuted(*axes: int) -> FileLayout:
    """Return the layout with permuted axes: the model's axis n is the file's axis `axes[n]`."""
    inverse = tuple(np.argsort(axes))
    return FileLayout(lambda file: file.transpose(axes), lambda model: model.transpose(inverse))


SAME = FileLayout(lambda file: file, lambda model: model)
LINEAR = permuted(1, 0)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Parameters whose full path matches `path` are stored as `name` (a `re.Match.expand` template) in `layout`."""

    path: str
    name: str
    layout: FileLayout = SAME


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a file and the parameter, or layer of a stacked parameter, that it contains."""

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    layout: FileLayout


def file_tensors(rules: Sequence[Rule], params: Mapping[str, Any]) -> list[FileTensor]:
    """Return all tensors, without prefix, in a file of a model with these parameters (anything with `.shape`).

    Raises LookupError unless each path matches exactly one rule.
    """
    tensors: list[FileTensor] = []
    for path, leaf in params.items():
        matches = [(match, rule) for rule in rules if (match := re.fullmatch(rule.path, path))]
        if len(matches) != 1:
            raise LookupError(f"parameter {path} matches {len(matches)} rules, not one")
        match, rule = matches[0]
        name, shape = match.expand(rule.name), tuple(leaf.shape)
        if "{layer}" in name:
            file_shape = rule.layout.file_shape(shape[1:])
            tensors += [
                FileTensor(name.replace("{layer}", str(layer)), file_shape, path, layer, rule.layout)
                for layer in range(shape[0])
            ]
        else:
            tensors.append(FileTensor(name, rule.layout.file_shape(shape), path, None, rule.layout))
    return tensors
