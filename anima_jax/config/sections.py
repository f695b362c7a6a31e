"""The main TOML's smaller tables: evaluated data, samples, the mesh and monitoring."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import annotated_types
from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.schema import (
    Count,
    Listed,
    LocalFile,
    NotEmpty,
    NotNegative,
    PixelSide,
    Positive,
    Section,
    Words,
    fault,
)

TorchSeed = Annotated[int, annotated_types.Ge(0), annotated_types.Lt(2**64), Words("whole number ≥ 0 and < 2⁶⁴")]


class SampleConfig(Section):
    """Ours: pictures drawn while training, one for each prompt and seed."""

    prompts: Annotated[tuple[str, ...], Listed, NotEmpty] = Field(description="what to draw")
    every_n_epochs: Count | None = Field(
        None, description="draw after every so many epochs, and at the start and the end"
    )
    every_n_steps: Count | None = Field(
        default_factory=lambda table: 500 if table["every_n_epochs"] is None else None,
        description="draw after every so many steps, and at the start and the end; unset: 500, or by epochs alone if "
        "every_n_epochs is set",
    )
    steps: Count = Field(30, description="sampler steps")
    guidance_scale: NotNegative = Field(4.0, description="classifier-free guidance; 1 turns it off")
    shift: Positive = Field(3.0, description="moves the sampler's times as [model] shift does the training's")
    seeds: Annotated[tuple[TorchSeed, ...], Listed, NotEmpty] = Field((0,), description="seeds of the starting noise")
    width: PixelSide | None = Field(None, description="in pixels, a multiple of 16; unset: the training pictures'")
    height: PixelSide | None = Field(
        None, validate_default=True, description="in pixels, a multiple of 16; unset: the training pictures'"
    )

    @field_validator("height")
    @classmethod
    def _both_or_none(cls, height: int | None, info: ValidationInfo) -> int | None:
        if "width" in info.data and (info.data["width"] is None) != (height is None):
            raise fault("expected both width and height, or neither; found one")
        return height


def _some_devices(size: int) -> int:
    if size < 1 and size != -1:
        raise fault(f"found {size}, expected a number of devices, or -1 for what is left")
    return size


AxisSize = Annotated[int, AfterValidator(_some_devices), Words("number of devices, or -1")]


class MeshConfig(Section):
    """Ours: how many devices each axis of the mesh has. One axis may be -1: the devices that are left."""

    data: AxisSize = Field(-1, description="replicas that share nothing but gradients")
    fsdp: AxisSize = Field(1, description="replicas that share the parameters out: each device keeps its part of them")
    tensor: AxisSize = Field(1, description="devices that split each layer's heads and hidden features")
    context: AxisSize = Field(
        1, validate_default=True, description="devices that split each example's tokens, for large pictures and videos"
    )

    @field_validator("context")
    @classmethod
    def _one_rest(cls, context: int, info: ValidationInfo) -> int:
        if [*info.data.values(), context].count(-1) > 1:
            raise fault("at most one of data, fsdp, tensor and context may be -1 (data is, unless set)")
        return context

    @property
    def sizes(self) -> dict[str, int]:
        """Axis → number of devices, -1 for what is left."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "context": self.context}


class MonitoringConfig(Section):
    """Where figures are reported besides the console and the run's metrics.jsonl."""

    enable_tensorboard: bool = Field(True, description="ours; write TensorBoard's files into the run's folder")
    enable_wandb: bool = Field(False, description="report to Weights & Biases too, for which wandb must be installed")
    wandb_api_key: str = Field("", description="key for Weights & Biases; empty: that of `wandb login`")
    wandb_tracker_name: str = Field("", description="project of the run; empty: Weights & Biases' own choice")
    wandb_run_name: str = Field("", description="name of the run; empty: Weights & Biases' own choice")


class EvalFile(Section):
    """A data set that is evaluated and not trained; a bare path stands for `config`."""

    config: LocalFile = Field(description="its dataset TOML")
    name: Annotated[str, Field(min_length=1)] = Field(
        default_factory=lambda table: Path(table["config"]).stem,
        description="what its figures are called; unset: the file's name without .toml",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, entry: Any) -> Any:
        return {"config": entry} if isinstance(entry, str) else entry


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """A data set that is evaluated: `path` is its TOML, `data` what stands in it."""

    name: str
    path: str
    data: DatasetConfig


def names_differ(files: tuple[EvalFile, ...]) -> tuple[EvalFile, ...]:
    """`files`, or a fault if two of them have one name."""
    names = [file.name for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise fault(f"two of them are called '{twice}', expected a name for each, as in {{name = …, config = …}}")
    return files
