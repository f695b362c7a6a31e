"""ComfyUI's prompt syntax: text is split into spans, each with the weight of its tokens, and textual inversions.

`(text)` multiplies the weight around it by 1.1, at every nesting level; `(text:1.3)` sets it to 1.3; `\\(` and `\\)`
are literal parentheses. Unclosed parentheses are plain text. `embedding:name`, at the start of a span or after white
space, stands for the vectors of a file. Source: `token_weights` and `SDTokenizer` in ComfyUI comfy/sd1_clip.py.
Axes: n source (Qwen3) tokens, d features.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

PARENTHESES_WEIGHT = 1.1

_EMBEDDING = "embedding:"

_ESCAPES = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))
"""(Escape sequence, its placeholder while parentheses are counted, the character that it stands for)."""


class TextualInversion(NamedTuple):
    """A textual inversion: the vectors that stand in the place of Qwen3's token embeddings, float32 (n, d).

    T5 has `t5_tokens` tokens of id 0 for it. Qwen3 gets `padding` pad tokens at the prompt's end for it, as many as
    there were vectors of another width.
    """

    vectors_nd: np.ndarray
    t5_tokens: int
    padding: int = 0


class Span(NamedTuple):
    """A piece of a prompt, which is text or an embedding, and the weight of its tokens."""

    text: str
    weight: float
    embedding: TextualInversion | None = None


Find = Callable[[str], TextualInversion | None]
"""Returns the embedding of a name, None if there is none."""


def spans(prompt: str, find: Find = lambda _: None, unknown: Callable[[str], None] = lambda _: None) -> list[Span]:
    """Return the spans of the prompt in order, [] for an empty prompt. Weights may be any number, even inf or nan.

    A name that `find` does not know is passed to `unknown` and left out.
    """
    found: list[Span] = []
    for word, weight in _words(prompt):
        text = word
        if word.startswith(_EMBEDDING) and (parts := word.removeprefix(_EMBEDDING).split()):
            name, embedding, text = _read_embedding(parts, find)
            if embedding is None:
                unknown(name)
            else:
                found.append(Span("", weight, embedding))
        if text:
            found.append(Span(text, weight))
    return found


def _read_embedding(parts: list[str], find: Find) -> tuple[str, TextualInversion | None, str]:
    """Return the name of an embedding, what `find` returns for it, and the text after it, single-spaced.

    A bracket ends the name. Commas around the name belong to it only if `find` knows it with them.
    """
    end = re.search(r"[<\[]|$", parts[0]).start()  # pyright: ignore[reportOptionalMemberAccess] - $ always matches
    name, text = parts[0][:end], " ".join(filter(None, [parts[0][end:], *parts[1:]]))
    embedding, bare = find(name), name.strip(",")
    if embedding is None and bare != name:
        return bare, find(bare), f"{name[len(bare) :]} {text}"
    return name, embedding, text


def _words(prompt: str) -> Iterator[tuple[str, float]]:
    """Yield (text, weight), split before every embedding."""
    for written, placeholder, _ in _ESCAPES:
        prompt = prompt.replace(written, placeholder)
    pending = [(prompt, 1.0, True)]
    while pending:
        text, weight, splits = pending.pop()
        if splits:
            pending += [_opened(piece, weight) for piece in reversed(_top_level(text))]
        else:
            yield from ((word, weight) for word in re.split(rf"(?<=\s)(?={_EMBEDDING})", _unescaped(text)))


def _top_level(text: str) -> list[str]:
    """Split at the outermost parentheses, which stay with the piece that they enclose."""
    pieces: list[str] = []
    start = depth = 0
    for index, character in enumerate(text):
        if character == "(":
            if depth == 0:
                pieces.append(text[start:index])
                start = index
            depth += 1
        elif character == ")":
            # An unmatched ")" makes the depth negative, and then the next "(" is plain text too.
            depth -= 1
            if depth == 0:
                pieces.append(text[start : index + 1])
                start = index + 1
    return [piece for piece in [*pieces, text[start:]] if piece]


def _opened(piece: str, weight: float) -> tuple[str, float, bool]:
    """Return a piece without its parentheses, its weight, and whether it had parentheses and must be split further."""
    if not (len(piece) > 1 and piece[0] == "(" and piece[-1] == ")"):
        return piece, weight, False
    inside = piece[1:-1]
    text, colon, number = inside.rpartition(":")
    if colon and text:
        try:
            return text, float(number), True
        except ValueError:
            pass
    return inside, weight * PARENTHESES_WEIGHT, True


def _unescaped(text: str) -> str:
    for _, placeholder, character in _ESCAPES:
        text = text.replace(placeholder, character)
    return text
