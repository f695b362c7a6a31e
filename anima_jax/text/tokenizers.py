"""Text to the ids of both tokenizers: Qwen3's, whose ids the text encoder reads, and T5's, whose ids the adapter reads.

They are transformers' fast tokenizers, imported on use; their libraries need no torch.
Axes: b captions, n tokens.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from anima_jax.errors import UserError

SMALL_TOKENIZERS = pathlib.Path(__file__).parent.parent / "assets" / "tokenizers"
"""Folder of the quick start's tokenizers (`assets/build_tokenizers.py`)."""

TRAINING_LENGTH = 512


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where one of the two tokenizers is found, and the token that pads it if its files do not say."""

    folder: str
    hub_name: str
    files: tuple[str, ...]
    native_class: str
    pad_token: str


_QWEN = _Source("qwen", "Qwen/Qwen3-0.6B-Base", ("tokenizer.json", "vocab.json"), "Qwen2TokenizerFast", "<|endoftext|>")
_T5 = _Source("t5", "google/t5-v1_1-xxl", ("tokenizer.json", "spiece.model"), "T5TokenizerFast", "<pad>")


@dataclasses.dataclass(frozen=True)
class TextIds:
    """A batch of captions, each array int32 (b, n), padded on the right. Masks are 1 on tokens and 0 on padding."""

    qwen_ids: np.ndarray
    qwen_mask: np.ndarray
    t5_ids: np.ndarray
    t5_mask: np.ndarray


class Tokenizers:
    """Both tokenizers. Text is taken as it is: prompt weights are parsed elsewhere."""

    def __init__(self, qwen: Any, t5: Any):
        self._qwen, self._t5 = qwen, t5

    @property
    def qwen_vocabulary(self) -> int:
        """Every Qwen id is below this number; the text encoder's embedding needs at least as many rows."""
        return len(self._qwen)

    @property
    def t5_vocabulary(self) -> int:
        """Every T5 id is below this number; the adapter's embedding needs at least as many rows."""
        return len(self._t5)

    def training_ids(self, captions: Sequence[str], length: int = TRAINING_LENGTH) -> TextIds:
        """Ids of the captions, cut and padded to `length` tokens, as diffusion-pipe calls the tokenizers.

        T5's end token closes each caption, also one that was cut; Qwen has none, so an empty caption is all padding.
        """
        qwen_ids, qwen_mask = _padded(self._qwen, captions, length)
        t5_ids, t5_mask = _padded(self._t5, captions, length)
        return TextIds(qwen_ids, qwen_mask, t5_ids, t5_mask)

    def prompt_ids(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """(Qwen ids, T5 ids) of one prompt, int32 (n,), uncut and unpadded, as at inference.

        The empty prompt is Qwen's pad token and T5's end token.
        """
        qwen_ids = self._qwen(prompt, verbose=False)["input_ids"] or [self._qwen.pad_token_id]
        t5_ids = self._t5(prompt, verbose=False)["input_ids"]
        return np.array(qwen_ids, np.int32), np.array(t5_ids, np.int32)


def load_tokenizers(folder: str | os.PathLike | None) -> Tokenizers:
    """Tokenizers from `folder`, which has `qwen/` and `t5/`, or from the Hugging Face hub (its local cache first).

    Raises UserError that says what to put where if they are not to be had, or if a file is broken.
    """
    return Tokenizers(*(_load(source, folder) for source in (_QWEN, _T5)))


def _load(source: _Source, folder: str | os.PathLike | None) -> Any:
    tokenizer = _from_hub(source) if folder is None else _from_folder(source, pathlib.Path(folder))
    if tokenizer.pad_token_id is None and source.pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = source.pad_token
    if tokenizer.pad_token_id is None:
        where = source.hub_name if folder is None else pathlib.Path(folder) / source.folder
        raise UserError(
            f"{where}: the tokenizer has no pad token, expected {source.pad_token} or tokenizer_config.json"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _from_folder(source: _Source, folder: pathlib.Path) -> Any:
    path = folder / source.folder
    present = [file for file in source.files if (path / file).is_file()]
    if not present:
        raise UserError(f"{path}: no tokenizer there, expected {_expected(source)} from {source.hub_name}")
    try:
        return _tokenizer_class(source, present[0]).from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise whatever a broken file leads them to
        raise UserError(f"{path / present[0]}: the tokenizer cannot be read: {error or type(error).__name__}") from None


def _from_hub(source: _Source) -> Any:
    """From the local cache if it is there, else downloaded."""
    reason = ""
    for local_files_only in (True, False):
        for file in source.files:
            try:
                tokenizer_class = _tokenizer_class(source, file)
                return tokenizer_class.from_pretrained(source.hub_name, local_files_only=local_files_only)
            except Exception as error:  # not in the cache, no such file, no network, no sentencepiece: try the next
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise UserError(
        f"tokenizer {source.hub_name}: not in the Hugging Face cache, and not downloaded ({reason}); "
        f"give a tokenizers folder with {source.folder}/ that holds {_expected(source)}"
    )


def _expected(source: _Source) -> str:
    return "tokenizer.json, or vocab.json and merges.txt" if source is _QWEN else "tokenizer.json"


def _tokenizer_class(source: _Source, file: str) -> Any:
    """A tokenizer.json says everything itself; other files need the class that knows how to read them.

    Not AutoTokenizer: importing it imports torch where that is installed.
    """
    with _without_advice():
        import transformers

        return getattr(transformers, "PreTrainedTokenizerFast" if file == "tokenizer.json" else source.native_class)


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
