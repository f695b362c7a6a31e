"""Prompt weights. Oracles: what ComfyUI's parser gave (golden/tokens.json), and properties of the syntax."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_jax.text.prompts import Span, TextualInversion, spans
from tests.golden_files import GOLDEN

CASES = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=[case["prompt"] for case in CASES])
def test_spans_equal_comfyuis(case):
    # The file holds escaped parentheses as ComfyUI does while it parses.
    parsed = [(text.replace("\0\1", ")").replace("\0\2", "("), weight) for text, weight in case["parsed"]]
    assert [(span.text, span.weight) for span in spans(case["prompt"])] == parsed


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
    assert [span.text for span in found] == [text for text, _ in expected]
    assert [span.weight for span in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize(
    ("prompt", "texts", "names"),
    [
        # What ComfyUI tokenises where it finds no embedding of that name (golden/embeddings.json has known names).
        ("embedding:bad", [], ["bad"]),
        ("a, embedding:bad, b  c", ["a, ", ", b c"], ["bad"]),
        ("(a embedding:bad:1.2)\nembedding:worse d", ["a ", "\n", "d"], ["bad", "worse"]),
        ("a,embedding:bad", ["a,embedding:bad"], []),
        ("a embedding:bad,", ["a ", ", "], ["bad"]),
        ("embedding:bad<lora:x> y", ["<lora:x> y"], ["bad"]),
        ("embedding:", ["embedding:"], []),
    ],
)
def test_unknown_embeddings_are_left_out_and_reported(prompt, texts, names):
    unknown = []
    assert [span.text for span in spans(prompt, unknown=unknown.append)] == texts
    assert unknown == names


def test_an_embedding_is_a_span_of_its_own_with_the_weight_around_it():
    known = {
        "good": TextualInversion(np.zeros((2, 4), np.float32), 2),
        "odd,": TextualInversion(np.ones((1, 4), np.float32), 1),
    }
    found = spans("a (embedding:good, b:1.3) embedding:odd, c", known.get)
    assert [(span.text, span.weight) for span in found] == [
        ("a ", 1.0), ("", 1.3), (", b", 1.3), (" ", 1.0), ("", 1.0), ("c", 1.0)
    ]  # fmt: skip
    assert [span.embedding for span in found if span.embedding] == list(known.values())


@given(st.text(st.characters(exclude_characters="()\\\0")).filter(lambda text: "embedding:" not in text))
def test_text_without_parentheses_is_one_unchanged_span(text):
    assert spans(text) == ([Span(text, 1.0)] if text else [])


@given(st.text(st.sampled_from("()\\:.1a ,"), max_size=40))
def test_no_text_except_parentheses_and_weights_is_lost(prompt):
    kept = [character for character in prompt if character in "a,"]
    assert [character for span in spans(prompt) for character in span.text if character in "a,"] == kept


def test_nesting_can_be_deep():
    (span,) = spans("(" * 2000 + "a" + ")" * 2000)
    assert span.text == "a"
    assert span.weight == pytest.approx(1.1**2000, rel=1e-9)
