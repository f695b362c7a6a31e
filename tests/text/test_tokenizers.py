"""Text to ids. Oracles: ids that the references' tokenizers gave (golden), transformers' own AutoTokenizer, and what
the two kinds of tokenizer promise (byte-level BPE loses nothing, T5 closes with its end token)."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.data.shapes import BACKGROUNDS, COLOURS, SHAPES, scenes
from anima_jax.errors import UserError
from anima_jax.text.prompts import Span, spans
from anima_jax.text.tokenizers import SMALL_TOKENIZERS, TextIds, Tokenizers, load_tokenizers, save_packaged
from make_assets import tokenizers as make_tokenizers
from tests.golden_files import GOLDEN


@pytest.fixture(scope="module")
def small() -> Tokenizers:
    return load_tokenizers(SMALL_TOKENIZERS)


@pytest.fixture(scope="module")
def real() -> Tokenizers:
    return load_tokenizers()


def check_rows(ids: np.ndarray, mask: np.ndarray, expected: list[list[int]], pad: int) -> None:
    assert ids.dtype == mask.dtype == np.int32
    for row, row_mask, tokens in zip(ids.tolist(), mask.tolist(), expected, strict=True):
        padding = len(row) - len(tokens)
        assert row == tokens + [pad] * padding
        assert row_mask == [1] * len(tokens) + [0] * padding


def test_the_packaged_tokenizers_give_the_references_training_ids(real):
    cases = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    text = real.training_ids([case["prompt"] for case in cases])
    assert text.qwen_ids.shape == text.t5_ids.shape == (len(cases), 512)
    check_rows(text.qwen_ids, text.qwen_mask, [case["train"]["qwen_ids"] for case in cases], 151643)
    check_rows(text.t5_ids, text.t5_mask, [case["train"]["t5_ids"] for case in cases], 0)


def test_the_packaged_tokenizers_give_the_references_prompt_ids(real):
    for case in json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8")):
        qwen_ids, t5_ids, t5_weights, *_ = real.prompt_ids(spans(case["prompt"]))
        assert qwen_ids.tolist() == case["qwen_ids"]
        assert t5_ids.tolist() == case["t5_ids"]
        np.testing.assert_allclose(t5_weights, case["t5_weights"], rtol=1e-7)


def test_odd_prompts_have_comfyuis_ids_and_weights(real):
    for case in json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8")):
        ids = real.prompt_ids(spans(case["prompt"]))
        assert ids.qwen_ids.tolist() == case["qwen_ids"], case["prompt"]
        assert ids.t5_ids.tolist() == case["t5_ids"], case["prompt"]
        np.testing.assert_allclose(ids.t5_weights, case["t5_weights"], rtol=1e-7)


def test_text_that_is_not_unicode_is_an_error(real):
    with pytest.raises(UserError, match=r"text 'a \\udcff': is not valid Unicode"):
        real.prompt_ids("a \udcff")


def test_spans_are_tokenized_separately_and_only_t5s_tokens_have_weights(small):
    pieces = [Span("a red", 1.3), Span(" circle", 0.5)]
    together, alone = small.prompt_ids(pieces), [small.prompt_ids(piece.text) for piece in pieces]
    np.testing.assert_array_equal(together.qwen_ids, np.concatenate([ids.qwen_ids for ids in alone]))
    first, second = (ids.t5_ids[:-1] for ids in alone)
    np.testing.assert_array_equal(together.t5_ids, [*first, *second, 1])
    weights = [1.3] * len(first) + [0.5] * len(second) + [1.0]
    np.testing.assert_array_equal(together.t5_weights, np.array(weights, np.float32))


def test_an_empty_caption_is_all_padding_for_qwen_and_one_end_token_for_t5(small):
    text = small.training_ids(["", "a red circle on a blue background"], 16)
    assert text.qwen_mask[0].sum() == 0
    assert set(text.qwen_ids[0].tolist()) == {small.qwen_vocabulary - 1}
    assert text.t5_ids[0].tolist() == [1] + [0] * 15
    assert text.t5_mask[0].tolist() == [1] + [0] * 15
    assert text.qwen_mask[1].sum() > 0


def test_an_empty_prompt_is_qwens_pad_token_and_t5s_end_token(small):
    qwen_ids, t5_ids, *_ = small.prompt_ids("")
    assert (qwen_ids.tolist(), t5_ids.tolist()) == ([small.qwen_vocabulary - 1], [1])
    assert qwen_ids.dtype == t5_ids.dtype == np.int32


def test_a_long_caption_is_truncated_but_keeps_t5s_end_token(small):
    caption = "an orange triangle on a pink background " * 100
    text, (qwen_ids, t5_ids, *_) = small.training_ids([caption]), small.prompt_ids(caption)
    assert text.qwen_ids.shape == text.t5_ids.shape == (1, 512)
    np.testing.assert_array_equal(text.qwen_ids[0], qwen_ids[:512])
    np.testing.assert_array_equal(text.t5_ids[0], [*t5_ids[:511], 1])
    assert len(t5_ids) == 701


@settings(deadline=None)  # busy machines are slow, not wrong
@given(st.text(max_size=60))
def test_any_text_has_ids_within_the_vocabularies_and_training_pads_the_prompts_ids(text):
    small = load_tokenizers_once()
    batch, (qwen_ids, t5_ids, *_) = small.training_ids([text], 300), small.prompt_ids(text)
    assert 0 <= qwen_ids.min() <= qwen_ids.max() < small.qwen_vocabulary
    assert 0 <= t5_ids.min() <= t5_ids.max() < small.t5_vocabulary
    assert t5_ids[-1] == 1
    check_rows(batch.t5_ids, batch.t5_mask, [t5_ids.tolist()], 0)
    if batch.qwen_mask.any():
        check_rows(batch.qwen_ids, batch.qwen_mask, [qwen_ids.tolist()], small.qwen_vocabulary - 1)


_LOADED: list[Tokenizers] = []


def load_tokenizers_once() -> Tokenizers:
    """Hypothesis warns of fixtures that are shared between its runs of a test."""
    if not _LOADED:
        _LOADED.append(load_tokenizers(SMALL_TOKENIZERS))
    return _LOADED[0]


def test_the_small_bpe_tokenizer_is_lossless(small):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(SMALL_TOKENIZERS / "qwen")
    text = "an orange triangle, (1girl:1.2)\n\t ümläut 日本 🌸"
    assert peer.decode(small.prompt_ids(text)[0]) == text


def test_every_word_of_the_shapes_is_a_single_token(small):
    seen = {}
    for word in (*SHAPES, *COLOURS, *BACKGROUNDS, "background"):
        qwen_ids, t5_ids, *_ = small.prompt_ids(f" {word}")
        assert (len(qwen_ids), len(t5_ids)) == (1, 2), word
        seen[word] = (int(qwen_ids[0]), int(t5_ids[0]))
    assert len(set(seen.values())) == len(seen)


def test_different_scenes_have_different_ids(small):
    captions = [scene.caption for held_out in (False, True) for scene in scenes(held_out=held_out)]
    text = small.training_ids(captions, 12)
    assert len(np.unique(text.qwen_ids, axis=0)) == len(np.unique(text.t5_ids, axis=0)) == len(captions) == 96
    assert text.qwen_mask.sum(axis=1).max() == 7  # seven words, seven tokens
    assert text.t5_mask.sum(axis=1).max() == 8


@pytest.mark.parametrize("name", ["qwen", "t5"])
def test_transformers_reads_the_small_tokenizers_as_we_do(small, name):
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoTokenizer.from_pretrained(SMALL_TOKENIZERS / name)
    captions = ["a white cross on a gray background", "a cat, (masterpiece:1.3)! ½ 猫", "  two  spaces ", ""]
    batch = peer(captions, truncation=True, padding="max_length", max_length=40)
    text = small.training_ids(captions, 40)
    ids, mask = (text.qwen_ids, text.qwen_mask) if name == "qwen" else (text.t5_ids, text.t5_mask)
    np.testing.assert_array_equal(ids, batch["input_ids"])
    np.testing.assert_array_equal(mask, batch["attention_mask"])


def test_the_shipped_tokenizers_are_what_their_script_builds(tmp_path):
    make_tokenizers.write(tmp_path)
    built = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert built == sorted(path.relative_to(SMALL_TOKENIZERS) for path in SMALL_TOKENIZERS.rglob("*.json"))
    for path in built:
        made, shipped = ((folder / path).read_text(encoding="utf-8") for folder in (tmp_path, SMALL_TOKENIZERS))
        assert json.loads(made) == json.loads(shipped), path
    assert sum(path.stat().st_size for path in SMALL_TOKENIZERS.rglob("*.json")) < 200_000


def copied(tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(SMALL_TOKENIZERS, tmp_path / "tokenizers"))


def test_qwen_as_vocabulary_and_merges_equals_its_tokenizer_json(tmp_path, small):
    folder = copied(tmp_path)
    model = json.loads((folder / "qwen" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "qwen" / "tokenizer.json").unlink()
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "qwen" / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "qwen" / "merges.txt").write_text("\n".join(map(" ".join, model["merges"])), encoding="utf-8")
    for prompt in ["", "an orange triangle on a pink background", "it's 12 o'clock,\n\n  日本"]:
        np.testing.assert_array_equal(load_tokenizers(folder).prompt_ids(prompt)[0], small.prompt_ids(prompt)[0])


def test_a_bare_tokenizer_json_is_enough(tmp_path, small):
    folder = copied(tmp_path)
    for config in folder.rglob("tokenizer_config.json"):
        config.unlink()
    captions = ["a red circle on a blue background", ""]
    bare, whole = load_tokenizers(folder).training_ids(captions, 20), small.training_ids(captions, 20)
    for name in ("qwen_ids", "qwen_mask", "t5_ids", "t5_mask"):
        np.testing.assert_array_equal(getattr(bare, name), getattr(whole, name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            shutil.rmtree,
            r"qwen: no tokenizer found, expected tokenizer\.json, or vocab\.json and",
        ),
        (lambda folder: shutil.rmtree(folder / "t5"), r"t5: no tokenizer found, expected tokenizer\.json"),
        (lambda folder: (folder / "qwen/tokenizer.json").write_text("{"), r"qwen/tokenizer\.json: .*cannot be read"),
        (lambda folder: (folder / "t5/tokenizer.json").write_bytes(b"\xff\0"), r"t5/tokenizer\.json: .*cannot be read"),
        (
            lambda folder: (folder / "qwen/tokenizer.json").rename(folder / "qwen/vocab.json"),
            r"qwen: no tokenizer found",  # without merges.txt transformers would make an empty tokenizer
        ),
    ],
)
def test_missing_or_broken_files_are_named(tmp_path, damage, message):
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizers(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFhYWE="}),
        ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ],
)
def test_a_tokenizer_on_which_the_library_panics_is_one_line(tmp_path, capfd, part, value):
    path = copied(tmp_path) / "t5" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(UserError, match=r"t5/tokenizer\.json: the tokenizer cannot be read: ") as caught:
        load_tokenizers(path.parents[1])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the library prints a backtrace


def test_a_tokenizer_without_vocabulary_is_an_error(tmp_path):
    folder = copied(tmp_path)
    (folder / "qwen" / "tokenizer.json").unlink()
    (folder / "qwen" / "vocab.json").write_text("{}")
    (folder / "qwen" / "merges.txt").write_text("")
    with pytest.raises(UserError, match="qwen"):
        load_tokenizers(folder)


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    # Of the environment, nothing that could point to a hub cache.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=kept | environment
    )


def test_the_packaged_tokenizers_load_without_network_cache_or_transformers(tmp_path):
    code = (
        "import sys\n"
        "from anima_jax.text.tokenizers import load_tokenizers\n"
        "print(load_tokenizers(None).prompt_ids('a red circle')[1].tolist())\n"
        "print([name for name in ('transformers', 'huggingface_hub', 'requests', 'httpx') if name in sys.modules])"
    )
    out = run(code, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == ["[3, 9, 1131, 8196, 1]", "[]"]


def test_transformers_reads_the_packaged_tokenizers_that_are_written_for_it(tmp_path, real):
    transformers = pytest.importorskip("transformers")
    save_packaged({"qwen": tmp_path / "tokenizer", "t5": tmp_path / "t5_tokenizer"})
    for name, at in (("tokenizer", 0), ("t5_tokenizer", 1)):
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in ("a red circle, 猫 (1.2)  <|im_end|> <tool_call>\n", "x </s> ﬁ\x85[ <extra_id_3>,"):
            assert real.prompt_ids(text)[at].tolist() == peer(text)["input_ids"]


def test_many_threads_share_the_tokenizers(real):
    """Padding, truncation and plain encoding at once: transformers raises "Already borrowed" there."""
    texts = [f"a red circle {number}, (blue:1.2) 猫 " * (1 + number % 40) for number in range(64)]
    jobs = [lambda text=text: real.training_ids([text, "x"], 16 + len(text) % 50) for text in texts]
    jobs += [lambda text=text: real.prompt_ids(text) for text in texts]
    jobs += [lambda text=text: real.lengths([text]) for text in texts]
    alone = [job() for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda job: job(), jobs))
    for one, other in zip(alone, together, strict=True):
        first, second = (vars(ids) if isinstance(ids, TextIds) else ids for ids in (one, other))
        np.testing.assert_equal(first, second)


def test_loading_imports_no_torch_and_prints_no_advice():
    # A finder that hides torch stands for a machine without it, where transformers prints its advice.
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'torch': raise ModuleNotFoundError(name)\n"
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'torch' else found(name, package)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from anima_jax.text.tokenizers import SMALL_TOKENIZERS, load_tokenizers\n"
        "print(load_tokenizers(SMALL_TOKENIZERS).prompt_ids('a red circle')[1].tolist())\n"
        "print([name for name in ('torch', 'jax', 'tensorflow') if name in sys.modules])"
    )
    out = run(code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines()[1] == "[]"
    assert out.stderr == ""
