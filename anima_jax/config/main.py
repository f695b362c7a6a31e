"""The main TOML: diffusion-pipe's keys with their defaults and meanings, and ours (marked so in their descriptions).

`MainFile` is the file as it is written; `MainConfig` is what a run uses: the same keys, the dataset, and what follows
from them. Keys of diffusion-pipe that are answered without a meaning here are in `foreign.py`.
"""

import os
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.model import GROUPS, ModelConfig
from anima_jax.config.optimizer import AdapterConfig, OptimizerConfig
from anima_jax.config.schema import (
    Count,
    Dtype,
    Listed,
    LocalFile,
    NotNegative,
    OutputFolder,
    Positive,
    Section,
    Whole,
    Words,
    fault,
    is_address,
    output_folder,
)
from anima_jax.config.sections import EvalDataset, EvalFile, MeshConfig, MonitoringConfig, SampleConfig, names_differ
from anima_jax.errors import did_you_mean

Fraction = Annotated[float, annotated_types.Ge(0), annotated_types.Le(1)]
Seed = Annotated[int, annotated_types.Ge(0), annotated_types.Lt(2**32), Words("whole number ≥ 0 and < 2³²")]
Decay = Annotated[float, annotated_types.Gt(0), annotated_types.Lt(1)]

LOSS_KEYS = ("huber_delta", "smooth_l1_beta", "pseudo_huber_c")
"""At most one is set; without any the loss is the mean squared error."""

EVAL_EVERY = ("eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples")
"""Without any of them data is evaluated before the first step alone."""


def _micro_batch(found: Any) -> Any:
    """A number, or [side, number] pairs. Checked by hand: the faults of a union would name both of its kinds."""
    pairs = found if isinstance(found, list | tuple) else [(1, found)]
    for pair in pairs or [()]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or any(type(n) is not int or n < 1 for n in pair):
            raise fault(f"found {found!r}, expected a whole number, at least 1, or [[side, batch size], …]")
    return tuple(map(tuple, found)) if isinstance(found, list | tuple) else found


MicroBatch = Annotated[
    int | tuple[tuple[int, int], ...], BeforeValidator(_micro_batch), Words("whole number or [[side, number], …]")
]


def _batch_sizes(micro_batch: int | tuple[tuple[int, int], ...] | None) -> list[int]:
    """Every batch size in a key's value."""
    if micro_batch is None:
        return []
    return [micro_batch] if isinstance(micro_batch, int) else [size for _, size in micro_batch]


def _on_this_machine(folder: str | None) -> str | None:
    if folder and is_address(folder):
        raise fault(f"found {folder}, expected a folder on this machine")
    return folder


Remat = Literal["none", "full", "dots", "attention", "offload"]
ACTIVATION_CHECKPOINTING: dict[bool | str, Remat] = {False: "none", True: "full", "unsloth": "offload"}


def _activation_checkpointing(found: Any) -> Any:
    if type(found) is not bool and found != "unsloth":
        near = did_you_mean(found, ["unsloth"]) if isinstance(found, str) else ""
        raise fault(f"found {found!r}, expected false, true or 'unsloth'{near}")
    return found


def _which_run(found: Any) -> Any:
    if type(found) is bool:
        return "" if found else None
    if not isinstance(found, str | None):
        raise fault(f"found {found!r}, expected a run's folder, or true for the newest in output_dir")
    return found


def _off_or_folder(folder: str) -> str:
    return output_folder(folder) if folder else folder


