"""The noise of a batch of images: each image gets the noise that it would get in its own ComfyUI batch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from anima_jax.diffusion.samplers import Sampler
from anima_jax.diffusion.samplers.plan import Draw
from anima_jax.diffusion.step_noise import NoiseKind, StepNoise, initial_noise
from anima_jax.models.dit import OUT_CHANNELS
from anima_jax.sampling.request import ImageRequest


class BatchNoise:
    """The noise of a batch: one float32 array (t, y, x, c) per image.

    Images with the same seed, size and batch size share one draw.
    """

    def __init__(
        self,
        requests: Sequence[ImageRequest],
        kind: str,
        sampler: Sampler,
        sigmas: np.ndarray,
        *,
        add_noise: bool = True,
    ):
        self._requests = requests
        self.start = self._per_image(
            lambda request: initial_noise(request.seed, _shape(request)) if add_noise else np.zeros(_shape(request))
        )
        """The noise from which sampling starts; zeros without `add_noise`, for latents that are noisy already."""
        self.outside_mask = self.start
        """The noise added to the latents that inpainting keeps."""
        if sampler.fresh_noise_outside_mask:
            self.outside_mask = self._per_image(lambda request: initial_noise(request.seed + 1, _shape(request)))
        self.keys_b3: np.ndarray | None = None
        """Keys of noise drawn on the device, uint32: low and high half of the seed, and the position in the batch."""
        parsed = NoiseKind.parse(kind)
        if parsed.kind == "jax":
            keys = [(r.seed & 0xFFFFFFFF, r.seed >> 32, r.batch_index) for r in requests]
            self.keys_b3 = np.array(keys, np.uint32)
        else:
            groups = {_group(request): request for request in requests}
            self._streams = {
                group: StepNoise(parsed, request.seed, _shape(request), sampler, sigmas)
                for group, request in groups.items()
            }

    def step(self, draw: Draw) -> list[np.ndarray]:
        """Return the sampler's next noise from torch's streams, one array per image."""
        return self._per_image(lambda request: self._streams[_group(request)].next(draw))

    def _per_image(self, batch_noise: Callable[[ImageRequest], np.ndarray]) -> list[np.ndarray]:
        drawn: dict[Any, np.ndarray] = {}
        for request in self._requests:
            if _group(request) not in drawn:
                drawn[_group(request)] = np.moveaxis(batch_noise(request), 1, -1)
        return [drawn[_group(request)][request.batch_index] for request in self._requests]


def _group(request: ImageRequest) -> tuple[int, tuple[int, int], int]:
    return request.seed, request.latent_size, request.batch_size


def _shape(request: ImageRequest) -> tuple[int, ...]:
    return request.batch_size, OUT_CHANNELS, 1, *request.latent_size
