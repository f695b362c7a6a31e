"""The nodes and links of a graph of ComfyUI's that a stranger wrote: it may be damaged, circular or large.

API format: id → {class_type, inputs}, where an input is a value or a link [id, output].
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anima_jax.errors import UserError
from anima_jax.sampling.recipe import Recipe, quoted

Node = Mapping[str, Any]
Link = tuple[str, int]

MAX_VISITS = 20_000
"""Nodes looked at before a graph is given up: links may share and repeat nodes."""

MAX_DEPTH = 100

VALUES = ("value", "string", "text", "int", "float", "number", "seed", "noise_seed", "String", "Text", "prompt")
"""Inputs that hold the value of a node that only passes one on."""


class NodeGraph:
    """The nodes of a graph, and the recipe that their values are read into."""

    def __init__(self, path: str, graph: Mapping[str, Any]):
        self.recipe = Recipe(path)
        self._visits = 0
        self.nodes: dict[str, Node] = {
            str(key): node
            for key, node in graph.items()
            if isinstance(node, Mapping)
            and isinstance(node.get("class_type"), str)
            and isinstance(node.get("inputs"), Mapping)
        }

    def inputs(self, key: str) -> Mapping[str, Any]:
        """Return a node's inputs. Raises UserError if this graph takes too long."""
        self._visits += 1
        if self._visits > MAX_VISITS:
            raise UserError(f"{self.recipe.path}: its ComfyUI graph has too many links")
        return self.nodes[key]["inputs"]

    def kind(self, key: str) -> str:
        """Return a node's class in lower case."""
        return str(self.nodes[key]["class_type"]).casefold()

    def leave_out(self, key: str, why: str = "") -> None:
        """Say that a node is not followed."""
        name = f"node {key} ({self.nodes[key]['class_type']})"
        message = f"not followed: {quoted(name)}" + (f", {why}" if why else "")
        if message not in self.recipe.messages:
            self.recipe.messages.append(message)

    def link(self, value: Any) -> Link | None:
        """Return node and output of a link, None for a value."""
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            key, index = value
            if isinstance(key, str | int) and str(key) in self.nodes and isinstance(index, int):
                return str(key), index
        return None

    def links(self, key: str) -> dict[str, Link]:
        """Return the links of a node by input."""
        return {name: link for name, value in self.inputs(key).items() if (link := self.link(value))}

    def next(self, key: str, names: Sequence[str]) -> Link | None:
        """Return the link of the first of these inputs, else the node's only link; a switch's is that of its choice."""
        links = self.links(key)
        if {"on_true", "on_false"} & set(links):
            return links.get("on_true" if self.value(key, ("switch",)) is True else "on_false")
        named = next((links[name] for name in names if name in links), None)
        return named or (next(iter(links.values())) if len(links) == 1 else None)

    def chain(self, link: Link | None, names: Sequence[str]) -> Iterator[str]:
        """Yield the nodes from a link upwards, along inputs of these names."""
        seen: set[str] = set()
        while link and link[0] not in seen:
            seen.add(link[0])
            yield link[0]
            link = self.next(link[0], names)

    def value(self, key: str, names: Sequence[str], depth: int = 0) -> Any:
        """Return the first of these inputs, through nodes that only hold or join values; None if there is none."""
        inputs = self.inputs(key)
        name = next((name for name in names if inputs.get(name) is not None), None)
        if name is None or not (link := self.link(inputs[name])):
            value = None if name is None else inputs[name]
            return value.get("__value__", value) if isinstance(value, Mapping) else value  # the frontend wraps lists
        value = self._linked_value(link[0], name, depth + 1) if depth < MAX_DEPTH else None
        if value is None:
            self.leave_out(link[0], f"which computes {quoted(name)}")
        return value

    def _linked_value(self, key: str, name: str, depth: int) -> Any:
        """Return the value that a node passes on as an input of this name."""
        inputs, links = self.inputs(key), self.links(key)
        if {"on_true", "on_false"} & set(links):
            choice = "on_true" if self.value(key, ("switch",), depth) is True else "on_false"
            return self.value(key, (choice,), depth)
        if re.search(r"concat|join", self.kind(key)):
            words = [word for word in inputs if not re.search(r"delim|separ|clean|linebreak", word, re.IGNORECASE)]
            parts = [self.value(key, (word,), depth) for word in words]
            glue = self.value(key, ("delimiter", "separator"), depth)
            return (glue if isinstance(glue, str) else "").join(part for part in parts if isinstance(part, str))
        if (value := self.value(key, (name, *VALUES), depth)) is not None:
            return value
        if len(links) == 1:
            return self.value(key, tuple(links), depth)
        values = [value for value in inputs.values() if isinstance(value, str | int | float)]
        return values[0] if len(values) == 1 and not links else None

    def typed(self, key: str, kind: type[Any], *names: str) -> Any:
        """Return the first of these inputs as this type, or None if there is none; says so if it is of another type."""
        value = self.value(key, names)
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            if kind is not str:
                value = kind(number(value))
            if isinstance(value, kind):
                return value
        if any(name in self.inputs(key) for name in names):
            self.leave_out(key, f"whose {names[0]} is not a value")
        return None

    def set(self, field: str, kind: type[Any], key: str, *names: str) -> bool:
        """Set a field of the recipe from the first of these inputs; return whether it is there and of this type."""
        value = self.typed(key, kind, *names)
        if value is not None:
            self.recipe.values[field] = value
        return value is not None


def number(value: Any) -> float:
    """Return a finite number, of any size. Raises ValueError or TypeError for anything else."""
    if isinstance(value, int):
        return value
    if not math.isfinite(found := float(value)):
        raise ValueError
    return found


def number_or(value: Any, default: float) -> float:
    """Return a finite number, or the default for anything else."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return float(number(value))
    return default
