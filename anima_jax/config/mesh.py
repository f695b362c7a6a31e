"""`[mesh]`: how many devices each axis of the mesh has."""

from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_jax.config.schema import FromFloat, Section, documented_as, invalid


def _check_axis_size(size: int) -> int:
    if size < 1 and size != -1:
        raise invalid(f"found {size}, expected a number of devices, or -1 for the rest")
    return size


AxisSize = Annotated[int, FromFloat, AfterValidator(_check_axis_size), documented_as("number of devices, or -1")]


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
