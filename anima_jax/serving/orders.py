"""Orders: what the engine is asked to draw, one image each."""

import dataclasses

from PIL import Image

from anima_jax.adapters.merge import Weight
from anima_jax.errors import UserError
from anima_jax.sampling.request import ImageRequest, SamplingParams, check_requests


@dataclasses.dataclass(frozen=True)
class Order:
    """One image to draw: its request, its parameters, and what it starts from.

    `loras` are names in the server's library, each with its weight. `image` is the image to start from (with `denoise`
    below 1), which is kept where `mask` is black. `preview_every` is the number of evaluations of the network between
    two previews, 0 for none. Without `is_counted` it takes no place in the queue, which may be full.
    """

    request: ImageRequest
    params: SamplingParams
    loras: tuple[tuple[str, Weight], ...] = ()
    image: Image.Image | None = None
    mask: Image.Image | None = None
    preview_every: int = 0
    is_counted: bool = True

    def check(self) -> None:
        """Raise UserError unless request, parameters, image and mask are valid and match."""
        check_requests([self.request], self.params, self.image, self.mask)
        if self.preview_every < 0:
            raise UserError(f"preview_every {self.preview_every}, expected a number of evaluations, or 0 for none")

    def preview_due(self, done: int) -> bool:
        """Return whether a preview is due after this many evaluations."""
        return self.preview_every > 0 and done > 0 and done % self.preview_every == 0
