"""The main TOML's tables `[sample]`, `[mesh]` and `[monitoring]`."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_jax.config.schema import (
    Count,
    Listed,
    NotEmpty,
    NotNegative,
    PixelSide,
    Positive,
    Section,
    documented_as,
    invalid,
)

TorchSeed = Annotated[int, Field(ge=0, lt=2**64), documented_as("whole number ≥ 0 and < 2⁶⁴")]


class SampleConfig(Section):
    """Ours: images drawn while training, one for each prompt and seed."""

    prompts: Annotated[tuple[str, ...], Listed, NotEmpty] = Field(description="what to draw")
    every_n_epochs: Count | None = Field(None, description="draw every n epochs, and at the start and the end")
    every_n_steps: Count | None = Field(
        default_factory=lambda table: 500 if table["every_n_epochs"] is None else None,
        description="draw every n steps, and at the start and the end; unset: 500, or only by epochs if "
        "every_n_epochs is set",
    )
    steps: Count = Field(30, description="sampler steps")
    guidance_scale: NotNegative = Field(4.0, description="classifier-free guidance; 1 turns it off")
    shift: Positive = Field(3.0, description="shifts the sampler's times as [model] shift does those of training")
    seeds: Annotated[tuple[TorchSeed, ...], Listed, NotEmpty] = Field((0,), description="seeds of the initial noise")
    width: PixelSide | None = Field(None, description="in pixels, a multiple of 16; unset: that of the training images")
    height: PixelSide | None = Field(
        None, validate_default=True, description="in pixels, a multiple of 16; unset: that of the training images"
    )

    @field_validator("height")
    @classmethod
    def _both_or_none(cls, height: int | None, info: ValidationInfo) -> int | None:
        if "width" in info.data and (info.data["width"] is None) != (height is None):
            raise invalid("expected both width and height, or neither; found one")
        return height


def _check_axis_size(size: int) -> int:
    if size < 1 and size != -1:
        raise invalid(f"found {size}, expected a number of devices, or -1 for the rest")
    return size


AxisSize = Annotated[int, AfterValidator(_check_axis_size), documented_as("number of devices, or -1")]


class MeshConfig(Section):
    """Ours: how many devices each axis of the mesh has. One axis may be -1: the remaining devices."""

    data: AxisSize = Field(-1, description="replicas that exchange only gradients")
    fsdp: AxisSize = Field(1, description="replicas that shard the parameters: each device stores its part of them")
    tensor: AxisSize = Field(1, description="devices that split each layer's heads and hidden features")
    context: AxisSize = Field(
        1, validate_default=True, description="devices that split each example's tokens, for large images and videos"
    )

    @field_validator("context")
    @classmethod
    def _one_rest(cls, context: int, info: ValidationInfo) -> int:
        if [*info.data.values(), context].count(-1) > 1:
            raise invalid("at most one of data, fsdp, tensor and context may be -1 (data is, unless set)")
        return context

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → number of devices, -1 for the rest."""
        return dict(self)


class MonitoringConfig(Section):
    """Where metrics are reported besides the console and the run's metrics.jsonl."""

    enable_tensorboard: bool = Field(True, description="ours; write TensorBoard's files into the run's folder")
    enable_wandb: bool = Field(False, description="report to Weights & Biases too, for which wandb must be installed")
    wandb_api_key: str = Field("", description="key for Weights & Biases; empty: that of `wandb login`")
    wandb_tracker_name: str = Field("", description="project of the run; empty: chosen by Weights & Biases")
    wandb_run_name: str = Field("", description="name of the run; empty: chosen by Weights & Biases")
