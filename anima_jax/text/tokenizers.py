"""Text to token ids: Qwen3's for the text encoder, T5's for the LLM adapter.

Both are fast tokenizers of transformers, which is imported at first use; they do not need torch.
Axes: b captions, n tokens.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from anima_jax.errors import UserError, first_line
from anima_jax.text.prompts import Span

SMALL_TOKENIZERS = pathlib.Path(__file__).parent.parent / "assets" / "tokenizers"
"""Folder of the quick start's tokenizers (`make_assets/tokenizers.py`)."""

TRAINING_LENGTH = 512
"""Tokens per caption in training."""


@dataclasses.dataclass(frozen=True)
class _Format:
    """The files of a tokenizer, the transformers class that reads them, and a package that the class needs."""

    files: tuple[str, ...]
    class_name: str
    needs: str | None = None


@dataclasses.dataclass(frozen=True)
class _Repository:
    """The location and file formats of one of the two tokenizers, and its pad token if its files name none."""

    folder: str
    hub_name: str
    pad_token: str
    formats: tuple[_Format, ...]


# Not AutoTokenizer: importing it also imports torch if that is installed.
_COMPLETE = _Format(("tokenizer.json",), "PreTrainedTokenizerFast")
_QWEN_BPE = _Format(("vocab.json", "merges.txt"), "Qwen2TokenizerFast")
_T5_UNIGRAM = _Format(("spiece.model",), "T5TokenizerFast", needs="sentencepiece")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")

_QWEN = _Repository("qwen", "Qwen/Qwen3-0.6B-Base", "<|endoftext|>", (_COMPLETE, _QWEN_BPE))
_T5 = _Repository("t5", "google/t5-v1_1-xxl", "<pad>", (_COMPLETE, _T5_UNIGRAM))


@dataclasses.dataclass(frozen=True)
class TextIds:
    """A batch of captions, each array int32 (b, n), padded on the right. Masks are 1 on tokens and 0 on padding."""

    qwen_ids: np.ndarray
    qwen_mask: np.ndarray
    t5_ids: np.ndarray
    t5_mask: np.ndarray


class PromptIds(NamedTuple):
    """One prompt: ids, int32 (n,) and (m,), and the weight of each T5 token, float32 (m,). Qwen ids have no weights."""

    qwen_ids: np.ndarray
    t5_ids: np.ndarray
    t5_weights: np.ndarray


