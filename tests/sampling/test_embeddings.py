"""Textual inversion. Oracle: ids, weights and text states that ComfyUI's own code gave (golden/embeddings)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax.checkpoints.models import load_text_encoder
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.sampling.embeddings import Embeddings
from anima_jax.text.states import padded_prompt, text_states
from anima_jax.text.tokenizers import SMALL_TOKENIZERS, load_tokenizers
from tests.golden_files import GOLDEN, VALUE_TOLERANCE, golden, relative_error
from tests.small_run import ASSETS

CASES = json.loads((GOLDEN / "embeddings.json").read_text(encoding="utf-8"))
WIDTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that ComfyUI read, with the same names and tensors."""
    folder, files = tmp_path_factory.mktemp("embeddings"), {}
    for name, array in golden("embeddings").items():
        what, *rest = name.split("|")
        if what == "file":
            files.setdefault(rest[0], {})[rest[1]] = array
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / name)
    return folder


def remarks(capsys, folder, prompt):
    Embeddings(folder, WIDTH).spans(prompt)
    return capsys.readouterr().err.splitlines()


@pytest.fixture(scope="module")
def text_encoder():
    return parameters.split(load_text_encoder(ASSETS / "tiny_qwen3.safetensors"))


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizers(SMALL_TOKENIZERS)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case["prompt"] for case in CASES])
def test_tokens_and_text_states_of_a_prompt_equal_comfyuis(number, folder, text_encoder, tokenizers):
    case, (graphdef, params) = CASES[number], text_encoder
    ids = tokenizers.prompt_ids(Embeddings(folder, WIDTH).spans(case["prompt"]))
    assert ids.t5_ids.tolist() == case["t5_ids"]
    np.testing.assert_array_equal(ids.t5_weights, np.array(case["t5_weights"], np.float32))
    words = [word for word in case["qwen_ids"] if word >= 0]
    assert [word for word in ids.qwen_ids.tolist() if word >= 0][: len(words)] == words
    states = text_states(params, *padded_prompt(ids, 16), graphdef=graphdef, dtype=jnp.dtype(jnp.float32))
    expected = golden("embeddings")[f"states|{number}"]
    assert not states[0, len(expected) :].any()
    assert relative_error(states[0, : len(expected)], expected) < VALUE_TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a embedding:missing, b", ["embedding:missing is ignored", "not in "]),
        ("embedding:wide", ["wide.safetensors", "width 80", "64"]),
    ],
)
def test_a_name_or_width_that_does_not_fit_is_one_remark(capsys, folder, prompt, words):
    (line,) = remarks(capsys, folder, prompt)
    assert all(word in line for word in words)


def test_without_a_folder_every_embedding_is_remarked_on(capsys):
    expected = "prompt 'a embedding:one b': embedding:one is ignored: no folder of embeddings is given"
    assert remarks(capsys, None, "a embedding:one b") == [expected]


NOT_FINITE = "x contains NaN or infinite values"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"PK\3\4 and more", "is a pickle"),
        ("a.bin", b"\x80\x02}q\0", "is a pickle"),
        ("a.safetensors", b"", "is empty"),
        ("a.safetensors", b"\2\0\0\0\0\0\0\0{}", "has no tensor"),
        ("a.safetensors", np.array([[1.0] * 63 + [np.nan]], np.float32), NOT_FINITE),
        ("a.safetensors", np.array([[1.0] * 63 + [np.inf]], np.float32), NOT_FINITE),
        ("a.safetensors", np.array(1.0, np.float32), r"x \[\], expected the vectors of an embedding"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        save_file({"x": content}, tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: .*{message}") as caught:
        Embeddings(tmp_path, WIDTH).spans("embedding:a")
    assert len(caught.value.messages) == 1


@pytest.mark.parametrize("folder", ["missing", "gs://bucket/embeddings"])
def test_the_folder_must_exist_here(tmp_path, folder):
    with pytest.raises(UserError, match=f"{folder}: is not a folder"):
        Embeddings(folder if "://" in folder else tmp_path / folder, WIDTH)


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    save_file({"x": np.ones((1, WIDTH), np.float32)}, tmp_path / "sub" / "a.safetensors")
    (span,) = Embeddings(tmp_path, WIDTH).spans("embedding:a")
    assert span.embedding is not None
    assert span.embedding.vectors_nd.tolist() == [[1.0] * WIDTH]
