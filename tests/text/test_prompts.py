"""Prompt weights. Oracles: what ComfyUI's parser gave (golden/tokens.json), and properties of the syntax."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_jax.text.prompts import embeddings, spans
from tests.golden_files import GOLDEN

CASES = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"] for case in CASES])
def test_spans_equal_comfyuis(case):
    # The file holds escaped parentheses as ComfyUI does while it parses.
    parsed = [(text.replace("\0\1", ")").replace("\0\2", "("), weight) for text, weight in case["parsed"]]
    assert spans(case["prompt"]) == parsed


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a)", [("a", 1.1)]),
        ("(((a)))", [("a", 1.1**3)]),
        ("((a:1.3))", [("a", 1.3)]),
        ("((a):1.5)", [("a", 1.1 * 1.5)]),
        ("(a:b:2)", [("a:b", 2.0)]),
        ("(a: -.5 )", [("a", -0.5)]),
        ("(a:)", [("a:", 1.1)]),
        ("(:2)", [(":2", 1.1)]),
        ("()", []),
        ("a) (b)", [("a) (b)", 1.0)]),
        ("a)((b)", [("a)(", 1.0), ("b", 1.1)]),
        ("(a (b)", [("a ", 1.1), ("(b", 1.1)]),
        ("(a (b", [("(a (b", 1.0)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        (r"\\(a)", [("\\(a)", 1.0)]),
    ],
)
def test_weights_multiply_when_nested_numbers_set_them_and_unclosed_parentheses_are_text(prompt, expected):
    found = spans(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        # What ComfyUI tokenises where it finds no embedding of that name.
        ("embedding:bad", []),
        ("a, embedding:bad, b  c", ["a,", ", b c"]),
        ("(a embedding:bad:1.2)\nembedding:worse d", ["a", "d"]),
        ("a,embedding:bad", ["a,embedding:bad"]),
        ("a embedding:bad,", ["a", ", "]),
        ("embedding:", ["embedding:"]),
    ],
)
def test_embeddings_are_left_out_as_comfyui_does_with_unknown_ones(prompt, texts):
    assert [span.text for span in spans(prompt)] == texts
    assert embeddings(prompt) == re.findall(r"(?<!,)embedding:(bad|worse)", prompt)


@given(st.text(st.characters(exclude_characters="()\\\0")).filter(lambda text: "embedding:" not in text))
def test_text_without_parentheses_is_one_unchanged_span(text):
    assert spans(text) == ([(text, 1.0)] if text else [])


@given(st.text(st.sampled_from("()\\:.1a ,"), max_size=40))
def test_no_text_except_parentheses_and_weights_is_lost(prompt):
    kept = [character for character in prompt if character in "a,"]
    assert [character for text, _ in spans(prompt) for character in text if character in "a,"] == kept


def test_nesting_can_be_deep():
    (span,) = spans("(" * 2000 + "a" + ")" * 2000)
    assert span.text == "a"
    assert span.weight == pytest.approx(1.1**2000, rel=1e-9)
