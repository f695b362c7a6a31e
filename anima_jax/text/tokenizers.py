"""Text to token ids: Qwen3's for the text encoder, T5's for the LLM adapter.

Both are tokenizers of Hugging Face's `tokenizers`. They are never changed after they are loaded, so any number of
threads may share them. Axes: b captions, n tokens.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from anima_jax.assets import ASSETS
from anima_jax.errors import UserError, first_line, os_reason
from anima_jax.text.prompts import Span

PACKAGED_TOKENIZERS = ASSETS / "anima_tokenizers"
"""Folder of the real tokenizers, which come with the package."""

SMALL_TOKENIZERS = ASSETS / "tokenizers"
"""Folder of the quick start's tokenizers (`make_assets/tokenizers.py`)."""

TOKENIZER_FOLDERS = {"qwen": "tokenizer", "t5": "t5_tokenizer"}
"""Folder of a tokenizer in our layout → its folder in the diffusers format."""

TRAINING_LENGTH = 512
"""Tokens per caption in training."""

VECTOR = -1
"""Stands among Qwen ids for a vector of an embedding."""

_EMBEDDING_T5_ID = 0
"""T5 id of an embedding's tokens (`AnimaTEModel` in ComfyUI comfy/text_encoders/anima.py)."""


@dataclasses.dataclass(frozen=True)
class TextIds:
    """A batch of captions, each array int32 (b, n), padded on the right. Masks are 1 on tokens and 0 on padding."""

    qwen_ids: np.ndarray
    qwen_mask: np.ndarray
    t5_ids: np.ndarray
    t5_mask: np.ndarray


class PromptIds(NamedTuple):
    """One prompt: ids, int32 (n,) and (m,), and the weight of each T5 token, float32 (m,). Qwen ids have no weights.

    `vectors` float32 (v, d) are for the ids `VECTOR`, in order. `attended` is int32 (n,): 0 for tokens that other
    tokens of Qwen3 do not attend to. Both are None if there are no such tokens.
    """

    qwen_ids: np.ndarray
    t5_ids: np.ndarray
    t5_weights: np.ndarray
    vectors: np.ndarray | None = None
    attended: np.ndarray | None = None


class Tokenizers:
    """Both tokenizers. They do not parse prompt weights."""

    def __init__(self, qwen: Tokenizer, t5: Tokenizer, qwen_pad: int, t5_pad: int):
        self._qwen, self._t5, self._qwen_pad, self._t5_pad = qwen, t5, qwen_pad, t5_pad

    @property
    def qwen_vocabulary(self) -> int:
        """All Qwen ids are below this number; the text encoder's embedding needs at least as many rows."""
        return self._qwen.get_vocab_size()

    @property
    def t5_vocabulary(self) -> int:
        """All T5 ids are below this number; the LLM adapter's embedding needs at least as many rows."""
        return self._t5.get_vocab_size()

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of everything that determines the ids of a text."""
        digest = hashlib.sha256()
        for tokenizer in (self._qwen, self._t5):
            digest.update(json.dumps(json.loads(tokenizer.to_str()), sort_keys=True).encode())
        return digest.digest()

    def training_ids(self, captions: Sequence[str], length: int = TRAINING_LENGTH) -> TextIds:
        """Return the ids of the captions, truncated and padded to `length` tokens, as in diffusion-pipe.

        Each caption ends with T5's end token, even if truncated. Qwen has no end token, so an empty caption is all
        padding.
        """
        return TextIds(
            *_padded(self._qwen, self._qwen_pad, captions, length), *_padded(self._t5, self._t5_pad, captions, length)
        )

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """Return the number of (Qwen, T5) tokens of each caption in training before truncation, int64 (b, 2)."""
        lengths = [list(map(len, _encode(tokenizer, captions))) for tokenizer in (self._qwen, self._t5)]
        return np.array(lengths, np.int64).reshape(2, -1).T

    def prompt_ids(self, prompt: str | Sequence[Span]) -> PromptIds:
        """Return the ids of one prompt for inference: each span tokenized by itself, then T5's end token, no padding.

        A string is one span of weight 1. The empty prompt is Qwen's pad token and T5's end token.
        """
        spans = [Span(prompt, 1.0)] if isinstance(prompt, str) else prompt
        (end,) = _encode(self._t5, [""])
        qwen_ids: list[int] = []
        t5_ids: list[int] = []
        t5_weights: list[float] = []
        for text, weight, embedding in spans:
            if embedding is None:
                (words,) = _encode(self._qwen, [text])
                (t5_words,) = _encode(self._t5, [text])
                t5_words = t5_words[: len(t5_words) - len(end)]
            else:
                words = [VECTOR] * len(embedding.vectors_nd)
                t5_words = [_EMBEDDING_T5_ID] * embedding.t5_tokens
            qwen_ids += words
            t5_ids += t5_words
            t5_weights += [weight] * len(t5_words)
        embeddings = [span.embedding for span in spans if span.embedding]
        padding = sum(embedding.padding for embedding in embeddings)
        ids_n = np.array(qwen_ids + [self._qwen_pad] * padding or [self._qwen_pad], np.int32)
        vectors = [embedding.vectors_nd for embedding in embeddings if len(embedding.vectors_nd)]
        return PromptIds(
            ids_n,
            np.array([*t5_ids, *end], np.int32),
            np.array([*t5_weights, *[1.0] * len(end)], np.float32),
            np.concatenate(vectors) if vectors else None,
            _attended(ids_n, len(ids_n) - padding, self._qwen_pad),
        )


def _attended(ids_n: np.ndarray, length: int, pad: int) -> np.ndarray | None:
    """Return the mask of the tokens that other tokens attend to, or None if it is 1 everywhere.

    As ComfyUI takes Qwen's pad token for padding, also where a prompt contains it: it masks pad tokens at the
    beginning, and then all tokens from the first pad token on, embeddings excepted (`SDClipModel.process_tokens` in
    comfy/sd1_clip.py). Everything from `length` on is padding.
    """
    tokens = np.flatnonzero(ids_n[:length] != VECTOR)
    is_pad = ids_n[tokens] == pad
    if (ids_n == pad).all():
        return None  # pad tokens alone attend to each other
    first = int(np.argmin(is_pad)) if len(ids_n) and ids_n[0] == pad else 0
    last = first + int(np.argmax(is_pad[first:])) if is_pad[first:].any() else len(tokens)
    mask_n = np.ones(len(ids_n), np.int32)
    mask_n[tokens[:first]] = mask_n[tokens[last:]] = mask_n[length:] = 0
    return None if mask_n.all() else mask_n


# ---- files ---------------------------------------------------------------------------------------------------------


_LONGEST_PATTERN = 4096

_LONG_PATTERN = re.compile(rb'"(?:Regex|String)"\s*:\s*"(?:[^"\\]|\\.){%d}' % _LONGEST_PATTERN, re.DOTALL)


def _read_complete(path: pathlib.Path) -> Tokenizer:
    if _LONG_PATTERN.search((path / "tokenizer.json").read_bytes()):
        raise ValueError(f"a pattern of over {_LONGEST_PATTERN} characters")  # takes minutes to compile
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_qwen(path: pathlib.Path) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as `Qwen2Tokenizer` in transformers builds it.

    Without vocab.json the ids are those of Qwen: the 256 bytes in order, then the merges in order.
    """
    lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if (path / "vocab.json").is_file():
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    else:
        words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
        vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # pyright: ignore[reportArgumentType]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's split of a text into words (`PRETOKENIZE_REGEX` in transformers' tokenization_qwen2.py)."""


def _read_sentencepiece(path: pathlib.Path) -> Tokenizer:
    # Otherwise transformers prints advice to install PyTorch when it is imported.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    t5_class: Any = getattr(transformers, "T5TokenizerFast")  # noqa: B009 - its type is not known
    return t5_class.from_pretrained(path, local_files_only=True).backend_tokenizer


@dataclasses.dataclass(frozen=True)
class _Format:
    """The files of a tokenizer, the function that reads them, and a package that the function needs."""

    files: tuple[str, ...]
    read: Callable[[pathlib.Path], Tokenizer]
    needs: str | None = None


@dataclasses.dataclass(frozen=True)
class _Repository:
    """The folders and file formats of one of the two tokenizers, and its pad token if its files name none."""

    folder: str
    hub_name: str
    pad_token: str
    formats: tuple[_Format, ...]


_COMPLETE = _Format(("tokenizer.json",), _read_complete)
_QWEN_BPE = _Format(("vocab.json", "merges.txt"), _read_qwen)
_QWEN_MERGES = _Format(("merges.txt",), _read_qwen)
_T5_UNIGRAM = _Format(("spiece.model",), _read_sentencepiece, needs="sentencepiece")
_SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")

_QWEN = _Repository("qwen", "Qwen/Qwen3-0.6B-Base", "<|endoftext|>", (_COMPLETE, _QWEN_BPE, _QWEN_MERGES))
_T5 = _Repository("t5", "google/t5-v1_1-xxl", "<pad>", (_COMPLETE, _T5_UNIGRAM))


_PROBES = ("a picture", "猫 🙂 ﬁ \x00", "x" * 600)
"""Texts that every tokenizer can encode: if the library panics at a broken one, it should be at the start."""


def tokenizer_folders(folder: str | os.PathLike[str]) -> dict[str, pathlib.Path]:
    """Return "qwen" and "t5" → the tokenizer's folder in `folder`, ours or else diffusers'; it may be missing."""
    root = pathlib.Path(folder)
    theirs_first = not (root / _QWEN.folder).is_dir() and (root / TOKENIZER_FOLDERS[_QWEN.folder]).is_dir()
    found: dict[str, pathlib.Path] = {}
    for pair in TOKENIZER_FOLDERS.items():
        paths = [root / name for name in (pair[::-1] if theirs_first else pair)]
        found[pair[0]] = next((path for path in paths if path.is_dir()), paths[0])
    return found


