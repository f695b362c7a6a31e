"""The noise of a batch of pictures: each picture's as if its own batch of ComfyUI's were drawn alone."""

from collections.abc import Callable, Sequence

import numpy as np

from anima_jax.diffusion.samplers import Sampler
from anima_jax.diffusion.samplers.plan import Draw
from anima_jax.diffusion.step_noise import NoiseKind, StepNoise, initial_noise
from anima_jax.models.dit import OUT_CHANNELS
from anima_jax.sampling.request import ImageRequest


class BatchNoise:
    """Arrays (t, y, x, c), float32, one a picture. Pictures of one seed, size and batch share what is drawn."""

    def __init__(self, pictures: Sequence[ImageRequest], kind: str, sampler: Sampler, sigmas: np.ndarray):
        self._pictures = pictures
        self.start = self._arrays(lambda picture: initial_noise(picture.seed, _shape(picture)))
        """Where sampling begins."""
        self.outside_mask = self.start
        """What the latents that inpainting keeps are noised with."""
        if sampler.fresh_noise_outside_mask:
            self.outside_mask = self._arrays(lambda picture: initial_noise(picture.seed + 1, _shape(picture)))
        self.keys_b3: np.ndarray | None = None
        """Of noise that the device draws itself, uint32: the seed's halves and the place in the batch."""
        parsed = NoiseKind.parse(kind)
        if parsed.kind == "jax":
            halves = [(p.seed & 0xFFFFFFFF, p.seed >> 32, p.batch_index) for p in pictures]
            self.keys_b3 = np.array(halves, np.uint32)
        else:
            groups = {_group(picture): picture for picture in pictures}
            self._streams = {
                group: StepNoise(parsed, picture.seed, _shape(picture), sampler, sigmas)
                for group, picture in groups.items()
            }

    def step(self, draw: Draw) -> list[np.ndarray]:
        """The next of the sampler's noises, from torch's streams."""
        return self._arrays(lambda picture: self._streams[_group(picture)].next(draw))

    def _arrays(self, batch_noise: Callable[[ImageRequest], np.ndarray]) -> list[np.ndarray]:
        drawn: dict[tuple, np.ndarray] = {}
        for picture in self._pictures:
            if _group(picture) not in drawn:
                drawn[_group(picture)] = np.moveaxis(batch_noise(picture), 1, -1)
        return [drawn[_group(picture)][picture.batch_index] for picture in self._pictures]


def _group(picture: ImageRequest) -> tuple:
    return picture.seed, picture.latent_size, picture.batch_size


def _shape(picture: ImageRequest) -> tuple[int, ...]:
    return picture.batch_size, OUT_CHANNELS, 1, *picture.latent_size
