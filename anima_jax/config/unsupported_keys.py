"""Keys of diffusion-pipe, its forks and GUIs that are not ours, and how each is answered.

A key is taken as the one of ours that means the same, ignored with a message, or refused with the name of our key.
Values that ask for nothing (mostly the default) are accepted silently. The keys of other trainers are in
`other_trainers.py`.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

from anima_jax.config.dataset import SHARED_KEYS, TfdsSource

IN_DATASET = "dataset:"
"""Prefix of a target in the main TOML's rows that is a key of the dataset TOML."""


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """How to answer a key whose value is not among `harmless`: exactly one of the next three fields is set."""

    message: str = ""
    """It is ignored: what does its job here."""
    refusal: str = ""
    """It is an error: what to set instead, or why there is nothing."""
    target: str = ""
    """It is taken as this key, dotted, from the top of the file; see also `IN_DATASET`."""
    values: Mapping[Any, Any] | None = None
    """Its value → that of `target`; others are errors. None: it has the same value."""
    fills: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Entries of a table that it has there unless it names them."""
    replaces: bool = False
    """Whether it replaces a value of `target`; otherwise, another value is an error."""
    requires: tuple[str, str] = ("", "")
    """Dotted key and the value without which it means nothing."""
    harmless: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether the value needs nothing that is missing here. `true` is not equal to 1."""
        return any(known == value and isinstance(known, bool) == isinstance(value, bool) for known in self.harmless)

    def value_of(self, value: Any) -> Any:
        """Return the value of `target`. Raises KeyError if there is none."""
        if self.values is None:
            return {**self.fills, **value} if self.fills and isinstance(value, dict) else value
        for known, ours in self.values.items():
            if known == value and type(known) is type(value):
                return ours
        raise KeyError(value)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the user is told about a key at `path`; `target` is set if the key was taken as another one."""

    path: tuple[str, ...]
    text: str
    is_error: bool = False
    target: str = ""


def ignored(message: str, *harmless: Any) -> Unsupported:
    return Unsupported(message=message, harmless=harmless)


def refused(refusal: str, *harmless: Any) -> Unsupported:
    return Unsupported(refusal=refusal, harmless=harmless)


def taken(target: str, *harmless: Any, values: Mapping[Any, Any] | None = None) -> Unsupported:
    return Unsupported(target=target, values=values, harmless=harmless)


_MESH = "layers are never split between devices; [mesh] shards each of them"
_SWAP = "activation_checkpointing = 'unsloth' and [model] transformer_dtype save memory"
_UPLOAD = "nothing is uploaded; `hf upload OWNER/REPO RUN/epochN` does that"
_LINEAR = "the blocks' layers are linear, without convolutions"
_DEBUG = "metrics.jsonl, TensorBoard and --dump_dataset show what is trained"
_XLA = "every step is compiled by XLA"
_LLLITE = (
    *("mlp_dim", "target_layers", "cond_dim", "cond_resblocks", "use_aspp", "dropout", "multiplier"),
    *("cond_in_channels", "inpaint_masked_input", "cond_emb_dim", "aspp_dilations"),
)
"""Keys of a control network that begin with `lllite_` in sd-scripts."""
_RATES = {
    "self_attn": "self_attn",
    "cross_attn": "cross_attn",
    "mlp": "mlp",
    "adaln": "mod",
    "adaln_modulation": "mod",
    "mod": "mod",
    "llm_adapter": "llm_adapter",
}
"""Part as forks call it → the beginning of its rate's key."""


def _toggles() -> dict[str, Unsupported]:
    """Return the rows of `train_mlp = false`, `freeze_mlp = true` and the like, for every table that has them."""
    rows: dict[str, Unsupported] = {}
    for table in ("", "model.", "adapter."):
        for part, rate in _RATES.items():
            target = f"model.{rate}_lr"
            frozen = Unsupported(target=target, values={False: 0}, replaces=True, harmless=(True,))
            rows[f"{table}train_{part}"] = frozen
            rows[f"{table}freeze_{part}"] = dataclasses.replace(frozen, values={True: 0}, harmless=(False,))
        for part in ("norm", "final_layer", "x_embedder", "t_embedder", "embedders", "base"):
            rows[f"{table}train_{part}"] = refused(
                "has no rate of its own; [adapter] exclude_modules leaves it out", True
            )
        rows[f"{table}train_text_encoder"] = refused("expected a rate: text_encoder_lr in [adapter]", False)
        rows[f"{table}caption_dropout_percent"] = taken("uncond_fraction", 0)
    return rows


