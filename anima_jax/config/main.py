"""The main TOML: diffusion-pipe's keys with their defaults and meanings, and our own ("ours" in their descriptions).

Keys of diffusion-pipe that do not apply here are in `unsupported_keys.py`.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SkipValidation, ValidationInfo, field_validator
from pydantic.json_schema import SkipJsonSchema

from anima_jax.checkpoints.names.groups import CONTROL, GROUPS
from anima_jax.config.adapter import AdapterConfig
from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.eval_dataset import EvalDataset, check_names_differ
from anima_jax.config.mesh import MeshConfig
from anima_jax.config.model import ModelConfig
from anima_jax.config.monitoring import MonitoringConfig
from anima_jax.config.optimizer import OptimizerConfig, Schedule
from anima_jax.config.pairs import Pairs, pairs_of
from anima_jax.config.sample import SampleConfig
from anima_jax.config.schema import (
    Count,
    Dtype,
    FileName,
    Fraction,
    FromFloat,
    Listed,
    LocalFile,
    NotEmpty,
    NotNegative,
    OutputFolder,
    Positive,
    Section,
    Whole,
    choices,
    documented_as,
    expecting,
    invalid,
    is_address,
    on_this_machine,
    only_one_of,
    output_folder,
)

Seed = Annotated[int, Field(ge=0, lt=2**32), FromFloat, documented_as("whole number ≥ 0 and < 2³²")]
Decay = Annotated[float, Field(gt=0, lt=1)]
LocalFolder = Annotated[OutputFolder, AfterValidator(on_this_machine)]

LOSS_KEYS = ("huber_delta", "smooth_l1_beta", "pseudo_huber_c")
"""At most one may be set. If none is, the loss is the mean squared error."""

EVAL_EVERY = ("eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples")
"""If none is set, evaluation runs only before the first step."""

MicroBatch = Annotated[
    Count | Annotated[tuple[Annotated[tuple[Count, Count], Listed], ...], Listed, NotEmpty],
    expecting("a whole number, at least 1, or [[side, batch size], …]"),
    documented_as("whole number or [[side, number], …]"),
]

Remat = Literal["none", "full", "dots", "attention", "offload"]
REMAT_OF: Mapping[bool | str, Remat] = {False: "none", True: "full", "unsloth": "offload"}
"""Value of `activation_checkpointing` → default of `remat`."""


def _run_to_resume(found: Any) -> Any:
    """Return the name or path of the run to resume; "" means the newest run, None no run."""
    return ("" if found else None) if isinstance(found, bool) else found


def _none_if_zero(found: Any) -> Any:
    return None if type(found) in {int, float} and not found else found


LossParameter = Annotated[Positive | None, only_one_of(*LOSS_KEYS)]


class MainConfig(Section):
    """The keys of the main TOML, and what the loader adds: dataset TOMLs, the file's path and messages for the user."""

    output_dir: LocalFolder = Field(description="folder on this machine in which every run creates its own folder")
    run_name: FileName | None = Field(
        None, description="ours; name of the run's folder in output_dir; unset: the time; also --run_name"
    )
    dataset: LocalFile = Field(description="the dataset TOML")
    eval_datasets: Annotated[tuple[EvalDataset, ...], Listed, AfterValidator(check_names_differ)] = Field(
        (), description="datasets to evaluate: {name = …, config = …} each, or the path of a dataset TOML"
    )
    seed: Seed = Field(0, description="ours; every random number of the run follows from it")

    epochs: Count = Field(description="number of passes over the data")
    max_steps: Count | None = Field(
        None, description="stop after this many optimizer steps, if the epochs do not end before"
    )
    micro_batch_size_per_gpu: MicroBatch = Field(
        1,
        description="examples that one device processes at once: a number, or [[side, number], …], of which each size "
        "uses the entry whose side in pixels is nearest to √(width · height)",
    )
    image_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None, description="the same for images, if it differs from that for clips; unset: micro_batch_size_per_gpu"
    )
    gradient_accumulation_steps: Count = Field(1, description="micro-batches per optimizer step")
    global_batch_size: Count | None = Field(
        None,
        description="ours; examples per optimizer step, of any size, a multiple of every micro batch size; set: the "
        "accumulation follows from it; unset: micro_batch_size_per_gpu × gradient_accumulation_steps × replicas",
    )
    gradient_clipping: NotNegative = Field(1.0, description="maximum global norm of the gradient; 0 turns clipping off")
    max_skipped_steps: Count = Field(
        10,
        description="ours; a step whose loss or gradient is not finite updates nothing; after this many in a row the "
        "run stops",
    )
    warmup_steps: Whole = Field(
        0, description="steps in which the learning rate rises linearly, from 1/warmup_steps of its value"
    )
    lr_scheduler: Literal[
        "constant", "linear", "cosine", "constant_with_warmup", "cosine_with_restarts", "polynomial", "rex"
    ] = Field(
        "constant",
        description="the learning rate after the warmup: constant, linear decay to 0, or cosine decay to 1e-6, as in "
        "diffusion-pipe; the others are as in transformers (and the usual 'rex'): their warmup begins at 0 and is a "
        "part of the decay's time",
    )
    lr_scheduler_num_cycles: Count | None = Field(
        None, description="ours; number of cosines of 'cosine_with_restarts'; unset: 1"
    )
    lr_scheduler_power: Positive | None = Field(None, description="ours; exponent of 'polynomial'; unset: 1")
    lr_scheduler_min_lr: NotNegative | None = Field(
        None,
        description="ours; the learning rate at which a decay ends; unset: 1e-6 for 'cosine', 1e-7 for 'polynomial', "
        "else 0",
    )
    force_constant_lr: Positive | None = Field(
        None, description="this learning rate for every group that is not frozen, without schedule or warmup"
    )
    ema_decay: Annotated[Decay | None, BeforeValidator(_none_if_zero)] = Field(
        None, description="ours; decay of the weights' moving average (EMA); unset or 0: no EMA"
    )
    uncond_fraction: Fraction = Field(0.0, description="fraction of examples trained with the empty caption")
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="ours; dtype of trained weights; 'bfloat16' halves their memory and rounds each update "
        "stochastically, so that none is lost on average; moments and EMA stay float32",
    )
    activation_checkpointing: Annotated[bool | Literal["unsloth"], expecting("false, true or 'unsloth'")] = Field(
        False,
        description="true: the backward pass recomputes the blocks' activations instead of storing them; "
        "'unsloth': the blocks' inputs are stored in the host's memory",
    )
    remat: Remat = Field(
        default_factory=lambda table: REMAT_OF[table["activation_checkpointing"]],
        description="ours, instead of activation_checkpointing; what the backward pass recomputes of each block: "
        "'none', the 'full' block, all but the results of its matrix products ('dots') or of its attention "
        "('attention'), or the 'full' block with its input in the host's memory ('offload'); unset: 'none', or 'full' "
        "for activation_checkpointing = true and 'offload' for 'unsloth'",
    )
    remat_every: Count = Field(1, description="ours; blocks recomputed together; must divide the number of blocks")
    memory: Literal["fit"] | None = Field(
        None,
        description="ours; 'fit': if the run needs more memory than a device has, keys that are not set are chosen so "
        "that it fits, in order of cost: remat, micro_batch_size_per_gpu, fsdp, param_dtype, an 8-bit optimizer.type, "
        "transformer_dtype, and the host's memory; unset: nothing is changed",
    )
    scan_unroll: Count = Field(
        1, description="ours; blocks compiled one after another instead of in a loop: more run faster, compile longer"
    )
    video_clip_mode: Literal["single_beginning", "single_middle"] = Field(
        "single_beginning", description="which part of a video is trained: its beginning or its middle"
    )
    map_num_proc: Count = Field(
        default_factory=lambda: min(8, os.cpu_count() or 1),
        description="threads that read and decode examples; unset: one per processor, at most 8",
    )
    edit: bool = Field(
        False,
        description="ours; learn to edit: the pictures of control_path in the dataset TOML are references, clean "
        "frames after the picture's own, of which alone the loss is; sources without control_path have none",
    )
    strict_data: bool = Field(
        False,
        description="ours; stop at a file that cannot be used, instead of reporting it; also --strict_data",
    )
    allow_unused: bool = Field(
        False,
        description="ours; load model and adapter files without the tensors that belong to no network; also "
        "--allow_unused",
    )
    caching_batch_size: Count = Field(
        1, description="images or clips that one device encodes at once while the cache is filled"
    )
    cache_dir: OutputFolder | None = Field(
        None, description="ours; folder or address (gs://…) of the cache; unset: in each source's own folder"
    )
    cache_local_dir: LocalFolder | None = Field(
        None,
        validate_default=True,
        description="ours; folder on this machine for copies of a slow cache; required if cache_dir is an address",
    )
    cache_dtype: Dtype | None = Field(None, description="ours; dtype of cached latents and text; unset: [model] dtype")
    regenerate_cache: bool = Field(False, description="encode everything again; also --regenerate_cache")
    trust_cache: bool = Field(
        False,
        description="ours; train on what the cache contains, without looking for changed or new files; also "
        "--trust_cache",
    )

    huber_delta: LossParameter = Field(None, description="Huber loss with this threshold")
    smooth_l1_beta: LossParameter = Field(None, description="smooth L1 loss with this threshold")
    pseudo_huber_c: LossParameter = Field(None, description="pseudo-Huber loss √(e² + c²) − c with this c")

    save_every_n_epochs: Count | None = Field(None, description="save the model every n epochs")
    save_every_n_steps: Count | None = Field(None, description="save the model every n optimizer steps")
    save_every_n_examples: Annotated[Count | None, only_one_of("save_every_n_steps", "save_every_n_examples")] = Field(
        None, description="save the model every n examples, instead of steps"
    )
    save_dtype: Dtype | None = Field(None, description="dtype of saved models; unset: [adapter] dtype or [model] dtype")
    checkpoint_every_n_epochs: Count | None = Field(
        None, description="save a checkpoint, from which a run can be resumed, every n epochs"
    )
    checkpoint_every_n_minutes: Positive | None = Field(
        None, description="save a checkpoint, from which a run can be resumed, every n minutes"
    )
    output_name: FileName | None = Field(
        None,
        description="ours; name of exported files, without .safetensors; unset: diffusion-pipe's names, adapter_model "
        "and model",
    )
    max_checkpoints: Count | None = Field(
        None,
        description="ours; how many of the newest saved models, and of the newest checkpoints, to keep; unset: all",
    )
    resume_from_checkpoint: Annotated[
        str | None,
        BeforeValidator(_run_to_resume),
        expecting("a run's folder, or true for the newest in output_dir"),
        documented_as("true or run's folder"),
    ] = Field(
        None,
        description="resume the run in this folder, or of this name in output_dir; true: the newest run there that has "
        "a checkpoint; also --resume_from_checkpoint",
    )
    resume: Annotated[Literal["auto", False], only_one_of("resume_from_checkpoint", "resume")] = Field(
        False,
        description="ours; 'auto': resume if there is a checkpoint, else begin: in the folder run_name, else in one "
        "named by the scheduler's job (docs/multihost.md), else the newest run with a checkpoint; also --resume auto",
    )
    reset_dataloader: bool = Field(
        False, description="ours; resume at the beginning of the current epoch; also --reset_dataloader"
    )
    reset_optimizer: bool = Field(
        False, description="ours; resume without the optimizer's state; also --reset_optimizer"
    )
    reset_optimizer_params: bool = Field(
        False, description="ours; resume with this file's optimizer settings; also --reset_optimizer_params"
    )

    eval_every_n_epochs: Count | None = Field(None, description="evaluate every n epochs")
    eval_every_n_steps: Count | None = Field(None, description="evaluate every n optimizer steps")
    eval_every_n_examples: Annotated[Count | None, only_one_of("eval_every_n_steps", "eval_every_n_examples")] = Field(
        None, description="evaluate every n examples, instead of steps"
    )
    eval_before_first_step: bool = Field(
        True, description="also evaluate before the first step, unless the run is resumed"
    )
    eval_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None,
        description="examples that one device evaluates at once, which changes no result; unset: as in training",
    )
    eval_image_micro_batch_size_per_gpu: MicroBatch | None = Field(
        None, description="the same for images; unset: eval_micro_batch_size_per_gpu"
    )

    steps_per_print: Count = Field(
        1,
        description="steps between updates of the progress bar; without a terminal, lines are printed instead",
    )
    logging_steps: Count = Field(1, description="steps between reports of metrics; see [monitoring]")
    x_axis_examples: bool = Field(False, description="report metrics by the number of examples instead of steps")
    compilation_cache_dir: (
        Annotated[
            str, AfterValidator(lambda folder: output_folder(folder) if folder else folder), documented_as("folder")
        ]
        | None
    ) = Field(
        None,
        description="ours; folder of compiled programs, with which the next run starts sooner; unset: in the user's "
        "cache directory; empty: they are not kept",
    )

    model: ModelConfig = Field(description="the networks")
    optimizer: OptimizerConfig = Field(description="the optimizer")
    adapter: AdapterConfig | None = Field(
        None,
        validate_default=True,
        description="a low-rank adapter or a control network; unset: every weight is trained",
    )
    sample: SampleConfig | None = Field(None, description="ours; images drawn while training; unset: none")
    mesh: MeshConfig = Field(MeshConfig.model_validate({}), description="ours; the devices")
    monitoring: MonitoringConfig = Field(MonitoringConfig.model_validate({}), description="where metrics are reported")

    data: SkipJsonSchema[SkipValidation[DatasetConfig]]
    """The contents of `dataset`."""
    path: SkipJsonSchema[str]
    """The absolute path of the main TOML."""
    messages: SkipJsonSchema[tuple[str, ...]]
    """One line for each key of diffusion-pipe that has no effect, and for each value that is rounded or unused."""

    @field_validator("lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_min_lr")
    @classmethod
    def _belongs_to_the_schedule(cls, value: float | None, info: ValidationInfo) -> float | None:
        schedule, key = info.data.get("lr_scheduler"), (info.field_name or "").removeprefix("lr_scheduler_")
        valid = {"num_cycles": ("cosine_with_restarts",), "power": ("polynomial",)}.get(
            key, ("linear", "cosine", "cosine_with_restarts", "polynomial", "rex")
        )
        if value is not None and schedule is not None and schedule not in valid:
            raise invalid(f"has no effect with lr_scheduler = '{schedule}', expected {choices(valid)}")
        return value

    @field_validator("global_batch_size")
    @classmethod
    def _divides_into_micro_batches(cls, size: int | None, info: ValidationInfo) -> int | None:
        keys = ("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu")
        steps = info.data.get("gradient_accumulation_steps")
        if size is None or steps is None or any(key not in info.data for key in keys):
            return size
        for key in keys:
            entries = info.data[key] or ()
            for micro in [entries] if isinstance(entries, int) else [number for _, number in entries]:
                if size % micro:
                    nearest = max(1, round(size / micro)) * micro
                    raise invalid(f"found {size}, expected a multiple of {key} = {micro} (the nearest is {nearest})")
                if steps not in {1, size // micro}:
                    raise invalid(
                        f"found {size}, but {micro} × gradient_accumulation_steps = {steps} is {micro * steps}, "
                        "expected only one of gradient_accumulation_steps and global_batch_size"
                    )
        return size

    @field_validator("adapter")
    @classmethod
    def _fits_the_model(cls, adapter: AdapterConfig | None, info: ValidationInfo) -> AdapterConfig | None:
        model = info.data.get("model")
        if adapter is None and model and model.compute:
            raise invalid(
                f"missing, expected one with [model] compute = '{model.compute}', which is for frozen weights"
            )
        if adapter and adapter.is_control and info.data.get("edit"):
            raise invalid(
                "a control network works on single frames, expected edit = false, or another type", key="type"
            )
        if adapter and adapter.text_encoder_lr and model and model.cache_text_embeddings:
            raise invalid(
                "the states of a trained text encoder cannot be cached, expected cache_text_embeddings = false in "
                "[model]",
                key="text_encoder_lr",
            )
        return adapter

    @field_validator("cache_local_dir")
    @classmethod
    def _remote_cache_needs_copies(cls, folder: str | None, info: ValidationInfo) -> str | None:
        cache = info.data.get("cache_dir")
        if folder is None and cache and is_address(cache):
            raise invalid(f"missing, expected a folder on this machine for copies of cache_dir = {cache}")
        return folder

    @property
    def compute_dtype(self) -> Dtype:
        """The dtype of the computation and of frozen weights."""
        return self.model.dtype

    @property
    def export_dtype(self) -> Dtype:
        """The dtype of saved models and adapters."""
        own = self.adapter.dtype if self.adapter else None
        return self.save_dtype or own or self.model.dtype

    @property
    def cached_dtype(self) -> Dtype:
        """The dtype of latents and text states in the cache."""
        return self.cache_dtype or self.model.dtype

    @property
    def loss(self) -> tuple[str, float]:
        """The loss, one of `LOSS_KEYS` or "mse", and its parameter."""
        chosen = [(key, value) for key in LOSS_KEYS if (value := getattr(self, key)) is not None]
        return chosen[0] if chosen else ("mse", 0.0)

    @property
    def schedule(self) -> Schedule:
        """The shape and warmup of the learning rate schedule."""
        if self.force_constant_lr is not None:
            return Schedule("constant", 0)
        cycles, power = self.lr_scheduler_num_cycles or 1, self.lr_scheduler_power or 1.0
        return Schedule(self.lr_scheduler, self.warmup_steps, cycles, power, self.lr_scheduler_min_lr)

    @property
    def pairs(self) -> Pairs:
        """The kind of pairs that the run trains on, "" for images alone."""
        return pairs_of(self.control_channels, self.edit)

    @property
    def control_channels(self) -> int:
        """Channels of the control pictures that the trained network is given: 3, 4 for inpainting, 0 for none."""
        return self.adapter.cond_in_channels if self.adapter and self.adapter.is_control else 0

    @property
    def trains_text_encoder(self) -> bool:
        """Whether an adapter on the text encoder is trained."""
        return self.adapter is not None and self.adapter.text_encoder_lr > 0

    @property
    def trains_control(self) -> bool:
        """Whether a control network is trained."""
        return self.control_channels > 0

    @property
    def learning_rates(self) -> dict[str, float]:
        """Group → learning rate for `GROUPS`; 0 means frozen. `text_encoder` is included only if it is trained.

        If a control network is trained, every other group is frozen; otherwise there is no group `control`.
        """
        own = {group: getattr(self.model, f"{group}_lr", None) for group, _ in GROUPS}
        rates = {group: self.optimizer.lr if rate is None else rate for group, rate in own.items()}
        del rates["text_encoder"]
        if self.trains_control:
            rates = dict.fromkeys(rates, 0.0) | {CONTROL: rates[CONTROL]}
        else:
            del rates[CONTROL]
        if self.adapter and self.adapter.text_encoder_lr:
            rates["text_encoder"] = self.adapter.text_encoder_lr
        forced = self.force_constant_lr
        return rates if forced is None else {group: forced if rate else 0.0 for group, rate in rates.items()}

    @property
    def sample_size_wh(self) -> tuple[int, int]:
        """Width and height in pixels of the images drawn during training."""
        if self.sample and self.sample.width and self.sample.height:
            return self.sample.width, self.sample.height
        return self.data.size_wh
