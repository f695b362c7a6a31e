"""Control pictures: what a control network is given for an image, and when in the sampling it acts."""

import dataclasses
import os
from typing import Any

from PIL import Image

from anima_jax.checkpoints.locations import PathLike
from anima_jax.data.preprocessors import Preprocessor, control_picture
from anima_jax.errors import UserError
from anima_jax.sampling.images import read_image


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """A control network for one image: its file, or the loaded network, and the control picture.

    `strength` multiplies what the network adds; it acts in the sampling from `start_percent` to `end_percent`, 0 (first
    step) to 1. `mask`, for inpainting networks, is white where the picture is drawn anew. Pictures are files or images.
    With a `kind`, such as "canny" or "canny:50:150" (`data.preprocessors`), `image` is an ordinary picture from which
    the control picture is made.
    """

    path: Any
    image: PathLike | Image.Image
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: PathLike | Image.Image | None = None
    kind: str | None = None

    def picture(self, size_wh: tuple[int, int]) -> Image.Image:
        """Return the control picture for an image of this size in pixels, which need not be its own size.

        Raises UserError if it cannot be read or made.
        """
        name = "control" if isinstance(self.image, Image.Image) else os.fspath(self.image)
        image = self.image if isinstance(self.image, Image.Image) else read_image(name)
        if self.kind is None:
            return image
        preprocessor = Preprocessor.parse(self.kind)
        try:
            return control_picture(image, preprocessor, size_wh)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