_ADAPTER: Mapping[str, Unsupported] = {
    "factor": taken("adapter.decompose_factor"),
    "dim": taken("adapter.rank"),
    **{f"lllite_{key}": taken(f"adapter.{key}") for key in _LLLITE},
    "target": taken("adapter.target_layers"),
    "channels": taken("adapter.cond_in_channels"),
    # A LoKr of this rank has one matrix for w2 in every layer, and the scale 1: diffusion-pipe's own way to ask for it.
    "full_matrix": Unsupported(
        target="adapter.rank", values={True: 10**6}, replaces=True, requires=("adapter.type", "lokr"), harmless=(False,)
    ),
    "preset": refused("expected target_modules, a list of modules", "full", "attn-mlp"),
    "decompose_both": refused("the smaller factor of a LoKr is one matrix", False),
    "unbalanced_factorization": refused("expected decompose_factor, the smaller factor of a layer's width", False),
    **dict.fromkeys(
        ("weight_decompose", "dora_wd", "use_dora"),
        refused("expected type = 'dora', a LoRA with weight decomposition", False),
    ),
    "wd_on_out": ignored("type = 'dora' scales each output", True, False),
    **dict.fromkeys(("rs_lora", "use_rslora"), refused("expected alpha = √rank times the alpha of rsLoRA", False)),
    "loraplus_lr_ratio": refused("both factors have one rate; lr_pattern sets it for a module", 0, 1),
    **dict.fromkeys(("use_tucker", "include_conv", "conv_dim", "conv_alpha"), ignored(_LINEAR, False, 0)),
    **dict.fromkeys(
        ("use_scalar", "rank_dropout_scale", "bypass_mode", "module_dropout", "train_norm", "oplora"),
        refused(
            "is a variant of adapters that is not trained here; expected dropout or rank_dropout, or none", False, 0
        ),
    ),
    "bias": refused("an adapter has no biases", "none", False),
    "target_include": refused("expected target_modules, regular expressions"),
    "target_exclude": refused("expected exclude_modules, regular expressions"),
    "fuse_adapters": refused(
        "belongs to Flux and Chroma; set [model] transformer_path to a file with the adapters merged"
    ),
}

_MODEL: Mapping[str, Unsupported] = {
    "t5_path": refused("belongs to Cosmos-Predict2; Anima's text encoder is llm_path"),
    "merge_adapters": refused("belongs to other models; set transformer_path to a file with the adapters merged"),
    # From forks that trained Anima before diffusion-pipe did, and from its own keys for later models.
    "qwen_path": taken("model.llm_path"),
    "qwen_state_dict_path": Unsupported(target="model.llm_path", replaces=True, harmless=("",)),
    "qwen_nf4": taken("model.text_encoder_nf4", False),
    "qwen_fp8": taken("model.text_encoder_fp8", False),
    "diffusion_model": taken("model.transformer_path"),
    "diffusion_model_dtype": taken("model.transformer_dtype"),
    "vae": taken("model.vae_path"),
    "text_encoders": refused("expected llm_path, the file of Anima's text encoder"),
    "load_to_cuda": ignored("weights are loaded straight onto the devices", False),
    "caching_batch_size": taken("caching_batch_size"),
    "max_text_length": taken("model.max_caption_tokens"),
    "guidance": ignored("Anima has no guidance embedding", 1),
    "flow_use_ot": refused("noise is drawn for each example alone, without optimal transport", False),
    "cfm_enabled": refused("the loss is that of diffusion-pipe, without a contrastive term", False),
    "cfm_lambda": ignored("the loss has no contrastive term"),
    "contrastive_flow_lambda": refused("the loss is that of diffusion-pipe, without a contrastive term", 0),
}

MAIN: Mapping[str, Unsupported] = {
    **_toggles(),
    **{f"model.{key}": row for key, row in _MODEL.items()},
    **{f"adapter.{key}": row for key, row in _ADAPTER.items()},
    "pipeline_stages": ignored(_MESH),
    "partition_method": ignored(_MESH),
    "partition_split": ignored(_MESH),
    "blocks_to_swap": ignored(_SWAP, 0),
    "disable_block_swap_for_eval": ignored(_SWAP),
    "reentrant_activation_checkpointing": ignored("activation_checkpointing has only one form, which always works"),
    "compile": ignored(_XLA),
    "compile_mode": ignored(_XLA),
    "compile_dynamic": ignored(_XLA),
    "compile_disk_cache": ignored("compilation_cache_dir keeps compiled programs"),
    "eval_gradient_accumulation_steps": ignored(
        "evaluation does not depend on the batch size; eval_micro_batch_size_per_gpu sets it", 1
    ),
    "image_eval_micro_batch_size_per_gpu": taken("eval_image_micro_batch_size_per_gpu"),
    "max_checkpoints_to_keep": taken("max_checkpoints", 0),
    "lr_scheduler_args.lr_min": taken("lr_scheduler_min_lr"),
    "lr_scheduler_args.min_lr": taken("lr_scheduler_min_lr"),
    "lr_scheduler_args.num_cycles": taken("lr_scheduler_num_cycles"),
    "lr_scheduler_args.power": taken("lr_scheduler_power"),
    "huggingface_repo": ignored(_UPLOAD, ""),
    "upload_hf_from_epoch": ignored(_UPLOAD),
    "batch_fill_strategy": ignored("examples that do not fill a batch begin the next epoch, so that none is dropped"),
    "bench": ignored("--profile measures steps", False),
    "sample.cfg": taken("sample.guidance_scale"),
    "sample.num_inference_steps": taken("sample.steps"),
    "sample.reference": taken("sample.references"),
    **dict.fromkeys(("conditioning", "edit_mode"), taken("edit", False)),
    "sample_every_n_epochs": taken("sample.every_n_epochs", 0),
    "sample_every_n_steps": taken("sample.every_n_steps", 0),
    "sample_at_first": ignored("[sample] always draws before the first step too", True),
    "debug": ignored(_DEBUG),
    "debug_*": ignored(_DEBUG, False),
    "model.debug_*": ignored(_DEBUG, False),
    "optimizer.kahan_sum": ignored("trained weights are float32, which needs no compensated sums"),
    "optimizer.gradient_release": ignored(
        "gradients and updates are already one program; type = 'adamw8bit' or 'adafactor' saves memory", False
    ),
}
"""Dotted keys of the main TOML, or patterns of them."""

CAPTIONS: Mapping[str, Unsupported] = {
    "model.shuffle_tags": taken(f"{IN_DATASET}shuffle_tags", False),
    "model.tag_delimiter": taken(f"{IN_DATASET}cache_shuffle_delimiter", ", "),
    "model.tag_dropout_percent": taken(f"{IN_DATASET}tag_dropout", 0),
    "model.shuffle_keep_first_n": taken(f"{IN_DATASET}keep_tokens", 0),
    "model.protected_tags_file": taken(f"{IN_DATASET}protected_tags_file", ""),
    "model.caption_mode": taken(f"{IN_DATASET}caption_mode", "tags"),
    "model.mixed_weights": Unsupported(
        target=f"{IN_DATASET}mixed_weights", fills={"tags": 50, "nl": 10, "tags_nl": 20, "nl_tags": 20}
    ),
    "model.nl_shuffle_sentences": taken(f"{IN_DATASET}nl_shuffle_sentences", False),
    "model.nl_keep_first_sentence": taken(f"{IN_DATASET}nl_keep_first_sentence", False),
    "model.attribution_*": refused("expected protected_tags and keep_tokens, in the dataset TOML", [], False, "fixed"),
    "model.min_tags_kept": refused("tag_dropout in the dataset TOML keeps what protected_tags and keep_tokens name", 0),
    "model.tag_min_count": refused("expected tag_dropout, in the dataset TOML", 0),
    "model.tag_max_count": refused("expected tag_dropout, in the dataset TOML", 0),
}
"""Keys of the main TOML with which a fork edits captions; it does so only if they are not cached."""

