"""Keys of diffusion-pipe and its forks that are not supported: another key replaces them, or they do not apply here.

A key is ignored with a message, refused with an error, or treated as another name of one of our keys. Values that
change nothing (mostly the default) are accepted silently.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """How to answer a key whose value is not among `harmless`: exactly one of the other three fields is set."""

    message: str = ""
    refusal: str = ""
    renamed: str = ""
    harmless: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether the value needs nothing that is missing here. `true` is not equal to 1."""
        return any(known == value and isinstance(known, bool) == isinstance(value, bool) for known in self.harmless)


def ignored(message: str, *harmless: Any) -> Unsupported:
    return Unsupported(message=message, harmless=harmless)


def refused(refusal: str, *harmless: Any) -> Unsupported:
    return Unsupported(refusal=refusal, harmless=harmless)


_MESH = "layers are never split between devices; [mesh] shards each of them"
_SWAP = "activation_checkpointing = 'unsloth' and [model] transformer_dtype save memory"
_TAGS = "is a key of the dataset TOML here, at its top or in a [[directory]]"
_UPLOAD = "nothing is uploaded; `hf upload OWNER/REPO RUN/epochN` does that"

MAIN: Mapping[str, Unsupported] = {
    "pipeline_stages": ignored(_MESH),
    "partition_method": ignored(_MESH),
    "partition_split": ignored(_MESH),
    "blocks_to_swap": ignored(_SWAP),
    "disable_block_swap_for_eval": ignored(_SWAP),
    "reentrant_activation_checkpointing": ignored("activation_checkpointing has only one form, which always works"),
    "compile": ignored("every step is compiled by XLA"),
    "eval_gradient_accumulation_steps": ignored(
        "evaluation does not depend on the batch size; eval_micro_batch_size_per_gpu sets it", 1
    ),
    "image_eval_micro_batch_size_per_gpu": Unsupported(renamed="eval_image_micro_batch_size_per_gpu"),
    "huggingface_repo": ignored(_UPLOAD, ""),
    "upload_hf_from_epoch": ignored(_UPLOAD),
    "model.t5_path": refused("belongs to Cosmos-Predict2; Anima's text encoder is llm_path"),
    "model.merge_adapters": refused("belongs to other models; set transformer_path to a file with the adapters merged"),
    # From forks that trained Anima before diffusion-pipe did.
    "model.qwen_path": Unsupported(renamed="llm_path"),
    "model.qwen_nf4": Unsupported(renamed="text_encoder_nf4"),
    "model.train_self_attn": refused("expected self_attn_lr = 0", True),
    "model.train_cross_attn": refused("expected cross_attn_lr = 0", True),
    "model.train_mlp": refused("expected mlp_lr = 0", True),
    "model.train_adaln": refused("expected mod_lr = 0", True),
    "model.train_llm_adapter": refused("expected llm_adapter_lr = 0", True),
    "model.shuffle_tags": refused(_TAGS, False),
    "model.tag_delimiter": refused(f"{_TAGS}, as cache_shuffle_delimiter", ", "),
    "model.tag_dropout_percent": refused(f"{_TAGS}, as tag_dropout", 0),
    "model.caption_dropout_percent": refused("expected uncond_fraction, at the top of this file", 0),
    "optimizer.kahan_sum": ignored("trained weights are float32, which needs no compensated sums"),
    "optimizer.gradient_release": ignored(
        "gradients and updates are already one program; type = 'adamw8bit' or 'adafactor' saves memory", False
    ),
    "adapter.fuse_adapters": refused(
        "belongs to Flux and Chroma; set [model] transformer_path to a file with the adapters merged"
    ),
}
"""Dotted keys of the main TOML."""

DATASET: Mapping[str, Unsupported] = {
    "control_path": refused("belongs to models that edit images; Anima draws them from text alone"),
    "shuffle_metadata": ignored("the order is drawn from seed, again in every epoch"),
}
"""Keys of the dataset TOML, at the top level and in each source."""

_FILES = "belongs to a [[directory]], whose images are files"

TFDS: Mapping[str, Unsupported] = {
    **DATASET,
    "mask_path": refused(_FILES),
    "default_mask_file": refused(_FILES),
    "online_captions": refused(_FILES),
}
"""Keys of a `[[tfds]]`, including those that belong to a `[[directory]]`."""

FLAGS: Mapping[str, str] = {
    "deepspeed": "one program runs on all devices; [mesh] says how they share the work",
    "deepspeed_config": "the TOML holds every setting",
    "local_rank": "one program runs on all devices of a machine, without a launcher",
    "master_port": "processes find each other through jax.distributed",
    "test_sample": "[sample] draws images while training, and `python -m anima_jax.generate` at any time",
}
"""Command-line flags of diffusion-pipe that do not apply here → what replaces them."""


def set_aside(
    table: dict[str, Any], rows: Mapping[str, Unsupported], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Remove the keys in `rows` from `table` and its nested tables; rename those that have another name here.

    Yield (path, answer, whether it is an error) for each key that has an answer.
    """
    for key in list(table):
        path = (*above, key)
        row = rows.get(".".join(path))
        if row is None:
            if isinstance(table[key], dict):
                yield from set_aside(table[key], rows, path)
            continue
        value = table.pop(key)
        if row.renamed:
            if row.renamed in table:
                yield path, f"is another name of {row.renamed}, which is set too; expected one of the two", True
            table.setdefault(row.renamed, value)
        elif not row.accepts(value):
            yield path, f"does nothing here: {row.message}" if row.message else row.refusal, not row.message
