"""Keys of diffusion-pipe that are no keys of ours: something else does their job, they mean nothing here, or they are
still to come.

One table for each TOML section. A row answers a key: `elsewhere` with a note, `refused` with a fault, `not_yet` with a
fault too, unless the value is one of the harmless ones that ask for nothing (the default, mostly).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

ANY = object()
"""Every value is harmless: the key only qualifies another one, and that one is answered."""


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a key is answered: by `note`, by the fault `refusal`, or by a fault unless its value is among `harmless`."""

    note: str = ""
    refusal: str = ""
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


def refused(refusal: str) -> Foreign:
    return Foreign(refusal=refusal)


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
    "logging_steps": not_yet(1, hint="steps_per_print sets how often a line is printed"),
    "x_axis_examples": not_yet(False),
    "huggingface_repo": not_yet(),
    "upload_hf_from_epoch": not_yet(ANY),
}

MODEL: Mapping[str, Foreign] = {
    "transformer_dtype": not_yet(hint="frozen weights are stored in dtype"),
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


def set_aside(table: dict[str, Any], rows: Mapping[str, Foreign]) -> Iterable[tuple[str, str, bool]]:
    """Take the foreign keys out of `table`, in place: (key, answer, whether it is a fault) of those that speak."""
    for key in [key for key in table if key in rows]:
        row, value = rows[key], table.pop(key)
        if row.note:
            yield key, f"does nothing here: {row.note}", False
        elif row.refusal:
            yield key, row.refusal, True
        elif not row.accepts(value):
            hint = f"; {row.hint}" if row.hint else ""
            yield key, f"a known key that this version does not carry out yet{hint}", True
