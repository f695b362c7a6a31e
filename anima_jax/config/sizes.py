"""Sizes of images and clips, and how they relate to latents and tokens."""

import math
from typing import NamedTuple

PIXEL_MULTIPLE = 16
"""Pixels along each side of one token: the VAE's factor 8 times the transformer's patch of 2."""

FRAMES_PER_LATENT = 4
"""The first latent frame encodes one frame of the clip; each further latent frame encodes four."""

SIDE_DECIMALS = 3
"""Resolutions and ratios that agree to this many decimals are treated as equal."""


class Size(NamedTuple):
    """The size of an image or clip as the VAE receives it."""

    width: int
    """Pixels, a multiple of 16."""
    height: int
    """Pixels, a multiple of 16."""
    frames: int
    """1 for an image. The VAE encodes the first `encoded_frames` frames of a clip."""

    @property
    def encoded_frames(self) -> int:
        """Number of frames that the VAE encodes: the largest 1 + 4n up to `frames`."""
        return 1 + (self.frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT

    @property
    def is_cut(self) -> bool:
        """Whether the VAE drops some of the frames."""
        return self.encoded_frames < self.frames

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of latent frames, patch rows and patch columns in the transformer."""
        latent_frames = 1 + (self.frames - 1) // FRAMES_PER_LATENT
        return latent_frames, self.height // PIXEL_MULTIPLE, self.width // PIXEL_MULTIPLE

    @property
    def tokens(self) -> int:
        """Sequence length of the transformer."""
        return math.prod(self.grid)


def nearest_multiple(pixels: float) -> int:
    """Return the multiple of 16 nearest to `pixels`, at least 16."""
    return max(1, round(pixels / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE
