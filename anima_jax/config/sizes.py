"""Sizes of images and clips, and the arithmetic that ties them to latents and tokens."""

import math
from typing import NamedTuple

PIXEL_MULTIPLE = 16
"""Pixels along each side of one token: the VAE's factor 8 times the transformer's patch of 2."""

FRAMES_PER_LATENT = 4
"""The first latent frame is one frame of the clip, each further one is four frames."""

SIDE_DECIMALS = 3
"""Resolutions and ratios that agree to this many decimals are the same."""


class Size(NamedTuple):
    """Size of an image or clip as the VAE receives it."""

    width: int
    """Pixels, a multiple of 16."""
    height: int
    """Pixels, a multiple of 16."""
    frames: int
    """1 for an image. Of a clip the VAE encodes the first `encoded_frames`."""

    @property
    def encoded_frames(self) -> int:
        """Frames that the VAE encodes: the largest 1 + 4n that is at most `frames`."""
        return 1 + (self.frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT

    @property
    def is_cut(self) -> bool:
        """Whether the VAE leaves out some of the frames."""
        return self.encoded_frames < self.frames

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the transformer's patches."""
        latent_frames = 1 + (self.frames - 1) // FRAMES_PER_LATENT
        return latent_frames, self.height // PIXEL_MULTIPLE, self.width // PIXEL_MULTIPLE

    @property
    def tokens(self) -> int:
        """The transformer's sequence length."""
        return math.prod(self.grid)


def nearest_multiple(pixels: float) -> int:
    """Return the multiple of 16 nearest to `pixels`, at least 16."""
    return max(1, round(pixels / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE
