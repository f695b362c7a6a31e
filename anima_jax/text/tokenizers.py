"""Text to the ids of both tokenizers: Qwen3's, whose ids the text encoder reads, and T5's, whose ids the adapter reads.

They are transformers' fast tokenizers, imported on use; their libraries need no torch.
Axes: b captions, n tokens.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from anima_jax.errors import UserError, first_line
from anima_jax.text.prompts import Span

SMALL_TOKENIZERS = pathlib.Path(__file__).parent.parent / "assets" / "tokenizers"
"""Folder of the quick start's tokenizers (`assets/build_tokenizers.py`)."""

TRAINING_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class _Form:
    """Files that make up a tokenizer, the class of transformers that reads them, and a package that it needs for it."""

    files: tuple[str, ...]
    class_name: str
    needs: str | None = None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one of the two tokenizers is found, in which forms, and what pads it if its files do not say."""

    folder: str
    hub_name: str
    pad_token: str
    forms: tuple[_Form, ...]


# Not AutoTokenizer: importing it imports torch where that is installed.
_COMPLETE = _Form(("tokenizer.json",), "PreTrainedTokenizerFast")
_QWEN_BPE = _Form(("vocab.json", "merges.txt"), "Qwen2TokenizerFast")
_T5_UNIGRAM = _Form(("spiece.model",), "T5TokenizerFast", needs="sentencepiece")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")

_QWEN = _Source("qwen", "Qwen/Qwen3-0.6B-Base", "<|endoftext|>", (_COMPLETE, _QWEN_BPE))
_T5 = _Source("t5", "google/t5-v1_1-xxl", "<pad>", (_COMPLETE, _T5_UNIGRAM))


@dataclasses.dataclass(frozen=True)
class TextIds:
    """A batch of captions, each array int32 (b, n), padded on the right. Masks are 1 on tokens and 0 on padding."""

    qwen_ids: np.ndarray
    qwen_mask: np.ndarray
    t5_ids: np.ndarray
    t5_mask: np.ndarray


class PromptIds(NamedTuple):
    """One prompt: int32 (n,) and (m,), and the weight of each T5 token, float32 (m,). Qwen's tokens have none."""

    qwen_ids: np.ndarray
    t5_ids: np.ndarray
    t5_weights: np.ndarray


class Tokenizers:
    """Both tokenizers. Text is taken as it is: prompt weights are parsed elsewhere."""

    def __init__(self, qwen: Any, t5: Any):
        self._qwen, self._t5 = qwen, t5
        self._one_at_a_time = threading.Lock()  # a fast tokenizer holds its padding and truncation as settings

    @property
    def qwen_vocabulary(self) -> int:
        """Every Qwen id is below this number; the text encoder's embedding needs at least as many rows."""
        return len(self._qwen)

    @property
    def t5_vocabulary(self) -> int:
        """Every T5 id is below this number; the adapter's embedding needs at least as many rows."""
        return len(self._t5)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of all that decides which ids a text has."""
        digest = hashlib.sha256()
        for tokenizer in (self._qwen, self._t5):
            table = json.loads(tokenizer.backend_tokenizer.to_str())
            # Settings of the last call, not of the tokenizer.
            digest.update(json.dumps(table | {"padding": None, "truncation": None}, sort_keys=True).encode())
        return digest.digest()

    def training_ids(self, captions: Sequence[str], length: int = TRAINING_LENGTH) -> TextIds:
        """Ids of the captions, cut and padded to `length` tokens, as diffusion-pipe calls the tokenizers.

        T5's end token closes each caption, also one that was cut; Qwen has none, so an empty caption is all padding.
        """
        with self._one_at_a_time:
            qwen_ids, qwen_mask = _padded(self._qwen, captions, length)
            t5_ids, t5_mask = _padded(self._t5, captions, length)
        return TextIds(qwen_ids, qwen_mask, t5_ids, t5_mask)

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Number of (Qwen, T5) tokens that each caption has in training before any is cut off, int64 (b, 2)."""
        with self._one_at_a_time:
            encoded = [
                tokenizer(list(captions), truncation=False, padding=False, verbose=False)["input_ids"]
                for tokenizer in (self._qwen, self._t5)
            ]
        return np.array([list(map(len, ids)) for ids in encoded], np.int64).reshape(2, -1).T

    def prompt_ids(self, prompt: str | Sequence[Span]) -> PromptIds:
        """Ids of one prompt, uncut and unpadded, as at inference: each span by itself, then T5's end token.

        A string is one span of weight 1, in which nothing is parsed. The empty prompt is Qwen's pad token and T5's end
        token.
        """
        spans = [Span(prompt, 1.0)] if isinstance(prompt, str) else prompt
        (end,) = self._t5("", verbose=False)["input_ids"]
        qwen_ids, t5_ids, t5_weights = [], [], []
        for text, weight in spans:
            qwen_ids += self._qwen(text, verbose=False)["input_ids"]
            words = self._t5(text, verbose=False)["input_ids"][:-1]
            t5_ids += words
            t5_weights += [weight] * len(words)
        return PromptIds(
            np.array(qwen_ids or [self._qwen.pad_token_id], np.int32),
            np.array([*t5_ids, end], np.int32),
            np.array([*t5_weights, 1.0], np.float32),
        )


