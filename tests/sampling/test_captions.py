"""Captions in any script: what draws them, where they break, and what stands for what no font has."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from anima_jax.sampling.captions import BASELINE, LINE_HEIGHT, draw_line, wrapped
from anima_jax.training.samples import sample_grid

SCRIPTS = {
    "Cyrillic": "Ёлка и дом у моря",
    "accents": "naïve façade crème brûlée Ångström Łódź ỹ ǟ",
    "accents of their own": "e\u0301 n\u0303 a\u0308",
    "Greek": "Φάρος στη θάλασσα",
    "Japanese": "海辺の灯台、夕焼け",
    "Chinese": "黎明时分的灯塔，水彩风格 臺灣",
    "Korean": "바닷가의 등대",
    "Hebrew": "שלום עולם",
    "Arabic": "شجرة خضراء",
    "Hindi": "हिन्दी में घर",
    "Thai": "ประภาคารริมทะเล",
}

HEX = {
    "日": "00001FF0101010101010101010101FF01010101010101010101010101FF01010",
    "한": "000008087F081C082208220E22081C080008000808000800080008000FF80000",
}


def drawn(line: str, width: int = 400) -> np.ndarray:
    """Where a line is black, (y, x)."""
    image = Image.new("RGB", (width, LINE_HEIGHT), "white")
    draw_line(ImageDraw.Draw(image), 0, 0, line)
    return np.asarray(image.convert("L")) < 128


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_its_letters(script):
    text = SCRIPTS[script]
    lines = wrapped(text, 120, 10)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(drawn(line).any() and not drawn(line)[:, 122:].any() for line in lines)
    boxes = [drawn(letter, 20) for letter in text if not letter.isspace()]
    assert not any(np.array_equal(box, drawn("\uffff", 20)) for box in boxes)


@pytest.mark.parametrize("letter", HEX)
def test_a_letter_is_the_one_of_unifonts_table(letter):
    """unifont.hex is the source of the font: 16 rows of 16 bits."""
    rows = np.array([[int(bit) for bit in f"{int(HEX[letter][n : n + 4], 16):016b}"] for n in range(0, 64, 4)], bool)
    np.testing.assert_array_equal(drawn(letter, 16)[BASELINE - 14 : BASELINE + 2], rows)


def test_what_no_font_has_is_written_as_its_number():
    assert wrapped("a\x00 \U0001f926 \ud800", 400, 3) == ["a[U+0000] [U+1F926] [U+D800]"]
    assert wrapped("a\n\tb", 400, 3) == ["a b"]


def test_long_captions_are_wrapped_and_end_in_an_ellipsis():
    text = "1girl, solo, looking at viewer, masterpiece, best quality, absurdres, long hair, standing, outdoors"
    lines = wrapped(text, 124, 3)
    assert len(lines) == 3
    assert text.startswith(" ".join(lines).removesuffix("…"))
    assert lines[-1].endswith("…")
    assert " ".join(wrapped(text, 124, 99)) == text
    assert not any(drawn(line)[:, 126:].any() for line in lines)


def test_a_word_that_is_wider_than_a_line_is_broken():
    word = wrapped("supercalifragilisticexpialidocious", 60, 9)
    assert "".join(word) == "supercalifragilisticexpialidocious"
    assert not any(drawn(line)[:, 62:].any() for line in word)


def test_closing_punctuation_does_not_begin_a_line():
    for width in range(56, 140, 8):
        lines = wrapped("「海辺の灯台、夕焼け。」水彩画、夜明け。", width, 99)
        assert not any(line[0] in "、。」" for line in lines)


def test_a_grid_has_room_for_the_longest_caption():
    images = [Image.new("RGB", (128, 32), "black")] * 3
    grid = np.asarray(sample_grid(images, ["", "a " * 200, SCRIPTS["Japanese"]]).convert("L"))
    assert grid.shape == (32 + 4 + 6 * LINE_HEIGHT, 3 * 132)
    assert (grid[32:, :132] == 255).all()
    assert (grid[32 + 5 * LINE_HEIGHT :, 132:264] < 128).any()