def _only_one(other: str) -> AfterValidator:
    """Set together with the key `other`, a key is a fault."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get(other) is not None:
            raise fault(f"{other} is set too, expected one of the two")
        return value

    return AfterValidator(check)


def _only_loss(value: float | None, info: ValidationInfo) -> float | None:
    others = [key for key in LOSS_KEYS if key != info.field_name and info.data.get(key) is not None]
    if value is not None and others:
        raise fault(f"{others[0]} is set too, expected at most one of {', '.join(LOSS_KEYS)}")
    return value


LossParameter = Annotated[Positive, AfterValidator(_only_loss)]


class MainFile(Section):
    """The keys of a main TOML."""

    output_dir: Annotated[OutputFolder, AfterValidator(_on_this_machine)] = Field(
        description="folder on this machine in which every run makes a folder of its own"
    )
    dataset: LocalFile = Field(description="the dataset TOML")
    eval_datasets: Annotated[tuple[EvalFile, ...], Listed, AfterValidator(names_differ)] = Field(
        (), description="data sets that are evaluated: {name = …, config = …} each, or the path of a dataset TOML"
    )
    seed: Seed = Field(0, description="ours; every random number of the run follows from it")

    epochs: Count = Field(description="number of passes over the data")
    max_steps: Count | None = Field(
        None, description="stop after so many optimizer steps, if epochs are not over before"
    )
    micro_batch_size_per_gpu: MicroBatch = Field(
        1,
        description="examples that one device takes through the network at once: a number, or [[side, number], …], of "
        "which each size takes the entry whose side in pixels is nearest to √(width · height)",
    )
    image_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None, description="the same for pictures, if it differs from that for clips; unset: micro_batch_size_per_gpu"
    )
    gradient_accumulation_steps: Count = Field(1, description="micro-batches whose gradients make one optimizer step")
    global_batch_size: Count | None = Field(
        None,
        description="ours; examples in one optimizer step, whatever their size, a multiple of every micro batch size; "
        "set: the accumulation follows from it; unset: micro_batch_size_per_gpu × gradient_accumulation_steps",
    )
    gradient_clipping: NotNegative = Field(1.0, description="largest global norm of the gradient; 0 turns clipping off")
    max_skipped_steps: Count = Field(
        10,
        description="ours; a step whose loss or gradient is not finite changes nothing; after so many in a row the run "
        "stops",
    )
    warmup_steps: Whole = Field(
        0, description="steps in which the learning rate rises in a line from 1/warmup_steps of it"
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="the learning rate after the warmup: constant, down to 0 in a line, or down to 1e-6 in a cosine",
    )
    force_constant_lr: Positive | None = Field(
        None, description="this learning rate for every group that is not frozen, without schedule or warmup"
    )
    ema_decay: Decay | None = Field(None, description="ours; decay of the weights' moving average; unset: none is kept")
    uncond_fraction: Fraction = Field(
        0.0, description="fraction of the examples that is trained with the empty caption"
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="ours; dtype of trained weights; 'bfloat16' halves their memory and rounds each update at random, "
        "up or down, so that none is lost on average; moments and averages stay float32",
    )
    activation_checkpointing: Annotated[bool | Literal["unsloth"], BeforeValidator(_activation_checkpointing)] = Field(
        False,
        description="true: the backward pass computes the blocks' inner values again instead of keeping them; "
        "'unsloth': they are kept in the host's memory",
    )
    remat: Remat = Field(
        default_factory=lambda table: ACTIVATION_CHECKPOINTING[table["activation_checkpointing"]],
        description="ours, instead of activation_checkpointing; what the backward pass computes again: 'none' of a "
        "block's inner values, the 'full' block, all but the results of its matrix products ('dots') or of its "
        "attention ('attention'), or nothing, because they wait in the host's memory ('offload'); unset: 'none', or "
        "'full' for activation_checkpointing = true and 'offload' for 'unsloth'",
    )
    remat_every: Count = Field(1, description="ours; blocks that are computed again together; divides their number")
    scan_unroll: Count = Field(
        1, description="ours; blocks that are compiled one after the other: more of them run faster and compile longer"
    )
    video_clip_mode: Literal["single_beginning", "single_middle"] = Field(
        "single_beginning", description="which part of a video is trained: its beginning or its middle"
    )
    map_num_proc: Count = Field(
        default_factory=lambda: min(8, os.cpu_count() or 1),
        description="threads that read and decode examples; unset: one for each processor, 8 at most",
    )
    strict_data: bool = Field(
        False,
        description="ours; stop at a file that cannot be used, instead of naming it and going on; also --strict_data",
    )
    caching_batch_size: Count = Field(
        1, description="pictures or clips that one device encodes at once while the cache is filled"
    )
    cache_dir: OutputFolder | None = Field(
        None, description="ours; folder or address (gs://…) of the cache; unset: in each source's own folder"
    )
    cache_local_dir: Annotated[OutputFolder | None, AfterValidator(_on_this_machine)] = Field(
        None,
        validate_default=True,
        description="ours; folder on this machine for copies of a cache that is slow or at an address, which needs it",
    )
    cache_dtype: Dtype | None = Field(None, description="ours; dtype of cached latents and text; unset: [model] dtype")
    regenerate_cache: bool = Field(False, description="encode everything again; also --regenerate_cache")
    trust_cache: bool = Field(
        False,
        description="ours; train what the cache holds without looking for changed or new files; also --trust_cache",
    )

    huber_delta: LossParameter | None = Field(None, description="Huber loss with this threshold")
    smooth_l1_beta: LossParameter | None = Field(None, description="smooth L1 loss with this threshold")
    pseudo_huber_c: LossParameter | None = Field(None, description="pseudo-Huber loss √(e² + c²) − c with this c")

    save_every_n_epochs: Count | None = Field(None, description="save the model after every so many epochs")
    save_every_n_steps: Count | None = Field(None, description="save the model after every so many optimizer steps")
    save_every_n_examples: Annotated[Count | None, _only_one("save_every_n_steps")] = Field(
        None, description="save the model after every so many examples, instead of steps"
    )
    save_dtype: Dtype | None = Field(None, description="dtype of saved models; unset: [adapter] dtype or [model] dtype")
    checkpoint_every_n_epochs: Count | None = Field(
        None, description="save all that a resumed run needs after every so many epochs"
    )
    checkpoint_every_n_minutes: Positive | None = Field(
        None, description="save all that a resumed run needs after every so many minutes"
    )
    max_checkpoints: Count | None = Field(
        None, description="ours; keep the newest so many saved models and so many checkpoints; unset: all"
    )
    resume_from_checkpoint: Annotated[str | None, BeforeValidator(_which_run), Words("true or run's folder")] = Field(
        None,
        description="go on with the run in this folder, or of this name in output_dir; true: the newest run there that "
        "has a checkpoint; also --resume_from_checkpoint",
    )
    reset_dataloader: bool = Field(
        False, description="ours; resume in the same epoch, but at its beginning; also --reset_dataloader"
    )
    reset_optimizer: bool = Field(
        False, description="ours; resume without the optimizer's state; also --reset_optimizer"
    )
    reset_optimizer_params: bool = Field(
        False, description="ours; resume with this file's settings of the optimizer; also --reset_optimizer_params"
    )

    eval_every_n_epochs: Count | None = Field(None, description="evaluate after every so many epochs")
    eval_every_n_steps: Count | None = Field(None, description="evaluate after every so many optimizer steps")
    eval_every_n_examples: Annotated[Count | None, _only_one("eval_every_n_steps")] = Field(
        None, description="evaluate after every so many examples, instead of steps"
    )
    eval_before_first_step: bool = Field(True, description="evaluate before the training too, unless it is resumed")
    eval_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None,
        description="examples that one device evaluates at once, which changes no figure; unset: those of the training",
    )
    eval_image_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None, description="the same for pictures; unset: eval_micro_batch_size_per_gpu"
    )

    steps_per_print: Count = Field(
        1,
        description="after every so many steps the progress bar has new figures, or a line of them is printed where no "
        "terminal shows a bar",
    )
    logging_steps: Count = Field(1, description="figures are reported after every so many steps; see [monitoring]")
    x_axis_examples: bool = Field(False, description="report figures by the number of examples instead of steps")
    compilation_cache_dir: Annotated[str, AfterValidator(_off_or_folder), Words("folder")] | None = Field(
        None,
        description="ours; folder of compiled programs, which start the next run sooner; unset: in the user's cache "
        "directory; empty: none is kept",
    )

    model: ModelConfig = Field(description="the networks")
    optimizer: OptimizerConfig = Field(description="the optimizer")
    adapter: AdapterConfig | None = Field(None, description="a low-rank adapter; unset: every weight is trained")
    sample: SampleConfig | None = Field(None, description="ours; pictures drawn while training; unset: none")
    mesh: MeshConfig = Field(MeshConfig.model_validate({}), description="ours; the devices")
    monitoring: MonitoringConfig = Field(MonitoringConfig.model_validate({}), description="where figures are reported")

    @field_validator("global_batch_size")
    @classmethod
    def _divides_into_micro_batches(cls, size: int | None, info: ValidationInfo) -> int | None:
        keys = ("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu")
        steps = info.data.get("gradient_accumulation_steps")
        if size is None or steps is None or any(key not in info.data for key in keys):
            return size
        for key in keys:
            for micro in _batch_sizes(info.data[key]):
                if size % micro:
                    nearest = max(1, round(size / micro)) * micro
                    raise fault(f"found {size}, expected a multiple of {key} = {micro} (the nearest is {nearest})")
                if steps not in {1, size // micro}:
                    raise fault(
                        f"found {size}, but {micro} × gradient_accumulation_steps = {steps} is {micro * steps}, "
                        "expected only one of gradient_accumulation_steps and global_batch_size"
                    )
        return size

    @field_validator("adapter")
    @classmethod
    def _trained_text_is_not_cached(cls, adapter: AdapterConfig | None, info: ValidationInfo) -> AdapterConfig | None:
        model = info.data.get("model")
        if adapter and adapter.text_encoder_lr and model and model.cache_text_embeddings:
            raise fault(
                "a trained text encoder's states cannot be cached, expected cache_text_embeddings = false in [model]",
                key="text_encoder_lr",
            )
        return adapter

    @field_validator("cache_local_dir")
    @classmethod
    def _an_address_is_copied(cls, folder: str | None, info: ValidationInfo) -> str | None:
        cache = info.data.get("cache_dir")
        if folder is None and cache and is_address(cache):
            raise fault(f"missing, expected a folder on this machine for copies of cache_dir = {cache}")
        return folder


class Schedule(NamedTuple):
    """Learning rate over time, as a factor of each group's own."""

    shape: Literal["constant", "linear", "cosine"]
    warmup_steps: int


