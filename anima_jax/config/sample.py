"""`[sample]`: images drawn while training."""

from collections.abc import Sized
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from anima_jax.config.schema import (
    Count,
    FromFloat,
    InputFolder,
    Listed,
    LocalFile,
    NotEmpty,
    NotNegative,
    PixelSide,
    Positive,
    Section,
    documented_as,
    expecting,
    invalid,
)
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.diffusion.step_cache import StepCache
from anima_jax.errors import UserError, did_you_mean, plural

TorchSeed = Annotated[int, Field(ge=0, lt=2**64), FromFloat, documented_as("whole number ≥ 0 and < 2⁶⁴")]


def _require_as_many(found: Sized, prompts: Sized, noun: str, expected: str) -> None:
    """Raise an error unless there is one for each prompt. Prompts that are missing or invalid have one of their own."""
    if prompts and len(found) != len(prompts):
        counts = f"{plural(len(found), noun)} for {plural(len(prompts), 'prompt')}"
        raise invalid(f"found {counts}, expected {expected}")


class SampleConfig(Section):
    """Ours: images drawn while training, one for each prompt and seed."""

    prompts: Annotated[tuple[str, ...], Listed, NotEmpty] = Field(description="what to draw")
    negative_prompt: Annotated[
        str | Annotated[tuple[str, ...], Listed],
        expecting("a string, or a list with one for each prompt"),
        documented_as("string or list of strings"),
    ] = Field(
        "", description="what not to draw: one text for all prompts, or one for each; without effect if guidance is 1"
    )
    at_once: Count = Field(4, description="how many images share a device while they are drawn")
    every_n_epochs: Count | None = Field(None, description="draw every n epochs, and at the start and the end")
    every_n_steps: Count | None = Field(
        default_factory=lambda table: 500 if table["every_n_epochs"] is None else None,
        description="draw every n steps, and at the start and the end; unset: 500, or only by epochs if "
        "every_n_epochs is set",
    )
    steps: Count = Field(30, description="sampler steps")
    guidance_scale: NotNegative = Field(4.0, description="classifier-free guidance; 1 turns it off")
    shift: Positive = Field(3.0, description="shifts the sampler's times as [model] shift does those of training")
    guidance_interval: Annotated[
        tuple[float, float],
        Listed,
        expecting("two ascending numbers from 0 to 1"),
        documented_as("two numbers from 0 to 1"),
    ] = Field((0.0, 1.0), description="the part of the sampling that is guided, as --guidance_interval of generate")
    sampler: str = Field("er_sde", description="a sampler of docs/sampling.md")
    schedule: str = Field("simple", description="a schedule of docs/sampling.md")
    cache: str | None = Field(None, description="reuses evaluations of the network, as --cache of generate")
    seeds: Annotated[tuple[TorchSeed, ...], Listed, NotEmpty] = Field((0,), description="seeds of the initial noise")
    width: PixelSide | None = Field(None, description="in pixels, a multiple of 16; unset: that of the training images")
    height: PixelSide | None = Field(
        None, validate_default=True, description="in pixels, a multiple of 16; unset: that of the training images"
    )

    references: Annotated[
        tuple[Annotated[tuple[LocalFile, ...], Listed], ...],
        Listed,
        documented_as("file, or list with a file, or a list of files, for each prompt"),
    ] = Field(
        (),
        description="reference pictures for edit = true: one for all prompts, or for each prompt one or several (an "
        "empty list: none), cropped and scaled to width and height",
    )
    control: Annotated[tuple[LocalFile, ...], Listed, documented_as("file, or list with a file for each prompt")] = (
        Field(
            (),
            description="control picture for [adapter] type = 'lllite': one for all prompts, or one for each, cropped "
            "and scaled to width and height; for inpainting, its transparent part is drawn anew; unset: none",
        )
    )
    control_strength: NotNegative | None = Field(
        None, description="strength of the control network in samples; unset: multiplier of [adapter]"
    )
    embeddings: InputFolder | None = Field(
        None, description="a folder with the files that embedding:name in a prompt stands for"
    )

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of sampling that this table sets, by their names in `SamplingParams`."""
        names = ("steps", "guidance_scale", "guidance_interval", "shift", "sampler", "schedule", "cache")
        return {name: getattr(self, name) for name in names}

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """The negative prompt of each prompt."""
        own = self.negative_prompt
        return (own,) * len(self.prompts) if isinstance(own, str) else own

    @field_validator("negative_prompt")
    @classmethod
    def _one_for_each(cls, found: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        prompts = info.data.get("prompts", ())
        if not isinstance(found, str):
            _require_as_many(found, prompts, "text", "one text, or one for each")
        return found

    @field_validator("control", mode="before")
    @classmethod
    def _one_for_all(cls, found: Any, info: ValidationInfo) -> Any:
        prompts = info.data.get("prompts", ())
        if found and (info.context or {}).get("pairs") not in {None, "control", "inpaint"}:
            raise invalid("nothing uses it, expected [adapter] type = 'lllite'")
        if isinstance(found, str):
            return [found] * len(prompts)
        if isinstance(found, list) and found:
            _require_as_many(found, prompts, "file", "one file, or one for each")
        return found

    @field_validator("references", mode="before")
    @classmethod
    def _of_each_prompt(cls, found: Any, info: ValidationInfo) -> Any:
        prompts = info.data.get("prompts", ())
        if isinstance(found, str):
            return [[found]] * len(prompts)
        if not isinstance(found, list) or not all(isinstance(one, str | list) for one in found):
            raise invalid("expected a file, or a list with a file, or a list of files, for each prompt")
        if found:
            _require_as_many(found, prompts, "item", "one file, or an item for each")
        return [[one] if isinstance(one, str) else one for one in found]

    @field_validator("sampler", "schedule")
    @classmethod
    def _known(cls, found: str, info: ValidationInfo) -> str:
        names = SAMPLERS if info.field_name == "sampler" else SCHEDULES
        if found not in names:
            raise invalid(f"found '{found}', expected one of {', '.join(names)}{did_you_mean(found, names)}")
        return found

    @field_validator("cache")
    @classmethod
    def _is_method(cls, found: str | None) -> str | None:
        try:
            StepCache.parse(found)
        except UserError as error:
            raise invalid(str(error).removeprefix("cache ")) from None
        return found

    @field_validator("guidance_interval")
    @classmethod
    def _ascending(cls, found: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= found[0] <= found[1] <= 1:
            raise invalid(f"found {found[0]:g} and {found[1]:g}, expected two ascending numbers from 0 to 1")
        return found

    @field_validator("height")
    @classmethod
    def _both_or_none(cls, height: int | None, info: ValidationInfo) -> int | None:
        if "width" in info.data and (info.data["width"] is None) != (height is None):
            raise invalid("expected both width and height, or neither; found one")
        return height
