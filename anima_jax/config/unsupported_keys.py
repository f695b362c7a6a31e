"""Keys of diffusion-pipe and its forks that are no keys of ours: others do their job, or they mean nothing here.

One table for each TOML section. A row answers a key: `elsewhere` with a note, unless the value is one of the harmless
ones that ask for nothing (the default, mostly), `refused` with a fault, again unless it is harmless.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a key is answered: by `note`, unless its value is among `harmless`, or by the fault `refusal`.

    A key with `renamed` is another spelling of that one.
    """

    note: str = ""
    refusal: str = ""
    harmless: tuple[Any, ...] = ()
    renamed: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether the value asks for nothing that is missing here. `true` is not 1."""
        return any(known == value and isinstance(known, bool) == isinstance(value, bool) for known in self.harmless)


def elsewhere(note: str, *harmless: Any) -> Foreign:
    return Foreign(note=note, harmless=harmless)


def refused(refusal: str, *harmless: Any) -> Foreign:
    return Foreign(refusal=refusal, harmless=harmless)


def spelling_of(key: str) -> Foreign:
    return Foreign(renamed=key)


_MESH = "layers are never split between devices; [mesh] shards every one of them"
_SWAP = "activation_checkpointing = 'unsloth' and [model] transformer_dtype are what saves memory"
_TAGS = "is a key of the dataset TOML here, at its top or in a [[directory]]"
_UPLOAD = "nothing is uploaded; `hf upload OWNER/REPO RUN/epochN` does that"

MAIN: Mapping[str, Foreign] = {
    "pipeline_stages": elsewhere(_MESH),
    "partition_method": elsewhere(_MESH),
    "partition_split": elsewhere(_MESH),
    "blocks_to_swap": elsewhere(_SWAP),
    "disable_block_swap_for_eval": elsewhere(_SWAP),
    "reentrant_activation_checkpointing": elsewhere("activation_checkpointing has one form, which always works"),
    "compile": elsewhere("every step is compiled, always, by XLA"),
    "eval_gradient_accumulation_steps": elsewhere(
        "no evaluation depends on the size of its batches; eval_micro_batch_size_per_gpu sets it", 1
    ),
    "image_eval_micro_batch_size_per_gpu": spelling_of("eval_image_micro_batch_size_per_gpu"),
    "huggingface_repo": elsewhere(_UPLOAD, ""),
    "upload_hf_from_epoch": elsewhere(_UPLOAD),
}

MODEL: Mapping[str, Foreign] = {
    "t5_path": refused("belongs to Cosmos-Predict2; Anima's text encoder is llm_path"),
    "merge_adapters": refused("belongs to other models; give transformer_path a file with the adapters merged in"),
    # Of forks that trained Anima before diffusion-pipe did.
    "qwen_path": spelling_of("llm_path"),
    "qwen_nf4": spelling_of("text_encoder_nf4"),
    "train_self_attn": refused("expected self_attn_lr = 0", True),
    "train_cross_attn": refused("expected cross_attn_lr = 0", True),
    "train_mlp": refused("expected mlp_lr = 0", True),
    "train_adaln": refused("expected mod_lr = 0", True),
    "train_llm_adapter": refused("expected llm_adapter_lr = 0", True),
    "shuffle_tags": refused(_TAGS, False),
    "tag_delimiter": refused(f"{_TAGS}, as cache_shuffle_delimiter", ", "),
    "tag_dropout_percent": refused(f"{_TAGS}, as tag_dropout", 0),
    "caption_dropout_percent": refused("expected uncond_fraction, at the top of this file", 0),
}

OPTIMIZER: Mapping[str, Foreign] = {
    "kahan_sum": elsewhere("trained weights are float32, which needs no compensated sums"),
    "gradient_release": elsewhere(
        "gradients and updates are one program already; type = 'adamw8bit' or 'adafactor' saves memory", False
    ),
}

ADAPTER: Mapping[str, Foreign] = {
    "fuse_adapters": refused("belongs to Flux and Chroma; give [model] transformer_path a file with them merged in"),
}

DATASET: dict[str, Foreign] = {
    "control_path": refused("belongs to models that edit pictures, and Anima draws them from text alone"),
    "shuffle_metadata": elsewhere("the order is drawn anew from seed in every epoch"),
}

_FILES = "belongs to a [[directory]], whose pictures are files"

TFDS: dict[str, Foreign] = {
    "mask_path": refused(_FILES),
    "default_mask_file": refused(_FILES),
    "online_captions": refused(_FILES),
}
"""Keys of a `[[directory]]` that a `[[tfds]]` cannot have."""

SECTIONS: Mapping[str, Mapping[str, Foreign]] = {
    "": MAIN,
    "model": MODEL,
    "optimizer": OPTIMIZER,
    "adapter": ADAPTER,
}
"""The main TOML's tables. The dataset TOML has `DATASET` at its top and in each source."""


FLAGS: Mapping[str, str] = {
    "deepspeed": "one program runs on all devices; [mesh] says how they share the work",
    "deepspeed_config": "the TOML holds every setting",
    "local_rank": "one program runs on all devices of a machine; no launcher starts it",
    "master_port": "processes find each other through jax.distributed",
    "test_sample": "[sample] draws pictures while training, and `python -m anima_jax.generate` at any time",
}
"""Flags of diffusion-pipe's command line that cannot apply, and what does their job."""


def set_aside(table: dict[str, Any], rows: Mapping[str, Foreign]) -> Iterable[tuple[str, str, bool]]:
    """Take the foreign keys out of `table`, in place: (key, answer, whether it is a fault) of those that speak."""
    for key in [key for key in table if key in rows]:
        row, value = rows[key], table.pop(key)
        if row.renamed:
            if row.renamed in table:
                yield key, f"is another spelling of {row.renamed}, which is set too; expected one of the two", True
            table.setdefault(row.renamed, value)
        elif row.accepts(value):
            continue
        elif row.note:
            yield key, f"does nothing here: {row.note}", False
        else:
            yield key, row.refusal, True
