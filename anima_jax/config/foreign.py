"""Keys of diffusion-pipe that are no keys of ours: those whose job something else does here, and those still to come.

One table for each TOML section. A row answers a key: `elsewhere` with a note, `not_yet` with a fault, unless the value
is one of the harmless ones that ask for nothing (the default, mostly).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

ANY = object()
"""Every value is harmless: the key only qualifies another one, and that one is answered."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a key is answered: by `note`, or by a fault unless its value is among `harmless`."""

    note: str = ""
    harmless: tuple[Any, ...] = ()
    hint: str = ""

    def accepts(self, value: Any) -> bool:
        """Whether the value asks for nothing that is missing here. `true` is not 1."""
        return bool(self.note) or any(
            known is ANY or (known == value and isinstance(known, bool) == isinstance(value, bool))
            for known in self.harmless
        )


def elsewhere(note: str) -> Foreign:
    return Foreign(note=note)


def not_yet(*harmless: Any, hint: str = "") -> Foreign:
    return Foreign(harmless=harmless, hint=hint)


_MESH = "layers are never split between devices; [mesh] shards every one of them"
_SWAP = "activation_checkpointing = true is what saves memory"

MAIN: Mapping[str, Foreign] = {
    "pipeline_stages": elsewhere(_MESH),
    "partition_method": elsewhere(_MESH),
    "partition_split": elsewhere(_MESH),
    "blocks_to_swap": elsewhere(_SWAP),
    "disable_block_swap_for_eval": elsewhere(_SWAP),
    "reentrant_activation_checkpointing": elsewhere("activation_checkpointing has one form, which always works"),
    "compile": elsewhere("every step is compiled, always, by XLA"),
    "map_num_proc": elsewhere("the input pipeline sets its own number of workers"),
    "image_micro_batch_size_per_gpu": not_yet(hint="all examples are images: set micro_batch_size_per_gpu"),
    "eval_datasets": not_yet([]),
    "eval_every_n_epochs": not_yet(ANY),
    "eval_every_n_steps": not_yet(ANY),
    "eval_every_n_examples": not_yet(ANY),
    "eval_before_first_step": not_yet(ANY),
    "eval_micro_batch_size_per_gpu": not_yet(ANY),
    "eval_image_micro_batch_size_per_gpu": not_yet(ANY),
    "image_eval_micro_batch_size_per_gpu": not_yet(ANY),
    "eval_gradient_accumulation_steps": not_yet(ANY),
    "checkpoint_every_n_epochs": not_yet(),
    "checkpoint_every_n_minutes": not_yet(),
    "max_checkpoints": not_yet(),
    "regenerate_cache": not_yet(False),
    "video_clip_mode": not_yet("single_beginning"),
    "logging_steps": not_yet(1, hint="steps_per_print sets how often a line is printed"),
    "x_axis_examples": not_yet(False),
    "huggingface_repo": not_yet(),
    "upload_hf_from_epoch": not_yet(ANY),
}

MODEL: Mapping[str, Foreign] = {
    "transformer_dtype": not_yet(hint="frozen weights are stored in dtype"),
    "cache_text_embeddings": not_yet(True),
}

OPTIMIZER: Mapping[str, Foreign] = {
    "kahan_sum": elsewhere("trained weights are float32, which needs no compensated sums"),
    "gradient_release": not_yet(False),
    "beta2_half_life": not_yet(hint="set betas"),
}

ADAPTER: Mapping[str, Foreign] = {
    "exclude_modules": not_yet([], ""),
    "init_from_existing": not_yet(),
    "rank_dropout": not_yet(0.0),
    "decompose_factor": not_yet(-1),
}

DATASET: Mapping[str, Foreign] = {
    "enable_ar_bucket": not_yet(False, hint="pictures are cropped to one resolution"),
    "min_ar": not_yet(ANY),
    "max_ar": not_yet(ANY),
    "num_ar_buckets": not_yet(ANY),
    "ar_buckets": not_yet(ANY),
    "size_buckets": not_yet(hint="set resolutions"),
    "frame_buckets": not_yet([1]),
    "mask_path": not_yet(),
    "default_mask_file": not_yet(),
    "control_path": not_yet(),
    "shuffle_tags": not_yet(False),
    "cache_shuffle_num": not_yet(0),
    "cache_shuffle_delimiter": not_yet(ANY),
    "online_captions": not_yet(False),
    "subsample_ratio": not_yet(1),
    "shuffle_metadata": elsewhere("the order is drawn anew from seed in every epoch"),
}

SECTIONS: Mapping[str, Mapping[str, Foreign]] = {
    "": MAIN,
    "model": MODEL,
    "optimizer": OPTIMIZER,
    "adapter": ADAPTER,
}
"""The main TOML's tables. The dataset TOML has `DATASET` at its top and in each `[[directory]]`."""


def set_aside(table: dict[str, Any], rows: Mapping[str, Foreign]) -> Iterable[tuple[str, str, bool]]:
    """Take the foreign keys out of `table`, in place: (key, answer, whether it is a fault) of those that speak."""
    for key in [key for key in table if key in rows]:
        row, value = rows[key], table.pop(key)
        if row.note:
            yield key, f"does nothing here: {row.note}", False
        elif not row.accepts(value):
            hint = f"; {row.hint}" if row.hint else ""
            yield key, f"a known key that this version does not carry out yet{hint}", True
