"""Make the quick start's tokenizers: `python -m make_assets.tokenizers` writes `assets/tokenizers`.

They are small tokenizers of the kinds that Anima uses: Qwen's byte-level BPE, padded with <|endoftext|>, and T5's
Unigram with <pad> 0, </s> 1, <unk> 2. Each word of the shapes' captions is one token; some general English fills the
rest of the vocabulary. Any text can be tokenized: T5's tokenizer turns non-ASCII characters into <unk>, as the real one
does with most of them.
"""

import collections
import json
import math
import pathlib
import string

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from anima_jax.data.shapes import scenes
from anima_jax.text.tokenizers import SMALL_TOKENIZERS, load_tokenizers

QWEN_PAD = "<|endoftext|>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
WORD_START = "▁"

# Qwen2's splitting rule (Qwen/Qwen3-0.6B-Base, tokenizer.json): contractions, words with the character before them,
# single digits, punctuation, line ends, spaces.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Common words and words of image captions. The order matters: the first ones become tokens of their own.
ENGLISH_TEXT = """
the of and to in is with at by for from one two three small large big little left right top bottom center corner
picture drawing painting photo image style artist quality best masterpiece high detailed simple sketch line art
girl boy woman man person people child hair eyes face hand dress shirt smile looking standing sitting holding
cat dog bird fish horse flower tree grass leaf sky cloud sun moon star night day light dark shadow water river sea
mountain city street house room window door table chair book car road snow rain fire wind wood stone glass gold
blue brown long short old new bright soft round sharp wide near far over under behind between front side view
"""
ENGLISH = ENGLISH_TEXT.split()

QWEN_VOCABULARY = 512
REPEATS_OF_SHAPES = 8  # enough for the captions' words to be merged before any others


def caption_words() -> list[str]:
    """Return the words of the shapes' captions, most frequent first."""
    captions = [scene.caption for held_out in (False, True) for scene in scenes(held_out=held_out)]
    counts = collections.Counter(word for caption in captions for word in caption.split())
    return sorted(counts, key=lambda word: (-counts[word], word))


def corpus() -> list[str]:
    """Return the texts for training the BPE."""
    captions = [scene.caption for held_out in (False, True) for scene in scenes(held_out=held_out)]
    return captions * REPEATS_OF_SHAPES + [f"a {word}" for word in ENGLISH]


def build_qwen(vocabulary: int = QWEN_VOCABULARY) -> tokenizers.Tokenizer:
    """Train a byte-level BPE like Qwen's on `corpus`, with `vocabulary` ids, of which the last is the pad token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([QWEN_PAD])
    return tokenizer


def build_t5(qwen: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Build a Unigram tokenizer like T5's: whole words, the parts of words that `qwen` learned, and ASCII characters.

    The scores are not fitted, since tokenizers' Unigram trainer is not deterministic. They decrease with rank as in
    Zipf's law, so that fewer and more common pieces win.
    """
    pieces = [WORD_START + word for word in (*caption_words(), *ENGLISH)]
    learned = sorted(qwen.get_vocab().items(), key=lambda item: item[1])
    pieces += [piece.replace("Ġ", WORD_START) for piece, _ in learned if piece.strip("Ġ").isascii() and len(piece) > 1]
    pieces += [WORD_START, *string.ascii_letters, *string.digits, *string.punctuation]
    distinct = [piece for piece in dict.fromkeys(pieces) if piece not in (QWEN_PAD, WORD_START * 2)]
    scores = [(piece, -math.log(rank + 2.0) - 1.0) for rank, piece in enumerate(distinct)]
    model = models.Unigram([(token, 0.0) for token in T5_SPECIAL] + scores, unk_id=T5_SPECIAL.index("<unk>"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(T5_SPECIAL))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def write(folder: pathlib.Path) -> None:
    """Write both tokenizers to `folder/qwen` and `folder/t5`, with the configuration that transformers reads."""
    qwen = build_qwen()
    _write(folder / "qwen", qwen, {"eos_token": QWEN_PAD, "pad_token": QWEN_PAD})
    special: dict[str, str] = dict(zip(("pad_token", "eos_token", "unk_token"), T5_SPECIAL, strict=True))
    _write(folder / "t5", build_t5(qwen), special)


def _write(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, special: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the tokenizers where `load_tokenizers(SMALL_TOKENIZERS)` finds them; print their vocabulary sizes."""
    write(SMALL_TOKENIZERS)
    small = load_tokenizers(SMALL_TOKENIZERS)
    print(f"{SMALL_TOKENIZERS}: {small.qwen_vocabulary} Qwen ids, {small.t5_vocabulary} T5 ids")


if __name__ == "__main__":
    main()