CACHED_CAPTIONS: Mapping[str, Unsupported] = {
    key: ignored("captions are cached and never change; it needs cache_text_embeddings = false", *row.harmless)
    for key, row in CAPTIONS.items()
}

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}

VALUES: Mapping[str, Mapping[str, str]] = {
    "model.type": {"cosmos_predict2": "anima"},
    "model.timestep_sample_method": {"sigmoid": "logit_normal", "logit-normal": "logit_normal"},
    "model.transformer_dtype": {**_DTYPES, "fp8": "float8"},
    **dict.fromkeys(("model.dtype", "adapter.dtype", "save_dtype", "cache_dtype"), _DTYPES),
    "adapter.type": {
        "locon": "lora",
        **{f"lycoris_{kind}": kind for kind in ("loha", "lokr", "dora")},
        "lycoris_locon": "lora",
    },
}
"""Our key → values of forks, in lower case, and ours that mean the same."""

DATASET: Mapping[str, Unsupported] = {
    "control_paths": taken("control_path"),
    "resolution_schedule": refused(
        "every resolution is trained in every epoch; a second run with init_from_existing or transformer_path goes on "
        "at another one",
        {"enabled": False},
    ),
    "shuffle_metadata": ignored("the order is drawn from seed, again in every epoch"),
    "enable_random_caption": taken("caption_choice", False, values={True: "random"}),
    "caption_sampling": taken("caption_choice", values={"all": "each", "random_per_epoch": "random"}),
    "shuffle_caption": taken("shuffle_tags", False),
    "tag_delimiter": taken("cache_shuffle_delimiter"),
    "tag_dropout_rate": taken("tag_dropout", 0),
    "tag_dropout_percent": taken("tag_dropout", 0),
    **dict.fromkeys(
        ("caption_dropout_percent", "caption_dropout_rate"), refused("expected uncond_fraction, in the main TOML", 0)
    ),
    "caption_suffix": refused("expected caption_prefix", ""),
    "prefix_tag_caption": refused(
        "expected caption_mode, shuffle_tags and tag_dropout, which may be set per source", ""
    ),
    "multiline_captions": refused("expected captions.json, which may have several captions of an image", False),
    "batch_fill_strategy": MAIN["batch_fill_strategy"],
    **dict.fromkeys(
        ("keep_latent_cache", "keep_text_embedding_cache"),
        ignored("the cache keeps what has not changed; --trust_cache trains on it without looking", False),
    ),
    "debug_*": ignored(_DEBUG, False),
}
"""Keys of the dataset TOML, at the top level and in each source."""

_FILES = "belongs to a [[directory]], whose images are files"

TFDS: Mapping[str, Unsupported] = {
    **DATASET,
    **dict.fromkeys((key for key in SHARED_KEYS if key not in TfdsSource.model_fields), refused(_FILES)),
    "control_path": refused(f"{_FILES}; expected control, the name of a feature"),
}
"""Keys of a `[[tfds]]`, including those that belong to a `[[directory]]`."""

SAMPLE_FILE: Mapping[str, Unsupported] = {
    "num_inference_steps": taken("steps"),
    "cfg": taken("guidance_scale"),
    "frames": refused("images are drawn, no videos", 1),
    "num_frames": refused("images are drawn, no videos", 1),
    "fps": ignored("images are drawn, no videos"),
    "batch_size": refused("expected several seeds", 1),
    "preview_every_n_steps": taken("every_n_steps", 0),
    "preview_every_n_epochs": taken("every_n_epochs", 0),
    "preview_before_first_step": ignored("[sample] always draws before the first step too", True),
    "preview_*": ignored("[sample] draws with the networks that are loaded, into samples/ and TensorBoard"),
    "seed_stride": ignored("each prompt is drawn with each of seeds, the same at every step"),
}
"""Keys of the TOML of prompts that the main TOML of a fork names with `sample`, and of `[preview]`."""