def load_tokenizers(folder: str | os.PathLike[str] | None) -> Tokenizers:
    """Tokenizers from `folder`, which has `qwen/` and `t5/`, or from the Hugging Face hub (its local cache first).

    Raises UserError that says what to put where if they are not to be had, or if a file is broken.
    """
    return Tokenizers(*(_load(source, folder) for source in (_QWEN, _T5)))


def _load(source: _Source, folder: str | os.PathLike[str] | None) -> Any:
    path = _hub_folder(source) if folder is None else pathlib.Path(folder) / source.folder
    form = _form(source, path)
    if form is None:
        raise UserError(f"{path}: no tokenizer there, expected {_expected(source)} of {source.hub_name}")
    if form.needs and importlib.util.find_spec(form.needs) is None:
        raise UserError(
            f"{path}: reading {form.files[0]} takes `pip install {form.needs}`; tokenizer.json needs nothing"
        )
    try:
        with _without_advice():
            import transformers
        tokenizer = getattr(transformers, form.class_name).from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise whatever a broken file leads them to
        raise UserError(f"{path / form.files[0]}: the tokenizer cannot be read: {first_line(error)}") from None
    return _checked(tokenizer, source, path)


def _checked(tokenizer: Any, source: _Source, path: pathlib.Path) -> Any:
    """Set to pad and cut on the right. An empty one is an error: transformers makes one of files that it misses."""
    if not set(tokenizer("a picture")["input_ids"]) - set(tokenizer.all_special_ids):
        raise UserError(f"{path}: the tokenizer has no vocabulary, expected the files of {source.hub_name}")
    if tokenizer.pad_token_id is None and source.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = source.pad_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: the tokenizer has no pad token, expected {source.pad_token} or tokenizer_config.json")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _form(source: _Source, path: pathlib.Path) -> _Form | None:
    """The first of the source's forms whose files are all in `path`."""
    return next((form for form in source.forms if all((path / file).is_file() for file in form.files)), None)


def _hub_folder(source: _Source) -> pathlib.Path:
    """The tokenizer's files in the local cache of the Hugging Face hub, downloaded if they are not there."""
    import huggingface_hub

    wanted = [*_SETTINGS, *(file for form in source.forms for file in form.files)]
    reason = ""
    for local_files_only in (True, False):
        try:
            path = huggingface_hub.snapshot_download(
                source.hub_name, allow_patterns=wanted, local_files_only=local_files_only
            )
        except Exception as error:  # no cache, no network, a proxy's odd answer: all the same to the user
            reason = first_line(error)
        else:
            if _form(source, pathlib.Path(path)):
                return pathlib.Path(path)
    raise UserError(
        f"tokenizer {source.hub_name}: not in the Hugging Face cache, and not downloaded ({reason}); "
        f"give a tokenizers folder with {source.folder}/ that holds {_expected(source)}"
    )


def _expected(source: _Source) -> str:
    return ", or ".join(" and ".join(form.files) for form in source.forms)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """transformers advises on import to install PyTorch. Nobody here needs it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _padded(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(list(captions), truncation=True, padding="max_length", max_length=length)
    return np.array(encoded["input_ids"], np.int32), np.array(encoded["attention_mask"], np.int32)