def load_tokenizers(folder: str | os.PathLike[str] | None = None) -> Tokenizers:
    """Load the tokenizers in `folder`, which are in `qwen/` and `t5/` or, in a diffusers folder, in other ones.

    If it is None, load those that come with the package. Raises UserError if a file is broken, or if files are missing;
    then the message says which files to put where.
    """
    paths = tokenizer_folders(PACKAGED_TOKENIZERS if folder is None else folder)
    (qwen, qwen_pad), (t5, t5_pad) = (_load(one, paths[one.folder]) for one in (_QWEN, _T5))
    return Tokenizers(qwen, t5, qwen_pad, t5_pad)


def save_packaged(folders: Mapping[str, pathlib.Path]) -> Tokenizers:
    """Write the package's tokenizers into the folders for `qwen` and `t5`, as transformers reads them."""
    (qwen, qwen_pad), (t5, t5_pad) = (_load(one, PACKAGED_TOKENIZERS / one.folder) for one in (_QWEN, _T5))
    for repository, tokenizer in ((_QWEN, qwen), (_T5, t5)):
        target, source = folders[repository.folder], PACKAGED_TOKENIZERS / repository.folder
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")
        tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    return Tokenizers(qwen, t5, qwen_pad, t5_pad)


def _load(repository: _Repository, path: pathlib.Path) -> tuple[Tokenizer, int]:
    """Return a tokenizer and the id of its pad token."""
    try:
        found = next((one for one in repository.formats if all((path / file).is_file() for file in one.files)), None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from None
    if found is None:
        expected = ", or ".join(" and ".join(one.files) for one in repository.formats)
        raise UserError(f"{path}: no tokenizer found, expected {expected} of {repository.hub_name}")
    if found.needs and importlib.util.find_spec(found.needs) is None:
        raise UserError(f"{path}: {found.files[0]} needs `pip install {found.needs}`; tokenizer.json needs no package")
    try:
        settings: dict[str, Any] = {}
        for file in _SETTINGS:
            if (path / file).is_file():
                settings |= json.loads((path / file).read_text(encoding="utf-8"))
        with _stderr_silenced():
            tokenizer = found.read(path)
            _add_tokens(tokenizer, settings)
            if str(settings.get("tokenizer_class")).startswith("T5Tokenizer"):
                _split_as_t5(tokenizer)
            pad = settings.get("pad_token") or repository.pad_token
            pad_id = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
            words, *_ = _encode(tokenizer, _PROBES)
            words = set(words) - tokenizer.get_added_tokens_decoder().keys()
    except BaseException as error:  # the parsers raise errors of many types for broken files
        _raise_unless_of_rust(error)
        raise UserError(f"{path / found.files[0]}: the tokenizer cannot be read: {first_line(error)}") from None
    if not words:
        raise UserError(f"{path}: the tokenizer has no vocabulary, expected the files of {repository.hub_name}")
    if pad_id is None:
        expected = f"{repository.pad_token} or tokenizer_config.json with 'pad_token'"
        raise UserError(f"{path}: the tokenizer has no pad token, expected {expected}")
    return tokenizer, pad_id


@contextlib.contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Drop what is written to stderr, also by the tokenizers library, which prints a backtrace of each panic."""
    try:
        before, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # stderr is closed
        yield
        return
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(null)


def _add_tokens(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Add the tokens of tokenizer_config.json that the tokenizer lacks. Raises ValueError if their ids differ."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    numbered = sorted((int(number), token) for number, token in settings.get("added_tokens_decoder", {}).items())
    for number, token in numbered:
        if token["content"] not in known:
            tokenizer.add_tokens([AddedToken(**token)])
            if tokenizer.token_to_id(token["content"]) != number:
                raise ValueError(f"tokenizer_config.json: {token['content']} cannot have the id {number}")


def _split_as_t5(tokenizer: Tokenizer) -> None:
    """Split text at white space, as `T5Tokenizer` in transformers does, whose files say something else.

    Their difference shows only after a literal `</s>` and the like, and at U+0085.
    """
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            tokenizer.normalizer = normalizers.Precompiled(base64.b64decode(part["precompiled_charsmap"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    except BaseException as error:
        _raise_unless_of_rust(error)
        broken = next((text for text in texts if re.search("[\ud800-\udfff]", text)), None)
        if broken is None:
            raise UserError(f"the tokenizer's files are broken: {first_line(error)}") from None
        raise UserError(f"text {ascii(broken)[:80]}: is not valid Unicode") from None


def _raise_unless_of_rust(error: BaseException) -> None:
    """Raise `error` again if it is neither an Exception nor a panic of the tokenizers library, which is not one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _padded(tokenizer: Tokenizer, pad: int, captions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (b, length) of the captions and their mask. The tokens of an empty text end every caption."""
    (end,) = _encode(tokenizer, [""])
    ids = np.full((len(captions), length), pad, np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(_encode(tokenizer, captions)):
        kept = tokens if len(tokens) <= length else [*tokens[: max(0, length - len(end))], *end][:length]
        ids[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    return ids, mask