FLAGS: Mapping[str, str] = {
    "deepspeed": "one program runs on all devices; [mesh] says how they share the work",
    "deepspeed_config": "the TOML holds every setting",
    "local_rank": "one program runs on all devices of a machine, without a launcher",
    "master_port": "processes find each other through jax.distributed",
    "test_sample": "[sample] draws images while training, and `python -m anima_jax.generate` at any time",
}
"""Command-line flags of diffusion-pipe that do not apply here → what replaces them."""


def set_aside(
    table: dict[str, Any], rows: Mapping[str, Unsupported], elsewhere: dict[str, Any] | None = None
) -> Iterator[Answer]:
    """Remove the keys in `rows` from `table` and its nested tables, and set those that they are taken as.

    Values for the dataset TOML are added to `elsewhere`. Yield an answer for each key that is not silently accepted.
    """
    patterns = [key for key in rows if "*" in key]
    found = list(_leaves(table, rows, patterns))
    for path, row in found:
        inner = _table_at(table, path[:-1])
        value = inner.pop(path[-1]) if inner is not None else None
        if row.accepts(value):
            continue
        if row.target:
            yield _take(table, {} if elsewhere is None else elsewhere, path, value, row)
        else:
            yield Answer(path, f"does nothing here: {row.message}" if row.message else row.refusal, not row.message)


def alias_values(table: dict[str, Any]) -> Iterator[Answer]:
    """Replace values of forks by ours that mean the same, and yield an answer for each."""
    for name, aliases in VALUES.items():
        *above, last = path = tuple(name.split("."))
        inner = _table_at(table, tuple(above))
        found = inner.get(last) if inner else None
        if inner and isinstance(found, str) and found.lower() in aliases:
            inner[last] = aliases[found.lower()]
            yield Answer(path, f"{found!r} is taken as {inner[last]!r}")


def _leaves(
    table: dict[str, Any], rows: Mapping[str, Unsupported], patterns: list[str], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Unsupported]]:
    """Yield the path and row of each key that has a row, in the order of the file."""
    for key, value in table.items():
        path = (*above, key)
        name = ".".join(path)
        row = rows.get(name) or next((rows[one] for one in patterns if fnmatch.fnmatchcase(name, one)), None)
        if row is not None:
            yield path, row
        elif isinstance(value, dict):
            yield from _leaves(value, rows, patterns, path)


def _table_at(table: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the nested table at `path`, or None if something else is there. Missing ones are not made."""
    for key in path:
        inner = table.get(key)
        if not isinstance(inner, dict):
            return None
        table = inner
    return table


def _take(
    table: dict[str, Any], elsewhere: dict[str, Any], path: tuple[str, ...], value: Any, row: Unsupported
) -> Answer:
    """Set the key that another one is taken as, and say so. It is an error if both are set and differ."""
    in_dataset = row.target.startswith(IN_DATASET)
    target = row.target.removeprefix(IN_DATASET)
    *above, last = target.split(".")
    inner = elsewhere if in_dataset else _table_at(table, tuple(above))
    where = f"{target} in the dataset TOML" if in_dataset else target
    if inner is None:
        return Answer(path, f"does nothing here: it means {where}, but there is no [{'.'.join(above)}]")
    try:
        ours = row.value_of(value)
    except KeyError:
        known = " or ".join(str(one).lower() if isinstance(one, bool) else repr(one) for one in row.values or ())
        return Answer(path, f"found {value!r}, expected {known or where}", is_error=True)
    needed, value_needed = row.requires
    *holder, key = needed.split(".")
    if needed and (_table_at(table, tuple(holder)) or {}).get(key) != value_needed:
        return Answer(path, f"belongs to {key} = '{value_needed}'", is_error=True)
    if not row.replaces and inner.get(last, ours) != ours:
        return Answer(path, f"is taken as {where}, which is set too; expected one of the two", is_error=True)
    inner[last] = ours
    text = f"is taken as {where}{'' if row.values is None else f' = {ours!r}'}"
    return Answer(path, text, target="" if in_dataset else target)
