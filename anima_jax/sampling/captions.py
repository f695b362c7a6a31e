"""Captions drawn into images, in any script.

DejaVu Sans draws Latin, Greek, Cyrillic, Hebrew, Arabic and much else, GNU Unifont all other characters of Unicode's
basic plane: Chinese, Japanese, Korean and Indic ones. Both come with the package (assets/fonts/NOTICE), so a caption
looks the same on every machine. A character that neither has is written as its number, never as an empty box.
"""

import functools
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from anima_jax.assets import ASSETS

FOLDER = ASSETS / "fonts"

FILES = (("DejaVuSans.ttf", 11), ("unifont.pcf.gz", 16))
"""Font file and its size in pixels; the first that has a character draws it."""

LINE_HEIGHT, BASELINE = 17, 14
"""Height of a line in pixels, and where in it the letters stand."""


def wrapped(text: str, width: float, most: int) -> list[str]:
    """Return `text` in lines of at most `width` pixels, `most` of them: what is left out is an ellipsis.

    Lines break at spaces, between Chinese and Japanese characters, and in words that are wider than a line.
    """
    lines = [""]
    for word in _words(_drawable(text)):
        if _length(lines[-1] + word.rstrip()) <= width:
            lines[-1] += word
            continue
        if lines[-1]:
            lines.append("")
        for letter in word.lstrip():
            if lines[-1] and _length(lines[-1] + letter) > width and not letter.isspace():
                lines.append("")
            lines[-1] += letter
    lines = [line.strip() for line in lines]
    if len(lines) > most:
        last = lines[most - 1]
        while last and _length(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return [line for line in lines if line]


def draw_line(pen: ImageDraw.ImageDraw, x: float, y: float, line: str) -> None:
    """Draw a line of `wrapped` in black with its upper left corner at (x, y)."""
    for font, part in _runs(line):
        pen.text((x, y + BASELINE), part, fill="black", font=font, anchor="ls")
        x += font.getlength(part)


def _words(text: str) -> Iterator[str]:
    """Yield the text in parts between which a line may break; spaces are at the end of a part."""
    part = ""
    for letter in text:
        wide = unicodedata.east_asian_width(letter) in "WF"
        if part and not letter.isspace() and (part[-1].isspace() or (wide and not _stays(letter))):
            yield part
            part = ""
        part += letter
    yield part


def _stays(letter: str) -> bool:
    """Return whether a line never begins with this character: a mark of the one before it, or closing punctuation."""
    return unicodedata.category(letter) in {"Mn", "Mc", "Me", "Cf", "Pe", "Pf", "Po"}


def _drawable(text: str) -> str:
    """Return the text in one line, with the number of each character that no font has in its place."""
    joined = " ".join(text.split())
    return "".join(letter if _font(letter) is not None else f"[U+{ord(letter):04X}]" for letter in joined)


def _length(line: str) -> float:
    return sum(font.getlength(part) for font, part in _runs(line))


def _runs(line: str) -> list[tuple[FreeTypeFont, str]]:
    """Return the line in parts, each with the font that draws it. A mark has the font of the letter before it."""
    chosen: list[int] = []
    for letter in line:
        own = _font(letter) or 0
        stays = chosen and (letter == " " or _stays(letter)) and _has(chosen[-1], letter)
        chosen.append(chosen[-1] if stays else own)
    parts = itertools.groupby(zip(chosen, line, strict=True), key=lambda pair: pair[0])
    return [(_fonts()[number], "".join(letter for _, letter in pairs)) for number, pairs in parts]


@functools.lru_cache(maxsize=4096)
def _font(letter: str) -> int | None:
    """Return the number of the first font that has a character, or None."""
    return next((number for number in range(len(FILES)) if _has(number, letter)), None)


@functools.lru_cache(maxsize=4096)
def _has(font: int, letter: str) -> bool:
    """Return whether a font has a character: whether it draws something else than for one that does not exist."""
    if unicodedata.category(letter) in {"Cc", "Cs", "Cn", "Co"}:
        return False
    return _image(font, letter) != _image(font, "\uffff")


def _image(font: int, letter: str) -> tuple[bytes, tuple[int, int]]:
    mask: Any = _fonts()[font].getmask(letter)
    return bytes(mask), mask.size


@functools.cache
def _fonts() -> Sequence[FreeTypeFont]:
    return [ImageFont.truetype(str(FOLDER / name), size) for name, size in FILES]
