"""ComfyUI's prompt weights: text to spans, each with the weight of its tokens.

`(text)` weighs 1.1 times what is around it, at every nesting; `(text:1.3)` weighs 1.3, wherever it stands; `\\(` and
`\\)` are parentheses themselves. What does not close is text as it is. Source: `token_weights` in ComfyUI
comfy/sd1_clip.py.
"""

from typing import NamedTuple

PARENTHESES_WEIGHT = 1.1

_ESCAPES = (("\\)", "\0\1", ")"), ("\\(", "\0\2", "("))
"""As written, as it stands while parentheses are counted, and what it means."""


class Span(NamedTuple):
    """A piece of a prompt and the weight of its tokens."""

    text: str
    weight: float


def spans(prompt: str) -> list[Span]:
    """The prompt's spans in order; none for an empty one. A weight is whatever number stands there, of any size."""
    for written, hidden, _ in _ESCAPES:
        prompt = prompt.replace(written, hidden)
    found: list[Span] = []
    waiting = [(prompt, 1.0, True)]
    while waiting:
        text, weight, divides = waiting.pop()
        if divides:
            waiting += [_opened(piece, weight) for piece in reversed(_top_level(text))]
        else:
            found.append(Span(_meant(text), weight))
    return found


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
