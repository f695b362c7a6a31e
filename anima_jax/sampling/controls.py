"""Control pictures: what a control network is given for an image, and when in the sampling it acts."""

import dataclasses
from typing import Any

from PIL import Image

from anima_jax.checkpoints.locations import PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """A control network for one image: its file, or the loaded network, and the control picture.

    `strength` multiplies what the network adds; it acts in the sampling from `start_percent` to `end_percent`, 0 (first
    step) to 1. `mask`, for inpainting networks, is white where the picture is drawn anew. Pictures are files or images.
    """

    path: Any
    image: PathLike | Image.Image
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: PathLike | Image.Image | None = None
