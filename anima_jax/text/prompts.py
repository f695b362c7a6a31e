"""ComfyUI's prompt weights: text is split into spans, each with the weight of its tokens.

`(text)` multiplies the weight around it by 1.1, at every nesting level; `(text:1.3)` sets it to 1.3; `\\(` and `\\)`
are literal parentheses. Unclosed parentheses are plain text. `embedding:name` requests a textual inversion and is left
out, because Anima has none. Source: `token_weights` and `SDTokenizer` in ComfyUI comfy/sd1_clip.py.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

PARENTHESES_WEIGHT = 1.1

_EMBEDDING = "embedding:"

_ESCAPES = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))
"""(Escape sequence, its placeholder while parentheses are counted, the character that it stands for)."""


class Span(NamedTuple):
    """A piece of a prompt and the weight of its tokens."""

    text: str
    weight: float


def spans(prompt: str) -> list[Span]:
    """Return the spans of the prompt in order, [] for an empty prompt. Weights may be any number, even inf or nan."""
    return [Span(text, weight) for word, weight in _words(prompt) if (text := _without_embedding(word))]


def embeddings(prompt: str) -> list[str]:
    """Return the names of the embeddings in the prompt, which `spans` leaves out."""
    words = [word.removeprefix(_EMBEDDING) for word, _ in _words(prompt) if word.startswith(_EMBEDDING)]
    return [name.strip(",") for word in words for name in word.split()[:1]]


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
            yield from ((word, weight) for word in re.split(f"[ \n](?={_EMBEDDING})", _unescaped(text)))


def _without_embedding(word: str) -> str:
    """Return the text after an embedding's name as ComfyUI does: its trailing commas, then the words, single-spaced."""
    name, *rest = word.removeprefix(_EMBEDDING).split() or [""]
    if not (name and word.startswith(_EMBEDDING)):
        return word
    commas = name[len(name.strip(",")) :]
    return " ".join([commas, " ".join(rest)] if commas else rest)


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
