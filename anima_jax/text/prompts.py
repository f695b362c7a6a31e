"""ComfyUI's prompt weights: text to spans, each with the weight of its tokens.

`(text)` weighs 1.1 times what is around it, at every nesting; `(text:1.3)` weighs 1.3, wherever it stands; `\\(` and
`\\)` are parentheses themselves. What does not close is text as it is. `embedding:name` asks for a textual inversion,
of which Anima has none: it is left out. Source: `token_weights` and `SDTokenizer` in ComfyUI comfy/sd1_clip.py.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

PARENTHESES_WEIGHT = 1.1

_EMBEDDING = "embedding:"

_ESCAPES = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))
"""As written, as it stands while parentheses are counted, and what it means."""


class Span(NamedTuple):
    """A piece of a prompt and the weight of its tokens."""

    text: str
    weight: float


def spans(prompt: str) -> list[Span]:
    """The prompt's spans in order; none for an empty one. A weight is whatever number stands there, of any size."""
    return [Span(text, weight) for word, weight in _words(prompt) if (text := _without_embedding(word))]


def embeddings(prompt: str) -> list[str]:
    """Names of the embeddings that the prompt asks for, which `spans` leaves out."""
    words = [word.removeprefix(_EMBEDDING) for word, _ in _words(prompt) if word.startswith(_EMBEDDING)]
    return [name.strip(",") for word in words for name in word.split()[:1]]


def _words(prompt: str) -> Iterator[tuple[str, float]]:
    """The text of each weight, divided before every embedding."""
    for written, hidden, _ in _ESCAPES:
        prompt = prompt.replace(written, hidden)
    waiting = [(prompt, 1.0, True)]
    while waiting:
        text, weight, divides = waiting.pop()
        if divides:
            waiting += [_opened(piece, weight) for piece in reversed(_top_level(text))]
        else:
            yield from ((word, weight) for word in re.split(f"[ \n](?={_EMBEDDING})", _meant(text)))


def _without_embedding(word: str) -> str:
    """What follows the embedding's name: commas at its end, and the rest with single spaces, as there."""
    name, *rest = word.removeprefix(_EMBEDDING).split() or [""]
    if not (name and word.startswith(_EMBEDDING)):
        return word
    commas = name[len(name.strip(",")) :]
    return " ".join([commas, " ".join(rest)] if commas else rest)


def _top_level(text: str) -> list[str]:
    """Pieces that begin at an opening parenthesis of depth 0 or end at the one that closes it."""
    pieces, start, depth = [], 0, 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0:
                pieces.append(text[start:place])
                start = place
            depth += 1
        elif character == ")":
            # Below 0, after one that closes nothing, the next that opens is text too.
            depth -= 1
            if depth == 0:
                pieces.append(text[start : place + 1])
                start = place + 1
    return [piece for piece in [*pieces, text[start:]] if piece]


def _opened(piece: str, weight: float) -> tuple[str, float, bool]:
    """What a piece holds, its weight, and whether it is to be divided further: what no parentheses enclose is not."""
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


def _meant(text: str) -> str:
    for _, hidden, meant in _ESCAPES:
        text = text.replace(hidden, meant)
    return text
