"""Kept and protected tags, and captions of tags and natural language: what is drawn in each epoch, and how often."""

import collections
import dataclasses

import pytest

from anima_jax.data.media import content_digest
from anima_jax.data.variants import CACHED_SHUFFLE, random_words
from tests.data.test_examples import entry, made

TAGS = "trigger, red, blue, green, night"


def with_nl(tags: str, *nl: str):
    return dataclasses.replace(entry(0, tags), nl=nl)


def seen(epochs: int = 400, entries=None, *, each_epoch: bool = True, **keys) -> collections.Counter[str]:
    """The captions of one image over many epochs."""
    (example,) = made(entries or [entry(0, TAGS)], shuffle_each_epoch=each_epoch, **keys)
    return collections.Counter(example.caption(0, epoch) for epoch in range(epochs))


@pytest.mark.parametrize("kept", [0, 1, 2, 5, 9])
def test_leading_tags_stay_in_front_while_the_others_are_shuffled_and_dropped(kept):
    tags = TAGS.split(", ")
    captions = [caption.split(", ") for caption in seen(keep_tokens=kept, shuffle_tags=True, tag_dropout=0.5)]
    assert all(caption[:kept] == tags[:kept] for caption in captions)
    assert {tag for caption in captions for tag in caption[kept:]} == set(tags[kept:])
    assert {len(caption) for caption in captions} == set(range(max(1, min(kept, 5)), 6))


@pytest.mark.parametrize(
    ("caption", "front", "middle", "back"),
    [
        ("a, b ||| c, d", "a, b", {"c", "d"}, ""),
        ("a, b, |||c, d, e", "a, b", {"c", "d", "e"}, ""),
        ("a|||c, d|||best, x", "a", {"c", "d"}, "best, x"),  # sd-scripts: a second separator begins a fixed end
        ("||| c, d", "", {"c", "d"}, ""),
        ("c, d", "", {"c", "d"}, ""),
    ],
)
def test_a_separator_marks_the_tags_that_stay_and_never_reaches_the_text_encoder(caption, front, middle, back):
    orders = seen(entries=[entry(0, caption)], keep_tokens_separator="|||", shuffle_tags=True)
    parts = [list(filter(None, [front, *order, back])) for order in ([*middle], [*middle][::-1])]
    assert {", ".join(part) for part in parts} <= set(orders)
    for text in orders:
        assert "|" not in text
        assert (text[: len(front)], text[len(text) - len(back) :]) == (front, back)
        assert sorted(text.removeprefix(front).removesuffix(back).strip(", ").split(", ")) == sorted(middle)
    (plain,) = made([entry(0, caption)], keep_tokens_separator="|||")
    assert plain.captions == (plain.caption(0, 0),)
    assert "|" not in plain.caption(0, 0)


def test_a_caption_with_the_separator_ignores_keep_tokens():
    texts = seen(entries=[entry(0, "a ||| b, c, d")], keep_tokens_separator="|||", keep_tokens=3, shuffle_tags=True)
    assert len(texts) == 6  # every order of b, c and d


def test_protected_tags_are_never_dropped(tmp_path):
    (tmp_path / "tags.txt").write_text("# a comment\n\nNight\n", "utf-8")
    keys = {"protected_tags": ("trigger",), "protected_tags_file": str(tmp_path / "tags.txt"), "tag_dropout": 0.5}
    found = seen(4000, **keys)
    assert all(caption.startswith("trigger") and caption.endswith("night") for caption in found)
    for tag in ("red", "blue", "green"):  # five standard deviations of 4,000 draws
        assert abs(sum(n for caption, n in found.items() if tag in caption) - 2000) < 160
    assert "trigger, night" in found


def test_kept_tags_stay_in_the_shuffled_copies_of_a_cache():
    examples = made([entry(0, TAGS)], keep_tokens=1, cache_shuffle_num=3)
    assert len({example.captions for example in examples}) == 3
    for copy, example in enumerate(examples):
        front, *rest = example.captions[0].split(", ")
        words = random_words(CACHED_SHUFFLE, *_content(0), 0, copy, count=4)
        expected = [tag for _, tag in sorted(zip(words.tolist(), TAGS.split(", ")[1:], strict=True))]
        assert (front, rest) == ("trigger", expected)
        assert example.caption(0, 5) == example.captions[0]


def _content(number: int) -> list[int]:
    digest = content_digest(str(number).encode())
    return [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8)]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("tags", {"a, b"}),
        ("nl", {"One cat."}),
        ("tags_nl", {"a, b. One cat."}),
        ("nl_tags", {"One cat. a, b"}),
        ("mixed", {"a, b", "One cat.", "a, b. One cat.", "One cat. a, b"}),
    ],
)
def test_each_mode_of_captions(mode, expected):
    assert set(seen(entries=[with_nl("a, b", "One cat.")], caption_mode=mode)) == expected


@pytest.mark.parametrize("mode", ["tags", "nl", "tags_nl", "mixed"])
def test_an_image_with_one_kind_of_caption_is_trained_with_that(mode):
    assert set(seen(entries=[entry(0, "a, b")], caption_mode=mode)) == {"a, b"}
    assert set(seen(entries=[with_nl("", "One cat.")], caption_mode=mode)) == {"One cat."}


def test_mixed_captions_are_drawn_by_weight_and_texts_share_their_ways_weight():
    weights = {"tags": 1.0, "nl": 4.0, "tags_nl": 0.0, "nl_tags": 3.0}
    found = seen(8000, [with_nl("a", "One.", "Two.")], caption_mode="mixed", mixed_weights=weights)
    expected = {"a": 1000, "One.": 2000, "Two.": 2000, "One. a": 1500, "Two. a": 1500}
    assert found.keys() == expected.keys()
    assert all(abs(found[text] - number) < 200 for text, number in expected.items())  # five standard deviations


def test_only_tags_are_shuffled_and_dropped_and_sentences_only_on_request():
    image = with_nl("a, b, c", "A cat, a dog. It runs! Then it sleeps")
    keys = {"caption_mode": "tags_nl", "shuffle_tags": True, "tag_dropout": 0.5}
    assert all(text.endswith("A cat, a dog. It runs! Then it sleeps") for text in seen(200, [image], **keys))
    shuffled = {text.partition("A cat")[1] + text.partition("A cat")[2] for text in seen(400, [image], **keys)}
    assert shuffled == {"A cat, a dog. It runs! Then it sleeps"}
    orders = seen(400, [with_nl("", "A cat. It runs! Then it sleeps")], nl_shuffle_sentences=True)
    assert len(orders) == 6
    assert "It runs! Then it sleeps. A cat." in orders
    first = seen(400, [with_nl("", "A. B. C.")], nl_shuffle_sentences=True, nl_keep_first_sentence=True)
    assert set(first) == {"A. B. C.", "A. C. B."}


def test_mixed_captions_never_change():
    image = with_nl("a, b, c, d", "One cat. It runs.")
    (example,) = made([image], caption_mode="mixed", shuffle_tags=True, shuffle_each_epoch=True, keep_tokens=1)
    assert [example.caption(7, epoch) for epoch in range(6)] == [
        "a, d, c, b",
        "a, d, b, c",
        "a, b, d, c. One cat. It runs.",
        "a, b, c, d. One cat. It runs.",
        "a, d, b, c. One cat. It runs.",
        "a, d, b, c",
    ]