class Tokenizers:
    """Both tokenizers. They do not parse prompt weights."""

    def __init__(self, qwen: Any, t5: Any):
        self._qwen, self._t5 = qwen, t5
        self._one_at_a_time = threading.Lock()  # a fast tokenizer stores padding and truncation as state

    @property
    def qwen_vocabulary(self) -> int:
        """All Qwen ids are below this number; the text encoder's embedding needs at least as many rows."""
        return len(self._qwen)

    @property
    def t5_vocabulary(self) -> int:
        """All T5 ids are below this number; the LLM adapter's embedding needs at least as many rows."""
        return len(self._t5)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of everything that determines the ids of a text."""
        digest = hashlib.sha256()
        for tokenizer in (self._qwen, self._t5):
            table = json.loads(tokenizer.backend_tokenizer.to_str())
            # The last call sets these two; they are not part of the tokenizer itself.
            digest.update(json.dumps(table | {"padding": None, "truncation": None}, sort_keys=True).encode())
        return digest.digest()

    def training_ids(self, captions: Sequence[str], length: int = TRAINING_LENGTH) -> TextIds:
        """Return the ids of the captions, truncated and padded to `length` tokens, as in diffusion-pipe.

        Each caption ends with T5's end token, even if truncated. Qwen has no end token, so an empty caption is all
        padding.
        """
        with self._one_at_a_time:
            qwen_ids, qwen_mask = _padded(self._qwen, captions, length)
            t5_ids, t5_mask = _padded(self._t5, captions, length)
        return TextIds(qwen_ids, qwen_mask, t5_ids, t5_mask)

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Return the number of (Qwen, T5) tokens of each caption in training before truncation, int64 (b, 2)."""
        with self._one_at_a_time:
            encoded = [
                tokenizer(list(captions), truncation=False, padding=False, verbose=False)["input_ids"]
                for tokenizer in (self._qwen, self._t5)
            ]
        return np.array([list(map(len, ids)) for ids in encoded], np.int64).reshape(2, -1).T

    def prompt_ids(self, prompt: str | Sequence[Span]) -> PromptIds:
        """Return the ids of one prompt for inference: each span tokenized by itself, then T5's end token, no padding.

        A string is one span of weight 1. The empty prompt is Qwen's pad token and T5's end token.
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
    """Load `qwen/` and `t5/` from `folder`; if it is None, from the Hugging Face hub (its local cache first).

    Raises UserError if a file is broken, or if files are missing; then the message says which files to put where.
    """
    return Tokenizers(*(_load(repository, folder) for repository in (_QWEN, _T5)))


def _load(repository: _Repository, folder: str | os.PathLike[str] | None) -> Any:
    path = _hub_folder(repository) if folder is None else pathlib.Path(folder) / repository.folder
    files = _format(repository, path)
    if files is None:
        raise UserError(f"{path}: no tokenizer found, expected {_expected(repository)} of {repository.hub_name}")
    if files.needs and importlib.util.find_spec(files.needs) is None:
        raise UserError(f"{path}: {files.files[0]} needs `pip install {files.needs}`; tokenizer.json needs no package")
    try:
        # Otherwise transformers prints advice to install PyTorch when it is imported.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers

        tokenizer = getattr(transformers, files.class_name).from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise errors of many types for broken files
        raise UserError(f"{path / files.files[0]}: the tokenizer cannot be read: {first_line(error)}") from None
    return _checked(tokenizer, repository, path)


def _checked(tokenizer: Any, repository: _Repository, path: pathlib.Path) -> Any:
    """Pad and truncate on the right, and set the pad token. Raises UserError if there are no words or no pad token."""
    if not set(tokenizer("a picture")["input_ids"]) - set(tokenizer.all_special_ids):
        raise UserError(f"{path}: the tokenizer has no vocabulary, expected the files of {repository.hub_name}")
    if tokenizer.pad_token_id is None and repository.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = repository.pad_token
    if tokenizer.pad_token_id is None:
        expected = f"{repository.pad_token} or tokenizer_config.json"
        raise UserError(f"{path}: the tokenizer has no pad token, expected {expected}")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _format(repository: _Repository, path: pathlib.Path) -> _Format | None:
    """Return the first format whose files are all in `path`, or None."""
    return next((one for one in repository.formats if all((path / file).is_file() for file in one.files)), None)


def _hub_folder(repository: _Repository) -> pathlib.Path:
    """Return the tokenizer's folder in the local Hugging Face cache, after a download if necessary."""
    import huggingface_hub

    wanted = [*_SETTINGS, *(file for one in repository.formats for file in one.files)]
    reason = ""
    for local_files_only in (True, False):
        try:
            path = huggingface_hub.snapshot_download(
                repository.hub_name, allow_patterns=wanted, local_files_only=local_files_only
            )
        except Exception as error:  # no cache, no network, an error page of a proxy, …
            reason = first_line(error)
        else:
            if _format(repository, pathlib.Path(path)):
                return pathlib.Path(path)
    raise UserError(
        f"tokenizer {repository.hub_name}: not in the Hugging Face cache, and the download failed ({reason}); "
        f"give a tokenizers folder with {repository.folder}/ that contains {_expected(repository)}"
    )


def _expected(repository: _Repository) -> str:
    return ", or ".join(" and ".join(one.files) for one in repository.formats)


def _padded(tokenizer: Any, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    encoded = tokenizer(list(captions), truncation=True, padding="max_length", max_length=length)
    return np.array(encoded["input_ids"], np.int32), np.array(encoded["attention_mask"], np.int32)