class MainConfig(MainFile):
    """What a run uses: the main TOML, the dataset TOML, and what follows from them."""

    data: DatasetConfig
    """The dataset TOML."""
    eval_datasets: tuple[EvalDataset, ...] = ()  # type: ignore[assignment]
    """The data sets to evaluate, each dataset TOML read."""
    path: str
    """The main TOML's own absolute path."""
    notes: tuple[str, ...] = ()
    """A line for each key of diffusion-pipe whose job something else does here, and for each value that was rounded."""

    @property
    def compute_dtype(self) -> Dtype:
        """Of the computation and of frozen weights."""
        return self.model.dtype

    @property
    def export_dtype(self) -> Dtype:
        """Of saved models or adapters."""
        own = self.adapter.dtype if self.adapter else None
        return self.save_dtype or own or self.model.dtype

    @property
    def cached_dtype(self) -> Dtype:
        """Of latents and text states in the cache."""
        return self.cache_dtype or self.model.dtype

    @property
    def loss(self) -> tuple[str, float]:
        """The loss's kind, one of `LOSS_KEYS` or "mse", and its parameter."""
        chosen = [(key, value) for key in LOSS_KEYS if (value := getattr(self, key)) is not None]
        return chosen[0] if chosen else ("mse", 0.0)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's shape and warmup."""
        if self.force_constant_lr is not None:
            return Schedule("constant", 0)
        return Schedule(self.lr_scheduler, self.warmup_steps)

    @property
    def trains_text_encoder(self) -> bool:
        """Whether an adapter on the text encoder is trained."""
        return self.adapter is not None and self.adapter.text_encoder_lr > 0

    @property
    def learning_rates(self) -> dict[str, float]:
        """Group → learning rate, for `GROUPS` and `base`, and `text_encoder` if it is trained; 0 is frozen."""
        own = {group: getattr(self.model, f"{group}_lr") for group in GROUPS}
        rates = {group: self.optimizer.lr if rate is None else rate for group, rate in own.items()}
        rates["base"] = self.optimizer.lr
        if self.adapter and self.adapter.text_encoder_lr:
            rates["text_encoder"] = self.adapter.text_encoder_lr
        forced = self.force_constant_lr
        return rates if forced is None else {group: forced if rate else 0.0 for group, rate in rates.items()}

    @property
    def sample_size_wh(self) -> tuple[int, int]:
        """Width and height of the pictures drawn while training, in pixels."""
        if self.sample and self.sample.width and self.sample.height:
            return self.sample.width, self.sample.height
        return self.data.size_wh
